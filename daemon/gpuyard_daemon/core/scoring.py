"""Which of the nodes that fit is best for a replica, as one integer: smaller goes first.

In order of weight:
1. what the share destroys of the card's gap, in twentieths of a card (`DemandMix.gap_loss`);
2. growth of what the mix could not use on the node (`DemandMix.unusable`), in hundredths on an S-curve: fine near 0,
   coarse far from it. The rounding matters: unrounded, tiny differences spread work over nodes that are all the same;
3. what is left free on the node: fuller nodes first, so that whole nodes drain.
Ties go to the node known longest; the caller's heap does that by node number.

The first two were found by measurement on fills and churn of a production trace: lexicographic beat every weighted sum.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

from gpuyard_daemon.core.fragmentation import ONE, DemandMix
from gpuyard_protocol.units import MILLI

#: Losses below a twentieth of a card count as none.
_LOSS_QUANTUM: Final = ONE // 20
#: Room in the integer for each lesser term.
_LEFT_ROOM: Final = 1 << 20
_GROWTH_ROOM: Final = 128

#: Gains in thousandths of a GPU from which the S-curve 100 / (1 + e^-gain) reaches 1, 2, … 99.
_CURVE: Final = tuple([round(MILLI * math.log(level / (100 - level))) * ONE for level in range(1, 100)])


class Choice(NamedTuple):
    """The best way to serve a request on one node."""

    #: Smaller is better.
    score: int
    #: Positions of the cards.
    cards: tuple[int, ...]


def best_choice(
    mix: DemandMix, model: str, cpu_free_milli: int, cards_free: Sequence[int], cpu_milli: int, gpus: int, milli: int
) -> Choice:
    """Score a request on a node on which it fits, and say which cards it would take.

    `cards_free`: free thousandths of each card; `gpus` cards with `milli` of each are wanted (0 GPUs: CPU only).
    """
    before = mix.unusable(model, cpu_free_milli, cards_free)
    left = min(_LEFT_ROOM - 1, sum(cards_free) - gpus * milli)
    best: Choice | None = None
    for cards in _ways(cards_free, gpus, milli):
        after = list(cards_free)
        loss = 0
        for card in cards:
            if milli < MILLI:
                loss = mix.gap_loss(after[card], milli) // _LOSS_QUANTUM
            after[card] -= milli
        gain = before - mix.unusable(model, cpu_free_milli - cpu_milli, after)
        growth = _GROWTH_ROOM - 1 - bisect_right(_CURVE, gain)
        score = (loss * _GROWTH_ROOM + growth) * _LEFT_ROOM + left
        if best is None or score < best.score:
            best = Choice(score, cards)
    if best is None:
        raise ValueError("the request does not fit the node")
    return best


def _ways(cards_free: Sequence[int], gpus: int, milli: int) -> list[tuple[int, ...]]:
    """Choices of cards, one for each state that they lead to."""
    if not gpus:
        return [()]
    if milli == MILLI:
        idle = [position for position, free in enumerate(cards_free) if free == MILLI]
        return [tuple(idle[:gpus])] if len(idle) >= gpus else []
    seen: set[int] = set()
    ways: list[tuple[int, ...]] = []
    for position, free in enumerate(cards_free):
        if free >= milli and free not in seen:
            seen.add(free)
            ways.append((position,))
    return ways


def round_rank(gpus: int) -> int:
    """Order within one round among equals in priority: gangs of cards first, else as they came."""
    return 0 if gpus > 1 else 1
