"""Figures that the daemon takes of itself while it runs: plain counters and histograms, cheap enough for every turn.

What they are called in Prometheus and where everything else comes from is `http.metrics`'s business.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

#: Upper bounds in seconds, from a fast disk's append to a stalled one.
LATENCY_BUCKETS_S = (
    0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
#: A fifth apart, from 20 µs to 10 s, for what promises are made about: a quantile read off them is right to a tenth.
FINE_BUCKETS_S = tuple(float(f"{0.00002 * 1.2**step:.3g}") for step in range(73))
INPUT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


class Histogram:
    """Counts by upper bound; the last count is of what exceeds every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants it: (upper bound, how many up to it), ending with `+Inf`."""
        total, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets


class Measures:
    def __init__(self) -> None:
        #: What one decision takes the core (one start, or the proof that nothing of what waits fits): a turn's time,
        #: shared out among its decisions.
        self.decision_s = Histogram(FINE_BUCKETS_S)
        #: Of each message and fact: from its arrival here to the journal's acknowledgement.
        self.decided_after_s = Histogram(FINE_BUCKETS_S)
        #: Whole turns; the core's part; the append's part.
        self.turn_s = Histogram(LATENCY_BUCKETS_S)
        self.core_s = Histogram(LATENCY_BUCKETS_S)
        self.append_s = Histogram(LATENCY_BUCKETS_S)
        self.turn_inputs = Histogram(INPUT_BUCKETS)
        self.turns = 0
        self.journal_bytes = 0

    def turn_ended(
        self, *, began: float, decided: float, inputs: int, came_at: Sequence[float], decisions: int
    ) -> None:
        """`began`, `decided` (the core is through), `came_at`: monotonic times; now it is in the journal."""
        now, core_s = time.monotonic(), decided - began
        self.turns += 1
        self.turn_s.observe(now - began)
        self.core_s.observe(core_s)
        self.turn_inputs.observe(inputs)
        if decisions:
            self.decision_s.observe(core_s / decisions, decisions)
        for at in came_at:
            self.decided_after_s.observe(now - at)

    def appended(self, append_s: float, size: int) -> None:
        self.append_s.observe(append_s)
        self.journal_bytes += size
