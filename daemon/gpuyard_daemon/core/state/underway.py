"""How much GPU time the jobs that run have had, counted by level at any moment without looking at each of them.

One slot of three arrays for each running job; a count is a comparison of whole arrays. Derived: which slot a job has
means nothing, since only counts are read.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from gpuyard_daemon.core.queueing.priority import LEVEL_MAX, level_begins
from gpuyard_protocol.names import JobId
from gpuyard_protocol.units import MILLI

_BEGINS: Final = np.array([level_begins(level) for level in range(LEVEL_MAX + 1)], dtype=np.int64)
#: Beyond it a job counts as one of this size: the product with a width must fit 64 bits.
_RAN_MAX_MS: Final = 1 << 40
_SLOTS_MIN: Final = 64


class Underway:
    """Run times of running jobs."""

    __slots__ = ("_free", "_served", "_since", "_slots", "_speed", "_width")

    def __init__(self) -> None:
        self._slots: dict[JobId, int] = {}
        self._free = list(range(_SLOTS_MIN))
        #: When it began to run, in ms; its run time before that; its GPUs in thousandths, 0: nobody is there.
        self._since = np.zeros(_SLOTS_MIN, dtype=np.int64)
        self._served = np.zeros(_SLOTS_MIN, dtype=np.int64)
        self._width = np.zeros(_SLOTS_MIN, dtype=np.int64)
        #: How fast its cards are, in thousandths.
        self._speed = np.zeros(_SLOTS_MIN, dtype=np.int64)

    def enter(self, job: JobId, width_milli: int, served_ms: int, since_ms: int, speed_milli: int = MILLI) -> None:
        if job in self._slots or not width_milli:
            return
        if not self._free:
            size = len(self._width)
            self._free = list(range(size, 2 * size))
            self._since, self._served, self._width, self._speed = (
                np.concatenate((array, np.zeros(size, dtype=np.int64)))
                for array in (self._since, self._served, self._width, self._speed)
            )
        slot = self._slots[job] = self._free.pop()
        self._since[slot], self._served[slot], self._width[slot] = since_ms, served_ms, width_milli
        self._speed[slot] = speed_milli

    def leave(self, job: JobId) -> None:
        slot = self._slots.pop(job, None)
        if slot is not None:
            self._width[slot] = 0
            self._free.append(slot)

    def reached(self, now_ms: int) -> list[int]:
        """By level: how many have reached it in their present run."""
        there = self._width > 0
        width, served = self._width[there], self._served[there]
        passed = np.minimum(np.maximum(0, now_ms - self._since[there]), _RAN_MAX_MS) * self._speed[there] // MILLI
        ran = np.minimum(served + passed, _RAN_MAX_MS)
        by_now = np.searchsorted(_BEGINS, ran * width // MILLI, side="right") - 1
        before = np.where(served > 0, np.searchsorted(_BEGINS, served * width // MILLI, side="right") - 1, -1)
        # Of one job: the levels above the one it had reached, up to the one it is at.
        up_to = np.bincount(by_now, minlength=LEVEL_MAX + 1)[::-1].cumsum()[::-1]
        known = np.bincount(before[before >= 0], minlength=LEVEL_MAX + 1)[::-1].cumsum()[::-1]
        return [int(count) for count in up_to - known]
