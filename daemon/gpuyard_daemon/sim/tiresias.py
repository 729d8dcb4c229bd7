"""Tiresias (NSDI'19) as its authors' simulator plays it: discretised two-dimensional least attained service.

Three queues by GPU time held, restarts included; a job sinks when it crosses a border and never rises. In a queue,
whoever runs stands before whoever waits. Who starts joins the end of those who run; who is stopped stands before those
who waited already; who sinks stands behind everybody. At each event all are packed anew in that order.
"""

from __future__ import annotations

from typing import Final

from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.ordering import Repacked

#: Borders between the queues, in GPU-seconds.
BORDERS: Final = (3250.0, 7200.0)
#: Of one queue's ranks: those who run from 0, those who wait around the first, those who just sank from the second.
_WAITING: Final = float(1 << 40)
_SUNK: Final = float(1 << 41)
_QUEUE: Final = float(1 << 42)


class Tiresias(Repacked):
    """Whole numbers as ranks, given out anew as jobs change their places."""

    def __init__(self) -> None:
        super().__init__("tiresias", lambda job, now_s: self._ranks[job.number])
        self._ranks: dict[int, float] = {}
        self._queue_of: dict[int, int] = {}
        #: Next place at the end of those who run, of those who wait, and of those who sink; first of those who wait.
        self._runs_to = 0.0
        self._waits_from = self._waits_to = _WAITING
        self._sunk_to = _SUNK

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        self._queue_of[job.number] = 0
        self._stand_last(job)
        super().arrived(run, job)

    def ended(self, run: JobsRun, job: RunJob) -> None:
        del self._ranks[job.number], self._queue_of[job.number]

    def wake_s(self, run: JobsRun) -> float | None:
        """When the first of those who run crosses a border."""
        crossings = [
            max(run.now_s + 1e-3, job.since_s + BORDERS[at] / job.gpus - job.held_s)
            for job in run.running.values()
            if (at := self._queue_of[job.number]) < len(BORDERS)
        ]
        return min(crossings, default=None)

    def decide(self, run: JobsRun) -> None:
        self._sink(run)
        stopped, started = self.pack(run)
        newcomers = started + [job for job in run.running.values() if self._ranks[job.number] % _QUEUE >= _SUNK]
        given_up = set(stopped)
        # In the order in which they stood, so that each group keeps it.
        for job in sorted(newcomers, key=lambda job: self._ranks[job.number]):
            if job in given_up:
                continue
            if not job.runs:
                self.take_out(job)
                run.start(job)
            self._give(job, self._runs_to)
            self._runs_to += 1
        fallen = [job for job in stopped if self._ranks[job.number] % _QUEUE >= _SUNK]
        for job in fallen:
            self._stand_last(job)
        for job in reversed([job for job in stopped if job not in set(fallen)]):
            self._waits_from -= 1
            self._give(job, self._waits_from)
        for job in stopped:
            run.stop(job)
            super().arrived(run, job)

    def _sink(self, run: JobsRun) -> None:
        for job in sorted(run.running.values(), key=lambda job: job.number):
            at = self._queue_of[job.number]
            if at < len(BORDERS) and job.held_at(run.now_s) * job.gpus + 1e-6 >= BORDERS[at]:
                self._queue_of[job.number] = at + 1
                self._give(job, self._sunk_to)
                self._sunk_to += 1

    def _stand_last(self, job: RunJob) -> None:
        self._give(job, self._waits_to)
        self._waits_to += 1

    def _give(self, job: RunJob, place: float) -> None:
        self._ranks[job.number] = self._queue_of[job.number] * _QUEUE + place
