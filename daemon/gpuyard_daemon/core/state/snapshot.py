"""The durable state as bytes, and back.

A snapshot holds the records of `model` and nothing derived; the derived part is rebuilt, which also proves that it can
be. Equal states give equal bytes: records stand in the order of their ids or of their arrival, both part of the state.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from gpuyard_daemon.core.applying.lost_facts import await_leases, note_lease
from gpuyard_daemon.core.placing.demand import DemandRecord, LiveDemand
from gpuyard_daemon.core.queueing import learning
from gpuyard_daemon.core.queueing.prediction import RunLore, SizeLore
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.inputs import Cursors
from gpuyard_daemon.core.state.model import Array, Claim, Job, KeptAnswer, Node, Service, Standing, Totals, Usage
from gpuyard_daemon.core.state.timers import Timer
from gpuyard_daemon.core.tenants import holdings
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId, SubmissionId, Tenant

SNAPSHOT_VERSION = 1


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a record's application may have changed."""

    v: int = SNAPSHOT_VERSION
    #: Number and time of the last record in it.
    turn: int
    now_ms: int
    cursors: Cursors
    last_job: JobId
    draining: bool
    totals: Totals
    nodes: list[Node]
    jobs: list[Job]
    #: Ids of finished jobs, longest ago first.
    finished: list[JobId]
    services: list[Service]
    chosen_answers: list[tuple[Tenant, SubmissionId, KeptAnswer]]
    given_answers: list[tuple[Tenant, SubmissionId, KeptAnswer]]
    policy: Policy = Policy()
    usage: list[Usage] = []
    #: Their elements stand in `jobs` without their specification.
    arrays: list[Array] = []
    #: What was learnt from ended jobs: by kind, heard of longest ago first, and by size.
    kinds: list[tuple[str, RunLore]] = []
    sizes: SizeLore | None = None
    standings: list[Standing] = []
    #: Oldest first.
    claims: list[Claim] = []
    #: None: written before it was counted.
    demand: DemandRecord | None = None


#: In place of what the elements of an array have in common.
_SHARED = JobSpec()
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Snapshot)


def take_snapshot(cluster: Cluster, turn: int, now_ms: int, cursors: Cursors) -> bytes:
    return _ENCODER.encode(
        Snapshot(
            turn=turn,
            now_ms=now_ms,
            cursors=cursors,
            last_job=cluster.last_job,
            draining=cluster.draining,
            totals=cluster.totals,
            nodes=list(cluster.nodes.values()),
            jobs=[replace(job, spec=_SHARED) if job.array else job for job in cluster.jobs.values()],
            finished=list(cluster.finished),
            services=list(cluster.services.values()),
            chosen_answers=[(*key, kept) for key, kept in cluster.chosen_answers.items()],
            given_answers=[(*key, kept) for key, kept in cluster.given_answers.items()],
            policy=cluster.tenancy.policy,
            usage=list(cluster.tenancy.usage.values()),
            arrays=list(cluster.arrays.records.values()),
            kinds=list(cluster.lore.kinds.items()),
            sizes=cluster.lore.sizes,
            standings=list(cluster.fairness.standings.values()),
            claims=list(cluster.claims),
            demand=cluster.demand.record,
        )
    )


def read_snapshot(data: bytes) -> tuple[Snapshot, Cluster]:
    """The state; `ValueError` if these bytes are no snapshot of a version that this core reads."""
    try:
        snapshot = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a snapshot: {error}") from None
    if snapshot.v != SNAPSHOT_VERSION:
        raise ValueError(f"snapshot of format {snapshot.v}; this core reads {SNAPSHOT_VERSION}")
    return snapshot, _rebuild(snapshot)


