"""A pool as it would be if some work were gone and other work were there: for plans that may be dropped.

Nodes are copied when they are first changed; the pool itself never is. Every change can be taken back to a mark, so a
search may try, look and go back without copying anything twice. Nothing is committed from here: what a plan leads to
goes into the state by facts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Reason, Shape, carve, judge
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Assignment
from gpuyard_protocol.names import AssignmentKey, JobId, NodeId, Tenant
from gpuyard_protocol.resources import Partition, devices_of


class _Change(NamedTuple):
    """One step, with what is needed to take it back."""

    space: NodeSpace
    key: AssignmentKey
    partition: Partition
    tenant: Tenant
    cpu_milli: int
    memory_mib: int
    #: True: it took; False: it gave.
    took: bool


class PoolTrial:
    """A copy-on-write view of a pool."""

    __slots__ = ("_changes", "_spaces", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._spaces: dict[NodeId, NodeSpace] = {}
        self._changes: list[_Change] = []

    def space(self, node: NodeId) -> NodeSpace:
        """A node as it is in the trial. Only to look at: change it through `without` and `take`."""
        return self._spaces.get(node) or self.pool.spaces[node]

    @property
    def touched(self) -> tuple[NodeId, ...]:
        """Nodes that were changed, in the order in which they first were."""
        return tuple(self._spaces)

    # --- changing ----------------------------------------------------------------------------------------------------

    def without(self, assignments: Iterable[Assignment]) -> PoolTrial:
        """Give back what live assignments hold."""
        for assignment in assignments:
            if assignment.is_live:
                space = self._own(assignment.node)
                tenant = next((space.by_uuid[uuid].domain for uuid in devices_of(assignment.partition)), "")
                cpu_milli, memory_mib = space.amounts[assignment.key]
                space.give(assignment.key, assignment.partition)
                self._changes.append(
                    _Change(space, assignment.key, assignment.partition, tenant, cpu_milli, memory_mib, took=False)
                )
        return self

    def take(
        self, job: JobId, replica: int, placement: Placement, tenant: Tenant, cpu_milli: int, memory_mib: int
    ) -> None:
        """Let a replica of a job hold a place."""
        space = self._own(placement.node)
        key = AssignmentKey(job, 0, replica)
        space.take(key, placement.partition, tenant, cpu_milli, memory_mib)
        self._changes.append(_Change(space, key, placement.partition, tenant, cpu_milli, memory_mib, took=True))

    def leave(self, job: JobId, placements: Iterable[Placement]) -> None:
        """Give back what a job took in this trial."""
        for replica, placement in enumerate(placements):
            space = self._own(placement.node)
            key = AssignmentKey(job, 0, replica)
            tenant = next((space.by_uuid[uuid].domain for uuid in devices_of(placement.partition)), "")
            cpu_milli, memory_mib = space.amounts[key]
            space.give(key, placement.partition)
            self._changes.append(_Change(space, key, placement.partition, tenant, cpu_milli, memory_mib, took=False))

    def restore(self, assignment: Assignment, tenant: Tenant, cpu_milli: int, memory_mib: int) -> None:
        """Let an assignment hold again what `without` gave back."""
        space = self._own(assignment.node)
        space.take(assignment.key, assignment.partition, tenant, cpu_milli, memory_mib)
        self._changes.append(
            _Change(space, assignment.key, assignment.partition, tenant, cpu_milli, memory_mib, took=True)
        )

    def mark(self) -> int:
        """A point to come back to with `undo`."""
        return len(self._changes)

    def undo(self, mark: int = 0) -> None:
        """Take back every change since a mark."""
        while len(self._changes) > mark:
            change = self._changes.pop()
            if change.took:
                change.space.give(change.key, change.partition)
            else:
                change.space.take(change.key, change.partition, change.tenant, change.cpu_milli, change.memory_mib)

    def _own(self, node: NodeId) -> NodeSpace:
        space = self._spaces.get(node)
        if space is None:
            space = self._spaces[node] = self.pool.spaces[node].copy(with_holders=True)
        return space

    # --- asking ------------------------------------------------------------------------------------------------------

    def judge(self, node: NodeId, shape: Shape, *, spanning: bool = False, owner: JobId = 0) -> int | Reason:
        """Whether one replica fits a node in the trial."""
        return judge(self.space(node), shape, spanning=spanning, owner=owner)

    def put(self, node: NodeId, shape: Shape, job: JobId, replica: int = 0, *, spanning: bool = False) -> Placement:
        """Place one replica on a node that `judge` said it fits, and hold it there."""
        partition = carve(self.space(node), shape, spanning=spanning, owner=job)
        placement = Placement(node, partition)
        self.take(job, replica, placement, shape.domain, shape.need.cpu_milli, shape.need.memory_mib)
        return placement

    def place(self, shape: Shape, job: JobId, nodes: Iterable[NodeId]) -> tuple[Placement, ...] | None:
        """Put all replicas of a job on some of these nodes, the snuggest first, and hold them; None: nothing held.

        On one node if it takes them all, else over as few as possible.
        """
        order = list(dict.fromkeys(nodes))
        start = self.mark()
        best: tuple[int, int, NodeId] | None = None
        counts: list[tuple[int, int, int, NodeId]] = []
        for node in order:
            left, room = self._room(shape, job, node, spanning=False)
            number = self.space(node).node.number
            if room == shape.replicas and (best is None or (left, number) < best[:2]):
                best = (left, number, node)
            if shape.replicas > 1:
                left, room = self._room(shape, job, node, spanning=True)
            counts.append((-room, left, number, node))
        if shape.need.within and best is None:
            counts = self._tightest(shape, counts)
        if best is not None:
            return tuple([self.put(best[2], shape, job, replica) for replica in range(shape.replicas)])
        if shape.replicas == 1:
            return None
        placements: list[Placement] = []
        for negative_room, _, _, node in sorted(counts):
            for _ in range(min(-negative_room, shape.replicas - len(placements))):
                placements.append(self.put(node, shape, job, len(placements), spanning=True))
        if len(placements) == shape.replicas:
            return tuple(placements)
        self.undo(start)
        return None

    def _tightest(self, shape: Shape, counts: list[tuple[int, int, int, NodeId]]) -> list[tuple[int, int, int, NodeId]]:
        """Of nodes that may be in one gang together: those that take it all, and least more."""
        domains = self.pool.domains(shape.need.within)
        rooms: dict[int, int] = {}
        for negative_room, _, number, _ in counts:
            domain = int(domains[number - 1])
            rooms[domain] = rooms.get(domain, 0) - negative_room
        enough = [(room, domain) for domain, room in rooms.items() if room >= shape.replicas]
        if not enough:
            return []
        chosen = min(enough)[1]
        return [each for each in counts if int(domains[each[2] - 1]) == chosen]

    def _room(self, shape: Shape, job: JobId, node: NodeId, *, spanning: bool) -> tuple[int, int]:
        """(left over after the last, how many replicas) a node takes; the trial is as before afterwards."""
        mark, room, last = self.mark(), 0, 0
        while room < shape.replicas:
            left = self.judge(node, shape, spanning=spanning, owner=job)
            if type(left) is not int:
                break
            self.put(node, shape, job, room, spanning=spanning)
            last, room = left, room + 1
        self.undo(mark)
        return last, room
