"""Which of the nodes that fit is best for a replica, as one integer: smaller goes first.

In order of weight:
1. a way that wastes more of the card than the wish's first choice would, and promising more compute than there is;
2. cards of one replica that do not reach each other over links, where others would;
3. what a share destroys of the card's gap, in twentieths of a card (`DemandMix.gap_loss`), and a MIG instance of the
   places of other profiles;
4. growth of what the mix could not use on the node (`DemandMix.unusable`), with what shares that lean on the same cost
   each other and what is lost on a slower model of card, in hundredths on an S-curve: fine near 0, coarse far from it.
   The rounding matters: unrounded, tiny differences spread work over nodes that are all the same;
5. what is left free on the node: fuller nodes first, so that whole nodes drain; then on the card, then of the CPUs.
Ties go to the node known longest; `placement` does that.

3 and 4 were found by measurement on fills and churn of a production trace: lexicographic beat every weighted sum. For
MIG instances a weighted sum did: at 90 % load it left half as much demand waiting as the curve or the first fit.
A score depends on the node's condition, the shape and the mix alone, so nodes in equal condition share it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

from gpuyard_daemon.core.placing.capacity import Measure, NodeSpace
from gpuyard_daemon.core.placing.feasibility import Reason, Shape, could_go, judge, modes_for, whole_cards
from gpuyard_daemon.core.placing.fragmentation import ONE, DemandMix, free_of
from gpuyard_daemon.core.placing.partitions import NO_ROOM, Card, fit, mode_for, profile_for, slices_at
from gpuyard_protocol.resources import GPU_LOADS, GpuLoad, Mode, share_of
from gpuyard_protocol.units import MILLI

#: Losses below a twentieth of a card count as none.
_LOSS_QUANTUM: Final = ONE // 20
#: Room in the integer for each term, the weightiest first: 12 + 1 + 6 + 7 + 16 + 10 + 10 bits.
_TIER_MAX, _LOSS_MAX, _GROWTH_MAX, _LEFT_MAX = 4095, 63, 127, 65_535

#: Gains in thousandths of a GPU from which the S-curve 100 / (1 + e^-gain) reaches 1, 2, … 99.
_CURVE: Final = tuple([round(MILLI * math.log(level / (100 - level))) * ONE for level in range(1, 100)])

#: Larger than every score.
UNFIT: Final = (1 << 63) - 1


#: What two shares on one card cost each other, in thousandths of it: leaning on the same, and on different things.
_SAME_LOAD, _OTHER_LOAD = 150, 30
#: Of MIG instances, in thousandths of a card: the price of cutting one more, and of leaving all of it free; the step.
_CUT_PRICE, _LEFT_PRICE, _INSTANCE_STEP = 300, 100, 16
_CUT_CARD, _FRESH_CARD = 1, 2
#: Bits below growth, and how much worse in growth and loss a node may be where work is warm: about a third of a card.
_BELOW_GROWTH: Final = 36
_WARM_WORTH: Final = 8


#: Looks of cards that a shape remembers its ways for.
_LOOKS_MAX: Final = 4096


class Choice(NamedTuple):
    """The best way to serve a replica on one node."""

    #: Smaller is better.
    score: int
    #: Positions of the cards; () for work without.
    cards: tuple[int, ...]


class Way(NamedTuple):
    """One way to serve it: what it costs beyond growth, and the room it leaves."""

    tier: int
    unlinked: bool
    loss: int
    #: What neighbours that lean on the same would cost, in thousandths of a card.
    strife: int
    #: Taken of what is free on the cards, and left on the chosen one.
    taken: int
    card_left: int
    #: What each of the cards is then.
    room_after: int
    #: 0: it is no MIG instance; else what the card was before.
    of_mig: int = 0
    #: What a switch of MIG mode costs, in thousandths of a card.
    switch: int = 0


_WITHOUT_CARDS: Final = Way(0, False, 0, 0, 0, 0, NO_ROOM)


def choose(mix: DemandMix, space: NodeSpace, shape: Shape, *, spanning: bool = False, owner: int = 0) -> Choice | None:
    """The best way to put one replica on a node, as its claims leave it; None where it does not fit."""
    need = shape.need
    if need.is_share or need.mig:
        # Whether some card takes it is found out below.
        if could_go(space, shape, owner=owner) is not None:
            return None
    elif isinstance(judge(space, shape, spanning=spanning, owner=owner), Reason):
        return None
    if space.claims:
        space = space.beside_claims(owner)
    ways = _ways(space, shape, spanning)
    if not ways:
        return None
    cpu, memory = space.cpu_free_milli, space.memory_free_mib
    rooms, idle, usable, before = _measured(mix, space)
    inventory = space.node.inventory
    cpu_left = (cpu - need.cpu_milli) * (MILLI - 1) // inventory.cpu_milli if inventory and inventory.cpu_milli else 0
    best: tuple[int, tuple[int, ...]] | None = None
    of_speed = bool(need.speeds or mix.names_speeds)
    fitting = mix.fitting(cpu - need.cpu_milli, memory - need.memory_mib)
    for way, cards in ways:
        left = idle - way.taken
        if len(cards) == 1:
            gain = before - mix.waste_with(fitting, usable, rooms[cards[0]], way.room_after, left)
        else:
            then = _usable_after(mix, usable, rooms, way.room_after, cards)
            gain = before - mix.waste(cpu - need.cpu_milli, memory - need.memory_mib, then, left)
        slow = mix.slowest([space.cards[position].kind for position in cards], need.speeds) if of_speed else 0
        gain -= (slow * way.taken // MILLI + way.strife + way.switch) * ONE
        growth = _growth_of_instance(gain, way) if way.of_mig else _growth(gain)
        loss = min(_LOSS_MAX, (mix.gap_loss(way.loss >> 16, way.loss & 0xFFFF) if way.loss else 0) // _LOSS_QUANTUM)
        score = min(_TIER_MAX, way.tier) << 1 | way.unlinked
        score = (score << 6 | loss) << 7 | growth
        score = score << 16 | min(_LEFT_MAX, left + way.switch)
        score = (score << 10 | min(1023, way.card_left)) << 10 | max(0, min(1023, cpu_left))
        if best is None or score < best[0]:
            best = score, cards
    return Choice(*best) if best is not None else None


def _measured(mix: DemandMix, space: NodeSpace) -> Measure:
    """What the mix makes of a node as it is: asked for by every kind of request that is scored there."""
    known = space.measured
    if known is None or known[0] is not mix or known[1] != space.version:
        rooms = [card.room for card in space.cards]
        idle, usable = sum(map(free_of, rooms)), mix.usable(rooms)
        before = mix.waste(space.cpu_free_milli, space.memory_free_mib, usable, idle)
        known = space.measured = (mix, space.version, (rooms, idle, usable, before))
    return known[2]


def _growth(gain: int) -> int:
    return _GROWTH_MAX - bisect_right(_CURVE, gain)


def _growth_of_instance(gain: int, way: Way) -> int:
    """The same for a MIG instance, in even steps, with a price for cutting one more card and for what is left on it."""
    fresh = _CUT_PRICE if way.of_mig == _FRESH_CARD else 0
    cost = fresh + _LEFT_PRICE * way.card_left // MILLI - gain // ONE
    return max(0, min(_GROWTH_MAX, _GROWTH_MAX // 2 + cost // _INSTANCE_STEP))


def _usable_after(
    mix: DemandMix, usable: Sequence[int], rooms: list[int], room_after: int, cards: tuple[int, ...]
) -> Sequence[int]:
    """What each wish could use once these cards have so much room left."""
    found: Sequence[int] = usable
    after = mix.usable_on(room_after)
    for position in cards:
        found = [each - old + new for each, old, new in zip(found, mix.usable_on(rooms[position]), after, strict=True)]
    return found


def about_as_good(score: int, best: int) -> bool:
    """Whether a node's score is so near the best that what is warm there decides."""
    return (score >> _BELOW_GROWTH) - (best >> _BELOW_GROWTH) <= _WARM_WORTH


