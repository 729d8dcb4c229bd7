"""The jobs that run, the largest first: an index by octave of GPU time, kept up to date as they cross the borders.

So that a search among them may stop early. Derived: it depends on the records and the time alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from gpuyard_daemon.core.queueing import priority
from gpuyard_daemon.core.queueing.ranking import outlives_ms, ran_ms, wall_ms, width_milli
from gpuyard_daemon.core.state.model import Job
from gpuyard_protocol.names import JobId
from gpuyard_protocol.units import MILLI

#: Jobs of an octave stand together by their numbers, so many to each group: who looks for the youngest puts those of a
#: few groups in order, and not all of a large yard.
_GROUP_BITS: Final = 8
#: Octave under which replicas of services stand: they run for ever, so their use says nothing.
_SERVICES = -1


class Running:
    """Jobs that run, by octave of their GPU time."""

    __slots__ = ("_moves", "_octave_of", "_octaves")

    def __init__(self) -> None:
        #: By octave, and the first bits of the number.
        self._octaves: dict[int, dict[int, dict[JobId, Job]]] = {}
        self._octave_of: dict[JobId, int] = {}
        #: (when, job, its attempt): moves to the next octave that are to come, a heap.
        self._moves: list[tuple[int, JobId, int]] = []

    def enter(self, job: Job, now_ms: int) -> None:
        octave, until_ms = _octave(job, now_ms)
        self._octave_of[job.id] = octave
        self._octaves.setdefault(octave, {}).setdefault(job.id >> _GROUP_BITS, {})[job.id] = job
        if until_ms:
            heapq.heappush(self._moves, (until_ms, job.id, job.attempt))

    def leave(self, job: Job) -> None:
        octave = self._octave_of.pop(job.id, None)
        if octave is not None:
            groups, number = self._octaves[octave], job.id >> _GROUP_BITS
            del groups[number][job.id]
            if not groups[number]:
                del groups[number]
            if not groups:
                del self._octaves[octave]

    def __len__(self) -> int:
        return len(self._octave_of)

    def everybody(self) -> Iterator[Job]:
        """In no order that means anything."""
        for groups in self._octaves.values():
            for jobs in groups.values():
                yield from jobs.values()

    def largest_first(self, at_ms: int) -> Iterator[Job]:
        """As of a moment that never goes back: by octave, then the youngest first; services' replicas last."""
        while self._moves and self._moves[0][0] <= at_ms:
            _, number, attempt = heapq.heappop(self._moves)
            groups = self._octaves.get(self._octave_of.get(number, _SERVICES - 1), {})
            job = groups.get(number >> _GROUP_BITS, {}).get(number)
            if job is not None and job.attempt == attempt:
                self.leave(job)
                self.enter(job, at_ms)
        for octave in sorted(self._octaves, reverse=True):
            groups = self._octaves[octave]
            for group in sorted(groups, reverse=True):
                jobs = groups[group]
                for number in sorted(jobs, reverse=True):
                    yield jobs[number]


def _octave(job: Job, now_ms: int) -> tuple[int, int]:
    """A job's octave, and when it reaches the next; 0: never."""
    if job.service:
        return _SERVICES, 0
    width, ran = width_milli(job), ran_ms(job, now_ms)
    if ran < (late_ms := outlives_ms(job)):
        return priority.natural_level(job.expected_ms * width // MILLI), now_ms + wall_ms(job, late_ms - ran)
    octave = priority.natural_level(ran * width // MILLI)
    if not width or octave >= priority.LEVEL_MAX:
        return octave, 0
    border_ms = -(-priority.level_begins(octave + 1) * MILLI // width)
    return octave, now_ms + max(1, wall_ms(job, border_ms - ran))
