"""Orders of jobs to compare with: FIFO, EASY, SJF, QSSF without preemption; SRTF, SRSF, Gittins with it.

The preempting ones pack the cluster anew at each event, in their order, whoever fits; a job that runs before and after
pays nothing even if it moved. That favours them: moving is free here and not in life.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeAlias

from gpuyard_daemon.sim.gang_nodes import GangNodes
from gpuyard_daemon.sim.history import GittinsTable
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob

Key: TypeAlias = tuple[float, int]
Rank: TypeAlias = Callable[[RunJob, float], float]


class SizeQueues:
    """Waiting jobs, those that want equally many GPUs in one queue, each in order."""

    def __init__(self) -> None:
        self._queues: dict[int, list[Key]] = {}

    def add(self, job: RunJob, rank: float) -> None:
        insort(self._queues.setdefault(job.gpus, []), (rank, job.number))

    def remove(self, job: RunJob, rank: float) -> None:
        queue = self._queues[job.gpus]
        del queue[bisect_left(queue, (rank, job.number))]
        if not queue:
            del self._queues[job.gpus]

    def heads(self) -> list[tuple[float, int, int, int]]:
        """(rank, job, GPUs, position) of each queue's first, a heap."""
        heads = [(*queue[0], gpus, 0) for gpus, queue in self._queues.items()]
        heapq.heapify(heads)
        return heads

    def after(self, gpus: int, position: int) -> tuple[float, int, int, int] | None:
        queue = self._queues[gpus]
        if position + 1 < len(queue):
            return (*queue[position + 1], gpus, position + 1)
        return None


class Unpreempted:
    """Starts whoever fits, in the order of a rank that never changes; `strict`: nobody passes the head."""

    def __init__(self, name: str, rank: Callable[[RunJob], float], *, strict: bool = False) -> None:
        self.name = name
        self._rank = rank
        self._strict = strict
        self._queues = SizeQueues()
        self._nodes: GangNodes | None = None

    def nodes(self, run: JobsRun) -> GangNodes:
        if self._nodes is None:
            self._nodes = GangNodes(run.nodes, run.per_node)
        return self._nodes

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        self._queues.add(job, self._rank(job))

    def ended(self, run: JobsRun, job: RunJob) -> None:
        self.nodes(run).give(job.places)

    def wake_s(self, run: JobsRun) -> float | None:
        return None

    def free_levels(self, run: JobsRun) -> Sequence[int]:
        return self.nodes(run).at

    def decide(self, run: JobsRun) -> None:
        nodes, queues = self.nodes(run), self._queues
        heads = queues.heads()
        started = []
        while heads and nodes.total_free:
            rank, number, gpus, position = heapq.heappop(heads)
            job = run.jobs[number]
            places = nodes.find(gpus)
            if places is None:
                if self._strict:
                    break
                continue
            job.places = places
            nodes.take(places)
            started.append((job, rank))
            following = queues.after(gpus, position)
            if following is not None:
                heapq.heappush(heads, following)
        for job, rank in started:
            queues.remove(job, rank)
            run.start(job)


class Repacked:
    """Packs everybody anew at each event in the order of a rank that running may change."""

    def __init__(self, name: str, rank: Rank, step_s: Callable[[RunJob, float], float | None] | None = None) -> None:
        self.name = name
        self._rank = rank
        #: When a running job's rank changes by a jump.
        self._step_s = step_s
        self._queues = SizeQueues()
        #: Rank under which each waiting job is queued.
        self._queued: dict[int, float] = {}
        self._free_levels: Sequence[int] = ()

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        self._queue(job, run.now_s)

    def _queue(self, job: RunJob, now_s: float) -> None:
        rank = self._rank(job, now_s)
        self._queued[job.number] = rank
        self._queues.add(job, rank)

    def ended(self, run: JobsRun, job: RunJob) -> None:
        pass

    def wake_s(self, run: JobsRun) -> float | None:
        if self._step_s is None:
            return None
        steps = [self._step_s(job, run.now_s) for job in run.running.values()]
        return min((step for step in steps if step is not None), default=None)

    def decide(self, run: JobsRun) -> None:
        stopped, started = self.pack(run)
        for job in stopped:
            run.stop(job)
            self._queue(job, run.now_s)
        for job in started:
            self.take_out(job)
            run.start(job)

    def take_out(self, job: RunJob) -> None:
        self._queues.remove(job, self._queued.pop(job.number))

    def free_levels(self, run: JobsRun) -> Sequence[int]:
        return self._free_levels

    def pack(self, run: JobsRun) -> tuple[list[RunJob], list[RunJob]]:
        """Who has to stop and who starts, each in order of rank, if whoever fits gets its place in that order."""
        nodes = GangNodes(run.nodes, run.per_node)
        now_s, queues = run.now_s, self._queues
        running = sorted([(self._rank(job, now_s), job.number, job.gpus, -1) for job in run.running.values()])
        heads = queues.heads()
        kept: set[int] = set()
        started: list[RunJob] = []
        too_large: set[int] = set()
        at = 0
        while nodes.total_free and (heads or at < len(running)):
            if at < len(running) and (not heads or running[at] < heads[0]):
                _, number, gpus, position = running[at]
                at += 1
            else:
                _, number, gpus, position = heapq.heappop(heads)
            if gpus in too_large or not nodes.take_counted(gpus):
                too_large.add(gpus)
                continue
            if position < 0:
                kept.add(number)
                continue
            started.append(run.jobs[number])
            following = queues.after(gpus, position)
            if following is not None:
                heapq.heappush(heads, following)
        self._free_levels = nodes.at
        return [run.jobs[number] for _, number, _, _ in running if number not in kept], started


