"""How the cards of a node are wired, and where nodes stand: what makes some choices of cards better than others.

Within a node: NVLinks. Cards of one replica that talk over links are worth more than cards that talk over the bus, and
a choice that leaves the rest linked is worth more than one that cuts it. Nodes whose cards are all wired alike (every
card linked to every other, or no link known) have no wiring here: any choice is as good as another.

Between nodes: the labels `rack` and `spine`, where an operator set them. Knows no work and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Final, NamedTuple

from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device

RACK_LABEL: Final = "rack"
SPINE_LABEL: Final = "spine"
#: Choices looked at one by one; beyond it cards are taken greedily, best linked first.
_CHOICES_MAX: Final = 20_000


class Pick(NamedTuple):
    """Some cards of a node, by position."""

    positions: tuple[int, ...]
    #: Each reaches each other over links.
    linked: bool


class Wiring:
    """The links between the cards of one node."""

    __slots__ = ("_known", "links")

    def __init__(self, links: tuple[tuple[int, ...], ...]) -> None:
        #: Number of links between two cards, by position.
        self.links = links
        self._known: dict[tuple[tuple[int, ...], int], Pick] = {}

    def pick(self, idle: tuple[int, ...], count: int) -> Pick:
        """The best `count` of these cards: linked together, by most links, cutting off the fewest of the others."""
        key = (idle, count)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._pick(idle, count)
        return known

    def _pick(self, idle: tuple[int, ...], count: int) -> Pick:
        if comb(len(idle), count) <= _CHOICES_MAX:
            chosen = min(combinations(idle, count), key=lambda cards: self._rank(idle, cards))
        else:
            chosen = self._greedy(idle, count)
        return Pick(chosen, self._is_linked(chosen))

    def _rank(self, idle: tuple[int, ...], cards: tuple[int, ...]) -> tuple[bool, int, int, tuple[int, ...]]:
        links = self.links
        inside = sum([links[a][b] for a, b in combinations(cards, 2)])
        cut = sum([links[a][b] for a in cards for b in idle if b not in cards])
        return (not self._is_linked(cards), -inside, cut, cards)

    def _greedy(self, idle: tuple[int, ...], count: int) -> tuple[int, ...]:
        best: tuple[int, ...] = ()
        most = -1
        for first in idle:
            chosen = [first]
            while len(chosen) < count:
                left = [card for card in idle if card not in chosen]
                chosen.append(max(left, key=lambda card: (sum([self.links[card][other] for other in chosen]), -card)))
            inside = sum([self.links[a][b] for a, b in combinations(chosen, 2)])
            if inside > most:
                best, most = tuple(sorted(chosen)), inside
        return best

    def _is_linked(self, cards: Sequence[int]) -> bool:
        """Whether links lead from each of these cards to each other, over the others if need be."""
        if not cards:
            return True
        reached, frontier = {cards[0]}, [cards[0]]
        while frontier:
            row = self.links[frontier.pop()]
            for card in cards:
                if row[card] and card not in reached:
                    reached.add(card)
                    frontier.append(card)
        return len(reached) == len(cards)


_WIRINGS: dict[tuple[tuple[int, ...], ...], Wiring] = {}


def wiring_of(devices: Sequence[Device]) -> Wiring | None:
    """The wiring of a node's cards; None where every choice of cards is as good as another."""
    place = {device.uuid: position for position, device in enumerate(devices)}
    matrix = [[0] * len(devices) for _ in devices]
    for position, device in enumerate(devices):
        for uuid, count in device.nvlinks:
            other = place.get(uuid)
            if other is not None and other != position:
                # Either card may be the one that tells.
                matrix[position][other] = matrix[other][position] = max(count, matrix[position][other])
    links = tuple([tuple(row) for row in matrix])
    if len({count for position, row in enumerate(links) for count in row[:position]}) <= 1:
        return None
    wiring = _WIRINGS.get(links)
    if wiring is None:
        wiring = _WIRINGS[links] = Wiring(links)
    return wiring


def rack_of(inventory: Inventory | None) -> tuple[str, str]:
    """(spine, rack) of a node; ("", "") where nobody said."""
    if inventory is None:
        return "", ""
    labels = dict(inventory.labels)
    return labels.get(SPINE_LABEL, ""), labels.get(RACK_LABEL, "")
