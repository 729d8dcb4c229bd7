"""Baselines without published values against brute force on small cases, and the rules of those with."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from gpuyard_daemon.sim.experiments import job_policy
from gpuyard_daemon.sim.gang_nodes import GangNodes
from gpuyard_daemon.sim.history import GittinsTable
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.ordering import gittins
from gpuyard_daemon.sim.tiresias import BORDERS
from gpuyard_daemon.sim.trace_jobs import TraceJob

Case = list[tuple[int, int, int]]


def _run(policy: str, case: Case, nodes: int, per_node: int, restart_s: float = 0.0) -> JobsRun:
    made = [
        RunJob(TraceJob(number, float(submit_s), gpus, float(service_s)), restart_s, float(service_s))
        for number, (submit_s, gpus, service_s) in enumerate(case)
    ]
    run = JobsRun(made, nodes, per_node, job_policy(policy, made, nodes, per_node))
    run.go()
    return run


def _case(dice: random.Random, jobs: int, sizes: tuple[int, ...], longest: int = 30) -> Case:
    submits = sorted(dice.randrange(40) for _ in range(jobs))
    return [(submit_s, dice.choice(sizes), dice.randrange(1, longest)) for submit_s in submits]


class _Seconds:
    """A cluster stepped second by second: slow, and plain enough to be believed."""

    def __init__(self, case: Case, nodes: int, per_node: int) -> None:
        self.case = case
        self.nodes = GangNodes(nodes, per_node)
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.places: dict[int, tuple[tuple[int, int], ...]] = {}

    def waiting(self, now: int) -> list[int]:
        return [n for n, (submit, _, _) in enumerate(self.case) if submit <= now and n not in self.starts]

    def finish(self, now: int) -> None:
        for number in [n for n, end in self.ends.items() if end == now]:
            del self.ends[number]
            self.nodes.give(self.places.pop(number))

    def start(self, number: int, now: int) -> bool:
        places = self.nodes.find(self.case[number][1])
        if places is None:
            return False
        self.nodes.take(places)
        self.places[number], self.starts[number] = places, now
        self.ends[number] = now + self.case[number][2]
        return True

    def earliest(self, number: int, now: int) -> int:
        """When a job fits if nothing else starts before it."""
        free = GangNodes(len(self.nodes.free), self.nodes.per_node)
        for held in self.places.values():
            free.take(held)
        for moment in range(now, now + 10_000):
            for other, end in self.ends.items():
                if end == moment:
                    free.give(self.places[other])
            if free.fits(self.case[number][1]):
                return moment
        raise AssertionError("never")


def _qssf_by_seconds(case: Case, nodes: int, per_node: int) -> list[int]:
    world = _Seconds(case, nodes, per_node)
    now = 0
    while len(world.starts) < len(case):
        world.finish(now)
        for number in sorted(world.waiting(now), key=lambda n: (case[n][1] * case[n][2], n)):
            world.start(number, now)
        now += 1
    return [world.starts[number] for number in range(len(case))]


def _easy_by_seconds(case: Case, nodes: int, per_node: int) -> list[int]:
    """A backfill is tried, and taken back if the head could then start only later."""
    world = _Seconds(case, nodes, per_node)
    now = 0
    while len(world.starts) < len(case):
        world.finish(now)
        line = world.waiting(now)
        while line and world.start(line[0], now):
            line.pop(0)
        if line:
            promised = world.earliest(line[0], now)
            for number in line[1:]:
                if world.start(number, now) and world.earliest(line[0], now) > promised:
                    world.nodes.give(world.places.pop(number))
                    del world.starts[number], world.ends[number]
        now += 1
    return [world.starts[number] for number in range(len(case))]


@pytest.mark.parametrize("seed", range(30))
def test_qssf_starts_whom_a_second_by_second_search_starts(seed):
    case = _case(random.Random(seed), 12, (1, 1, 2, 3, 4, 8))
    run = _run("qssf", case, 2, 4)
    assert [job.first_start_s for job in run.jobs] == _qssf_by_seconds(case, 2, 4)


@pytest.mark.parametrize("seed", range(30))
def test_easy_on_one_node_backfills_what_trying_shows_to_be_harmless(seed):
    case = _case(random.Random(seed), 12, (1, 1, 2, 3, 4, 6, 8))
    run = _run("easy", case, 1, 8)
    assert [job.first_start_s for job in run.jobs] == _easy_by_seconds(case, 1, 8)


@pytest.mark.parametrize("seed", range(20))
def test_easy_on_several_nodes_starts_no_head_later_than_promised(seed):
    case = _case(random.Random(100 + seed), 10, (1, 2, 3, 4, 8))
    run = _run("easy", case, 3, 4)
    starts = [int(job.first_start_s) for job in run.jobs]
    for head in range(1, len(case)):
        since = max(starts[before] for before in range(head))
        # It stood first from then on (or came later): nothing that started after may have pushed it back.
        since = max(since, case[head][0])
        world = _Seconds(case, 3, 4)
        for number, job in enumerate(run.jobs):
            if number != head and starts[number] <= since < starts[number] + case[number][2]:
                world.nodes.take(job.places)
                world.places[number], world.ends[number] = job.places, starts[number] + case[number][2]
        assert starts[head] <= world.earliest(head, since)


def test_gittins_reaches_the_least_expected_time_that_any_order_can():
    # Sizes of 16 or 64 seconds, equally likely, two jobs, one GPU; service in quanta of 16 seconds.
    quantum, sizes = 16, (1, 4)

    @cache
    def best(ages: tuple[int, ...]) -> float:
        """Least expected sum of completion times from here, over all ways to give out quanta."""
        if not ages:
            return 0.0
        costs = []
        for at, age in enumerate(ages):
            alive = [size for size in sizes if size > age]
            done = sum(1 for size in alive if size == age + 1) / len(alive)
            rest = ages[:at] + ages[at + 1 :]
            cost = len(ages) + done * best(rest)
            if done < 1:
                cost += (1 - done) * best(tuple(sorted((*rest, age + 1))))
            costs.append(cost)
        return min(costs)

    totals = []
    for pair in itertools.product(sizes, repeat=2):
        made = [RunJob(TraceJob(n, 0.0, 1, float(size * quantum)), 0.0, None) for n, size in enumerate(pair)]
        run = JobsRun(made, 1, 1, gittins(GittinsTable([float(size * quantum) for size in sizes])))
        run.go()
        totals.append(sum(job.finish_s for job in run.jobs) / quantum)
    assert sum(totals) / len(totals) == pytest.approx(best((0, 0)), rel=1e-3)


class _PlainTiresias:
    """Three lists, walked from front to back at each event, as the authors' simulator does."""

    name = "plain"

    def __init__(self) -> None:
        self.queues: list[list[RunJob]] = [[], [], []]
        self.at: dict[int, int] = {}

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        self.queues[0].append(job)
        self.at[job.number] = 0

    def ended(self, run: JobsRun, job: RunJob) -> None:
        self.queues[self.at.pop(job.number)].remove(job)

    def wake_s(self, run: JobsRun) -> float | None:
        moments = [
            max(run.now_s + 1e-3, job.since_s + BORDERS[at] / job.gpus - job.held_s)
            for job in run.running.values()
            if (at := self.at[job.number]) < 2
        ]
        return min(moments, default=None)

    def free_levels(self, run: JobsRun) -> list[int]:
        return []

    def decide(self, run: JobsRun) -> None:
        for job in sorted(run.running.values(), key=lambda job: job.number):
            at = self.at[job.number]
            if at < 2 and job.held_at(run.now_s) * job.gpus + 1e-6 >= BORDERS[at]:
                self.queues[at].remove(job)
                self.queues[at + 1].append(job)
                self.at[job.number] = at + 1
        nodes = GangNodes(run.nodes, run.per_node)
        for queue in self.queues:
            for job in queue:
                fits = nodes.take_counted(job.gpus)
                if job.runs and not fits:
                    run.stop(job)
                elif fits and not job.runs:
                    run.start(job)
            queue.sort(key=lambda job: not job.runs)


@pytest.mark.parametrize("seed", range(8))
def test_tiresias_is_the_walk_over_three_lists(seed):
    dice = random.Random(seed)
    jobs = sorted((dice.uniform(0, 9000), dice.choice((1, 1, 2, 4, 8)), dice.uniform(10, 9000)) for _ in range(80))
    runs = []
    for plain in (False, True):
        made = [RunJob(TraceJob(n, *job), 20.0, None) for n, job in enumerate(jobs)]
        policy = _PlainTiresias() if plain else job_policy("tiresias", made, 2, 4)
        run = JobsRun(made, 2, 4, policy)
        run.go()
        runs.append([(round(job.finish_s, 3), job.starts) for job in run.jobs])
    assert runs[0] == runs[1]
