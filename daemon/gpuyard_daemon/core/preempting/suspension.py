"""Suspended jobs: who can be, what nodes say about it, and when they go back to their cards.

A job can be suspended if it asked for that, has one replica, and holds one whole card or turns on one: of what is cut
otherwise the driver cannot take the work off. Its node must have memory for the image. Where any of this fails it gives
way like one that starts anew.

A suspended job goes back as soon as its card is free and nobody who waits goes first. It grows older meanwhile like
anybody else in line, so it does not wait for ever behind small ones; and it may take its card from whoever it may
preempt (`homing`). One that its owner suspended, or that is held for another reason, does neither until it is released.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.queueing.ranking import Rank
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.fact_words import PATIENT_CLAIMS
from gpuyard_daemon.core.state.model import Assignment, Claim, Job
from gpuyard_daemon.core.tenants.limits import may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.nodes import Resumed, ResumeFailed, Suspended, SuspendFailed
from gpuyard_protocol.resources import Partition, devices_of

#: Between attempts to go back to a card that its node would not give.
RESUME_AGAIN_MS: Final = 10_000


Answer: TypeAlias = Suspended | Resumed | SuspendFailed | ResumeFailed


def take_report(draft: Draft, report: Answer, assignment: Assignment) -> None:
    """What a node says about an order to suspend or resume; only the answer to the newest counts."""
    if report.step != assignment.step:
        return
    key = report.key
    match report:
        case Suspended() if assignment.state == "suspending":
            draft.add(f.ReplicaSuspended(key, report.image_mib))
        case SuspendFailed() if assignment.state == "suspending":
            draft.add(f.SuspensionFailed(key, _why(report.code, report.detail, "it could not be suspended")))
        case Resumed() if assignment.state == "resuming":
            draft.add(f.ReplicaResumed(key))
        case ResumeFailed() if assignment.state == "resuming":
            why = _why(report.code, report.detail, "it could not go back to its card")
            draft.add(f.ResumptionFailed(key, draft.now_ms + RESUME_AGAIN_MS, why))


def _why(code: str, detail: str, text: str) -> Why:
    return Why(code[:64] or "Refused", f"{text}: {(detail or code)[:300]}")


def resume_waiting(draft: Draft, before: Rank | None) -> None:
    """Let suspended jobs go back to their cards, best first; those only that go before somebody in line."""
    cluster, now_ms = draft.cluster, draft.now_ms
    if not cluster.suspended or cluster.draining:
        return
    ranked = [(cluster.ranking.rank_of(each, now_ms), each) for each in cluster.suspended.values()]
    for rank, job in sorted(ranked, key=lambda entry: entry[0]):
        if before is not None and rank > before:
            return
        if job.resume_after_ms <= now_ms:
            _resume(draft, job)


def resume_before(draft: Draft, claim: Claim) -> None:
    """Let suspended jobs go back to cards that are kept for somebody who goes after them."""
    cluster, now_ms = draft.cluster, draft.now_ms
    if not cluster.suspended:
        return
    kept = {uuid for placement in claim.placements for uuid in devices_of(placement.partition)}
    rank = cluster.ranking.rank_of(cluster.jobs[claim.job], now_ms)
    ranked = [(cluster.ranking.rank_of(each, now_ms), each) for each in cluster.suspended.values()]
    for mine, job in sorted(ranked, key=lambda entry: entry[0]):
        home = job.assignments[0].home
        if mine < rank and job.resume_after_ms <= now_ms and home is not None and kept & set(devices_of(home)):
            _resume(draft, job)


def _resume(draft: Draft, job: Job) -> None:
    cluster, assignment = draft.cluster, job.assignments[0]
    space, home = cluster.pool.spaces[assignment.node], assignment.home
    if home is None or space.node.state != "ready":
        return
    if any(uuid not in space.by_uuid for uuid in devices_of(home)):
        why = Why("CardGone", "the card that it was suspended from is no longer there")
        draft.add(f.JobStopping(job.id, "requeue", why, "card-gone"))
        return
    if not _has_room(space, job, home) or not may_hold(cluster, job, (f.Placement(assignment.node, home),)):
        return
    if not _has_room(space.beside_claims(job.id), job, home):
        # It is kept for somebody: who goes first?
        rank = cluster.ranking.rank_of(job, draft.now_ms)
        kept = [cluster.claims.records[number] for number in dict.fromkeys([claim.job for claim in space.claims])]
        if any(
            claim.kind not in PATIENT_CLAIMS or cluster.ranking.rank_of(cluster.jobs[claim.job], draft.now_ms) < rank
            for claim in kept
        ):
            return
        for claim in kept:
            draft.add(f.ClaimDropped(claim.job, Why("Overtaken", f"job {job.id} goes back to its card first")))
    draft.add(f.JobResuming(job.id))


def _has_room(space: NodeSpace, job: Job, home: Partition) -> bool:
    cards = [space.by_uuid[uuid] for uuid in devices_of(home)]
    is_free = all(card.takes_work and card.could_take(home, job.domain) for card in cards)
    return is_free and space.cpu_free_milli >= job.spec.need.cpu_milli


def why_not(cluster: Cluster, job: Job) -> str:
    """Why a running job cannot be taken off its card now, in words; "" if it can be."""
    if can_be_suspended(cluster, job):
        return ""
    if job.service:
        return f"it is a replica of service {job.service}"
    if job.spec.preemption != "suspend":
        return f"it was submitted with preemption {job.spec.preemption!r}, and only 'suspend' says that it bears that"
    if job.refused_suspension:
        return "its node has tried before, and could not"
    if len(job.assignments) != 1:
        return f"it has {len(job.assignments)} replicas, and only a job of one can be"
    (assignment,) = job.assignments
    if not cluster.pool.image_bound(assignment):
        return "it does not hold one whole card, nor turns on one, and nothing else can be left"
    inventory = cluster.nodes[assignment.node].inventory
    if inventory is None or not inventory.suspend_mib:
        problem = inventory.suspend_problem if inventory else ""
        return f"node {assignment.node} suspends no jobs" + (f": {problem}" if problem else "")
    return f"node {assignment.node} has too little memory left for what it has on its card"


def can_be_suspended(cluster: Cluster, job: Job, beside: Iterable[Job] = ()) -> bool:
    """Whether a running job's node can take its work off the card now, as far as is known here, and `beside` it."""
    if job.spec.preemption != "suspend" or job.refused_suspension or len(job.assignments) != 1 or job.service:
        return False
    assignment = job.assignments[0]
    bound_mib = cluster.pool.image_bound(assignment)
    if not bound_mib:
        return False
    space = cluster.pool.spaces[assignment.node]
    inventory = space.node.inventory
    if inventory is None or space.memory_free_mib < bound_mib:
        return False
    held_mib, coming_mib = 0, bound_mib
    for other in space.assignments.values():
        if other.image_mib:
            held_mib += other.image_mib
        elif other.state == "suspending" or other.may_leave_image:
            coming_mib += cluster.pool.image_bound(other)
    for job in beside:
        if job.assignments[0].node == assignment.node:
            coming_mib += cluster.pool.image_bound(job.assignments[0])
    return coming_mib <= space.memory_free_mib and held_mib + coming_mib <= inventory.suspend_mib
