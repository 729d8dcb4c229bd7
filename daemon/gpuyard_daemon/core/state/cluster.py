"""The state of the yard, and the one writer of it.

`apply_fact` is the only way anything changes: while a turn is decided, when a record is replayed, and in a standby. It
checks that each move is legal, keeps the derived indexes in step, and fills `Effects` with the orders and notices that
follow. It decides nothing and reads no settings: what a fact does not say, and the state does not imply, it cannot do.

Rules of this file: no policy; every change of a job's or an assignment's state goes through `move_job` or
`move_assignment`. What each kind of fact does is written in `request_facts`, `job_facts`, `node_facts` and
`service_facts`, whose functions are called from the table at the end, and from nowhere that decides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from gpuyard_daemon.core.applying import (
    card_facts,
    claim_facts,
    cordon_facts,
    elastic_facts,
    job_facts,
    lost_facts,
    node_facts,
    request_facts,
    service_facts,
    suspend_facts,
)
from gpuyard_daemon.core.placing.capacity import ANY_MODE, NodeSpace, Pool
from gpuyard_daemon.core.placing.demand import LiveDemand
from gpuyard_daemon.core.placing.speeds import Speeds
from gpuyard_daemon.core.preempting.claims import Claims
from gpuyard_daemon.core.queueing import fairness, learning
from gpuyard_daemon.core.queueing.fairness import Fairness
from gpuyard_daemon.core.queueing.gates import Gates
from gpuyard_daemon.core.queueing.prediction import Lore
from gpuyard_daemon.core.queueing.ranking import Ranking
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.alike import Alike
from gpuyard_daemon.core.state.arrays import LIVE_STATES, Arrays
from gpuyard_daemon.core.state.backlog import Backlog
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.listing import JobList
from gpuyard_daemon.core.state.model import (
    Assignment,
    AssignmentState,
    Job,
    KeptAnswer,
    Node,
    Service,
    Totals,
    Verdict,
)
from gpuyard_daemon.core.state.running import Running
from gpuyard_daemon.core.state.states import InvariantViolated, check_assignment_move, check_job_move
from gpuyard_daemon.core.state.timers import Timer, Timers
from gpuyard_daemon.core.state.underway import Underway
from gpuyard_daemon.core.tenants import holdings
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_daemon.core.tenants.quota import QuotaTree
from gpuyard_daemon.core.tenants.tenancy import Tenancy
from gpuyard_protocol.jobs import JobState, SubmissionAnswer, Why
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
        #: What is asked for: counts and the mix in use are durable, what waits of it is derived.
        self.demand = LiveDemand()
        #: How fast models of cards are, by the policy.
        self.speeds = Speeds()
        #: Queues, and what is used of their quotas: derived from policy and assignments.
        self.quota = QuotaTree()
        #: What tenants were charged lately, and their shifts.
        self.fairness = Fairness()
        #: What ended jobs taught.
        self.lore = Lore()
        #: What running jobs have had so far: derived.
        self.underway = Underway()
        #: The newest job's number.
        self.last_job: JobId = 0
        #: The yard is stopping or stopped: nothing starts.
        self.draining = False
        # --- derived
        self.alike = Alike()
        self.pool = Pool()
        #: Places kept for jobs in line: the records are durable, what the spaces know of them is derived.
        self.claims = Claims(self.pool)
        self.timers = Timers()
        #: Jobs that have not ended and whose deadline was promised.
        self.promised: dict[JobId, None] = {}
        #: Who waits for other jobs.
        self.gates = Gates()
        self.arrays = Arrays()
        self.backlog = Backlog(self.arrays)
        #: Jobs that may start now, by id.
        self.waiting: dict[JobId, Job] = {}
        #: Jobs that began or ceased to wait since the line last looked; None: too many, it must look at them all.
        self.line_changes: list[JobId] | None = []
        self.ranking = Ranking(self)
        #: Jobs that run.
        self.running = Running()
        #: Jobs that were told to stop and have not ended.
        self.leaving: dict[JobId, Job] = {}
        #: Suspended jobs that wait for their cards, and that nobody holds.
        self.suspended: dict[JobId, Job] = {}
        #: Elastic jobs that run with fewer replicas than they may have, and those with more than their least.
        self.growing: dict[JobId, Job] = {}
        self.wide: dict[JobId, Job] = {}
        #: Finished jobs, longest ago first.
        self.finished: OrderedDict[JobId, None] = OrderedDict()
        #: Jobs of each service that are not final, oldest first.
        self.service_jobs: dict[ServiceKey, dict[JobId, Job]] = {}
        #: Services whose replicas may be too few or too many now.
        self.unsettled: dict[ServiceKey, None] = {}
        #: Services that may still have replicas of an earlier generation.
        self.changing: dict[ServiceKey, None] = {}
        #: Replicas under a lease, by node, with the lease.
        self.leased: dict[NodeId, dict[AssignmentKey, int]] = {}
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

    def pending_elements(self, array: JobId) -> list[Job]:
        """Elements of an array that wait, by number."""
        numbers = range(array, array + self.arrays.records[array].count)
        return [job for number in numbers if (job := self.jobs.get(number)) is not None and job.state == "pending"]

    def take_number(self, job: JobId) -> None:
        if job != self.last_job + 1:
            raise InvariantViolated(f"job {job} does not follow job {self.last_job}")
        self.last_job = job

    # nodes

    def refit(self, space: NodeSpace) -> None:
        """Recount a node's space after its inventory changed; what is held there may count for more or less now."""
        before = {key: holdings.amounts_of(space, held.partition) for key, held in space.assignments.items()}
        amounts = [held.held(self.jobs[key.job].spec.need) for key, held in space.assignments.items()]
        self.pool.refit(space, sum([cpu for cpu, _ in amounts]), sum([memory for _, memory in amounts]))
        for key, counted in before.items():
            holdings.recount(self, self.jobs[key.job], space, space.assignments[key], counted)

    def drop_absent(self, space: NodeSpace) -> None:
        """Forget cards that are gone, once nothing holds them any more."""
        held = {uuid for a in space.assignments.values() for uuid in devices_of(a.partition)}
        remaining = [device for device in space.node.absent if device.uuid in held]
        if len(remaining) != len(space.node.absent):
            space.node.absent = remaining
            self.refit(space)

    def restore_modes(self, node: Node) -> None:
        """Make what a node may be asked for follow from what is to be avoided there."""
        avoided = {name for name, avoidance in node.avoided.items() if avoidance.until_ms}
        space = self.pool.spaces[node.id]
        space.modes = tuple(mode for mode in ANY_MODE if mode not in avoided)
        self.pool.shut(space, tuple(sorted(avoided.difference(ANY_MODE))))

    # the yard

    def _on_policy(self, fact: f.PolicySet, now_ms: int, effects: Effects) -> None:
        self.fairness.begin_anew(now_ms)
        self.set_policy(fact.policy)
        for space in self.pool.spaces.values():
            for key, assignment in space.assignments.items():
                holdings.enter_in_queue(self, self.jobs[key.job], space, assignment)

    def set_policy(self, policy: Policy) -> None:
        """Enter what tenants and queues are granted; what is held counts for no queue yet."""
        self.tenancy.set_policy(policy)
        self.quota.set_policy(policy, holdings.capacity_by_model(self.pool))
        self.demand.set_speeds(policy.speeds)
        self.speeds = Speeds(policy.speeds)

    def _on_draining(self, fact: f.YardDraining, now_ms: int, effects: Effects) -> None:
        self.draining = True
        why = Why("Shutdown", "the yard was stopped")
        for job in self.jobs.values():
            if job.live and job.verdict is None:
                job_facts.stop_job(self, job, Verdict("requeue", why, "shutdown"), now_ms, effects)

    def _on_resumed(self, fact: f.YardResumed, now_ms: int, effects: Effects) -> None:
        self.draining = False
        for node in self.nodes.values():
            if node.state in ("ready", "suspected", "lost"):
                node.state, node.reason = "joining", "its agent has not joined since the yard was started"
                node.lost_ms = 0
                self.pool.touch(self.pool.spaces[node.id])
        self.unsettled.update(dict.fromkeys(self.services))

    # --- moves and indexes -------------------------------------------------------------------------------------------

    def move_job(self, job: Job, to: JobState) -> None:
        check_job_move(job, to)
        before = job.state
        for counts in (self.lists[job.tenant].counts, self.lists[""].counts):
            counts[before] -= 1
            counts[to] += 1
        if before == "pending":
            self.park(job)
        throttle = self.arrays.throttle(job) if job.array else None
        if throttle is not None:
            throttle.lives((to in LIVE_STATES) - (before in LIVE_STATES))
        if before == "running":
            self.running.leave(job)
        job.state = to
        self.note_elastic(job)
        if to == "running":
            self.running.enter(job, self.totals.summed_to_ms)
        if to == "stopping":
            self.leaving[job.id] = job
        else:
            self.leaving.pop(job.id, None)
        if to == "pending":
            self.queue_up(job)
        if throttle is not None:
            self.settle_array(job)

    def move_assignment(self, job: Job, assignment: Assignment, to: AssignmentState) -> None:
        check_assignment_move(job, assignment, to)
        if assignment.state == "suspending" and to == "stopping":
            assignment.may_leave_image = True
        assignment.state = to

    def park(self, job: Job) -> None:
        """It may not start for now."""
        if (throttle := self.arrays.throttle(job)) is not None:
            throttle.cannot(job.id)
        self._leave_line(job.id)

    def _leave_line(self, job: JobId) -> None:
        left = self.waiting.pop(job, None)
        if left is not None:
            self.demand.waits(left.spec.need, -left.spec.least_replicas)
            left.waited_ms = self.totals.summed_to_ms - left.waits_since_ms
            left.waits_since_ms = 0
            self._note_line(job)
            self.claims.drop(job)

    def settle_array(self, job: Job) -> None:
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

    def queue_up(self, job: Job) -> None:
        """A pending job waits for a place, or first for its time, its release, or other jobs."""
        if job.not_before_ms:
            self.timers.set_job(job.not_before_ms, Timer.WAKE, job.id)
            return
        if not self.may_start(job):
            return
        throttle = self.arrays.throttle(job) if job.array else None
        if throttle is None:
            self._join_line(job)
            return
        if throttle.could(job.id):
            self._join_line(job)
        self.settle_array(job)

    def _join_line(self, job: Job) -> None:
        number, spec = job.id, job.spec
        if number in self.waiting:
            return
        self.waiting[number] = job
        self.demand.waits(spec.need, spec.least_replicas)
        if not job.waits_since_ms:
            now_ms = self.totals.summed_to_ms
            job.level = self.ranking.natural_of(job, now_ms)
            job.waits_since_ms = max(1, now_ms)
        if self.line_changes is not None:
            self._note_line(number)

    def _note_line(self, job: JobId) -> None:
        if self.line_changes is not None:
            self.line_changes.append(job)
            if len(self.line_changes) > 1024 + 2 * len(self.waiting):
                # Nobody is reading: a standby, or a long replay.
                self.line_changes = None

    def note_elastic(self, job: Job) -> None:
        """Enter whether an elastic job could have more replicas, or fewer."""
        if not job.is_elastic:
            return
        self.growing.pop(job.id, None)
        self.wide.pop(job.id, None)
        if job.state == "running" and len(job.assignments) < job.most_replicas:
            self.growing[job.id] = job
        if job.state == "running" and len(job.assignments) > job.spec.least_replicas:
            self.wide[job.id] = job

    def rank_replicas_anew(self, key: ServiceKey) -> None:
        """Of what a service is never to be without, more or less is there: its waiting replicas may stand elsewhere."""
        for number in self.service_jobs.get(key, {}):
            if number in self.waiting:
                self._note_line(number)

    def unsettle(self, job: Job) -> None:
        """A service's replica changed: look at the service again."""
        key = (job.tenant, job.service)
        if key in self.services:
            self.unsettled[key] = None

    def index_job(self, job: Job) -> None:
        """Enter a job, new or restored, into the indexes."""
        number, state, spec = job.id, job.state, job.spec
        self.jobs[number] = job
        jobs = self.lists.get(job.tenant)
        if jobs is None:
            jobs = self.lists[job.tenant] = JobList()
        jobs.add(number, state)
        self.lists[""].add(number, state)
        self.backlog.enter(job)
        if state == "pending" or not job.is_final:
            if job.promised:
                self.promised[number] = None
            if job.service:
                self.service_jobs.setdefault((job.tenant, job.service), {})[number] = job
            if spec.depends_on or spec.name:
                self.gates.enter(job, self.jobs, self.arrays)
        if job.assignments:
            self._index_attempt(job)
        if state == "pending":
            self.queue_up(job)

    def _index_attempt(self, job: Job) -> None:
        """The same for what it holds, or held last."""
        if job.state in LIVE_STATES and (throttle := self.arrays.throttle(job)) is not None:
            throttle.lives(1)
            self.settle_array(job)
        self.note_elastic(job)
        if job.state == "running":
            self.running.enter(job, self.totals.summed_to_ms)
        if job.state == "stopping" or any(each.state == "suspending" for each in job.assignments):
            self.leaving[job.id] = job
        if not job.held_by and any(each.state == "suspended" for each in job.assignments):
            self.suspended[job.id] = job

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


