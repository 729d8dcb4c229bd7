"""Where one replica goes: best fit over all nodes, found without looking at all nodes.

For each shape that is waiting, `Candidates` keeps a heap of (left over, node number): the nodes it fits, snuggest
first. When a node changes, only that node is judged again, and only for shapes that ask. The choice is the minimum
over all nodes whichever way it was found, so it depends on the state alone and not on what happened to be looked at.

Cost: one judgement per changed node and shape that asks, and a heap step. A shape's first question judges every node.
"""

from __future__ import annotations

import heapq

from gpuyard_daemon.core.capacity import NodeSpace, Pool
from gpuyard_daemon.core.feasibility import Shape, judge


class Candidates:
    """The nodes that one shape fits now, snuggest first."""

    __slots__ = ("_heap", "_read_to", "_spanning", "shape")

    def __init__(self, shape: Shape, *, spanning: bool = False) -> None:
        self.shape = shape
        self._spanning = spanning
        #: (left over, node number, the space's version then, space). Entries of an older version no longer count.
        self._heap: list[tuple[int, int, int, NodeSpace]] = []
        #: How far of the pool's changes, counted from the beginning, is in the heap; -1: nothing yet.
        self._read_to = -1

    def best(self, pool: Pool) -> NodeSpace | None:
        """The node where the least is left over; of equals the one known longest. None: it fits nowhere now."""
        self._catch_up(pool)
        heap = self._heap
        while heap and heap[0][2] != heap[0][3].version:
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def in_order(self, pool: Pool) -> list[NodeSpace]:
        """All nodes it fits, snuggest first."""
        self._catch_up(pool)
        self._heap = [entry for entry in self._heap if entry[2] == entry[3].version]
        self._heap.sort(key=lambda entry: entry[:2])
        return list(dict.fromkeys([entry[3] for entry in self._heap]))

    def _catch_up(self, pool: Pool) -> None:
        total = pool.changes_made
        if self._read_to == total:
            return
        heap = self._heap
        changed = pool.changed_since(self._read_to)
        if changed is None or len(heap) > 64 + 4 * len(pool.spaces):
            heap.clear()
            changed = list(pool.spaces.values())
        shape, spanning = self.shape, self._spanning
        for space in changed:
            left = judge(space, shape, spanning=spanning)
            if type(left) is int:
                heapq.heappush(heap, (left, space.node.number, space.version, space))
        self._read_to = total
