"""The durable state as bytes, and back.

A snapshot holds the records of `model` and nothing derived; the derived part is rebuilt, which also proves that it can
be. Equal states give equal bytes: records stand in the order of their ids or of their arrival, both part of the state.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from gpuyard_daemon.core.cluster import Cluster
from gpuyard_daemon.core.inputs import Cursors
from gpuyard_daemon.core.model import Array, Job, KeptAnswer, Node, Service, Totals, Usage
from gpuyard_daemon.core.policy import Policy
from gpuyard_daemon.core.tenancy import held_by
from gpuyard_daemon.core.timers import Timer
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
    cluster.tenancy.set_policy(snapshot.policy)
    cluster.tenancy.usage.update({(usage.tenant, usage.user): usage for usage in snapshot.usage})
    for node in snapshot.nodes:
        cluster.nodes[node.id] = node
        space = cluster.pool.add(node)
        if node.inventory is not None:
            cluster.pool.refit(space, 0, 0)
        cluster.restore_modes(node)
        for mode, avoidance in node.avoided.items():
            if avoidance.until_ms:
                cluster.timers.set_named(avoidance.until_ms, Timer.FORGIVE, node.id, mode)
    for array in snapshot.arrays:
        cluster.arrays.add(array)
    for job in snapshot.jobs:
        if job.array:
            job.spec = cluster.arrays.records[job.array].spec
        cluster.index_job(job)
        if job.prepare_until_ms:
            cluster.timers.set_job(job.prepare_until_ms, Timer.PREPARE, job.id)
        if job.live:
            _hold(cluster, job)
    cluster.finished.update(dict.fromkeys(snapshot.finished))
    for service in snapshot.services:
        key = (service.tenant, service.spec.name)
        cluster.services[key] = service
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
    need = job.spec.need
    for assignment in job.assignments:
        if assignment.is_live:
            space = cluster.pool.spaces[assignment.node]
            cluster.pool.take(space, assignment, job.tenant, need.cpu_milli, need.memory_mib)
            cluster.tenancy.restore_held(job.tenant, job.user, held_by(space, assignment.partition))
