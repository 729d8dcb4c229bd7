"""Gittins ranks from the sizes of finished jobs: what a job that has had so much may still need, at its best moment.

For a baseline: the ranks are fitted on the whole trace, which no real scheduler could do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class GittinsTable:
    """Ranks by GPU-seconds attained, from known sizes."""

    def __init__(self, sizes: Sequence[float]) -> None:
        self._sizes = sorted(sizes)
        self._sums = [0.0]
        for size in self._sizes:
            self._sums.append(self._sums[-1] + size)

    def rank(self, attained: float) -> float:
        """min over horizons of (expected service until done or horizon) / (chance to be done by then)."""
        first = bisect_left(self._sizes, attained + 1e-9)
        alive = len(self._sizes) - first
        if not alive:
            return float("inf")
        best = float("inf")
        step = max(1, alive // 64)
        ends = [*range(first, len(self._sizes), step), len(self._sizes) - 1]
        for end in ends:
            done = end + 1 - first
            served = self._sums[end + 1] - self._sums[first] - done * attained
            served += (alive - done) * (self._sizes[end] - attained)
            best = min(best, served / done)
        return best
