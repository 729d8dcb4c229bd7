"""Who holds what a waiting job could use, and until when, as far as anything is known about that.

An end is known from a job's time limit, or from what it is expected to take; somebody who has outlasted every
expectation ends nobody knows when. On a large yard only the nodes nearest to taking the job are looked at.

A tenant is told its own jobs one by one, and those of others together: how much, on how many nodes, and when the first
of them ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpuyard_daemon.core.explaining.survey import Finding
from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.partitions import amounts_on
from gpuyard_daemon.core.queueing.ranking import ran_ms, wall_ms
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import Job
from gpuyard_protocol.explaining import EndBasis, Holder
from gpuyard_protocol.names import DeviceUuid, JobId, NodeId, Tenant
from gpuyard_protocol.resources import Partition, WholeCards, devices_of
from gpuyard_protocol.units import MILLI

#: Nodes that are looked at, and rows that are shown.
NODES_MAX = 96
ROWS_MAX = 8
_EXAMPLES_MAX = 5
#: What a job takes to leave its card for the host's memory, about.
SUSPENDS_MS = 20_000


@dataclass(slots=True)
class Held:
    """One job that holds something there."""

    job: Job
    until_ms: int
    basis: EndBasis
    #: GPU compute on cards that could be used.
    milli: int = 0
    nodes: dict[NodeId, None] = field(default_factory=dict)


def expected_end(cluster: Cluster, job: Job, now_ms: int) -> tuple[int, EndBasis]:
    """When a job's attempt should be over, and by what; (0, "") if there is nothing to go by."""
    if job.state == "stopping":
        return now_ms + job.spec.stop_grace_ms, "stopping"
    if any(assignment.state == "suspending" for assignment in job.assignments):
        return now_ms + SUSPENDS_MS, "stopping"
    if job.service or job.state == "suspended":
        return 0, ""
    began_ms = job.started_ms or now_ms
    # The limit stands still while it is suspended: from when it went on, it has no more than the whole of it.
    limit_ms = max(began_ms, job.runs_since_ms) + job.spec.time_limit_ms if job.spec.time_limit_ms else 0
    expected = cluster.ranking.expected_ms(job, now_ms)
    if expected is not None:
        at_ms = began_ms + (wall_ms(job, expected[0]) if job.runs_since_ms else expected[0])
        if job.runs_since_ms and job.spec.preemption in ("checkpoint", "suspend"):
            # What it did before it gave way is done.
            at_ms = now_ms + wall_ms(job, max(0, expected[0] - ran_ms(job, now_ms)))
        if at_ms > now_ms and (not limit_ms or at_ms < limit_ms):
            return at_ms, "estimate" if expected[1] == "estimate" else "history"
    return (limit_ms, "limit") if limit_ms > now_ms else (0, "")


def holders_on(cluster: Cluster, shape: Shape, findings: Iterable[Finding], now_ms: int) -> list[Held]:
    """Jobs with something that the shape could use, on the nodes of these findings: on the first so many of them."""
    found: dict[JobId, Held] = {}
    wants_gpu = shape.need.wants_gpu
    left = NODES_MAX
    for finding in findings:
        nodes = finding.group.nodes[:left]
        left -= len(nodes)
        specimen = finding.group.space
        # What the inventory says holds for all of them alike.
        _, positions = shape.eligible(specimen)
        is_any = len(positions) == len(specimen.cards)
        for node in nodes:
            space = cluster.pool.spaces[node]
            usable = None if is_any else {space.cards[position].device.uuid for position in positions}
            for key, assignment in space.assignments.items():
                milli = _held_on(space, assignment.partition, usable)
                if not milli and wants_gpu:
                    continue
                held = found.get(key.job)
                if held is None:
                    job = cluster.jobs[key.job]
                    held = found[key.job] = Held(job, *expected_end(cluster, job, now_ms))
                held.nodes[node] = None
                held.milli += milli
        if not left:
            break
    return list(found.values())


def holders_of(cluster: Cluster, node: NodeId, devices: Iterable[DeviceUuid], now_ms: int) -> list[Held]:
    """Jobs with something on just these cards of a node."""
    found: dict[JobId, Held] = {}
    space = cluster.pool.spaces[node]
    for uuid in devices:
        card = space.by_uuid.get(uuid)
        for key, partition in card.held.items() if card else ():
            job = cluster.jobs[key.job]
            held = found.setdefault(key.job, Held(job, *expected_end(cluster, job, now_ms)))
            held.nodes[node] = None
            held.milli += amounts_on(space.by_uuid[uuid].device, partition)[0]
    return list(found.values())


def _held_on(space: NodeSpace, partition: Partition, usable: set[DeviceUuid] | None) -> int:
    """Compute that a partition holds on cards that can be used. `usable` None: on any."""
    if type(partition) is WholeCards:
        if usable is None:
            return len(partition.devices) * MILLI
        return sum([MILLI for uuid in partition.devices if uuid in usable])
    devices = devices_of(partition)
    if not devices or (usable is not None and devices[0] not in usable):
        return 0
    return amounts_on(space.by_uuid[devices[0]].device, partition)[0]


def rows(found: list[Held], viewer: Tenant | None) -> tuple[Holder, ...]:
    """As the asker is told: its own, the largest first, then those of others. `viewer` None: an operator."""
    ranked = sorted(found, key=lambda held: (-held.milli, held.job.id))
    own = [held for held in ranked if viewer is None or held.job.tenant == viewer]
    others = [held for held in ranked if viewer is not None and held.job.tenant != viewer]
    shown = [_row([held], held.job.tenant) for held in own[:ROWS_MAX]]
    if len(own) > ROWS_MAX:
        rest = own[ROWS_MAX:]
        tenants = {held.job.tenant for held in rest}
        shown.append(_row(rest, tenants.pop() if len(tenants) == 1 else ""))
    if others:
        shown.append(_row(others, ""))
    return tuple(shown)


def _row(group: list[Held], tenant: Tenant) -> Holder:
    nodes = list(dict.fromkeys([node for held in group for node in held.nodes]))
    first = min([held for held in group if held.until_ms], key=lambda held: held.until_ms, default=None)
    lone = group[0].job if len(group) == 1 and tenant else None
    return Holder(
        job=lone.id if lone else 0,
        jobs=len(group),
        tenant=tenant,
        user=lone.user if lone else "",
        name=lone.spec.name if lone else "",
        held_milli=sum(held.milli for held in group),
        nodes=len(nodes),
        examples=tuple(nodes[:_EXAMPLES_MAX]),
        until_ms=first.until_ms if first else 0,
        basis=first.basis if first else "",
    )
