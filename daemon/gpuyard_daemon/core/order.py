"""Which job next: priority, then first come, by job number; what does not fit lets the others pass.

Jobs of equal shape stand in one queue. The queue whose head is first goes first; a queue whose head fits nowhere is
blocked as a whole, and looked at again only when a node changed; one whose tenant is at its limit is held back until
the tenant holds less. So neither a long queue nor a full yard makes a turn slow: the work is per shape and changed
node, not per waiting job.

Derived from `Cluster.waiting`, read through its list of newcomers; nothing here is saved, and nothing here may matter
to the outcome: which queues are blocked follows from the state.
"""

from __future__ import annotations

import heapq
from typing import TypeAlias

from gpuyard_daemon.core.capacity import Pool
from gpuyard_daemon.core.cluster import Cluster
from gpuyard_daemon.core.feasibility import Shape
from gpuyard_daemon.core.gangs import Offers
from gpuyard_daemon.core.model import Job
from gpuyard_daemon.core.placement import Candidates
from gpuyard_daemon.core.tenancy import least_held
from gpuyard_protocol.names import Tenant, User
from gpuyard_protocol.resources import ResourceNeed

ShapeKey: TypeAlias = tuple[ResourceNeed, int, Tenant, User]

#: Queues kept although empty, with what they learnt about nodes.
_IDLE_QUEUES_MAX = 256


class ShapeQueue:
    """Waiting jobs of one shape, and the nodes it fits."""

    __slots__ = (
        "apart", "blocked", "candidates", "heads", "key", "least_milli", "number", "ready_key", "shape", "spanning",
        "together",
    )  # fmt: skip

    def __init__(self, key: ShapeKey, number: int, timeslice_milli_max: int) -> None:
        self.key = key
        self.number = number
        self.shape = Shape(*key, timeslice_milli_max)
        self.candidates = Candidates(self.shape)
        #: The same for a member of a gang over several nodes.
        self.spanning = Candidates(self.shape, spanning=True)
        #: What nodes could take of a gang, as a whole and in parts.
        self.together = Offers(self.candidates, spanning=False)
        self.apart = Offers(self.spanning, spanning=True)
        #: What a job of this shape counts for at least, against its tenant's limit.
        self.least_milli = least_held(self.shape.need, self.shape.replicas)
        #: Order keys, a heap; those of jobs that no longer wait are skipped.
        self.heads: list[int] = []
        #: It fitted nowhere, or its tenant was at its limit, when last looked at.
        self.blocked = False
        #: Key of this queue's one entry in the order between the queues that counts; -1: none does.
        self.ready_key = -1

    def fits_nowhere(self, pool: Pool) -> bool:
        """No node takes even one replica. (Room for one does not mean room for all of a gang.)"""
        if self.candidates.best(pool) is not None:
            return False
        return self.shape.replicas == 1 or self.spanning.best(pool) is None


