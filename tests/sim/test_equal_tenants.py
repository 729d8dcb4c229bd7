"""Fairness under lasting overload, and what it is measured on."""

from __future__ import annotations

from collections import defaultdict

import pytest

from gpuyard_daemon.sim.equal_tenants import equal_tenants
from gpuyard_daemon.sim.experiments import run_equal_tenants
from gpuyard_daemon.sim.jobs_run import DAY_S
from gpuyard_daemon.sim.measures import fairness_measures


def test_every_tenant_asks_for_the_same_and_all_together_for_more_than_there_is():
    jobs = equal_tenants(1.6, 3, 64, 8, seed=1)
    asked: dict[str, float] = defaultdict(float)
    for job in jobs:
        asked[job.tenant] += job.gpus * job.service_s
    assert sorted(asked) == ["arrays", "gangs", "mixed", "short"]
    assert sum(asked.values()) == pytest.approx(1.6 * 64 * 3 * DAY_S, rel=0.1)
    assert max(asked.values()) / min(asked.values()) < 1.25
    assert jobs == equal_tenants(1.6, 3, 64, 8, seed=1) != equal_tenants(1.6, 3, 64, 8, seed=2)
    assert [job.number for job in jobs] == list(range(len(jobs)))


def test_a_flood_of_short_jobs_leaves_gangs_their_part_of_a_day():
    fair = fairness_measures(run_equal_tenants("gpuyard", 1.6, 1, 4, 8, 60.0, seed=0))
    shortest_first = fairness_measures(run_equal_tenants("srsf", 1.6, 1, 4, 8, 60.0, seed=0))
    assert fair["jain_entitled_24h"] > 0.93 > 0.8 > shortest_first["jain_entitled_24h"]