def fifo(*, skip: bool) -> Unpreempted:
    return Unpreempted("fifo-skip" if skip else "fifo", lambda job: job.submit_s, strict=not skip)


def _told_s(job: RunJob) -> float:
    return job.service_s if job.estimate_s is None else job.estimate_s


def sjf() -> Unpreempted:
    """Shortest run time first, as told."""
    return Unpreempted("sjf", _told_s)


def qssf() -> Unpreempted:
    """Least GPU time first, as predicted."""
    return Unpreempted("qssf", lambda job: _told_s(job) * job.gpus)


def srtf() -> Repacked:
    return Repacked("srtf", lambda job, now_s: max(0.0, _told_s(job) - job.attained_at(now_s)))


def srsf() -> Repacked:
    return Repacked("srsf", lambda job, now_s: max(0.0, _told_s(job) - job.attained_at(now_s)) * job.gpus)


def gittins(table: GittinsTable) -> Repacked:
    """Smallest Gittins rank of GPU time attained first; ranks move in steps of an eighth of an octave."""

    def stepped(attained: float) -> float:
        if attained < 1:
            return 0.0
        return float(2.0 ** (math.floor(math.log2(attained) * 8 + 1e-9) / 8))

    def rank(job: RunJob, now_s: float) -> float:
        return table.rank(stepped(job.attained_at(now_s) * job.gpus + 1e-6))

    def step_s(job: RunJob, now_s: float) -> float | None:
        at = max(1.0, job.attained_at(now_s) * job.gpus + 1e-6)
        border = float(2.0 ** ((math.floor(math.log2(at) * 8 + 1e-9) + 1) / 8))
        return max(now_s + 1.0, job.since_s + job.overhead_s + border / job.gpus - job.attained_s)

    return Repacked("gittins", rank, step_s)


class Easy(Unpreempted):
    """First come, first served, with backfill that may not delay the head by the given walltimes."""

    def __init__(self) -> None:
        super().__init__("easy", lambda job: job.submit_s)
        self._line: list[Key] = []
        self._until_s: dict[int, float] = {}

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        insort(self._line, (job.submit_s, job.number))

    def decide(self, run: JobsRun) -> None:
        nodes = self.nodes(run)
        while self._line and (places := nodes.find(run.jobs[self._line[0][1]].gpus)) is not None:
            self._begin(run, run.jobs[self._line.pop(0)[1]], places)
        if not self._line or not nodes.total_free:
            return
        head = run.jobs[self._line[0][1]]
        shadow_s, spare = self._reserve(run, head)
        for entry in self._line[1:]:
            job = run.jobs[entry[1]]
            if not nodes.total_free:
                break
            places = nodes.find(job.gpus)
            if places is None:
                continue
            ends_s = run.now_s + job.restart_cost_s + _told_s(job)
            if ends_s > shadow_s:
                if any(spare.free[node] < gpus for node, gpus in places):
                    continue
                spare.take(places)
            self._line.remove(entry)
            self._begin(run, job, places)

    def _begin(self, run: JobsRun, job: RunJob, places: tuple[tuple[int, int], ...]) -> None:
        job.places = places
        self.nodes(run).take(places)
        run.start(job)
        self._until_s[job.number] = run.now_s + job.restart_cost_s + _told_s(job)

    def _reserve(self, run: JobsRun, head: RunJob) -> tuple[float, GangNodes]:
        """When the head can start by the walltimes, and what is free then beside it."""
        later = _copy(self.nodes(run))
        by_end = groupby(sorted(run.running, key=self._until_s.__getitem__), key=self._until_s.__getitem__)
        for until_s, numbers in by_end:
            for number in numbers:
                later.give(run.jobs[number].places)
            places = later.find(head.gpus)
            if places is not None:
                later.take(places)
                return until_s, later
        return float("inf"), later


def _copy(nodes: GangNodes) -> GangNodes:
    twin = GangNodes(len(nodes.free), nodes.per_node)
    twin.free, twin.at, twin.total_free = list(nodes.free), list(nodes.at), nodes.total_free
    return twin
