"""What facts about jobs and their replicas change in the state.

Called by `Cluster.apply_fact`, and by handlers of other facts. Resources are taken in `placed` and given back in
`replica_ended`, nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.applying import lost_facts, node_facts, suspend_facts
from gpuyard_daemon.core.queueing import learning
from gpuyard_daemon.core.queueing.ranking import BORROWING
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import CONTAINERS, EARLIER_ATTEMPTS_MAX, Assignment, Job, Verdict, account_of
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_daemon.core.state.timers import Timer
from gpuyard_daemon.core.tenants import holdings
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import mode_of

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def placed(cluster: Cluster, fact: f.JobPlaced, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if not job.spec.least_replicas <= len(fact.placements) <= max(job.spec.replicas, job.most_replicas):
        raise InvariantViolated(f"job {job.id}: {len(fact.placements)} places for {job.spec.replicas} replicas")
    cluster.move_job(job, "starting")
    if job.assignments:
        job.earlier.append((job.attempt, tuple([a.node for a in job.assignments])))
        del job.earlier[:-EARLIER_ATTEMPTS_MAX]
    job.attempt += 1
    job.prepare_until_ms = fact.prepare_until_ms
    job.exit_code = None
    job.started_ms = job.scaled_ms = 0
    job.why = None
    job.assignments = []
    for placement in fact.placements:
        take_place(cluster, job, placement, now_ms)
    for assignment in job.assignments:
        effects.start(cluster.nodes[assignment.node], job, assignment)
    if (claim := cluster.claims.of(fact.guest_of)) is not None:
        claim.guests.append(job.id)
    if job.prepare_until_ms:
        cluster.timers.set_job(job.prepare_until_ms, Timer.PREPARE, job.id)
    job.note(now_ms, f"attempt {job.attempt} placed on {_node_names(job)}")
    if job.spec.preemption == "never" and cluster.ranking.band_of(job) >= BORROWING:
        job.note(now_ms, "borrows beyond its queue's quota: it may be stopped for one that has waited very long")
    effects.tell(job, now_ms)


def take_place(cluster: Cluster, job: Job, placement: f.Placement, now_ms: int) -> None:
    """The next replica of the present attempt gets its place."""
    spec = job.spec
    key = AssignmentKey(job.id, job.attempt, len(job.assignments))
    assignment = Assignment(key, placement.node, placement.partition)
    space = cluster.pool.spaces[placement.node]
    assignment.lease_ms = lost_facts.lease_on(space.node, spec)
    lost_facts.note_lease(cluster, assignment)
    cluster.pool.take(space, assignment, job.domain, spec.need.cpu_milli, spec.need.memory_mib)
    holdings.take(cluster, job, space, assignment, now_ms)
    job.assignments.append(assignment)
    job.live += 1


def gang_released(cluster: Cluster, fact: f.GangReleased, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    job.prepare_until_ms = 0
    for assignment in job.assignments:
        cluster.move_assignment(job, assignment, "released")
        effects.order(cluster.nodes[assignment.node], cluster.go_order(job, assignment))
    job.note(now_ms, "all replicas prepared: go")


def stopping(cluster: Cluster, fact: f.JobStopping, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    stop_job(cluster, job, Verdict(fact.verdict, fact.why, fact.order_reason, fact.exit_code), now_ms, effects)


def stop_job(cluster: Cluster, job: Job, verdict: Verdict, now_ms: int, effects: Effects) -> None:
    job.verdict = verdict
    job.prepare_until_ms = 0
    if verdict.kind != "requeue":
        # It goes on nowhere, whatever was kept for its next attempt.
        cluster.claims.drop(job.id)
    suspend_facts.forget_suspension(cluster, job, now_ms)
    for assignment in job.assignments:
        if assignment.state not in ("stopping", "ended"):
            cluster.move_assignment(job, assignment, "stopping")
            cluster.pool.leaving(cluster.pool.spaces[assignment.node])
            effects.order(cluster.nodes[assignment.node], cluster.stop_order(job, assignment))
    job.note(now_ms, f"stopping: {verdict.why.text}")
    if job.state != "stopping":
        cluster.move_job(job, "stopping")
        effects.tell(job, now_ms)
    if job.service:
        cluster.unsettle(job)


def requeued(cluster: Cluster, fact: f.JobRequeued, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if job.live:
        raise InvariantViolated(f"job {job.id} was requeued while {job.live} of its replicas live")
    learning.bank_run_time(cluster, job, now_ms)
    job.verdict = None
    job.prepare_until_ms = 0
    job.retries_left -= fact.charged
    job.uncharged = fact.uncharged
    job.not_before_ms = fact.not_before_ms
    job.why = fact.why
    job.exit_code = fact.exit_code
    cluster.totals.requeued += 1
    cluster.move_job(job, "pending")
    if job.id not in cluster.waiting:
        cluster.claims.drop(job.id)
    job.note(now_ms, f"waits again: {fact.why.text}")
    effects.tell(job, now_ms)


def woken(cluster: Cluster, fact: f.JobWoken, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if job.state != "pending" or not job.not_before_ms:
        raise InvariantViolated(f"job {job.id} was woken, but it is {job.state} and not asleep")
    job.not_before_ms = 0
    cluster.queue_up(job)


def held(cluster: Cluster, fact: f.JobHeld, now_ms: int, effects: Effects) -> None:
    for job in _meant(cluster, fact):
        if not job.held_by or job.idled:
            job.held_by = fact.by
            suspend_facts.forget_idleness(job)
            cluster.park(job)
            suspend_facts.held(cluster, job, now_ms)
            cluster.settle_array(job)
            job.note(now_ms, f"held by {fact.by}")


def let_go(cluster: Cluster, fact: f.JobReleased, now_ms: int, effects: Effects) -> None:
    for job in _meant(cluster, fact):
        if job.held_by:
            job.held_by = ""
            job.note(now_ms, "released")
            suspend_facts.released(cluster, job, now_ms)
            if job.state == "pending":
                cluster.queue_up(job)


def _meant(cluster: Cluster, fact: f.JobHeld | f.JobReleased) -> list[Job]:
    job = cluster.job(fact.job)
    return cluster.pending_elements(job.array) if fact.whole_array else [job]


def ended(cluster: Cluster, fact: f.JobEnded, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if job.live:
        raise InvariantViolated(f"job {job.id} ended while {job.live} of its replicas live")
    learning.bank_run_time(cluster, job, now_ms)
    job.verdict = None
    job.prepare_until_ms = job.not_before_ms = 0
    job.why, job.exit_code, job.ended_ms = fact.why, fact.exit_code, now_ms
    cluster.move_job(job, fact.state)
    learning.note_end(cluster, job)
    cluster.claims.drop(job.id)
    cluster.promised.pop(job.id, None)
    cluster.arrays.ended(job)
    cluster.backlog.ended(job)
    for freed in cluster.gates.leave(job, cluster.jobs, cluster.arrays):
        if cluster.jobs[freed].state == "pending":
            cluster.queue_up(cluster.jobs[freed])
    cluster.finished[job.id] = None
    totals = cluster.totals
    totals.finished += 1
    if job.first_started_ms:
        totals.wait_sum_ms += job.first_started_ms - job.submitted_ms
    job.note(now_ms, f"{fact.state}: {fact.why.text}" if fact.why else fact.state)
    effects.tell(job, now_ms)
    if job.service:
        cluster.unsettle(job)
        cluster.service_jobs[job.tenant, job.service].pop(job.id, None)


def retired(cluster: Cluster, fact: f.JobRetired, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if not job.is_final:
        raise InvariantViolated(f"job {job.id} was retired while {job.state}")
    del cluster.jobs[job.id]
    cluster.arrays.retired(job)
    cluster.backlog.retired(job)
    cluster.finished.pop(job.id, None)
    for owner in (job.tenant, ""):
        jobs = cluster.lists[owner]
        jobs.counts[job.state] -= 1
        jobs.remove(job.id)


def prepared(cluster: Cluster, fact: f.ReplicaPrepared, now_ms: int, effects: Effects) -> None:
    job, assignment = _live(cluster, fact.key)
    assignment.port = fact.port
    if assignment.state == "ordered":
        cluster.move_assignment(job, assignment, "prepared")


def started(cluster: Cluster, fact: f.ReplicaStarted, now_ms: int, effects: Effects) -> None:
    job, assignment = _live(cluster, fact.key)
    assignment.started_ms = now_ms
    assignment.port = fact.port or assignment.port
    cluster.totals.started += 1
    if assignment.state != "stopping":
        cluster.move_assignment(job, assignment, "running")
    holdings.run(cluster, job, cluster.pool.spaces[assignment.node], assignment, now_ms)
    node = cluster.nodes[assignment.node]
    if node.avoided:
        need = job.spec.need
        served = (account_of(need, job.tenant, job.user), *((CONTAINERS,) if need.containers else ()))
        node_facts.forget_avoidance(cluster, node, mode_of(assignment.partition), *served)
    if not job.first_started_ms:
        job.first_started_ms = now_ms
    if job.state == "starting" and not any(a.state in ("ordered", "prepared", "released") for a in job.assignments):
        job.started_ms = now_ms
        learning.begin_run_time(cluster, job, now_ms)
        cluster.move_job(job, "running")
        job.note(now_ms, "running")
        effects.tell(job, now_ms)
        if job.service:
            cluster.unsettle(job)


def replica_ended(cluster: Cluster, fact: f.ReplicaEnded, now_ms: int, effects: Effects) -> None:
    job, assignment = _live(cluster, fact.key)
    cluster.move_assignment(job, assignment, "ended")
    assignment.outcome, assignment.exit_code, assignment.signal = fact.outcome, fact.exit_code, fact.signal
    assignment.code, assignment.detail, assignment.node_fault = fact.code, fact.detail, fact.node_fault
    job.live -= 1
    if job.service and not job.live:
        cluster.rank_replicas_anew((job.tenant, job.service))
    suspend_facts.forget_suspension(cluster, job, now_ms)
    lost_facts.drop_lease(cluster, assignment)
    space = cluster.pool.spaces[assignment.node]
    holdings.give(cluster, job, space, assignment, now_ms)
    cluster.pool.give(space, assignment)
    if space.node.absent:
        cluster.drop_absent(space)
    if len(job.assignments) > 1 or fact.outcome != "exited":
        what = fact.detail or fact.code or (f"exit code {fact.exit_code}" if fact.outcome == "exited" else "")
        job.note(now_ms, f"replica {fact.key.replica} {fact.outcome}" + (f": {what}" if what else ""))


def _live(cluster: Cluster, key: AssignmentKey) -> tuple[Job, Assignment]:
    assignment = cluster.assignment(key)
    if assignment is None or not assignment.is_live:
        raise InvariantViolated(f"a fact names assignment {key}, which is not alive")
    return cluster.jobs[key.job], assignment


def _node_names(job: Job) -> str:
    names = list(dict.fromkeys([a.node for a in job.assignments]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more nodes" if len(names) > 4 else "")
