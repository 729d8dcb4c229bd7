"""The state of the yard, and the one writer of it.

`apply_fact` is the only way anything changes: while a turn is decided, when a record is replayed, and in a standby. It
checks that each move is legal, keeps the derived indexes in step, and fills `Effects` with the orders and notices that
follow. It decides nothing and reads no settings: what a fact does not say, and the state does not imply, it cannot do.

Rules of this file: no policy; every change of a job's or an assignment's state goes through `_move_job` or
`_move_assignment`; resources are taken in `_on_placed` and given back in `_on_replica_ended`, nowhere else. What facts
about nodes and services do is written in `node_facts` and `service_facts`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from gpuyard_daemon.core import facts as f
from gpuyard_daemon.core import node_facts, service_facts
from gpuyard_daemon.core.arrays import LIVE_STATES, Arrays, elements
from gpuyard_daemon.core.capacity import ANY_MODE, NodeSpace, Pool
from gpuyard_daemon.core.effects import Effects, start_order
from gpuyard_daemon.core.gates import Gates
from gpuyard_daemon.core.listing import JobList
from gpuyard_daemon.core.model import (
    EARLIER_ATTEMPTS_MAX,
    Array,
    Assignment,
    AssignmentState,
    Job,
    KeptAnswer,
    Node,
    Service,
    Totals,
    Verdict,
)
from gpuyard_daemon.core.partitions import mode_of
from gpuyard_daemon.core.states import InvariantViolated, check_assignment_move, check_job_move
from gpuyard_daemon.core.tenancy import Tenancy, held_by
from gpuyard_daemon.core.timers import Timer, Timers
from gpuyard_protocol.jobs import JobSpec, JobState, SubmissionAnswer, Why
from gpuyard_protocol.names import AssignmentKey, JobId, NodeId, ServiceName, SubmissionId, Tenant
from gpuyard_protocol.nodes import Go, Stop
from gpuyard_protocol.resources import devices_of

AnswerKey: TypeAlias = tuple[Tenant, SubmissionId]
ServiceKey: TypeAlias = tuple[Tenant, ServiceName]


class Cluster:
    """Jobs, nodes, services and answers, with their indexes."""

    def __init__(self) -> None:
        # --- durable: what a snapshot holds
        self.jobs: dict[JobId, Job] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.services: dict[ServiceKey, Service] = {}
        #: Answers under ids that tenants chose, and under ids that the yard gave; oldest first.
        self.chosen_answers: OrderedDict[AnswerKey, KeptAnswer] = OrderedDict()
        self.given_answers: OrderedDict[AnswerKey, KeptAnswer] = OrderedDict()
        self.totals = Totals()
        #: The policy and what was used are durable, what is held is derived.
        self.tenancy = Tenancy()
        #: The newest job's number.
        self.last_job: JobId = 0
        #: The yard is stopping or stopped: nothing starts.
        self.draining = False
        # --- derived
        self.pool = Pool()
        self.timers = Timers()
        #: Who waits for other jobs.
        self.gates = Gates()
        self.arrays = Arrays()
        #: Jobs that may start now, by id.
        self.waiting: dict[JobId, Job] = {}
        #: Their order keys.
        self.waiting_keys: dict[JobId, int] = {}
        #: Jobs that began to wait since the queue last looked; None: too many, it must look at them all.
        self.newly_waiting: list[JobId] | None = []
        #: Finished jobs, longest ago first.
        self.finished: OrderedDict[JobId, None] = OrderedDict()
        #: Jobs of each service that are not final, oldest first.
        self.service_jobs: dict[ServiceKey, dict[JobId, Job]] = {}
        #: Services whose replicas may be too few or too many now.
        self.unsettled: dict[ServiceKey, None] = {}
        #: Services that may still have replicas of an earlier generation.
        self.changing: dict[ServiceKey, None] = {}
        #: By tenant, and "" for all.
        self.lists: dict[Tenant, JobList] = {"": JobList()}

    # --- reading -----------------------------------------------------------------------------------------------------

    def job(self, job: JobId) -> Job:
        """The job of a fact; it must exist."""
        found = self.jobs.get(job)
        if found is None:
            raise InvariantViolated(f"a fact names job {job}, which does not exist")
        return found

    def assignment(self, key: AssignmentKey) -> Assignment | None:
        """The assignment of a key, if it is of the job's current or last attempt."""
        job = self.jobs.get(key.job)
        if job is None or job.attempt != key.attempt or not 0 <= key.replica < len(job.assignments):
            return None
        return job.assignments[key.replica]

    def answer(self, tenant: Tenant, submission_id: SubmissionId) -> SubmissionAnswer | None:
        key = (tenant, submission_id)
        kept = self.chosen_answers.get(key) or self.given_answers.get(key)
        return kept.answer if kept else None

    # --- writing -----------------------------------------------------------------------------------------------------

    def apply_fact(self, fact: f.Fact, now_ms: int, effects: Effects) -> None:
        if now_ms != self.totals.summed_to_ms:
            self._sum_up_to(now_ms)
        _HANDLERS[type(fact)](self, fact, now_ms, effects)

    def _sum_up_to(self, now_ms: int) -> None:
        totals = self.totals
        passed = now_ms - totals.summed_to_ms if totals.summed_to_ms else 0
        totals.held_milli_ms += passed * self.pool.held_milli
        totals.capacity_milli_ms += passed * self.pool.capacity_milli
        totals.summed_to_ms = now_ms

    # requests

    def _on_accepted(self, fact: f.JobAccepted, now_ms: int, effects: Effects) -> None:
        self.take_number(fact.job)
        job = Job(
            id=fact.job,
            tenant=fact.tenant,
            user=fact.user,
            submission_id=fact.submission_id,
            spec=fact.spec,
            submitted_ms=now_ms,
            retries_left=fact.spec.retries,
            not_before_ms=_begin_ms(fact.spec, now_ms),
            held_by=fact.user if fact.spec.hold else "",
            story=[(now_ms, "accepted")],
        )
        self.index_job(job)
        answer = SubmissionAnswer(submission_id=fact.submission_id, accepted=True, job=fact.job, at_ms=now_ms)
        self._keep_answer(fact.tenant, answer, fact.answer_until_ms, chosen=fact.chosen)
        effects.answer(fact.tenant, answer)
        effects.tell_fresh(job, now_ms)

    def _on_array(self, fact: f.ArrayAccepted, now_ms: int, effects: Effects) -> None:
        """One answer, and no event for each of so many jobs until something happens to it."""
        assert fact.spec.array is not None
        count = fact.spec.array.count
        array = Array(fact.first, fact.tenant, count, fact.spec, count, count)
        self.arrays.add(array)
        begin_ms, holder = _begin_ms(fact.spec, now_ms), fact.user if fact.spec.hold else ""
        for number, index in elements(array):
            self.take_number(number)
            self.index_job(
                Job(
                    id=number,
                    tenant=fact.tenant,
                    user=fact.user,
                    submission_id=fact.submission_id,
                    spec=fact.spec,
                    submitted_ms=now_ms,
                    retries_left=fact.spec.retries,
                    not_before_ms=begin_ms,
                    held_by=holder,
                    array=fact.first,
                    array_index=index,
                    story=[(now_ms, f"accepted as element {index} of array {fact.first}")],
                )
            )
        answer = SubmissionAnswer(
            submission_id=fact.submission_id, accepted=True, job=fact.first, elements=count, at_ms=now_ms
        )
        self._keep_answer(fact.tenant, answer, fact.answer_until_ms, chosen=fact.chosen)
        effects.answer(fact.tenant, answer)

    def _on_array_cancelled(self, fact: f.ArrayCancelled, now_ms: int, effects: Effects) -> None:
        for job in self.pending_elements(fact.array):
            self._on_ended(f.JobEnded(job.id, "cancelled", fact.why), now_ms, effects)

    def pending_elements(self, array: JobId) -> list[Job]:
        """Elements of an array that wait, by number."""
        numbers = range(array, array + self.arrays.records[array].count)
        return [job for number in numbers if (job := self.jobs.get(number)) is not None and job.state == "pending"]

    def take_number(self, job: JobId) -> None:
        if job != self.last_job + 1:
            raise InvariantViolated(f"job {job} does not follow job {self.last_job}")
        self.last_job = job

    def _on_answered(self, fact: f.RequestAnswered, now_ms: int, effects: Effects) -> None:
        self._keep_answer(fact.tenant, fact.answer, fact.until_ms, chosen=fact.chosen)
        if not fact.answer.accepted:
            self.totals.rejected += 1
        effects.answer(fact.tenant, fact.answer)

    def _keep_answer(self, tenant: Tenant, answer: SubmissionAnswer, until_ms: int, *, chosen: bool) -> None:
        answers = self.chosen_answers if chosen else self.given_answers
        key = (tenant, answer.submission_id)
        answers[key] = KeptAnswer(until_ms, answer)
        answers.move_to_end(key)

    def _on_repeated(self, fact: f.AnswerRepeated, now_ms: int, effects: Effects) -> None:
        answer = self.answer(fact.tenant, fact.submission_id)
        if answer is None:
            raise InvariantViolated(f"no answer {fact.submission_id!r} of {fact.tenant!r} to repeat")
        effects.answer(fact.tenant, answer)

    def _on_forgotten(self, fact: f.AnswersForgotten, now_ms: int, effects: Effects) -> None:
        for _ in range(fact.chosen):
            self.chosen_answers.popitem(last=False)
        for _ in range(fact.given):
            self.given_answers.popitem(last=False)

    # jobs

    def _on_placed(self, fact: f.JobPlaced, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        spec = job.spec
        if len(fact.placements) != spec.replicas:
            raise InvariantViolated(f"job {job.id}: {len(fact.placements)} places for {spec.replicas} replicas")
        self._move_job(job, "starting")
        if job.assignments:
            job.earlier.append((job.attempt, tuple([a.node for a in job.assignments])))
            del job.earlier[:-EARLIER_ATTEMPTS_MAX]
        job.attempt += 1
        job.prepare_until_ms = fact.prepare_until_ms
        job.exit_code = None
        job.started_ms = 0
        job.why = None
        job.assignments = []
        for replica, placement in enumerate(fact.placements):
            key = AssignmentKey(job.id, job.attempt, replica)
            assignment = Assignment(key, placement.node, placement.partition)
            space = self.pool.spaces[placement.node]
            self.pool.take(space, assignment, job.tenant, spec.need.cpu_milli, spec.need.memory_mib)
            self.tenancy.take(job.tenant, job.user, held_by(space, placement.partition), now_ms)
            job.assignments.append(assignment)
            effects.order(space.node, start_order(job, assignment))
        job.live = spec.replicas
        if job.prepare_until_ms:
            self.timers.set_job(job.prepare_until_ms, Timer.PREPARE, job.id)
        job.note(now_ms, f"attempt {job.attempt} placed on {_node_names(job)}")
        effects.tell(job, now_ms)

    def _on_released(self, fact: f.GangReleased, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        job.prepare_until_ms = 0
        for assignment in job.assignments:
            self._move_assignment(job, assignment, "released")
            effects.order(self.nodes[assignment.node], self.go_order(job, assignment))
        job.note(now_ms, "all replicas prepared: go")

    def _on_stopping(self, fact: f.JobStopping, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        self._stop(job, Verdict(fact.verdict, fact.why, fact.order_reason, fact.exit_code), now_ms, effects)

    def _stop(self, job: Job, verdict: Verdict, now_ms: int, effects: Effects) -> None:
        job.verdict = verdict
        job.prepare_until_ms = 0
        for assignment in job.assignments:
            if assignment.state not in ("stopping", "ended"):
                self._move_assignment(job, assignment, "stopping")
                effects.order(self.nodes[assignment.node], self.stop_order(job, assignment))
        job.note(now_ms, f"stopping: {verdict.why.text}")
        if job.state != "stopping":
            self._move_job(job, "stopping")
            effects.tell(job, now_ms)
        if job.service:
            self.unsettle(job)

    def _on_requeued(self, fact: f.JobRequeued, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        if job.live:
            raise InvariantViolated(f"job {job.id} was requeued while {job.live} of its replicas live")
        job.verdict = None
        job.prepare_until_ms = 0
        job.retries_left -= fact.charged
        job.uncharged = fact.uncharged
        job.not_before_ms = fact.not_before_ms
        job.why = fact.why
        job.exit_code = fact.exit_code
        self.totals.requeued += 1
        self._move_job(job, "pending")
        job.note(now_ms, f"waits again: {fact.why.text}")
        effects.tell(job, now_ms)

    def _on_woken(self, fact: f.JobWoken, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        if job.state != "pending" or not job.not_before_ms:
            raise InvariantViolated(f"job {job.id} was woken, but it is {job.state} and not asleep")
        job.not_before_ms = 0
        self._await(job)

    def _on_held(self, fact: f.JobHeld, now_ms: int, effects: Effects) -> None:
        for job in self._meant(fact):
            if not job.held_by:
                job.held_by = fact.by
                self._park(job)
                self._settle_array(job)
                job.note(now_ms, f"held by {fact.by}")

    def _on_let_go(self, fact: f.JobReleased, now_ms: int, effects: Effects) -> None:
        for job in self._meant(fact):
            if job.held_by:
                job.held_by = ""
                job.note(now_ms, "released")
                if job.state == "pending":
                    self._await(job)

    def _meant(self, fact: f.JobHeld | f.JobReleased) -> list[Job]:
        job = self.job(fact.job)
        return self.pending_elements(job.array) if fact.whole_array else [job]

    def _on_ended(self, fact: f.JobEnded, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        if job.live:
            raise InvariantViolated(f"job {job.id} ended while {job.live} of its replicas live")
        job.verdict = None
        job.prepare_until_ms = job.not_before_ms = 0
        job.why, job.exit_code, job.ended_ms = fact.why, fact.exit_code, now_ms
        self._move_job(job, fact.state)
        self.arrays.ended(job)
        for freed in self.gates.leave(job, self.jobs, self.arrays):
            if self.jobs[freed].state == "pending":
                self._await(self.jobs[freed])
        self.finished[job.id] = None
        totals = self.totals
        totals.finished += 1
        if job.first_started_ms:
            totals.wait_sum_ms += job.first_started_ms - job.submitted_ms
        job.note(now_ms, f"{fact.state}: {fact.why.text}" if fact.why else fact.state)
        effects.tell(job, now_ms)
        if job.service:
            self.unsettle(job)
            self.service_jobs[job.tenant, job.service].pop(job.id, None)

    def _on_retired(self, fact: f.JobRetired, now_ms: int, effects: Effects) -> None:
        job = self.job(fact.job)
        if not job.is_final:
            raise InvariantViolated(f"job {job.id} was retired while {job.state}")
        del self.jobs[job.id]
        self.arrays.retired(job)
        self.finished.pop(job.id, None)
        for owner in (job.tenant, ""):
            jobs = self.lists[owner]
            jobs.counts[job.state] -= 1
            jobs.remove(job.id)

    # replicas

    def _on_prepared(self, fact: f.ReplicaPrepared, now_ms: int, effects: Effects) -> None:
        job, assignment = self._live(fact.key)
        assignment.port = fact.port
        if assignment.state == "ordered":
            self._move_assignment(job, assignment, "prepared")

    def _on_started(self, fact: f.ReplicaStarted, now_ms: int, effects: Effects) -> None:
        job, assignment = self._live(fact.key)
        assignment.started_ms = now_ms
        assignment.port = fact.port or assignment.port
        self.totals.started += 1
        if assignment.state != "stopping":
            self._move_assignment(job, assignment, "running")
        node = self.nodes[assignment.node]
        if node.avoided:
            node_facts.forget_avoidance(self, node, mode_of(assignment.partition))
        if not job.first_started_ms:
            job.first_started_ms = now_ms
        if job.state == "starting" and not any(a.state in ("ordered", "prepared", "released") for a in job.assignments):
            job.started_ms = now_ms
            self._move_job(job, "running")
            job.note(now_ms, "running")
            effects.tell(job, now_ms)
            if job.service:
                self.unsettle(job)

    def _on_replica_ended(self, fact: f.ReplicaEnded, now_ms: int, effects: Effects) -> None:
        job, assignment = self._live(fact.key)
        self._move_assignment(job, assignment, "ended")
        assignment.outcome, assignment.exit_code, assignment.signal = fact.outcome, fact.exit_code, fact.signal
        assignment.code, assignment.detail = fact.code, fact.detail
        job.live -= 1
        space = self.pool.spaces[assignment.node]
        need = job.spec.need
        self.tenancy.give(job.tenant, job.user, held_by(space, assignment.partition), now_ms)
        self.pool.give(space, assignment, need.cpu_milli, need.memory_mib)
        if space.node.absent:
            self._drop_absent(space)
        if len(job.assignments) > 1 or fact.outcome != "exited":
            what = fact.detail or fact.code or (f"exit code {fact.exit_code}" if fact.outcome == "exited" else "")
            job.note(now_ms, f"replica {fact.key.replica} {fact.outcome}" + (f": {what}" if what else ""))

    def _live(self, key: AssignmentKey) -> tuple[Job, Assignment]:
        assignment = self.assignment(key)
        if assignment is None or not assignment.is_live:
            raise InvariantViolated(f"a fact names assignment {key}, which is not alive")
        return self.jobs[key.job], assignment

    # nodes

    def refit(self, space: NodeSpace) -> None:
        """Recount a node's space after its inventory changed."""
        needs = [self.jobs[key.job].spec.need for key in space.assignments]
        self.pool.refit(space, sum(n.cpu_milli for n in needs), sum(n.memory_mib for n in needs))

    def _drop_absent(self, space: NodeSpace) -> None:
        """Forget cards that are gone, once nothing holds them any more."""
        held = {uuid for a in space.assignments.values() for uuid in devices_of(a.partition)}
        remaining = [device for device in space.node.absent if device.uuid in held]
        if len(remaining) != len(space.node.absent):
            space.node.absent = remaining
            self.refit(space)

    def restore_modes(self, node: Node) -> None:
        """Make the modes that a node may be asked for follow from what is to be avoided there."""
        space = self.pool.spaces[node.id]
        space.modes = tuple(m for m in ANY_MODE if not (m in node.avoided and node.avoided[m].until_ms))
        self.pool.touch(space)

    # the yard

    def _on_policy(self, fact: f.PolicySet, now_ms: int, effects: Effects) -> None:
        self.tenancy.set_policy(fact.policy)

    def _on_draining(self, fact: f.YardDraining, now_ms: int, effects: Effects) -> None:
        self.draining = True
        why = Why("Shutdown", "the yard was stopped")
        for job in self.jobs.values():
            if job.live and job.verdict is None:
                self._stop(job, Verdict("requeue", why, "shutdown"), now_ms, effects)

    def _on_resumed(self, fact: f.YardResumed, now_ms: int, effects: Effects) -> None:
        self.draining = False
        for node in self.nodes.values():
            if node.state in ("ready", "suspected", "lost"):
                node.state, node.reason = "joining", "its agent has not joined since the yard was started"
                self.pool.touch(self.pool.spaces[node.id])
        self.unsettled.update(dict.fromkeys(self.services))

    # --- moves and indexes -------------------------------------------------------------------------------------------

    def _move_job(self, job: Job, to: JobState) -> None:
        check_job_move(job, to)
        for owner in (job.tenant, ""):
            counts = self.lists[owner].counts
            counts[job.state] -= 1
            counts[to] += 1
        self._park(job)
        if (throttle := self.arrays.throttle(job)) is not None:
            throttle.lives((to in LIVE_STATES) - (job.state in LIVE_STATES))
        job.state = to
        if to == "pending":
            self._await(job)
        self._settle_array(job)

    def _move_assignment(self, job: Job, assignment: Assignment, to: AssignmentState) -> None:
        check_assignment_move(job, assignment, to)
        assignment.state = to

    def _park(self, job: Job) -> None:
        """It may not start for now."""
        if (throttle := self.arrays.throttle(job)) is not None:
            throttle.cannot(job.id)
        self._leave_line(job.id)

    def _leave_line(self, job: JobId) -> None:
        if job in self.waiting:
            del self.waiting[job], self.waiting_keys[job]

    def _settle_array(self, job: Job) -> None:
        """Let as many elements of a job's array look for a place as may go at once."""
        if (throttle := self.arrays.throttle(job)) is not None:
            come, go = throttle.settle()
            for number in go:
                self._leave_line(number)
            for number in come:
                self._join_line(self.jobs[number])

    def may_start(self, job: Job) -> bool:
        """Pending, and nothing but room holds it back: no time, no hold, no other job."""
        is_due = job.state == "pending" and not job.not_before_ms and not job.held_by
        return is_due and self.gates.is_open(job)

    def _await(self, job: Job) -> None:
        """A pending job waits for a place, or first for its time, its release, or other jobs."""
        if job.not_before_ms:
            self.timers.set_job(job.not_before_ms, Timer.WAKE, job.id)
            return
        if not self.may_start(job):
            return
        if (throttle := self.arrays.throttle(job)) is not None:
            if throttle.could(job.id):
                self._join_line(job)
            self._settle_array(job)
        else:
            self._join_line(job)

    def _join_line(self, job: Job) -> None:
        if job.id in self.waiting:
            return
        self.waiting[job.id] = job
        self.waiting_keys[job.id] = job.order_key
        if self.newly_waiting is not None:
            self.newly_waiting.append(job.id)
            if len(self.newly_waiting) > 1024 + 2 * len(self.waiting):
                # Nobody is reading: a standby, or a long replay.
                self.newly_waiting = None

    def unsettle(self, job: Job) -> None:
        """A service's replica changed: look at the service again."""
        key = (job.tenant, job.service)
        if key in self.services:
            self.unsettled[key] = None

    def index_job(self, job: Job) -> None:
        """Enter a job, new or restored, into the indexes."""
        self.jobs[job.id] = job
        for owner in (job.tenant, ""):
            jobs = self.lists.get(owner)
            if jobs is None:
                jobs = self.lists[owner] = JobList()
            jobs.add(job.id)
            jobs.counts[job.state] += 1
        if job.service and not job.is_final:
            self.service_jobs.setdefault((job.tenant, job.service), {})[job.id] = job
        if not job.is_final:
            self.gates.enter(job, self.jobs, self.arrays)
        if job.state in LIVE_STATES and (throttle := self.arrays.throttle(job)) is not None:
            throttle.lives(1)
            self._settle_array(job)
        if job.state == "pending":
            self._await(job)

    def stop_order(self, job: Job, assignment: Assignment) -> Stop:
        """The order that ends one replica; the same whenever it is asked for."""
        reason = job.verdict.order_reason if job.verdict else "cancelled"
        return Stop(key=assignment.key, grace_ms=job.spec.stop_grace_ms, reason=reason)

    def go_order(self, job: Job, assignment: Assignment) -> Go:
        """The order that lets one member of a prepared gang run."""
        peers = tuple([self._address(member.node) for member in job.assignments])
        return Go(key=assignment.key, master_address=peers[0], master_port=job.assignments[0].port, peers=peers)

    def _address(self, node: NodeId) -> str:
        inventory = self.nodes[node].inventory
        return inventory.address if inventory else ""


def _begin_ms(spec: JobSpec, now_ms: int) -> int:
    """When a job may start first; 0: at once."""
    at_ms = spec.begin_ms or (now_ms + spec.begin_after_ms if spec.begin_after_ms else 0)
    return at_ms if at_ms > now_ms else 0


def _node_names(job: Job) -> str:
    names = list(dict.fromkeys([a.node for a in job.assignments]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more nodes" if len(names) > 4 else "")


#: Each handler takes exactly the fact it is listed with; the types cannot say so for a table.
_HANDLERS: dict[type, Callable[[Cluster, Any, int, Effects], None]] = {
    f.JobAccepted: Cluster._on_accepted,
    f.ArrayAccepted: Cluster._on_array,
    f.ArrayCancelled: Cluster._on_array_cancelled,
    f.RequestAnswered: Cluster._on_answered,
    f.AnswerRepeated: Cluster._on_repeated,
    f.AnswersForgotten: Cluster._on_forgotten,
    f.JobPlaced: Cluster._on_placed,
    f.GangReleased: Cluster._on_released,
    f.JobStopping: Cluster._on_stopping,
    f.JobRequeued: Cluster._on_requeued,
    f.JobWoken: Cluster._on_woken,
    f.JobHeld: Cluster._on_held,
    f.JobReleased: Cluster._on_let_go,
    f.JobEnded: Cluster._on_ended,
    f.JobRetired: Cluster._on_retired,
    f.ReportsTaken: node_facts.reports,
    f.LedgerReplaced: node_facts.new_ledger,
    f.NodeJoined: node_facts.joined,
    f.NodeChanged: node_facts.node_changed,
    f.NodeAvoided: node_facts.avoided,
    f.NodeForgiven: node_facts.forgiven,
    f.ReplicaPrepared: Cluster._on_prepared,
    f.ReplicaStarted: Cluster._on_started,
    f.ReplicaEnded: Cluster._on_replica_ended,
    f.ServiceSet: service_facts.service,
    f.ServiceRemoved: service_facts.service_removed,
    f.LoadTaken: service_facts.load,
    f.ServiceScaled: service_facts.scaled,
    f.ReplicaWanted: service_facts.replica_wanted,
    f.ServiceFaltered: service_facts.faltered,
    f.PolicySet: Cluster._on_policy,
    f.YardDraining: Cluster._on_draining,
    f.YardResumed: Cluster._on_resumed,
}