def _ways(space: NodeSpace, shape: Shape, spanning: bool) -> list[tuple[Way, tuple[int, ...]]]:
    """Ways to serve a replica, one for each state of the node that they lead to, each with its cards by position."""
    need = shape.need
    if not need.wants_gpu:
        return [(_WITHOUT_CARDS, ())]
    _, positions = shape.eligible(space)
    if need.gpus:
        kinds = {space.cards[position].kind for position in positions}
        of_kinds = [tuple([p for p in positions if space.cards[p].kind == kind]) for kind in sorted(kinds)]
        some = [positions, *of_kinds] if len(kinds) > 1 else [positions]
        return [whole for each in some if (whole := _whole_on(space, each, need.gpus)) is not None]
    ways: list[tuple[Way, tuple[int, ...]]] = []
    modes, domain, are_all = modes_for(space, spanning=spanning), shape.domain, len(positions) == len(space.cards)
    # Cards that look alike serve alike, so what was found out about one is good for all.
    known = shape.ways_on(modes)
    for look, owner, position, card in space.faces:
        if (not owner or owner == domain) and (are_all or position in positions):
            way = known[look] if look in known and not card.keeps_mode else _find_way(known, look, card, shape, modes)
            if way is not None:
                ways.append((way, (position,)))
    return ways


