"""The next thing that time alone will bring: one heap of deadlines.

Derived: every deadline also stands in the record that it concerns, and an entry counts only while that record still
says so. So nothing is ever removed from the heap; what no longer holds is skipped when it comes up.
"""

from __future__ import annotations

import heapq
from enum import IntEnum

from gpuyard_protocol.names import JobId


class Timer(IntEnum):
    """What a deadline is about; at equal times the smaller number comes first."""

    #: A pending job's wait before a retry is over. Subject: job.
    WAKE = 1
    #: A gang has not got prepared. Subject: job.
    PREPARE = 2
    #: A node may be asked for a mode again. Subject: (node, mode).
    FORGIVE = 3
    #: A service's load has been low for long enough. Subject: (tenant, service).
    SCALE_DOWN = 4
    #: A service's crashed replica may be replaced. Subject: (tenant, service).
    REPLACE = 5
    #: A replica on a lost node has ended, as its lease says. Subject: (node, assignment).
    LEASE = 6
    #: A suspended job may be asked again to go back to its card. Subject: job.
    RESUME = 7
    #: A job that was suspended for holding its card idle ends. Subject: job.
    IDLE_END = 8
    #: A card may switch MIG mode again. Subject: (node, card).
    SETTLE = 20


class Timers:
    """Deadlines, soonest first; a total order: time, kind, subject."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, Timer, JobId, str, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def set_job(self, at_ms: int, timer: Timer, job: JobId) -> None:
        heapq.heappush(self._heap, (at_ms, timer, job, "", ""))

    def set_named(self, at_ms: int, timer: Timer, owner: str, name: str) -> None:
        heapq.heappush(self._heap, (at_ms, timer, 0, owner, name))

    def first(self) -> tuple[int, Timer, JobId, str, str] | None:
        """(time, kind, job, owner, name) of the soonest entry, whether or not it still holds."""
        return self._heap[0] if self._heap else None

    def drop_first(self) -> None:
        heapq.heappop(self._heap)
