"""How the cards of a job that asks for so many in all are parted into replicas.

Into equal parts, since trainers want equal ranks: as large as nodes hold, because cards of one replica are on one node
and reach each other fastest. Of parts that could ever run, those go first that would start now, the largest of them.
Decided once, at acceptance: where no node has joined yet, into single cards, which any nodes can hold. CPUs and memory
were asked for by card, and go with the cards.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.gangs import Offers, fits
from gpuyard_daemon.core.placing.placement import Candidates
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_protocol.jobs import REPLICAS_MAX, JobSpec
from gpuyard_protocol.names import Tenant, User
from gpuyard_protocol.needs import GPUS_PER_REPLICA_MAX

#: Whether a part would start now is looked at for so many, and in yards of so many nodes: each is asked of each node.
_LOOKED_AT_MAX: Final = 4
_NODES_MAX: Final = 1024


def parted(draft: Draft, tenant: Tenant, user: User, spec: JobSpec) -> JobSpec:
    """The specification with its cards parted; itself where it says itself how they are."""
    if not spec.total_gpus:
        return spec
    total, pool = spec.total_gpus, draft.cluster.pool
    sizes = [size for size in range(min(total, GPUS_PER_REPLICA_MAX), 0, -1) if total % size == 0]
    ways = [_with_part(spec, size) for size in sizes if total // size <= REPLICAS_MAX]
    if not pool.by_number:
        return ways[-1]
    possible = [way for way in ways if draft.possibilities.missing(pool, way.need, way.replicas, tenant, user) is None]
    if len(pool.by_number) <= _NODES_MAX:
        for way in possible[:_LOOKED_AT_MAX]:
            if _starts(draft, tenant, user, way):
                return way
    return (possible or ways)[0 if possible else -1]


def _with_part(spec: JobSpec, size: int) -> JobSpec:
    need = replace(spec.need, gpus=size, cpu_milli=spec.need.cpu_milli * size, memory_mib=spec.need.memory_mib * size)
    return replace(spec, replicas=spec.total_gpus // size, need=need)


def _starts(draft: Draft, tenant: Tenant, user: User, spec: JobSpec) -> bool:
    shape = Shape(spec.need, spec.replicas, tenant, user, draft.settings.timeslice_milli_max)
    together = Offers(Candidates(shape), spanning=False)
    return fits(draft.cluster.pool, together, Offers(Candidates(shape, spanning=True), spanning=True))