def is_way_on(space: NodeSpace, shape: Shape, *, spanning: bool = False) -> bool:
    """Whether some card of a node would take a share or MIG instance, as far as the cards alone say."""
    domain, modes = shape.domain, modes_for(space, spanning=spanning)
    known = shape.ways_on(modes)
    for look, owner, _, card in space.faces:
        if not owner or owner == domain:
            way = known[look] if look in known and not card.keeps_mode else _find_way(known, look, card, shape, modes)
            if way is not None:
                return True
    return False


def _find_way(known: dict[int, Way | None], look: int, card: Card, shape: Shape, modes: tuple[Mode, ...]) -> Way | None:
    if len(known) >= _LOOKS_MAX:
        known.clear()
    way = known[look] = _way_on(card, shape, modes)
    return way


def _whole_on(space: NodeSpace, positions: tuple[int, ...], count: int) -> tuple[Way, tuple[int, ...]] | None:
    """So many of these cards whole; None if they are too few."""
    if sum([1 for p in positions if space.cards[p].mode == "idle" and space.cards[p].takes_work]) < count:
        return None
    cards, linked = whole_cards(space, positions, count)
    switch = sum([space.cards[position].switch_milli("whole") for position in cards])
    return Way(0, not linked, 0, 0, count * MILLI, 0, NO_ROOM, switch=switch), cards


def _way_on(card: Card, shape: Shape, modes: tuple[Mode, ...]) -> Way | None:
    """Serving a share or MIG instance on one card; None if it has no room."""
    need = shape.need
    if fit(card, need, shape.domain, modes, shape.timeslice_milli_max) < 0:
        return None
    mode = mode_for(card, need, modes)
    after = NO_ROOM
    tier = loss = strife = of_mig = 0
    match mode:
        case "mig":
            tier = 1 if need.isolation == "soft" and not need.mig else 0
            profile = profile_for(card, need)
            if profile is None:
                return None
            start = card.geometry.free_start(card.mask, profile)
            mask = slices_at(start, profile.size)
            of_mig = _FRESH_CARD if card.mode == "idle" else _CUT_CARD
            after = card.room_after(mask=mask, slices=profile.compute_slices)
        case "whole":
            tier = 1
        case _:
            milli, memory = share_of(card.device.memory_mib, need)
            over = card.milli + milli - MILLI
            if mode == "timeslice" and over > 0:
                tier = 2 + over
            after = card.room_after(milli=milli, memory_mib=memory)
            loss = _gap(card, milli, memory)
            strife = _strife(card, need.gpu_load) if need.gpu_load else 0
    left = free_of(after)
    switch = card.switch_milli(mode) if mode is not None else 0
    return Way(tier, False, loss, strife, free_of(card.room) - left, left, after, of_mig, switch)


def _strife(card: Card, load: GpuLoad) -> int:
    """What a share that leans on this costs itself and its neighbours that said theirs."""
    cost = 0
    for other, count in zip(GPU_LOADS, card.loads, strict=True):
        cost += count * (_SAME_LOAD if other == load != "light" else _OTHER_LOAD)
    return cost


def _gap(card: Card, milli: int, memory_mib: int) -> int:
    """(the card's gap, what a share takes of it), packed: each the larger part of compute and memory."""
    size = max(1, card.device.memory_mib)
    gap = min(MILLI - card.milli, (size - card.memory_mib) * MILLI // size)
    left = min(MILLI - card.milli - milli, (size - card.memory_mib - memory_mib) * MILLI // size)
    return gap << 16 | gap - left if 0 <= left < gap else 0


def round_rank(gpus: int) -> int:
    """Order within one round among equals in priority: gangs of cards first, else as they came."""
    return 0 if gpus > 1 else 1
