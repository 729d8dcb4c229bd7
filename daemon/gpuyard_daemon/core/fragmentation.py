"""How much of what is free could still be used, by the mix of work that the yard sees.

Two measures, both in integers and of states alone, so that equal states always measure alike:

- `unusable`: idle GPU that the demand mix cannot use on a node, weighted by frequency. A demand that does not fit the
  node by CPU, model or GPUs can use nothing of it; one that fits can use the GPUs that have enough free of each.
- `gap_values`: what a partly free card is worth: the shadow prices of packing the mix's shares onto as few cards as
  possible. A gap that only plentiful gaps are made of is worth nothing, however large: where most shares leave 19 %
  over and few shares are smaller, those 19 % are lost already, and filling one is free.

Knows no nodes and no jobs: a node's state is (model, free CPU, free thousandths of each card).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from gpuyard_protocol.units import MILLI

#: Prices and weights are in millionths.
ONE: Final = 1_000_000
#: Gaps are valued in steps of a hundredth of a card.
_STEP: Final = 10
_STEPS: Final = MILLI // _STEP
#: Rounds of price finding; the result is within a percent of the optimum long before.
_ROUNDS: Final = 400
#: Demands rarer than the commonest that make up this share of all, in thousandths, are left out.
_COVERED_MILLI: Final = 950


class Demand(NamedTuple):
    """What some of the work asks for, and how often it comes."""

    cpu_milli: int
    gpus: int
    #: Of each GPU; 1000 for whole ones.
    milli: int
    #: Models it may run on; empty: any.
    models: tuple[str, ...]
    #: How many of it were seen.
    seen: int


class DemandMix:
    """The typical demands, and both measures by them. Fixed once made: a changed mix is a new object."""

    def __init__(self, demands: Iterable[Demand]) -> None:
        ranked = sorted(demands, key=lambda demand: (-demand.seen, demand))
        total = sum(demand.seen for demand in ranked)
        chosen, covered = [], 0
        for demand in ranked:
            if covered * MILLI >= _COVERED_MILLI * total:
                break
            chosen.append(demand)
            covered += demand.seen
        self._weighted = tuple([(demand, demand.seen * ONE // covered) for demand in chosen])
        self._cpu_steps = sorted({demand.cpu_milli for demand in chosen})
        shares: dict[int, int] = {}
        for demand in ranked:
            if demand.gpus == 1 and demand.milli < MILLI:
                shares[demand.milli] = shares.get(demand.milli, 0) + demand.seen
        self._prices, self._gaps = gap_values(shares)
        #: (model, CPU step) -> ((GPUs, milli of each, weight), …) of the demands that fit there.
        self._fitting: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {}
        self._known: dict[tuple[str, int, tuple[int, ...]], int] = {}

    def unusable(self, model: str, cpu_free_milli: int, cards_free: Sequence[int]) -> int:
        """Idle thousandths of cards that the mix could not use, expected, in millionths of a thousandth."""
        step = bisect_right(self._cpu_steps, cpu_free_milli)
        key = (model, step, tuple(sorted(cards_free)))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._measure(*key)
        return known

    def gap_loss(self, free_milli: int, milli: int) -> int:
        """What taking a share out of a gap destroys beyond the share's own price; 0 where it fits perfectly."""
        gaps = self._gaps
        price = self._prices.get(milli)
        if price is None:
            price = gaps[min(_STEPS, -(-milli // _STEP))]
        return max(0, gaps[free_milli // _STEP] - gaps[(free_milli - milli) // _STEP] - price)

    def _measure(self, model: str, step: int, cards_free: tuple[int, ...]) -> int:
        usable = 0
        for gpus, milli, weight in self._fitting_demands(model, step):
            first = 0
            while first < len(cards_free) and cards_free[first] < milli:
                first += 1
            if len(cards_free) - first >= gpus:
                usable += weight * sum(cards_free[first:])
        return sum(cards_free) * ONE - usable

    def _fitting_demands(self, model: str, step: int) -> tuple[tuple[int, int, int], ...]:
        found = self._fitting.get((model, step))
        if found is None:
            limit = self._cpu_steps[step - 1] if step else -1
            sums: dict[tuple[int, int], int] = {}
            for demand, weight in self._weighted:
                if demand.gpus and demand.cpu_milli <= limit and (not demand.models or model in demand.models):
                    kind = (demand.gpus, demand.milli)
                    sums[kind] = sums.get(kind, 0) + weight
            found = self._fitting[(model, step)] = tuple([(*kind, weight) for kind, weight in sorted(sums.items())])
        return found


def gap_values(shares: dict[int, int]) -> tuple[dict[int, int], list[int]]:
    """(price of each share size, value of a gap by hundredths of a card), a whole card being worth `ONE`.

    The dual of bin packing by price adjustment: each round packs one card with what is dearest at the present prices;
    sizes packed less often than they are asked for become dearer, the others cheaper. The best prices seen count.
    """
    sizes = sorted(shares)
    if not sizes:
        return {}, [ONE * step // _STEPS for step in range(_STEPS + 1)]
    counts = [shares[size] for size in sizes]
    widths = [-(-size // _STEP) for size in sizes]
    prices = [size * ONE // MILLI for size in sizes]
    best_bound, best = -1, prices
    for number in range(_ROUNDS):
        values = _best_values(widths, prices)
        whole = values[_STEPS]
        bound = sum(count * price for count, price in zip(counts, prices, strict=True)) * ONE // whole
        if bound > best_bound:
            best_bound, best = bound, [price * ONE // whole for price in prices]
        packed = _pack(widths, prices, values)
        for at, count in enumerate(counts):
            wanted = count * ONE * ONE // best_bound
            change = (wanted - packed[at] * ONE) * 10 // (20 + number)
            scale = ONE + wanted
            if change >= 0:
                prices[at] += prices[at] * change // scale
            else:
                prices[at] = max(1, prices[at] * scale // (scale - change))
    return dict(zip(sizes, best, strict=True)), _best_values(widths, best)


def _best_values(widths: Sequence[int], prices: Sequence[int]) -> list[int]:
    """The dearest contents of a gap, for each size of gap."""
    values = [0] * (_STEPS + 1)
    items = list(zip(widths, prices, strict=True))
    for gap in range(1, _STEPS + 1):
        best = values[gap - 1]
        for width, price in items:
            if width <= gap:
                value = values[gap - width] + price
                best = max(best, value)
        values[gap] = best
    return values


def _pack(widths: Sequence[int], prices: Sequence[int], values: Sequence[int]) -> list[int]:
    """How many of each size are in the dearest contents of one card."""
    packed = [0] * len(widths)
    gap = _STEPS
    while gap > 0:
        for at, width in enumerate(widths):
            if width <= gap and values[gap - width] + prices[at] == values[gap]:
                packed[at] += 1
                gap -= width
                break
        else:
            gap -= 1
    return packed