class WaitingLine:
    """All queues, and the order between their heads."""

    def __init__(self, cluster: Cluster, timeslice_milli_max: int) -> None:
        self._cluster = cluster
        self._timeslice_milli_max = timeslice_milli_max
        self._queues: dict[ShapeKey, ShapeQueue] = {}
        self._by_number: dict[int, ShapeQueue] = {}
        self._numbers = 0
        #: (order key of the head, number of the queue), of queues that are not blocked.
        self._ready: list[tuple[int, int]] = []
        self._blocked: list[ShapeQueue] = []
        #: Queues whose tenants are at their limits.
        self._held_back: dict[Tenant, list[ShapeQueue]] = {}
        #: Those among them that might count for less on another card: they are looked at when nodes change, too.
        self._costly: list[ShapeQueue] = []
        #: Of the pool, when blocked queues were last looked at.
        self._changes_seen = -1
        cluster.newly_waiting = None

    def catch_up(self) -> None:
        """Take in who began to wait, and unblock the queues that changed nodes may serve."""
        cluster = self._cluster
        newcomers = cluster.waiting if cluster.newly_waiting is None else cluster.newly_waiting
        for number in newcomers:
            if job := cluster.waiting.get(number):
                self._enter(job)
        cluster.newly_waiting = []
        everybody, eased = cluster.tenancy.take_eased()
        for tenant in sorted(self._held_back if everybody else eased & self._held_back.keys()):
            self._release(self._held_back.pop(tenant))
        changes = cluster.pool.changes_made
        if everybody or changes != self._changes_seen:
            costly, self._costly = self._costly, []
            self._release(costly)
        if changes != self._changes_seen:
            self._changes_seen = changes
            self._unblock()
        if len(self._queues) > _IDLE_QUEUES_MAX:
            self._drop_idle()

    def queue_of(self, job: Job) -> ShapeQueue:
        spec = job.spec
        key = (spec.need, spec.replicas, job.tenant, job.user)
        queue = self._queues.get(key)
        if queue is None:
            self._numbers += 1
            queue = ShapeQueue(key, self._numbers, self._timeslice_milli_max)
            self._queues[key] = self._by_number[queue.number] = queue
        return queue

    def _enter(self, job: Job) -> None:
        queue = self.queue_of(job)
        key = job.order_key
        heapq.heappush(queue.heads, key)
        if not queue.blocked and (queue.ready_key < 0 or key < queue.ready_key):
            self._make_ready(queue, key)

    def _make_ready(self, queue: ShapeQueue, key: int) -> None:
        queue.ready_key = key
        heapq.heappush(self._ready, (key, queue.number))

    def _unblock(self) -> None:
        still_blocked = []
        pool = self._cluster.pool
        for queue in self._blocked:
            if self._head(queue) is None:
                queue.blocked = False
            elif queue.fits_nowhere(pool):
                still_blocked.append(queue)
            else:
                queue.blocked = False
                self._make_ready(queue, queue.heads[0])
        self._blocked = still_blocked

    def _release(self, queues: list[ShapeQueue]) -> None:
        """Let queues that were held back be looked at again."""
        for queue in queues:
            queue.blocked = False
            if self._head(queue) is not None:
                self._make_ready(queue, queue.heads[0])

    def _head(self, queue: ShapeQueue) -> Job | None:
        heads, waiting = queue.heads, self._cluster.waiting
        while heads:
            job = waiting.get(heads[0] & (1 << 48) - 1)
            if job is not None:
                return job
            heapq.heappop(heads)
        return None

    def next(self) -> tuple[ShapeQueue, Job] | None:
        """The first waiting job whose queue is not blocked."""
        ready = self._ready
        while ready:
            key, number = ready[0]
            queue = self._by_number.get(number)
            if queue is None or queue.ready_key != key:
                heapq.heappop(ready)
                continue
            job = self._head(queue)
            if job is None:
                queue.ready_key = -1
                heapq.heappop(ready)
            elif queue.heads[0] != key:
                queue.ready_key = queue.heads[0]
                heapq.heapreplace(ready, (queue.ready_key, number))
            else:
                return queue, job
        return None

    def block(self, queue: ShapeQueue) -> None:
        """The head of this queue fits nowhere, so none of it does, until a node changes."""
        queue.blocked = True
        queue.ready_key = -1
        self._blocked.append(queue)

    def hold_back(self, queue: ShapeQueue, *, costly: bool) -> None:
        """The tenant of this queue is at its limit; `costly`: only with the cards that it would get now."""
        queue.blocked = True
        queue.ready_key = -1
        if costly:
            self._costly.append(queue)
        else:
            self._held_back.setdefault(queue.shape.tenant, []).append(queue)

    def _drop_idle(self) -> None:
        for queue in list(self._queues.values()):
            if not queue.blocked and self._head(queue) is None:
                del self._queues[queue.key], self._by_number[queue.number]
