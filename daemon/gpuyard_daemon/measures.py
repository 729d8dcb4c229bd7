"""Figures that the daemon takes of itself while it runs: plain counters and histograms, cheap enough for every turn.

What they are called in Prometheus and where everything else comes from is `http.metrics`'s business.
"""

from __future__ import annotations

from bisect import bisect_left

#: Upper bounds in seconds, from a fast disk's append to a stalled one.
LATENCY_BUCKETS_S = (
    0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
#: A fifth apart, from 0.1 ms to 10 s, for what promises are made about: a quantile read off them is right to a tenth.
FINE_BUCKETS_S = tuple(float(f"{0.0001 * 1.2**step:.3g}") for step in range(64))
INPUT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


class Histogram:
    """Counts by upper bound; the last count is of what exceeds every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants it: (upper bound, how many up to it), ending with `+Inf`."""
        total, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets


class Measures:
    def __init__(self) -> None:
        #: From the arrival of a turn's oldest input to the journal's acknowledgement.
        self.decision_s = Histogram(FINE_BUCKETS_S)
        #: Whole turns; the core's part; the append's part.
        self.turn_s = Histogram(LATENCY_BUCKETS_S)
        self.core_s = Histogram(LATENCY_BUCKETS_S)
        self.append_s = Histogram(LATENCY_BUCKETS_S)
        self.turn_inputs = Histogram(INPUT_BUCKETS)
        self.turns = 0
        self.journal_bytes = 0

    def turn_ended(self, *, inputs: int, core_s: float, turn_s: float, waited_s: float | None) -> None:
        self.turns += 1
        self.turn_s.observe(turn_s)
        self.core_s.observe(core_s)
        self.turn_inputs.observe(inputs)
        if waited_s is not None:
            self.decision_s.observe(waited_s)

    def appended(self, append_s: float, size: int) -> None:
        self.append_s.observe(append_s)
        self.journal_bytes += size
