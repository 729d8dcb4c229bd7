"""What jobs without an estimate turn out to need: learnt from those that came before, in octaves of size.

For each octave it counts who entered it and who ended in it. Jobs that still run count where they are, so that a yard
full of long jobs does not look like one of short jobs. From the counts comes the Gittins rank: the expected further
use per expected end, at the best moment to look again. Where sizes have heavy tails it grows with what a job has had,
and the order is least-attained first; where they have not, it stays level, and whoever runs goes on.

Integers only; nothing is sampled or fitted. With no history all are alike: whoever runs goes on.
"""

from __future__ import annotations

from typing import Final

from gpuyard_daemon.core.priority import LEVEL_MAX, LEVEL_UNIT, level_begins

_ONE: Final = 1_000_000
#: One job more than was seen is taken to enter each octave and go on: an octave that nobody has left yet keeps no one
#: from staying. Assuming a heavy tail instead cost a third on traces without one.
_ASSUMED_ENTERED: Final = 1
#: Ranks are worked out anew when the counts grew by one part in so many.
_REREAD_PART: Final = 64


class SizeHistory:
    """Counts by octave, and ranks from them."""

    def __init__(self) -> None:
        self._entered = [0] * (LEVEL_MAX + 2)
        self._ended = [0] * (LEVEL_MAX + 2)
        self._ranks: list[int] | None = None
        #: Counts made, and how many of them the ranks do not know yet.
        self._seen = 0
        self._unread = 0

    def enter(self, level: int) -> None:
        """A job's use reached an octave."""
        self._entered[level] += 1
        self._seen += 1
        self._unread += 1

    def end(self, level: int) -> None:
        """A job ended in an octave."""
        self._ended[level] += 1
        self._seen += 1
        self._unread += 1

    def rank(self, level: int) -> int:
        """Gittins rank, GPU-milliseconds, of a job whose use is at the beginning of an octave."""
        if self._ranks is None or self._unread * _REREAD_PART > self._seen:
            self._unread = 0
            self._ranks = [self._rank_at(at) for at in range(LEVEL_MAX + 1)]
        return self._ranks[min(level, LEVEL_MAX)]

    def _rank_at(self, level: int) -> int:
        alive, served, best = _ONE, 0, 0
        for at in range(level, LEVEL_MAX + 1):
            entered = max(self._entered[at], self._ended[at]) + _ASSUMED_ENTERED
            ending = alive * self._ended[at] // entered
            width = level_begins(at + 1) - level_begins(at) if at else LEVEL_UNIT
            # Who ends in the octave ends in its middle on average.
            served += (alive - ending) * width + ending * width // 2
            alive -= ending
            rank = served // max(1, _ONE - alive)
            best = rank if not best else min(best, rank)
        return best