def _rebuild(snapshot: Snapshot) -> Cluster:
    cluster = Cluster()
    cluster.last_job, cluster.draining, cluster.totals = snapshot.last_job, snapshot.draining, snapshot.totals
    cluster.demand = LiveDemand(snapshot.demand)
    cluster.tenancy.usage.update({(usage.tenant, usage.user): usage for usage in snapshot.usage})
    cluster.lore.kinds.update(snapshot.kinds)
    cluster.fairness.standings.update({standing.tenant: standing for standing in snapshot.standings})
    cluster.lore.sizes = snapshot.sizes or cluster.lore.sizes
    for node in snapshot.nodes:
        cluster.nodes[node.id] = node
        space = cluster.pool.add(node)
        if node.inventory is not None:
            cluster.pool.refit(space, 0, 0)
        cluster.restore_modes(node)
        for mode, avoidance in node.avoided.items():
            if avoidance.until_ms:
                cluster.timers.set_named(avoidance.until_ms, Timer.FORGIVE, node.id, mode)
        for uuid, past in node.pasts.items():
            if past.keeps_mode_until_ms:
                cluster.timers.set_named(past.keeps_mode_until_ms, Timer.SETTLE, node.id, uuid)
    cluster.set_policy(snapshot.policy)
    for array in snapshot.arrays:
        array.spec = cluster.alike.of(array.spec)
        cluster.arrays.add(array)
    stood = [(job.waits_since_ms, job.level, job.waited_ms) for job in snapshot.jobs]
    for job in snapshot.jobs:
        if job.array:
            job.spec = cluster.arrays.records[job.array].spec
        else:
            job.spec = cluster.alike.of(job.spec)
        cluster.index_job(job)
        learning.enter_run(cluster, job)
        if job.prepare_until_ms:
            cluster.timers.set_job(job.prepare_until_ms, Timer.PREPARE, job.id)
        if job.idle_end_ms:
            cluster.timers.set_job(job.idle_end_ms, Timer.IDLE_END, job.id)
        if job.live:
            _hold(cluster, job)
    for node in snapshot.nodes:
        if node.state == "lost":
            await_leases(cluster, node)
    for job in cluster.suspended.values():
        if job.resume_after_ms > snapshot.now_ms:
            cluster.timers.set_job(job.resume_after_ms, Timer.RESUME, job.id)
    for claim in snapshot.claims:
        cluster.claims.make(cluster.jobs[claim.job], claim)
    for job, line in zip(snapshot.jobs, stood, strict=True):
        # An element of an array may have stood in line for a moment, until those that go had been counted.
        if line[0] or job.id not in cluster.waiting:
            job.waits_since_ms, job.level, job.waited_ms = line
    if snapshot.demand is None:
        unfinished = [job.spec for job in snapshot.jobs if not job.is_final]
        cluster.demand.count_all([(spec.need, spec.least_replicas) for spec in unfinished], snapshot.now_ms)
    cluster.finished.update(dict.fromkeys(snapshot.finished))
    for service in snapshot.services:
        key = (service.tenant, service.spec.name)
        cluster.services[key] = service
        cluster.backlog.set_service(service.tenant, None, service.spec)
        cluster.unsettled[key] = cluster.changing[key] = None
        if service.lower_since_ms:
            at_ms = service.lower_since_ms + service.spec.scale_down_after_ms
            cluster.timers.set_named(at_ms, Timer.SCALE_DOWN, *key)
        if service.not_before_ms:
            cluster.timers.set_named(service.not_before_ms, Timer.REPLACE, *key)
    cluster.chosen_answers.update({(tenant, name): kept for tenant, name, kept in snapshot.chosen_answers})
    cluster.given_answers.update({(tenant, name): kept for tenant, name, kept in snapshot.given_answers})
    return cluster


def _hold(cluster: Cluster, job: Job) -> None:
    """Enter what a job's live assignments hold."""
    for assignment in job.assignments:
        if assignment.is_live:
            space = cluster.pool.spaces[assignment.node]
            cluster.pool.take(space, assignment, job.domain, *assignment.held(job.spec.need))
            note_lease(cluster, assignment)
            holdings.restore(cluster, job, space, assignment)
