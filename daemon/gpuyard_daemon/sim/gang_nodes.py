"""GPUs of equal nodes, counted, and where a gang goes: up to a node's GPUs on one node, more on whole nodes and a rest.

The first node that fits is taken. Nothing here knows jobs or time.
"""

from __future__ import annotations


class GangNodes:
    """Free GPUs of each node."""

    __slots__ = ("at", "free", "per_node", "total_free")

    def __init__(self, nodes: int, per_node: int) -> None:
        self.per_node = per_node
        self.free = [per_node] * nodes
        self.total_free = nodes * per_node
        #: How many nodes have so many GPUs free.
        self.at = [0] * per_node + [nodes]

    def clear(self) -> None:
        nodes = len(self.free)
        self.free = [self.per_node] * nodes
        self.total_free = nodes * self.per_node
        self.at = [0] * self.per_node + [nodes]

    def fits(self, gpus: int) -> bool:
        """Whether a gang fits now; only counts are looked at."""
        if gpus > self.total_free:
            return False
        whole, rest = divmod(gpus, self.per_node)
        at = self.at
        if gpus <= self.per_node:
            return any(at[gpus:])
        empty = at[self.per_node]
        if empty < whole:
            return False
        return not rest or empty > whole or any(at[rest : self.per_node])

    def find(self, gpus: int) -> tuple[tuple[int, int], ...] | None:
        """(node, GPUs) for a gang; None if it does not fit."""
        if not self.fits(gpus):
            return None
        if gpus <= self.per_node:
            return ((next(node for node, free in enumerate(self.free) if free >= gpus), gpus),)
        whole, rest = divmod(gpus, self.per_node)
        empty = [node for node, free in enumerate(self.free) if free == self.per_node]
        places = [(node, self.per_node) for node in empty[:whole]]
        if rest:
            broken = [level for level in range(rest, self.per_node) if self.at[level]]
            places.append((self.free.index(broken[0]) if broken else empty[whole], rest))
        return tuple(places)

    def take(self, places: tuple[tuple[int, int], ...]) -> None:
        for node, gpus in places:
            self._set(node, self.free[node] - gpus)

    def give(self, places: tuple[tuple[int, int], ...]) -> None:
        for node, gpus in places:
            self._set(node, self.free[node] + gpus)

    def _set(self, node: int, free: int) -> None:
        before = self.free[node]
        self.at[before] -= 1
        self.at[free] += 1
        self.free[node] = free
        self.total_free += free - before

    def take_counted(self, gpus: int) -> bool:
        """Take room for a gang without saying where (nodes are equal); False if it does not fit."""
        if not self.fits(gpus):
            return False
        at, size = self.at, self.per_node
        self.total_free -= gpus
        if gpus <= size:
            self._drop(gpus, gpus)
            return True
        whole, rest = divmod(gpus, size)
        at[size] -= whole
        at[0] += whole
        if rest:
            self._drop(rest, rest)
        return True

    def _drop(self, least: int, gpus: int) -> None:
        at = self.at
        level = least
        while not at[level]:
            level += 1
        at[level] -= 1
        at[level - gpus] += 1
