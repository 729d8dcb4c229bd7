"""The production core under a trace: what the engine counts is what the core holds, and nothing is tuned or lost."""

from __future__ import annotations

import random

import pytest

from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.sim.core_jobs import CoreJobs, node_of, spec_of
from gpuyard_daemon.sim.core_pods import CorePods
from gpuyard_daemon.sim.experiments import estimate_s, job_policy
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.openb import Ask, HostShape
from gpuyard_daemon.sim.simulated_yard import BEGIN_MS, SimulatedYard
from gpuyard_daemon.sim.trace_jobs import TraceJob
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.resources import ResourceNeed


def _jobs(seed: int, count: int = 60, told: bool = True) -> list[RunJob]:
    dice = random.Random(seed)
    submits = sorted(dice.uniform(0, 20_000) for _ in range(count))
    made = []
    for number, submit_s in enumerate(submits):
        job = TraceJob(number, submit_s, dice.choice((1, 1, 2, 4, 8)), dice.uniform(5, 9000), tenant=f"t{number % 3}")
        made.append(RunJob(job, 30.0, job.service_s if told else None))
    return made


class _Checked(CoreJobs):
    """Looks after every decision."""

    def decide(self, run: JobsRun) -> None:
        super().decide(run)
        cluster = self.yard.core.cluster
        check(cluster)
        held = cluster.pool.held_milli
        assert held == 1000 * sum(job.gpus for job in run.running.values())
        for job in run.running.values():
            assert sum(gpus for _, gpus in job.places) == job.gpus


@pytest.mark.parametrize("told", [True, False])
def test_what_the_engine_counts_is_what_the_core_holds(told):
    made = _jobs(1, told=told)
    run = JobsRun(made, 2, 4, _Checked(2, 4))
    run.go()
    for job in made:
        assert job.attained_s == pytest.approx(job.service_s, abs=0.01)
        # Each start costs its 30 seconds, in full unless it was stopped within them.
        assert job.held_s <= job.service_s + 30.0 * job.starts + 0.01
        assert job.finish_s - job.first_start_s >= job.held_s - 0.01
    assert run.overhead_gpu_s == pytest.approx(sum(job.gpus * (job.held_s - job.service_s) for job in made), abs=1.0)


def test_a_run_repeats_itself():
    ends = []
    for _ in range(2):
        made = _jobs(2)
        run = JobsRun(made, 2, 4, job_policy("gpuyard", made, 2, 4))
        run.go()
        ends.append([(job.finish_s, job.starts) for job in made])
    assert ends[0] == ends[1]


def test_the_core_is_told_what_the_owner_knows_and_no_more():
    known, unknown = _jobs(3, count=1)[0], _jobs(3, count=1, told=False)[0]
    assert spec_of(known, 8).estimate_ms == int(known.service_s * 1000)
    assert spec_of(unknown, 8).estimate_ms == 0
    assert spec_of(unknown, 8).restart_ms == 30_000
    gang = RunJob(TraceJob(0, 0.0, 20, 1.0), 0.0, None)
    assert (spec_of(gang, 8).replicas, spec_of(gang, 8).need.gpus) == (5, 4)


def test_estimates_are_exact_noisy_or_none():
    job = TraceJob(0, 0.0, 1, 100.0)
    dice = random.Random(1)
    assert estimate_s(job, "known", dice) == 100.0
    assert estimate_s(job, "unknown", dice) is None
    told = [estimate_s(job, "estimated", dice) for _ in range(1000)]
    given = [value for value in told if value is not None]
    assert 600 < len(given) < 800
    assert 0 < min(given) < 50 < 200 < max(given)


def test_a_gang_runs_when_all_its_members_do():
    yard = SimulatedYard([node_of("a", 2), node_of("b", 2)])
    need = ResourceNeed(gpus=2, cpu_milli=1, memory_mib=1)
    (job,) = yard.submit([("t", JobSpec(argv=("x",), need=need, replicas=2))])
    assert [(change.job, change.runs) for change in yard.changes()] == [(job, True)]
    assert sorted(place.node for place in yard.places(job)) == ["a", "b"]
    view = yard.core.job_view(job)
    assert view is not None
    assert view.state == "running"
    assert view.first_started_ms == BEGIN_MS
    yard.end(job)
    yard.take([])
    assert yard.core.cluster.pool.held_milli == 0


def test_a_pod_that_does_not_fit_is_dropped_and_leaves_nothing_behind():
    pods = CorePods([HostShape("h", 4000, 8000, 1, "T4")], "never")
    pods.place_round([Ask(1000, 10, 1, 600, ()), Ask(1000, 10, 1, 600, ()), Ask(1000, 10, 1, 400, ("T4",))])
    assert pods.held_milli == 1000
    pods.place_round([Ask(1000, 10, 1, 1000, ("V100",)), Ask(1000, 10, 0, 0, ())])
    cluster = pods.yard.core.cluster
    assert not cluster.waiting
    assert cluster.pool.spaces["h"].cpu_free_milli == 1000
    check(cluster)
