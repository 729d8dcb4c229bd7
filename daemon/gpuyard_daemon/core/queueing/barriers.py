"""The limits that hold queues back, and who waits for how much room under each.

A limit is a tenant's, or that of one grant in the quota tree. Under each, those that need equally much stand behind one
barrier: when the limit eases, the barriers for which there is room now are told to the line, which takes the first
from them one after the other, for as long as there is. So an eased limit costs work in proportion to whom it lets on,
and not to how many wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpuyard_daemon.core.queueing.queues import Barrier, Ceiling
from gpuyard_daemon.core.tenants.quota import Allotment, Obstacle
from gpuyard_daemon.core.tenants.tenancy import Tenancy
from gpuyard_protocol.names import Tenant


class Barriers:
    """All of them, made when first needed."""

    __slots__ = ("_of_allotments", "_of_queues", "_of_tenants", "_tenancy")

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy
        self._of_tenants: dict[Tenant, Ceiling] = {}
        #: By grant, and the same by the name of the grant's queue.
        self._of_allotments: dict[Allotment, Ceiling] = {}
        self._of_queues: dict[str, list[Ceiling]] = {}

    def clear(self) -> None:
        """Nobody waits, and the limits may be others."""
        for ceiling in (*self._of_tenants.values(), *self._of_allotments.values()):
            # Else each would keep the other until the next full collection, which a large yard puts off.
            ceiling.barriers.clear()
        self._of_tenants.clear()
        self._of_allotments.clear()
        self._of_queues.clear()

    def of_tenant(self, tenant: Tenant, need: int, number: int) -> Barrier:
        """For so much more held by a tenant; `number`: the barrier's, if it is new."""
        ceiling = self._of_tenants.get(tenant)
        if ceiling is None:
            tenancy = self._tenancy
            ceiling = self._of_tenants[tenant] = Ceiling(lambda: tenancy.room_milli(tenant))
        return _barrier(ceiling, need, number)

    def of_quota(self, obstacle: Obstacle, number: int) -> Barrier:
        """For what stands in the way in the quota tree."""
        allotment = obstacle.allotment
        ceiling = self._of_allotments.get(allotment)
        if ceiling is None:
            ceiling = self._of_allotments[allotment] = Ceiling(lambda: allotment.room_milli)
            self._of_queues.setdefault(obstacle.queue, []).append(ceiling)
        return _barrier(ceiling, obstacle.wanted_milli - obstacle.own_milli, number)

    def opened(self, tenants: Iterable[Tenant], queues: Iterable[str]) -> Iterator[Barrier]:
        """Those with room, under the limits of these."""
        for tenant in tenants:
            if (ceiling := self._of_tenants.get(tenant)) is not None:
                yield from ceiling.opened()
        for name in queues:
            for ceiling in self._of_queues.get(name, ()):
                yield from ceiling.opened()


def _barrier(ceiling: Ceiling, need: int, number: int) -> Barrier:
    barrier = ceiling.barriers.get(need)
    if barrier is None:
        barrier = Barrier(number, ceiling, need)
        ceiling.add(barrier)
    return barrier