#: Each handler takes exactly the fact it is listed with; the types cannot say so for a table.
_HANDLERS: dict[type, Callable[[Cluster, Any, int, Effects], None]] = {
    f.JobAccepted: request_facts.accepted,
    f.ArrayAccepted: request_facts.array_accepted,
    f.ArrayCancelled: request_facts.array_cancelled,
    f.RequestAnswered: request_facts.answered,
    f.AnswerRepeated: request_facts.repeated,
    f.AnswersForgotten: request_facts.forgotten,
    f.JobPlaced: job_facts.placed,
    f.ClaimMade: claim_facts.made,
    f.ClaimDropped: claim_facts.dropped,
    f.JobIdled: suspend_facts.idled,
    f.JobSuspending: suspend_facts.suspending,
    f.ReplicaSuspended: suspend_facts.suspended,
    f.SuspensionFailed: suspend_facts.suspension_failed,
    f.JobResuming: suspend_facts.resuming,
    f.ReplicaResumed: suspend_facts.resumed,
    f.ResumptionFailed: suspend_facts.resumption_failed,
    f.JobWidened: elastic_facts.widened,
    f.JobResizing: elastic_facts.resizing,
    f.JobScaled: elastic_facts.scaled,
    f.GangReleased: job_facts.gang_released,
    f.JobStopping: job_facts.stopping,
    f.JobRequeued: job_facts.requeued,
    f.JobWoken: job_facts.woken,
    f.JobHeld: job_facts.held,
    f.JobReleased: job_facts.let_go,
    f.JobEnded: job_facts.ended,
    f.JobRetired: job_facts.retired,
    f.ReportsTaken: node_facts.reports,
    f.LedgerReplaced: node_facts.new_ledger,
    f.NodeJoined: node_facts.joined,
    f.NodeChanged: node_facts.node_changed,
    f.ReplicasGivenUp: lost_facts.given_up,
    f.GivenUpGone: lost_facts.gone,
    f.NodeForgotten: lost_facts.forgotten,
    f.NodeCordoned: cordon_facts.cordoned,
    f.NodeUncordoned: cordon_facts.uncordoned,
    f.NodeAvoided: node_facts.avoided,
    f.NodeForgiven: node_facts.forgiven,
    f.CardSwitched: card_facts.switched,
    f.CardSettled: card_facts.settled,
    f.ReplicaPrepared: job_facts.prepared,
    f.ReplicaStarted: job_facts.started,
    f.ReplicaEnded: job_facts.replica_ended,
    f.ServiceSet: service_facts.service,
    f.ServiceRemoved: service_facts.service_removed,
    f.LoadTaken: service_facts.load,
    f.ServiceScaled: service_facts.scaled,
    f.ReplicaWanted: service_facts.replica_wanted,
    f.ServiceFaltered: service_facts.faltered,
    f.SizesLearnt: learning.learnt,
    f.TenantsShifted: fairness.shifted,
    f.PolicySet: Cluster._on_policy,
    f.YardDraining: Cluster._on_draining,
    f.YardResumed: Cluster._on_resumed,
}
