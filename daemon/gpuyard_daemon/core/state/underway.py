"""How much GPU time the jobs that run have had, counted by level at any moment without looking at each of them.

One slot of a few arrays for each running job, with the level it is at and the moment at which it reaches the next: a
count looks for moments that have passed, by one comparison of a whole array, and at the jobs of those alone. Derived:
which slot a job has means nothing, since only counts are read.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, TypeAlias

import numpy as np

from gpuyard_daemon.core.queueing.priority import LEVEL_MAX, level_begins
from gpuyard_protocol.names import JobId
from gpuyard_protocol.units import MILLI

Slots: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

_BEGINS: Final = np.array([level_begins(level) for level in range(LEVEL_MAX + 1)], dtype=np.int64)
_BEGINS_LIST: Final = [int(begins) for begins in _BEGINS]
#: Beyond it a job counts as one of this size: the product with a width must fit 64 bits.
_RAN_MAX_MS: Final = 1 << 40
_SLOTS_MIN: Final = 64
_NEVER: Final = (1 << 63) - 1


class Underway:
    """Run times of running jobs."""

    __slots__ = ("_at", "_before", "_free", "_level", "_moves_ms", "_served", "_since", "_slots", "_speed", "_width")

    def __init__(self) -> None:
        self._slots: dict[JobId, int] = {}
        self._free = list(range(_SLOTS_MIN))
        #: When it began to run, in ms; its run time before that; its GPUs in thousandths, 0: nobody is there.
        self._since = np.zeros(_SLOTS_MIN, dtype=np.int64)
        self._served = np.zeros(_SLOTS_MIN, dtype=np.int64)
        self._width = np.zeros(_SLOTS_MIN, dtype=np.int64)
        #: How fast its cards are, in thousandths.
        self._speed = np.zeros(_SLOTS_MIN, dtype=np.int64)
        #: The level it was last seen at, -1: not looked at yet; and until when it is there at least.
        self._level = np.full(_SLOTS_MIN, -1, dtype=np.int64)
        self._moves_ms = np.full(_SLOTS_MIN, _NEVER, dtype=np.int64)
        #: By level: how many are at it, and how many were at it when their present run began.
        self._at = np.zeros(LEVEL_MAX + 1, dtype=np.int64)
        self._before = np.zeros(LEVEL_MAX + 1, dtype=np.int64)

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
            self._level = np.concatenate((self._level, np.full(size, -1, dtype=np.int64)))
            self._moves_ms = np.concatenate((self._moves_ms, np.full(size, _NEVER, dtype=np.int64)))
        slot = self._slots[job] = self._free.pop()
        self._since[slot], self._served[slot], self._width[slot] = since_ms, served_ms, width_milli
        self._speed[slot] = speed_milli
        self._level[slot], self._moves_ms[slot] = -1, 0
        if served_ms > 0:
            self._before[_level_of(served_ms, width_milli)] += 1

    def leave(self, job: JobId) -> None:
        slot = self._slots.pop(job, None)
        if slot is not None:
            if (level := int(self._level[slot])) >= 0:
                self._at[level] -= 1
            if (served := int(self._served[slot])) > 0:
                self._before[_level_of(served, int(self._width[slot]))] -= 1
            self._width[slot], self._moves_ms[slot] = 0, _NEVER
            self._free.append(slot)

    def reached(self, now_ms: int) -> list[int]:
        """By level: how many have reached it in their present run. Moments asked about never go back."""
        moved = np.nonzero(self._moves_ms <= now_ms)[0]
        if len(moved):
            self._look_at(moved, now_ms)
        # Of one job: the levels above the one it had reached, up to the one it is at.
        return [int(count) for count in (self._at - self._before)[::-1].cumsum()[::-1]]

    def _look_at(self, slots: Slots, now_ms: int) -> None:
        width, served, speed = self._width[slots], self._served[slots], self._speed[slots]
        since, before = self._since[slots], self._level[slots]
        passed = np.minimum(np.maximum(0, now_ms - since), _RAN_MAX_MS) * speed // MILLI
        ran = np.minimum(served + passed, _RAN_MAX_MS)
        level = np.searchsorted(_BEGINS, ran * width // MILLI, side="right") - 1
        self._at += np.bincount(level, minlength=LEVEL_MAX + 1)
        self._at -= np.bincount(before[before >= 0], minlength=LEVEL_MAX + 1)
        self._level[slots] = level
        # Not later than the moment at which it reaches the next level; too early costs a look.
        wanted = _BEGINS[np.minimum(level + 1, LEVEL_MAX)] // width * MILLI - served
        moves = since + np.maximum(0, wanted) // np.maximum(1, speed) * MILLI
        self._moves_ms[slots] = np.where(level >= LEVEL_MAX, _NEVER, np.maximum(moves, now_ms + 1))


def _level_of(ran_ms: int, width_milli: int) -> int:
    return bisect_right(_BEGINS_LIST, ran_ms * width_milli // MILLI) - 1
