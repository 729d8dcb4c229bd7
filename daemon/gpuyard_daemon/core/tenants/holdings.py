"""What comes and goes with a replica's place in all books that tenants are held against.

A place counts by the compute that it takes of each model of card: towards its tenant and user (`tenancy`), towards the
tenant's share (`fairness`), and towards its queue and the queues above it (`quota`). All three are entered here, and
nowhere else, so that they cannot come apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import least_milli
from gpuyard_daemon.core.placing.partitions import amounts_on, sample_of
from gpuyard_daemon.core.state.model import Assignment, Job
from gpuyard_daemon.core.tenants.policy import Kind
from gpuyard_daemon.core.tenants.quota import Amounts
from gpuyard_protocol.resources import Device, Partition, ResourceNeed, WholeCards, devices_of, model_matches
from gpuyard_protocol.units import MILLI

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def amounts_of(space: NodeSpace, partition: Partition) -> Amounts:
    """Compute that a place counts for, by model of card and kind of sharing."""
    kind: Kind = "whole" if isinstance(partition, WholeCards) else "shared"
    devices = devices_of(partition)
    if len(devices) == 1:
        device = space.by_uuid[devices[0]].device
        return {(_short(device.model), kind): amounts_on(device, partition)[0]}
    found: Amounts = {}
    for uuid in devices:
        device = space.by_uuid[uuid].device
        key = (model_of(device), kind)
        found[key] = found.get(key, 0) + amounts_on(device, partition)[0]
    return found


def model_of(device: Device) -> str:
    """The short name of a card's model."""
    return _short(device.model)


def capacity_by_model(pool: Pool) -> dict[str, int]:
    """Compute of the cards that are there."""
    found: dict[str, int] = {}
    for kind, cards in pool.card_kinds.items():
        model = model_of(sample_of(kind))
        found[model] = found.get(model, 0) + cards * MILLI
    return found


def wanted_by(pool: Pool, need: ResourceNeed, replicas: int) -> tuple[Amounts, ...]:
    """What a request will count for at least, on each model of card that could serve it."""
    kind: Kind = "whole" if need.gpus else "shared"
    found: dict[str, int] = {}
    for number in sorted(pool.card_kinds):
        device = sample_of(number)
        if need.models and not any(model_matches(device.model, wanted) for wanted in need.models):
            continue
        milli, model = least_milli(need, [device]), model_of(device)
        if milli:
            found[model] = min(milli, found.get(model, milli))
    return tuple([{(model, kind): milli * replicas} for model, milli in sorted(found.items())])


@cache
def _short(model: str) -> str:
    return Device(uuid="", index=0, model=model, memory_mib=0, modes=()).short_model


def charged_milli(cluster: Cluster, amounts: Amounts) -> int:
    """What a place counts for in fairness: its compute, by how fast the cards are."""
    speeds = cluster.speeds
    if not speeds.named:
        return sum(amounts.values())
    return sum([milli * speeds.of_name(model) // MILLI for (model, _), milli in amounts.items()])


def take(cluster: Cluster, job: Job, space: NodeSpace, assignment: Assignment, now_ms: int) -> None:
    """A replica was given its place."""
    amounts = amounts_of(space, assignment.partition)
    if amounts:
        cluster.tenancy.take(job.tenant, job.user, amounts, now_ms)
        cluster.fairness.hold(job.tenant, charged_milli(cluster, amounts), job.spec, now_ms)
        cluster.quota.take(cluster.quota.queue_of(job), amounts)


def sum_of(parts: Iterable[Amounts]) -> Amounts:
    """All together."""
    total: Amounts = {}
    for amounts in parts:
        for key, milli in amounts.items():
            total[key] = total.get(key, 0) + milli
    return total


def enter_in_queue(cluster: Cluster, job: Job, space: NodeSpace, assignment: Assignment) -> None:
    """Count a live replica in a tree of queues, and in charges, that were made anew."""
    amounts = amounts_of(space, assignment.partition)
    cluster.quota.take(cluster.quota.queue_of(job), amounts)
    cluster.fairness.restore_hold(job.tenant, charged_milli(cluster, amounts), job.spec)


def recount(cluster: Cluster, job: Job, space: NodeSpace, assignment: Assignment, before: Amounts) -> None:
    """The cards under a live replica may be called or cut otherwise now: count it for what it is."""
    now_ms = cluster.totals.summed_to_ms
    if not before or amounts_of(space, assignment.partition) == before:
        return
    _leave(cluster, job, assignment, before, now_ms)
    take(cluster, job, space, assignment, now_ms)
    if assignment.started_ms:
        run(cluster, job, space, assignment, now_ms)


def run(cluster: Cluster, job: Job, space: NodeSpace, assignment: Assignment, now_ms: int) -> None:
    """A replica's process began."""
    cluster.tenancy.run(job.tenant, job.user, amounts_of(space, assignment.partition), now_ms)


def give(cluster: Cluster, job: Job, space: NodeSpace, assignment: Assignment, now_ms: int) -> None:
    """A replica's place is free again."""
    amounts = amounts_of(space, assignment.partition)
    if amounts:
        _leave(cluster, job, assignment, amounts, now_ms)


def _leave(cluster: Cluster, job: Job, assignment: Assignment, amounts: Amounts, now_ms: int) -> None:
    if assignment.started_ms:
        cluster.tenancy.halt(job.tenant, job.user, amounts, now_ms)
    cluster.tenancy.give(job.tenant, job.user, amounts, now_ms)
    cluster.fairness.hold(job.tenant, -charged_milli(cluster, amounts), job.spec, now_ms)
    cluster.quota.give(cluster.quota.queue_of(job), amounts)


def restore(cluster: Cluster, job: Job, space: NodeSpace, assignment: Assignment) -> None:
    """Enter what a live replica holds without summing: after a restart, when the sums stand already."""
    amounts = amounts_of(space, assignment.partition)
    if amounts:
        cluster.tenancy.restore_held(job.tenant, job.user, amounts)
        if assignment.started_ms:
            cluster.tenancy.restore_run(job.tenant, job.user, amounts)
        cluster.fairness.restore_hold(job.tenant, charged_milli(cluster, amounts), job.spec)
        cluster.quota.take(cluster.quota.queue_of(job), amounts)
