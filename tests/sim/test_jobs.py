"""Job traces through simulated time: baselines against brute force on small cases, and the core's policy."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core import exchange, prediction, priority
from gpuyard_daemon.sim.experiments import JOB_POLICIES, job_policy
from gpuyard_daemon.sim.history import GittinsTable
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.measures import jain, job_measures
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


def test_levels_are_octaves():
    unit = priority.LEVEL_UNIT
    assert [priority.natural_level(size) for size in (0, unit - 1, unit, 2 * unit - 1, 2 * unit)] == [0, 0, 1, 1, 2]
    for level in range(1, priority.LEVEL_MAX):
        assert priority.natural_level(priority.level_begins(level)) == level


@given(st.integers(1, 1 << 40), st.integers(1, 64))
def test_a_job_reaches_the_top_within_a_bound_of_its_own_size(size, gpus):
    level = priority.natural_level(size)
    waits = [priority.lift_wait_ms(at, gpus) for at in range(level, priority.LEVEL_TOP, -1)]
    bound = 2 * priority.LIFT_FACTOR * size // gpus + priority.LIFT_MIN_MS * (level + 1)
    assert sum(waits) <= bound


def test_a_victim_is_a_level_larger_even_with_its_cost():
    unit = priority.LEVEL_UNIT
    large = exchange.Victim(1, 5, 1, 0)
    assert exchange.may_take(unit, 1, large)
    assert not exchange.may_take(unit << 4, 5, large)
    assert not exchange.may_take(unit, 1, large._replace(cost=unit << 3))


def test_nobody_is_stopped_needlessly():
    victims = [exchange.Victim(1, 9, 1, 10), exchange.Victim(2, 8, 4, 5)]
    assert exchange.cheapest(victims, 4) == exchange.Plan((2,), 5)
    assert exchange.cheapest(victims, 6) is None


def test_jain_is_one_for_equals_and_least_for_a_monopoly():
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0]) == pytest.approx(0.5)


def test_measures_have_the_promised_keys():
    result = job_measures(_run("fifo", [(0, 1, 10), (5, 8, 10)]))
    promised = (
        "policy jobs avg_jct_s p50_jct_s p99_jct_s avg_queue_s makespan_s preemptions_per_job first_start_p99_s "
        "worst_slowdown jain_24h"
    )
    assert set(promised.split()) <= set(result)


def test_ranks_stay_level_without_a_tail_and_grow_with_one():
    even, heavy = prediction.SizeHistory(), prediction.SizeHistory()
    for _ in range(100):
        for level in range(9):
            even.enter(level)
        even.end(8)
    assert even.rank(3) >= even.rank(7) >= even.rank(8)
    left = 1024
    for level in range(10):
        for _ in range(left):
            heavy.enter(level)
        left //= 2
        for _ in range(left):
            heavy.end(level)
    assert heavy.rank(2) < heavy.rank(4) < heavy.rank(6)
