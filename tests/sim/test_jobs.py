"""Job traces through simulated time: baselines against brute force on small cases, and the core's policy."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.sim.experiments import JOB_POLICIES, job_policy
from gpuyard_daemon.sim.history import GittinsTable
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.measures import entitlements, further_measures, jain, jain_24h, jain_entitled_24h, job_measures
from gpuyard_daemon.sim.trace_jobs import TraceJob


def _run(policy: str, jobs: list[tuple[float, int, float]], nodes: int = 2, per_node: int = 4, restart_s: float = 0.0):
    made = [
        RunJob(TraceJob(number, submit_s, gpus, service_s, tenant="t"), restart_s, service_s)
        for number, (submit_s, gpus, service_s) in enumerate(sorted(jobs))
    ]
    run = JobsRun(made, nodes, per_node, job_policy(policy, made, nodes, per_node))
    run.go()
    return run


@pytest.mark.parametrize("policy", JOB_POLICIES)
def test_every_job_ends_with_all_its_work_done(policy):
    dice = random.Random(7)
    jobs = [(dice.uniform(0, 5000), dice.choice((1, 1, 2, 4, 6, 8)), dice.uniform(1, 4000)) for _ in range(120)]
    run = _run(policy, jobs, restart_s=5.0)
    for job in run.jobs:
        assert job.finish_s >= job.submit_s + job.service_s + 5.0 - 1e-6
        assert job.attained_s == pytest.approx(job.service_s, abs=1e-3)
    assert all(busy <= 8 for _, _, busy in run.timeline)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6), st.floats(0, 0))
@settings(max_examples=40, deadline=None)
def test_sjf_and_qssf_on_one_gpu_reach_the_best_order(services, submit_s):
    jobs = [(submit_s, 1, service_s) for service_s in services]
    best = min(sum(itertools.accumulate(order)) for order in itertools.permutations(services))
    for policy in ("sjf", "qssf", "srtf", "srsf"):
        run = _run(policy, jobs, nodes=1, per_node=1)
        assert sum(job.finish_s for job in run.jobs) == pytest.approx(best, abs=1e-3)


def test_easy_backfills_only_what_does_not_delay_the_head():
    # 4 GPUs: a 3-GPU job until 100; the head wants 4; a short job fits the hole, a long one would delay the head.
    run = _run("easy", [(0, 3, 100), (1, 4, 50), (2, 1, 200), (3, 1, 90)], nodes=1, per_node=4)
    starts = [job.first_start_s for job in run.jobs]
    assert starts == [0, 100, 150, 3]


def test_easy_never_starts_the_head_later_than_its_reservation():
    dice = random.Random(3)
    for _ in range(20):
        jobs = [(0.0, 4, 50.0), (1.0, 4, 30.0)]
        jobs += [(2.0, dice.choice((1, 2)), dice.uniform(5, 100)) for _ in range(4)]
        run = _run("easy", jobs, nodes=1, per_node=4)
        assert run.jobs[1].first_start_s == pytest.approx(50.0)


def test_gittins_rank_is_the_best_ratio_over_all_horizons():
    sizes = [3.0, 3.0, 10.0, 50.0]
    table = GittinsTable(sizes)
    for attained in (0.0, 3.0, 10.0):
        alive = [size for size in sizes if size > attained]
        ratios = []
        for end in alive:
            served = sum(min(size, end) - attained for size in alive)
            ratios.append(served / sum(1 for size in alive if size <= end))
        assert table.rank(attained) == pytest.approx(min(ratios))


def test_jain_is_one_for_equals_and_least_for_a_monopoly():
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0]) == pytest.approx(0.5)


def test_who_wants_little_gets_it_and_the_rest_is_divided():
    assert entitlements({"a": 1.0, "b": 9.0, "c": 9.0}, 11.0) == {"a": 1.0, "b": 5.0, "c": 5.0}
    assert entitlements({"a": 1.0, "b": 2.0}, 11.0) == {"a": 1.0, "b": 2.0}


def test_a_tenant_that_gets_what_it_is_due_counts_as_served_whatever_others_want():
    # One GPU; "greedy" asks for days, "modest" for an hour a day, and gets it at once under shortest first.
    jobs = [TraceJob(0, 0.0, 1, 5 * 86_400.0, tenant="greedy")]
    jobs += [TraceJob(n, n * 86_400.0 - 50_000, 1, 3600.0, tenant="modest") for n in (1, 2, 3)]
    made = [RunJob(job, 0.0, job.service_s) for job in jobs]
    run = JobsRun(made, 1, 1, job_policy("srtf", made, 1, 1))
    run.go()
    assert jain_entitled_24h(run) == pytest.approx(1.0)
    assert 0.99 < jain_24h(run) < 1.0, "over what it could use, the greedy one got a little less"
    made = [RunJob(job, 0.0, job.service_s) for job in jobs]
    run = JobsRun(made, 1, 1, job_policy("fifo", made, 1, 1))
    run.go()
    assert jain_entitled_24h(run) == pytest.approx(0.5)
    assert jain_24h(run) == pytest.approx(0.5)


def test_measures_have_exactly_the_promised_keys():
    run = _run("fifo", [(0, 1, 10), (5, 8, 10)])
    promised = (
        "policy jobs avg_jct_s p50_jct_s p99_jct_s avg_queue_s makespan_s preemptions_per_job first_start_p99_s "
        "worst_slowdown jain_24h"
    )
    assert list(job_measures(run)) == promised.split()
    assert not set(promised.split()) & set(further_measures(run))
