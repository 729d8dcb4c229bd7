"""How much of what is free could still be used, by the mix of work that the yard sees.

Two measures, both in integers and of states alone, so that equal states always measure alike:

- `unusable`: idle GPU that the demand mix cannot use on a node, weighted by frequency. A demand that does not fit the
  node by CPU, memory, model or cards can use nothing of it; one that fits can use the cards that have enough free. A
  share has two dimensions: of a card it can use the smaller of what is left of compute and of memory, so that what is
  stranded counts as lost. A MIG instance can use as many places as its profile still has on a card.
- `gap_values`: what a partly free card is worth: the shadow prices of packing the mix's shares onto as few cards as
  possible. A gap that only plentiful gaps are made of is worth nothing, however large: where most shares leave 19 %
  over and few shares are smaller, those 19 % are lost already, and filling one is free.

Knows no nodes and no jobs: a node's state is (free CPU, free memory, room on each card).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from gpuyard_daemon.core.placing.partitions import Room, geometry_of, sample_of
from gpuyard_daemon.core.placing.speeds import Named, Speeds
from gpuyard_protocol.resources import Device, ResourceNeed, model_matches, share_of
from gpuyard_protocol.units import MILLI

#: Prices and weights are in millionths.
ONE: Final = 1_000_000
#: Gaps are valued in steps of a hundredth of a card.
_STEP: Final = 10
_STEPS: Final = MILLI // _STEP
#: Rounds of price finding; the result is within a percent or two of the optimum by then.
_ROUNDS: Final = 150
#: Sizes of shares that get a price of their own, the commonest.
_SIZES_MAX: Final = 24
#: Demands rarer than the commonest that make up this share of all, in thousandths, are left out.
_COVERED_MILLI: Final = 950
#: Node states whose waste is remembered.
_KNOWN_MAX: Final = 200_000


#: Of wishes: place among all, weight, thousandths wanted at least.
Fitting: TypeAlias = tuple[tuple[int, int, int], ...]


class Demand(NamedTuple):
    """What some of the work asks for, and how often it comes."""

    need: ResourceNeed
    #: In any unit, the same for all demands of a mix.
    seen: int


class _Wish(NamedTuple):
    """A demand for cards, as far as measuring goes."""

    need: ResourceNeed
    weight: int
    cpu_milli: int
    memory_mib: int


class DemandMix:
    """The typical demands, and both measures by them. Fixed once made: a changed mix is a new object."""

    def __init__(self, demands: Iterable[Demand], speeds: Named = ()) -> None:
        ranked = sorted(demands, key=lambda demand: -demand.seen)
        total = sum(demand.seen for demand in ranked)
        chosen, covered = [], 0
        for demand in ranked:
            if covered * MILLI >= _COVERED_MILLI * total:
                break
            chosen.append(demand)
            covered += demand.seen
        self.demands = tuple(chosen)
        sums: dict[ResourceNeed, int] = {}
        for need, seen in chosen:
            if need.wants_gpu:
                sums[need] = sums.get(need, 0) + seen * ONE // covered
        self._wishes = [_Wish(need, weight, need.cpu_milli, need.memory_mib) for need, weight in sums.items()]
        self._cpu_steps = sorted({wish.cpu_milli for wish in self._wishes})
        self._memory_steps = sorted({wish.memory_mib for wish in self._wishes})
        shares: dict[int, int] = {}
        for need, seen in ranked:
            if need.share_milli and need.share_milli < MILLI:
                shares[need.share_milli] = shares.get(need.share_milli, 0) + seen
        commonest = sorted(shares, key=lambda size: (-shares[size], size))[:_SIZES_MAX]
        self._prices, self._gaps = gap_values({size: shares[size] for size in commonest})
        #: By (CPU step, memory step).
        self._fitting: dict[tuple[int, int], Fitting] = {}
        #: By room: what each wish could use of such a card.
        self._usable: dict[int, tuple[int, ...]] = {}
        self._sums: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._speeds = Speeds(speeds)

    def unusable(self, cpu_free_milli: int, memory_free_mib: int, rooms: Sequence[int]) -> int:
        """Idle thousandths of cards that the mix could not use, expected, in millionths of a thousandth."""
        return self.waste(cpu_free_milli, memory_free_mib, self.usable(rooms), sum(map(free_of, rooms)))

    def usable(self, rooms: Sequence[int]) -> tuple[int, ...]:
        """What each wish could use of a node's cards, in thousandths."""
        key = tuple(sorted(rooms))
        known = self._sums.get(key)
        if known is None:
            if len(self._sums) >= _KNOWN_MAX:
                self._sums.clear()
            on_each = [self.usable_on(room) for room in key] or [(0,) * len(self._wishes)]
            known = self._sums[key] = tuple(map(sum, zip(*on_each, strict=True)))
        return known

    def usable_on(self, room: int) -> tuple[int, ...]:
        """What each wish could use of one card, in thousandths."""
        known = self._usable.get(room)
        if known is None:
            if len(self._usable) >= _KNOWN_MAX:
                self._usable.clear()
            known = self._usable[room] = tuple([usable_by(wish.need, room) for wish in self._wishes])
        return known

    def waste(self, cpu_free_milli: int, memory_free_mib: int, usable: Sequence[int], idle: int) -> int:
        """`unusable` of a node whose cards have so much idle, of which each wish could use so much."""
        used = 0
        for place, weight, least in self.fitting(cpu_free_milli, memory_free_mib):
            some = usable[place]
            if some >= least:
                used += weight * some
        return idle * ONE - used

    def waste_with(self, fitting: Fitting, usable: Sequence[int], room_before: int, room_after: int, idle: int) -> int:
        """The same for `fitting` wishes, once one of the cards has another room than `usable` was summed with."""
        before, after, used = self.usable_on(room_before), self.usable_on(room_after), 0
        for place, weight, least in fitting:
            some = usable[place] - before[place] + after[place]
            if some >= least:
                used += weight * some
        return idle * ONE - used

    def fitting(self, cpu_free_milli: int, memory_free_mib: int) -> Fitting:
        """The wishes that so much CPU and memory would do for."""
        steps = (bisect_right(self._cpu_steps, cpu_free_milli), bisect_right(self._memory_steps, memory_free_mib))
        found = self._fitting.get(steps)
        if found is None:
            found = self._fitting[steps] = self._fitting_at(*steps)
        return found

    def _fitting_at(self, cpu_step: int, memory_step: int) -> Fitting:
        cpu = self._cpu_steps[cpu_step - 1] if cpu_step else -1
        memory = self._memory_steps[memory_step - 1] if memory_step else -1
        return tuple(
            [
                (place, wish.weight, wish.need.gpus * MILLI)
                for place, wish in enumerate(self._wishes)
                if wish.cpu_milli <= cpu and wish.memory_mib <= memory
            ]
        )

    @property
    def names_speeds(self) -> bool:
        """Somebody said that models of cards differ in speed."""
        return bool(self._speeds.named)

    def slowness(self, kind: int, own: Named = ()) -> int:
        """What work loses on a card of a kind, in thousandths of it; 0: nobody said. `own`: a job's own figures."""
        return self._speeds.loss(sample_of(kind).model, own)

    def slowest(self, kinds: Iterable[int], own: Named = ()) -> int:
        """The same of several cards together."""
        if not own and not self._speeds.named:
            return 0
        return max([self.slowness(kind, own) for kind in kinds], default=0)

    def gap_loss(self, free_milli: int, milli: int) -> int:
        """What taking a share out of a gap destroys beyond the share's own price; 0 where it fits perfectly."""
        gaps = self._gaps
        price = self._prices.get(milli)
        if price is None:
            price = gaps[min(_STEPS, -(-milli // _STEP))]
        return max(0, gaps[free_milli // _STEP] - gaps[(free_milli - milli) // _STEP] - price)


#: Answers of `free_of`, which depend on nothing else.
_FREE: dict[int, int] = {}


def free_of(packed: int) -> int:
    """Idle thousandths of a card: the smaller of compute and memory."""
    known = _FREE.get(packed)
    if known is None:
        if len(_FREE) >= _KNOWN_MAX:
            _FREE.clear()
        known = _FREE[packed] = _free(packed)
    return known


def _free(packed: int) -> int:
    room = Room.unpack(packed)
    match room.tag:
        case 0:
            return 0
        case 3:
            device = sample_of(room.kind)
            slices = device.mig_slices - room.first.bit_count()
            return min(
                slices * MILLI // max(1, device.mig_slices), room.second * MILLI // max(1, device.mig_compute_slices)
            )
        case _:
            return min(room.first, room.second)


def usable_by(need: ResourceNeed, packed: int) -> int:
    """Idle thousandths of a card that work of this kind could use."""
    room = Room.unpack(packed)
    if not room.tag:
        return 0
    device = sample_of(room.kind)
    if need.models and not any(model_matches(device.model, model) for model in need.models):
        return 0
    if device.memory_mib < max(need.card_memory_mib, need.share_memory_mib):
        return 0
    if need.gpus:
        return MILLI if room.tag == 1 and "whole" in device.modes else 0
    if need.mig:
        return _usable_by_profile(need.mig, room, device)
    milli, memory = share_of(device.memory_mib, need)
    if need.isolation == "hard" or (room.tag == 3 and need.isolation == "soft"):
        profile = geometry_of(device).covering(need.share_milli, need.share_memory_mib)
        if profile is not None:
            return _usable_by_profile(profile.name, room, device)
        return MILLI if room.tag == 1 and need.isolation == "hard" else 0
    if room.tag == 3:
        return 0
    fits = room.first >= milli and room.second * device.memory_mib >= memory * MILLI - MILLI
    return min(room.first, room.second) if fits else 0


def _usable_by_profile(name: str, room: Room, device: Device) -> int:
    geometry = geometry_of(device)
    profile = geometry.profiles.get(name)
    if profile is None or room.tag == 2 or "mig" not in device.modes:
        return 0
    mask, compute = (room.first, room.second) if room.tag == 3 else (0, device.mig_compute_slices)
    count = min(geometry.packable(mask, profile), compute // max(1, profile.compute_slices))
    return min(free_of(room.pack()), count * profile.size * MILLI // max(1, device.mig_slices))


def gap_values(shares: dict[int, int]) -> tuple[dict[int, int], list[int]]:
    """(price of each share size, value of a gap by hundredths of a card), a whole card being worth `ONE`.

    The dual of bin packing by price adjustment: each round packs one card with what is dearest at the present prices;
    sizes packed more often than wanted become cheaper, the others dearer. The prices with the best bound are kept.
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
    for width, price in zip(widths, prices, strict=True):
        for gap in range(width, _STEPS + 1):
            value = values[gap - width] + price
            if value > values[gap]:
                values[gap] = value
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
