"""Serving those for whom places are kept: placed or resumed once everybody has left, dropped once that cannot be.

The only readers of claims that change anything; who gets one is decided in `preemption` and `reservations`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.preempting.claims import takes
from gpuyard_daemon.core.preempting.suspension import resume_before
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.fact_words import PATIENT_CLAIMS
from gpuyard_daemon.core.state.model import Claim, Job
from gpuyard_daemon.core.tenants.limits import may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.resources import WholeCards, devices_of


def serve_claims(draft: Draft) -> None:
    """Place the jobs whose places have been left; drop claims to places that are no longer to be had."""
    cluster = draft.cluster
    if cluster.draining:
        return
    for claim in list(cluster.claims):
        if claim.kind in PATIENT_CLAIMS:
            resume_before(draft, claim)
            if claim.job not in cluster.claims:
                continue
        job = cluster.jobs[claim.job]
        gone = _gone(cluster, claim)
        if claim.kind == "resize" and gone is None and job.id not in cluster.waiting:
            # Its attempt has not ended yet.
            continue
        if gone is None and is_free(cluster, job, claim):
            placements = tuple(claim.placements)
            if may_hold(cluster, job, placements) and job.id in cluster.suspended:
                draft.add(f.JobResuming(job.id))
            elif may_hold(cluster, job, placements):
                prepare_until_ms = draft.now_ms + draft.settings.prepare_timeout_ms if job.is_gang else 0
                draft.add(f.JobPlaced(job.id, placements, prepare_until_ms, resized=claim.kind == "resize"))
            else:
                gone = f"tenant {job.tenant} is at its limit"
        elif gone is None and claim.kind not in PATIENT_CLAIMS and not _somebody_leaves(cluster, claim):
            gone = "somebody else holds it"
        if gone is not None:
            draft.add(f.ClaimDropped(job.id, Why("ClaimVoid", f"no place is kept for it any more: {gone}")))


def _gone(cluster: Cluster, claim: Claim) -> str | None:
    """What became of a place that nobody can be put on any more."""
    for placement in claim.placements:
        space = cluster.pool.spaces.get(placement.node)
        if space is None or space.node.state != "ready":
            return f"node {placement.node} is {space.node.state if space else 'no longer there'}"
        if space.node.cordoned_by:
            return f"node {placement.node} is cordoned"
        for uuid in devices_of(placement.partition):
            card = space.by_uuid.get(uuid)
            if card is None or not card.takes_work:
                return f"card {uuid} of node {placement.node} takes no work"
    for number in claim.evicted:
        other = cluster.jobs.get(number)
        if other is not None and other.refused_suspension and other.state == "running":
            return f"job {number} could not be suspended and runs on"
    return None


def _somebody_leaves(cluster: Cluster, claim: Claim) -> bool:
    """Whether anybody is on the way out of the nodes of a claim, so that it may yet become free."""
    nodes = {placement.node for placement in claim.placements}
    return any(
        assignment.is_live and assignment.node in nodes
        for job in cluster.leaving.values()
        for assignment in job.assignments
    )


def is_free(cluster: Cluster, job: Job, claim: Claim, without: Iterable[Job] = ()) -> bool:
    """Whether everybody has left the places of a claim. `without`: as if these had."""
    gone = list(without)
    cpu_milli, memory_mib = takes(job)
    if not gone and not _looks_free(cluster, job, claim):
        return False
    trial = PoolTrial(cluster.pool)
    for other in gone:
        trial.without(other.assignments)
    for replica, placement in enumerate(claim.placements):
        space = trial.space(placement.node)
        if space.cpu_free_milli < cpu_milli or space.memory_free_mib < memory_mib:
            return False
        if not all(
            space.by_uuid[uuid].could_take(placement.partition, job.domain) for uuid in devices_of(placement.partition)
        ):
            return False
        trial.take(job.id, replica, placement, job.domain, cpu_milli, memory_mib)
    return True


def _looks_free(cluster: Cluster, job: Job, claim: Claim) -> bool:
    """At a glance, so that nothing is copied for claims that are waited for."""
    cpu_milli, memory_mib = takes(job)
    for placement in claim.placements:
        space, partition = cluster.pool.spaces[placement.node], placement.partition
        if space.cpu_free_milli < cpu_milli or space.memory_free_mib < memory_mib:
            return False
        if isinstance(partition, WholeCards) and any(space.by_uuid[uuid].mode != "idle" for uuid in partition.devices):
            return False
    return True
