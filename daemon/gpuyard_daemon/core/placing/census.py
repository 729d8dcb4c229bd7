"""Nodes that are in the same state, counted: whoever asks about all nodes judges one of each kind.

A node's kind is everything that feasibility reads of it: its condition (`capacity`), its state, and whose its shared
cards are. In a yard of thousands of nodes there are some hundred kinds.

Derived and read-only: nothing here matters to a decision. A change of a node costs one comparison, made when somebody
asks next.
"""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from typing import TypeAlias

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_protocol.names import NodeId

_Key: TypeAlias = tuple[Hashable, ...]


class NodeKind:
    """Nodes that fit alike."""

    __slots__ = ("nodes", "space")

    def __init__(self, space: NodeSpace) -> None:
        #: A copy of one of them, that stays as it is.
        self.space = space
        self.nodes: dict[NodeId, None] = {}


class Census:
    """The kinds of nodes in a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kinds: dict[_Key, NodeKind] = {}
        #: Where each node was counted, and the version of its space then.
        self._places: dict[NodeId, tuple[int, _Key]] = {}
        #: How far of the pool's changes is counted; -1: nothing yet.
        self._read_to = -1

    def kinds(self) -> list[NodeKind]:
        """All kinds there are, in no order that means anything."""
        self._catch_up()
        return list(self._kinds.values())

    def _catch_up(self) -> None:
        pool = self._pool
        if self._read_to == pool.changes_made:
            return
        changed = pool.changed_since(self._read_to)
        for space in pool.spaces.values() if changed is None else changed:
            if space.node.id in pool.spaces:
                self._count(space)
        self._read_to = pool.changes_made
        for node in self._places.keys() - pool.spaces.keys() if len(self._places) != len(pool.spaces) else ():
            self._uncount(node)

    def _count(self, space: NodeSpace) -> None:
        node = space.node.id
        place = self._places.get(node)
        if place is not None and place[0] == space.version:
            return
        key = _key_of(space)
        if place is not None and place[1] != key:
            self._uncount(node)
        self._places[node] = (space.version, key)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = NodeKind(_specimen(space))
        kind.nodes[node] = None

    def _uncount(self, node: NodeId) -> None:
        _, key = self._places.pop(node)
        nodes = self._kinds[key].nodes
        del nodes[node]
        if not nodes:
            del self._kinds[key]


def _key_of(space: NodeSpace) -> _Key:
    shared = [(card.domain, card.look) for card in space.cards if card.domain]
    if space.wiring is None:
        shared.sort()
    # Where something is claimed it matters who holds what: such a node is a kind of its own.
    alone = space.node.id if space.claims else ""
    return space.condition, space.node.state, bool(space.node.cordoned_by), alone, tuple(shared)


def _specimen(space: NodeSpace) -> NodeSpace:
    twin = space.copy(with_holders=bool(space.claims))
    # The node itself goes on to other states.
    twin.node = copy(space.node)
    return twin
