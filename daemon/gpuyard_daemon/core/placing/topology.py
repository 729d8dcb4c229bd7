"""How the cards of a node are wired, and where nodes stand: what makes some choices of cards better than others.

Within a node: NVLinks. Cards of one replica that talk over links are worth more than cards that talk over the bus, and
a choice that leaves the rest linked is worth more than one that cuts it. Then PCIe: cards behind one switch before
those behind one bridge, and those before cards of two sockets. Nodes whose cards are all wired alike (every card linked
to every other; no link known, and the same between all on PCIe) have no wiring here: any choice is as good as another.

Between nodes: the labels `rack` and `spine`, where an operator set them. Knows no work and no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb
from typing import Final, NamedTuple, TypeAlias

from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device

RACK_LABEL: Final = "rack"
SPINE_LABEL: Final = "spine"
#: How near two cards are on PCIe, by what lies between them.
_NEARNESS: Final = {"same-board": 5, "same-switch": 4, "switches": 3, "host-bridge": 2, "numa-node": 1, "system": 0}
#: Choices looked at one by one (half of thirteen cards); beyond it cards are taken greedily, best linked first: ten
#: thousand choices would take a turn half a second.
_CHOICES_MAX: Final = 2_000


#: Between each two cards, by position.
Matrix: TypeAlias = tuple[tuple[int, ...], ...]


class Pick(NamedTuple):
    """Some cards of a node, by position."""

    positions: tuple[int, ...]
    #: Each reaches each other over links.
    linked: bool


class Wiring:
    """The links between the cards of one node, and how near they are on PCIe."""

    __slots__ = ("_known", "has_links", "links", "near")

    def __init__(self, links: Matrix, near: Matrix) -> None:
        #: Numbers of links.
        self.links = links
        self.has_links = any(map(any, links))
        #: `_NEARNESS`.
        self.near = near
        self._known: dict[tuple[tuple[int, ...], int], Pick] = {}

    def pick(self, idle: tuple[int, ...], count: int) -> Pick:
        """The best `count` of these cards: linked together, by most links, cutting off the fewest of the others; then
        the same of what is near on PCIe."""
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

    def _rank(self, idle: tuple[int, ...], cards: tuple[int, ...]) -> tuple[bool, int, int, int, int, tuple[int, ...]]:
        others = [card for card in idle if card not in cards]
        return (
            not self._is_linked(cards),
            -_within(self.links, cards),
            _between(self.links, cards, others),
            -_within(self.near, cards),
            _between(self.near, cards, others),
            cards,
        )

    def _greedy(self, idle: tuple[int, ...], count: int) -> tuple[int, ...]:
        best: tuple[int, ...] = ()
        most = (-1, -1)
        for first in idle:
            chosen = [first]
            while len(chosen) < count:
                left = [card for card in idle if card not in chosen]
                chosen.append(max(left, key=lambda card: (*self._to(card, chosen), -card)))
            inside = _within(self.links, chosen), _within(self.near, chosen)
            if inside > most:
                best, most = tuple(sorted(chosen)), inside
        return best

    def _to(self, card: int, others: Sequence[int]) -> tuple[int, int]:
        return _between(self.links, (card,), others), _between(self.near, (card,), others)

    def _is_linked(self, cards: Sequence[int]) -> bool:
        """Whether links lead from each of these cards to each other, over the others if need be; yes where none are."""
        if not cards or not self.has_links:
            return True
        reached, frontier = {cards[0]}, [cards[0]]
        while frontier:
            row = self.links[frontier.pop()]
            for card in cards:
                if row[card] and card not in reached:
                    reached.add(card)
                    frontier.append(card)
        return len(reached) == len(cards)


def _within(matrix: Matrix, cards: Sequence[int]) -> int:
    return sum([matrix[a][b] for a, b in combinations(cards, 2)])


def _between(matrix: Matrix, cards: Sequence[int], others: Sequence[int]) -> int:
    return sum([matrix[a][b] for a in cards for b in others])


_WIRINGS: dict[tuple[Matrix, Matrix], Wiring] = {}


def wiring_of(devices: Sequence[Device]) -> Wiring | None:
    """The wiring of a node's cards; None where every choice of cards is as good as another."""
    links = _matrix(devices, [device.nvlinks for device in devices])
    if not _is_even(links):
        near = _nearness(devices)
    elif any(map(any, links)):
        # All are linked to all: what lies between them on PCIe is not asked.
        return None
    elif _is_even(near := _nearness(devices)):
        return None
    wiring = _WIRINGS.get((links, near))
    if wiring is None:
        wiring = _WIRINGS[links, near] = Wiring(links, near)
    return wiring


def _nearness(devices: Sequence[Device]) -> Matrix:
    peers = [[(uuid, _NEARNESS.get(word, 0)) for uuid, word in device.pcie_peers] for device in devices]
    return _matrix(devices, peers)


def _matrix(devices: Sequence[Device], peers: Sequence[Iterable[tuple[str, int]]]) -> Matrix:
    place = {device.uuid: position for position, device in enumerate(devices)}
    matrix = [[0] * len(devices) for _ in devices]
    for position, told in enumerate(peers):
        for uuid, value in told:
            other = place.get(uuid)
            if other is not None and other != position:
                # Either card may be the one that tells.
                matrix[position][other] = matrix[other][position] = max(value, matrix[position][other])
    return tuple([tuple(row) for row in matrix])


def _is_even(matrix: Matrix) -> bool:
    return len({value for position, row in enumerate(matrix) for value in row[:position]}) <= 1


def rack_of(inventory: Inventory | None) -> tuple[str, str]:
    """(spine, rack) of a node; ("", "") where nobody said."""
    if inventory is None:
        return "", ""
    labels = dict(inventory.labels)
    return labels.get(SPINE_LABEL, ""), labels.get(RACK_LABEL, "")
