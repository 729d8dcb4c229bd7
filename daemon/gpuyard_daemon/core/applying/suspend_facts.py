"""What facts about suspended jobs change in the state.

A suspended job keeps its attempt and its processes: its work lies in the memory of its node, and its card is free for
others. So its place becomes one in the host's memory alone until it goes back; which card is its home stands beside.

Called by `Cluster.apply_fact`, and by handlers of other facts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.queueing import learning
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects, standing_order
from gpuyard_daemon.core.state.model import Assignment, Job
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_daemon.core.state.timers import Timer
from gpuyard_daemon.core.tenants import holdings
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import NoGpu

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def suspend(cluster: Cluster, job: Job, why: Why, now_ms: int, effects: Effects) -> None:
    """Tell a running job of one replica to leave its card."""
    (assignment,) = job.assignments
    cluster.move_assignment(job, assignment, "suspending")
    cluster.pool.touch(cluster.pool.spaces[assignment.node])
    job.why = why
    cluster.move_job(job, "suspended")
    cluster.leaving[job.id] = job
    _order(cluster, assignment, effects)
    job.note(now_ms, f"suspending: {why.text}")
    effects.tell(job, now_ms)


def idled(cluster: Cluster, fact: f.JobIdled, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    job.note(now_ms, fact.why.text)
    effects.warn(job, fact.why, now_ms)


def suspending(cluster: Cluster, fact: f.JobSuspending, now_ms: int, effects: Effects) -> None:
    """Off its card until it is released."""
    job = cluster.job(fact.job)
    job.held_by, job.idled, job.idle_end_ms = fact.by, fact.idle, fact.end_ms
    if job.idle_end_ms:
        cluster.timers.set_job(job.idle_end_ms, Timer.IDLE_END, job.id)
    suspend(cluster, job, fact.why, now_ms, effects)


def suspended(cluster: Cluster, fact: f.ReplicaSuspended, now_ms: int, effects: Effects) -> None:
    job, assignment = _of(cluster, fact.key)
    cluster.move_assignment(job, assignment, "suspended")
    cluster.leaving.pop(job.id, None)
    learning.bank_run_time(cluster, job, now_ms)
    _leave_card(cluster, job, assignment, fact.image_mib, now_ms)
    _wait(cluster, job, now_ms)
    job.note(now_ms, "suspended: its work is in the host's memory")


def suspension_failed(cluster: Cluster, fact: f.SuspensionFailed, now_ms: int, effects: Effects) -> None:
    job, assignment = _of(cluster, fact.key)
    cluster.leaving.pop(job.id, None)
    job.refused_suspension = True
    job.held_by = ""
    forget_idleness(job)
    cluster.pool.leaving(cluster.pool.spaces[assignment.node])
    cluster.move_assignment(job, assignment, "running")
    _run(cluster, job, now_ms, effects, f"runs on: {fact.why.text}")


def resuming(cluster: Cluster, fact: f.JobResuming, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    (assignment,) = job.assignments
    if assignment.home is None:
        raise InvariantViolated(f"job {job.id} is to be resumed and was not suspended")
    cluster.move_assignment(job, assignment, "resuming")
    _stop_waiting(cluster, job, now_ms)
    space = cluster.pool.spaces[assignment.node]
    cluster.pool.give(space, assignment)
    # Its image goes when it is back, not when it is told to come.
    assignment.partition, assignment.home = assignment.home, None
    cluster.pool.take(space, assignment, job.domain, *assignment.held(job.spec.need))
    holdings.take(cluster, job, space, assignment, now_ms)
    holdings.run(cluster, job, space, assignment, now_ms)
    _order(cluster, assignment, effects)
    job.note(now_ms, "resuming on its card")


def resumed(cluster: Cluster, fact: f.ReplicaResumed, now_ms: int, effects: Effects) -> None:
    job, assignment = _of(cluster, fact.key)
    cluster.move_assignment(job, assignment, "running")
    assignment.image_mib = 0
    cluster.pool.hold(cluster.pool.spaces[assignment.node], assignment, *assignment.held(job.spec.need))
    learning.begin_run_time(cluster, job, now_ms)
    _run(cluster, job, now_ms, effects, "runs again")


def resumption_failed(cluster: Cluster, fact: f.ResumptionFailed, now_ms: int, effects: Effects) -> None:
    job, assignment = _of(cluster, fact.key)
    cluster.move_assignment(job, assignment, "suspended")
    _leave_card(cluster, job, assignment, assignment.image_mib, now_ms)
    job.resume_after_ms = fact.again_ms
    cluster.timers.set_job(fact.again_ms, Timer.RESUME, job.id)
    _wait(cluster, job, now_ms)
    job.note(now_ms, f"stays suspended: {fact.why.text}")


def forget_suspension(cluster: Cluster, job: Job, now_ms: int) -> None:
    """It is told to stop, or has ended."""
    if job.id in cluster.suspended:
        _stop_waiting(cluster, job, now_ms)
    if job.idled:
        # What held it was its card, which it has lost: should it start anew, it does so like any other.
        job.held_by = ""
        forget_idleness(job)


def forget_idleness(job: Job) -> None:
    job.idled, job.idle_end_ms = False, 0


def _of(cluster: Cluster, key: AssignmentKey) -> tuple[Job, Assignment]:
    assignment = cluster.assignment(key)
    if assignment is None or not assignment.is_live:
        raise InvariantViolated(f"a fact names assignment {key}, which is not alive")
    return cluster.jobs[key.job], assignment


def _order(cluster: Cluster, assignment: Assignment, effects: Effects) -> None:
    assignment.step += 1
    order = standing_order(assignment)
    assert order is not None
    effects.order(cluster.nodes[assignment.node], order)


def _leave_card(cluster: Cluster, job: Job, assignment: Assignment, image_mib: int, now_ms: int) -> None:
    """From a place on a card to one in the host's memory."""
    space = cluster.pool.spaces[assignment.node]
    holdings.give(cluster, job, space, assignment, now_ms)
    cluster.pool.give(space, assignment)
    assignment.home, assignment.partition, assignment.image_mib = assignment.partition, NoGpu(), image_mib
    cluster.pool.take(space, assignment, job.domain, *assignment.held(job.spec.need))
    if space.node.absent:
        cluster.drop_absent(space)


def held(cluster: Cluster, job: Job, now_ms: int) -> None:
    """A suspended job is not to go back to its card for now."""
    if job.id in cluster.suspended:
        _stop_waiting(cluster, job, now_ms)


def released(cluster: Cluster, job: Job, now_ms: int) -> None:
    """Nobody holds a job any more: if it is suspended, it may go back to its card."""
    forget_idleness(job)
    if any(assignment.state == "suspended" for assignment in job.assignments):
        _wait(cluster, job, now_ms)


def _wait(cluster: Cluster, job: Job, now_ms: int) -> None:
    """In line for its card, unless somebody holds it."""
    if job.held_by:
        return
    cluster.suspended[job.id] = job
    job.level = cluster.ranking.natural_of(job, now_ms)
    job.waits_since_ms = max(1, now_ms)


def _stop_waiting(cluster: Cluster, job: Job, now_ms: int) -> None:
    del cluster.suspended[job.id]
    cluster.claims.drop(job.id)
    job.waited_ms = now_ms - job.waits_since_ms
    job.waits_since_ms = job.resume_after_ms = 0


def _run(cluster: Cluster, job: Job, now_ms: int, effects: Effects, text: str) -> None:
    job.why = None
    cluster.move_job(job, "running")
    job.note(now_ms, text)
    effects.tell(job, now_ms)
