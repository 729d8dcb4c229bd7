"""Filling and churning a small cluster: what fits, and what the measures say."""

import pytest

from gpuyard_daemon.sim.churn import Churn
from gpuyard_daemon.sim.experiments import pods_under
from gpuyard_daemon.sim.fill import arrivals, fill
from gpuyard_daemon.sim.openb import Ask, HostShape
from gpuyard_daemon.sim.placing import PLACEMENT_POLICIES
from gpuyard_daemon.sim.typical import TypicalTasks

HOSTS = tuple([HostShape(f"host-{n}", 32_000, 131_072, 4, "T4" if n % 2 else "V100") for n in range(8)])
ASKS = (
    *[Ask(4000, 8192, 1, 1000, ())] * 40,
    *[Ask(2000, 4096, 1, 810, ())] * 20,
    *[Ask(2000, 4096, 1, 470, ("T4",))] * 20,
    *[Ask(16_000, 8192, 4, 1000, ())] * 4,
    *[Ask(6000, 4096, 0, 0, ())] * 10,
)


@pytest.mark.parametrize("policy", PLACEMENT_POLICIES)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_fill_never_holds_more_than_there_is_and_repeats_itself(policy, batch):
    typical = TypicalTasks(ASKS)
    results = [fill(pods_under(policy, HOSTS, typical, 3, "never"), ASKS, 3, batch, typical) for _ in range(2)]
    assert results[0].allocation == results[1].allocation
    assert list(results[0].allocation) == sorted(results[0].allocation)
    assert 50 < results[0].allocation[-1] <= 100
    assert 0 <= results[0].fragmentation <= 100 - results[0].allocation[-1] + 1e-9


def test_arrivals_ask_for_130_percent():
    demand = sum(ask.total_milli for ask in arrivals(ASKS, 32_000, seed=1))
    assert 1.3 * 32_000 <= demand <= max(1.3 * 32_000 + 4000, sum(ask.total_milli for ask in ASKS))


@pytest.mark.parametrize("policy", ["gpuyard", "fgd"])
def test_churn_with_room_for_all_blocks_nobody(policy):
    typical = TypicalTasks(ASKS)
    result = Churn(pods_under(policy, HOSTS, typical, 0, "requeue"), ASKS, 0.3, 5).run(typical)
    assert result.blocked_pct < 1.0
    assert result.moves_per_100 == 0
