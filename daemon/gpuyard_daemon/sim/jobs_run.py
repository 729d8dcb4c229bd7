"""Jobs through simulated time: arrivals, progress, restarts, ends. Who runs is a policy's to say.

A start costs some seconds without progress. Progress is booked when a job stops or ends, never step by step, so a run
costs work in proportion to its events.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

from gpuyard_daemon.sim.trace_jobs import TraceJob

#: Ends and wake-ups this close are one moment.
_MOMENT_S = 1e-6
#: How often the free GPUs of nodes are looked at.
_SAMPLE_S = 600.0
#: Tenants' demand and what they got are compared over windows of this length.
DAY_S = 86_400.0


class RunJob:
    """One job in simulated time."""

    __slots__ = (
        "attained_s", "estimate_s", "finish_s", "first_start_s", "generation", "gpus", "held_s", "number", "overhead_s",
        "places", "restart_cost_s", "runs", "service_s", "since_s", "starts", "submit_s", "tenant",
    )  # fmt: skip

    def __init__(self, job: TraceJob, restart_cost_s: float, estimate_s: float | None) -> None:
        self.number = job.number
        self.submit_s = job.submit_s
        self.gpus = job.gpus
        self.service_s = job.service_s
        self.tenant = job.tenant
        #: What the policy is told about the run time; None: nothing.
        self.estimate_s = estimate_s
        self.restart_cost_s = restart_cost_s
        #: Useful run time until `since_s`.
        self.attained_s = 0.0
        #: Time on its GPUs until `since_s`, useful or not.
        self.held_s = 0.0
        #: Without progress yet to come at `since_s`, while running.
        self.overhead_s = 0.0
        self.since_s = 0.0
        self.runs = False
        self.starts = 0
        self.first_start_s = -1.0
        self.finish_s = -1.0
        #: Grows with each start and stop: an end noted under an older one does not count.
        self.generation = 0
        self.places: tuple[tuple[int, int], ...] = ()

    def attained_at(self, now_s: float) -> float:
        """Useful run time so far."""
        if not self.runs:
            return self.attained_s
        return self.attained_s + max(0.0, now_s - self.since_s - self.overhead_s)

    def held_at(self, now_s: float) -> float:
        """Time on its GPUs so far."""
        return self.held_s + (now_s - self.since_s if self.runs else 0.0)

    def remaining_at(self, now_s: float) -> float:
        return self.service_s - self.attained_at(now_s)


class JobPolicy(Protocol):
    """Says who runs."""

    name: str

    def arrived(self, run: JobsRun, job: RunJob) -> None: ...

    def ended(self, run: JobsRun, job: RunJob) -> None: ...

    def decide(self, run: JobsRun) -> None:
        """Called once at each moment at which something happened."""
        ...

    def wake_s(self, run: JobsRun) -> float | None:
        """When to be asked again though nothing happens."""
        ...

    def free_levels(self, run: JobsRun) -> Sequence[int]:
        """How many nodes have 0, 1, 2, … GPUs free, now that it has decided."""
        ...


class JobsRun:
    """One trace under one policy."""

    def __init__(self, jobs: Sequence[RunJob], nodes: int, per_node: int, policy: JobPolicy) -> None:
        self.jobs = jobs
        self.nodes = nodes
        self.per_node = per_node
        self.policy = policy
        self.now_s = 0.0
        self.running: dict[int, RunJob] = {}
        #: GPU-seconds spent without progress.
        self.overhead_gpu_s = 0.0
        #: (hour, tenant) -> GPU-seconds held; what each tenant got when.
        self.held: dict[tuple[int, str], float] = {}
        #: By day: GPU-seconds that each tenant could have used, had it had the cluster for itself.
        self.wanted: list[dict[str, float]] = []
        #: (time, jobs waiting, GPUs held), one entry a moment.
        self.timeline: list[tuple[float, int, int]] = []
        #: (time, how many nodes have 0, 1, 2, … GPUs free), now and then.
        self.free_samples: list[tuple[float, tuple[int, ...]]] = []
        self._ends: list[tuple[float, int, int]] = []
        self._arrived = 0
        self._done = 0
        self._busy = 0

    def start(self, job: RunJob) -> None:
        job.runs = True
        job.since_s = self.now_s
        job.overhead_s = job.restart_cost_s
        job.starts += 1
        job.generation += 1
        if job.first_start_s < 0:
            job.first_start_s = self.now_s
        self.running[job.number] = job
        self._busy += job.gpus
        end_s = self.now_s + job.overhead_s + job.service_s - job.attained_s
        heapq.heappush(self._ends, (end_s, job.number, job.generation))

    def stop(self, job: RunJob) -> None:
        """Preempted: it keeps what it attained and pays for the next start."""
        self._book(job)
        job.runs = False
        job.generation += 1
        del self.running[job.number]
        self._busy -= job.gpus

    def _book(self, job: RunJob) -> None:
        passed = self.now_s - job.since_s
        self.overhead_gpu_s += job.gpus * min(passed, job.overhead_s)
        if job.tenant:
            self._book_held(job, job.since_s, self.now_s)
        job.attained_s = job.attained_at(self.now_s)
        job.held_s += passed
        job.since_s = self.now_s

    def _book_held(self, job: RunJob, from_s: float, to_s: float) -> None:
        hour = int(from_s // 3600)
        while from_s < to_s:
            border_s = min(to_s, (hour + 1) * 3600.0)
            key = (hour, job.tenant)
            self.held[key] = self.held.get(key, 0.0) + job.gpus * (border_s - from_s)
            from_s, hour = border_s, hour + 1

    def _begin_day(self) -> None:
        """Nothing happened since the last moment, so what each job still needed at midnight can be told now."""
        midnight_s = len(self.wanted) * DAY_S
        self.wanted.append({})
        for job in self.jobs[: self._arrived]:
            if job.finish_s < 0:
                self._want(job, midnight_s)

    def _want(self, job: RunJob, from_s: float) -> None:
        """Enter what a job could use of the day, from then on."""
        usable_s = min(job.remaining_at(from_s), len(self.wanted) * DAY_S - from_s)
        day = self.wanted[-1]
        day[job.tenant] = day.get(job.tenant, 0.0) + job.gpus * max(0.0, usable_s)

    def go(self, until_s: float = math.inf) -> None:
        """To the end of all jobs, or not beyond a moment; then what those who run have got is booked."""
        jobs, ends, policy = self.jobs, self._ends, self.policy
        while self._done < len(jobs):
            self.now_s = self._next_moment()
            if self.now_s >= until_s:
                self.now_s = until_s
                for job in self.running.values():
                    self._book(job)
                break
            while len(self.wanted) * DAY_S <= self.now_s:
                self._begin_day()
            limit_s = self.now_s + _MOMENT_S
            while ends and ends[0][0] <= limit_s:
                _, number, generation = heapq.heappop(ends)
                job = jobs[number]
                if job.runs and job.generation == generation:
                    self._end(job)
            while self._arrived < len(jobs) and jobs[self._arrived].submit_s <= limit_s:
                self._want(jobs[self._arrived], jobs[self._arrived].submit_s)
                policy.arrived(self, jobs[self._arrived])
                self._arrived += 1
            policy.decide(self)
            self.timeline.append((self.now_s, self._arrived - self._done - len(self.running), self._busy))
            if not self.free_samples or self.now_s - self.free_samples[-1][0] >= _SAMPLE_S:
                self.free_samples.append((self.now_s, tuple(policy.free_levels(self))))

    def _next_moment(self) -> float:
        jobs, ends = self.jobs, self._ends
        while ends and ends[0][2] != jobs[ends[0][1]].generation:
            heapq.heappop(ends)
        moments = []
        if ends:
            moments.append(ends[0][0])
        if self._arrived < len(jobs):
            moments.append(jobs[self._arrived].submit_s)
        wake_s = self.policy.wake_s(self)
        if wake_s is not None:
            moments.append(max(wake_s, self.now_s))
        if not moments:
            raise RuntimeError(f"policy {self.policy.name} leaves {len(jobs) - self._done} jobs waiting for ever")
        return min(moments)

    def _end(self, job: RunJob) -> None:
        self._book(job)
        job.runs = False
        job.generation += 1
        job.finish_s = self.now_s
        del self.running[job.number]
        self._busy -= job.gpus
        self._done += 1
        self.policy.ended(self, job)
