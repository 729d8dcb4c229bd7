"""The scheduler's face: inputs and time in, facts and their consequences out.

`handle` decides and writes down; `apply` repeats what was written down. Both change the state through the same facts,
so a core that applied every record of another is its twin: same digest, same answers, same next decision.

A turn: the inputs in their order, then the deadlines that are due, then services (they may ask for replicas), then a
placement pass. A turn in which nothing happened leaves no record and no trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from gpuyard_daemon.core.applying import lost_facts
from gpuyard_daemon.core.explaining import usage_views, views
from gpuyard_daemon.core.explaining.plan import Planner
from gpuyard_daemon.core.explaining.views import Gauges
from gpuyard_daemon.core.explaining.why import Asked, Explainer
from gpuyard_daemon.core.handling import (
    admission,
    cordons,
    deadlines,
    dependencies,
    directives,
    lost_nodes,
    outcomes,
    scaling,
    services,
)
from gpuyard_daemon.core.placing import switching
from gpuyard_daemon.core.placing.impossible import Possibilities
from gpuyard_daemon.core.preempting.keeping import serve_claims
from gpuyard_daemon.core.preempting.preemption import Rounds
from gpuyard_daemon.core.preempting.resizing import Growing
from gpuyard_daemon.core.preempting.suspension import resume_waiting
from gpuyard_daemon.core.queueing import fairness, learning
from gpuyard_daemon.core.queueing.order import WaitingLine
from gpuyard_daemon.core.queueing.round import place_waiting
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.effects import Effects, Forgone, standing_order, start_order
from gpuyard_daemon.core.state.inputs import Cursors, Input
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.snapshot import read_snapshot, take_snapshot
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_daemon.core.state.turn import Record, Turn
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.jobs import JobSpec, JobView, SubmissionAnswer
from gpuyard_protocol.names import JobId, NodeId, ServiceName, SubmissionId, Tenant, User
from gpuyard_protocol.nodes import Desired
from gpuyard_protocol.queries import (
    DryRun,
    JobsPage,
    JobsQuery,
    NodeView,
    ServicesPage,
    ServicesQuery,
    Stats,
    UsageReport,
    WhyAnswer,
)


class Scheduler:
    """One yard's scheduler. Not thread-safe, and never waits."""

    def __init__(self, settings: CoreSettings | None = None) -> None:
        self.settings = settings or CoreSettings()
        #: Number and time of the last record.
        self.turn = 0
        self.now_ms = 0
        self.cursors = Cursors()
        self.cluster = Cluster()
        self._begin()

    def _begin(self) -> None:
        self._line = WaitingLine(self.cluster, self.settings.timeslice_milli_max)
        self._possibilities = Possibilities()
        self._rounds = Rounds()
        self._growing = Growing()
        #: When `handle` was last called, whether or not it left a record.
        self._handled_ms = 0
        self._explainer = Explainer(self.cluster, self._line, self.settings)
        self._planner = Planner(self.cluster, self._explainer, self._possibilities, self.settings)

    # --- deciding ----------------------------------------------------------------------------------------------------

    def handle(self, inputs: Sequence[Input], now_ms: int, cursors: Cursors) -> Turn:
        """Decide about what came in and what is due. The record must be durable before anything else is sent."""
        draft = Draft(self.cluster, self.settings, self._possibilities, max(now_ms, self.now_ms))
        for given in inputs:
            _take(draft, given)
        deadlines.fire_due(draft)
        services.settle_services(draft)
        dependencies.end_doomed(draft)
        learning.read_ranks(draft)
        fairness.refresh(draft, self.now_ms)
        self._rounds.give_up(draft, self._line, self.now_ms)
        serve_claims(draft)
        decided, proofs = len(draft.facts), self._line.proofs
        unfinished = place_waiting(draft, self._line, lambda rank: resume_waiting(draft, rank))
        services.make_room_for_new(draft)
        self._rounds.hold(draft, self._line, self.now_ms)
        # What is no longer kept for somebody is there for whoever fits it: the next turn, at once, looks who does.
        unfinished = unfinished or any(type(fact) is f.ClaimDropped for fact in draft.facts[decided:])
        self._growing.hold(draft, self._line, self.now_ms, unfinished=unfinished)
        switching.note_switches(draft)
        self._handled_ms = draft.now_ms
        unfinished = dependencies.end_doomed(draft) or unfinished
        starts = sum([type(fact) is f.JobPlaced for fact in draft.facts])
        decisions = starts + (self._line.proofs > proofs)
        if not draft.facts and cursors == self.cursors:
            return Turn(record=None, unfinished=unfinished, decisions=decisions)
        record = Record(turn=self.turn + 1, now_ms=draft.now_ms, cursors=cursors, facts=tuple(draft.facts))
        self._note(record)
        effects = draft.effects
        return Turn(
            record=record,
            orders=effects.orders(),
            notices=effects.notices(),
            unfinished=unfinished,
            decisions=decisions,
        )

    def next_deadline_ms(self) -> int | None:
        """When `handle` should be called though nothing came in; None: nothing to wait for."""
        round_ms = self._rounds.next_ms(self.cluster, self.settings, max(self._handled_ms, self.now_ms))
        grow_ms = self._growing.next_ms(self.cluster, self.settings, max(self._handled_ms, self.now_ms))
        soonest = [deadlines.next_deadline_ms(self.cluster, self.settings), round_ms, grow_ms]
        return min([at_ms for at_ms in soonest if at_ms is not None], default=None)

    # --- repeating ---------------------------------------------------------------------------------------------------

    def apply(self, record: Record, *, told: bool = False) -> Turn:
        """Take over what another (or an earlier) core decided. Returns what it led to then, for whoever lost it.

        `told`: the world knows it all, so nothing of that is wanted.
        """
        if record.turn != self.turn + 1:
            raise InvariantViolated(f"record {record.turn} does not follow record {self.turn}")
        effects = Forgone() if told else Effects()
        apply_fact, now_ms = self.cluster.apply_fact, record.now_ms
        for fact in record.facts:
            apply_fact(fact, now_ms, effects)
        self._rounds.forget()
        self._note(record)
        return Turn(record=record, orders=effects.orders(), notices=effects.notices())

    def warm(self) -> None:
        """For a core that only applies: bring what `handle` derives up to date, so that its first turn is no longer
        than any other. Changes no state."""
        self._line.catch_up(self.now_ms)
        self.next_deadline_ms()

    def _note(self, record: Record) -> None:
        self.turn, self.now_ms, self.cursors = record.turn, record.now_ms, record.cursors

    def snapshot(self) -> bytes:
        return take_snapshot(self.cluster, self.turn, self.now_ms, self.cursors)

    @classmethod
    def restore(cls, data: bytes, settings: CoreSettings | None = None) -> Scheduler:
        """The scheduler of a snapshot; `ValueError` if it is none."""
        scheduler = cls(settings)
        snapshot, scheduler.cluster = read_snapshot(data)
        scheduler.turn, scheduler.now_ms, scheduler.cursors = snapshot.turn, snapshot.now_ms, snapshot.cursors
        scheduler._begin()
        return scheduler

    def digest(self) -> str:
        """Equal for equal states."""
        return hashlib.sha256(self.snapshot()).hexdigest()

    @property
    def policy(self) -> Policy:
        """What tenants are granted now."""
        return self.cluster.tenancy.policy

    @property
    def is_draining(self) -> bool:
        """The yard was stopped with `RequeueAll`: `YardStarted` must come before anything starts again."""
        return self.cluster.draining

    # --- reading -----------------------------------------------------------------------------------------------------

    def desired(self, node: NodeId) -> tuple[int, tuple[Desired, ...]]:
        """The number of the last order for a node, and the whole set of assignments that should be there."""
        known = self.cluster.nodes.get(node)
        if known is None:
            return 0, ()
        wanted = []
        for key, assignment in sorted(self.cluster.pool.spaces[node].assignments.items()):
            job = self.cluster.jobs[key.job]
            released = assignment.state in ("released", "running") and job.is_gang
            wanted.append(
                Desired(
                    start=start_order(job, assignment),
                    go=self.cluster.go_order(job, assignment) if released else None,
                    stop=self.cluster.stop_order(job, assignment) if assignment.state == "stopping" else None,
                    standing=standing_order(assignment),
                )
            )
        return known.orders_issued, (*wanted, *lost_facts.wanted_gone(known))

    def known_nodes(self) -> tuple[NodeId, ...]:
        return tuple([name for name, node in self.cluster.nodes.items() if not node.is_removed])

    def held_on(self, node: NodeId) -> int:
        """How many replicas may run on a node now."""
        space = self.cluster.pool.spaces.get(node)
        return len(space.assignments) if space else 0

    def leased(self, node: NodeId) -> Collection[int]:
        """The leases of the replicas on a node, in milliseconds."""
        return self.cluster.leased.get(node, {}).values()

    def leased_nodes(self) -> tuple[NodeId, ...]:
        """Nodes with replicas under a lease."""
        return tuple(self.cluster.leased)

    def node_instance(self, node: NodeId) -> str:
        """The agent process that joined last, "" if none has."""
        known = self.cluster.nodes.get(node)
        return known.instance if known else ""

    def node_is_twinned(self, node: NodeId) -> bool:
        known = self.cluster.nodes.get(node)
        return known is not None and known.is_twinned

    def node_state(self, node: NodeId) -> str:
        known = self.cluster.nodes.get(node)
        return known.state if known else ""

    def assignment_node(self, job: JobId, replica: int, attempt: int = 0) -> NodeId | None:
        """Where a replica is or was. `attempt`: 0 for the last; the nodes of a few earlier ones are kept."""
        known = self.cluster.jobs.get(job)
        if known is None or replica < 0:
            return None
        if attempt in (0, known.attempt):
            return known.assignments[replica].node if replica < len(known.assignments) else None
        # An elastic job's attempts differ in size.
        return next(
            (nodes[replica] for number, nodes in known.earlier if number == attempt and replica < len(nodes)), None
        )

    def job_view(self, job: JobId, *, with_spec: bool = False) -> JobView | None:
        known = self.cluster.jobs.get(job)
        return views.job_view(self.cluster, known, with_spec=with_spec) if known else None

    def job_owner(self, job: JobId) -> tuple[Tenant, User] | None:
        known = self.cluster.jobs.get(job)
        return (known.tenant, known.user) if known else None

    def nearest_job(self, tenant: Tenant | None, job: JobId) -> JobId:
        """The number next to one that does not exist, for a message; 0 if there are none."""
        jobs = self.cluster.lists.get(tenant or "")
        return jobs.near(job) if jobs else 0

    def jobs_page(self, tenant: Tenant | None, query: JobsQuery) -> JobsPage:
        return views.jobs_page(self.cluster, tenant, query)

    def submission(self, tenant: Tenant, submission_id: SubmissionId) -> SubmissionAnswer | None:
        return self.cluster.answer(tenant, submission_id)

    def why(
        self, job: JobId, now_ms: int = 0, *, viewer: Tenant | None = None, brief: bool = False
    ) -> WhyAnswer | None:
        """Why a job is where it is. `viewer`: the tenant who asks; None: an operator. `brief`: without what costs."""
        known = self.cluster.jobs.get(job)
        if known is None:
            return None
        return self._explainer.why(Asked(known, max(now_ms, self.now_ms), viewer, brief))

    def plan(self, tenant: Tenant, user: User, spec: JobSpec, now_ms: int = 0) -> DryRun:
        """What would become of a job if it were submitted now."""
        return self._planner.plan(tenant, user, spec, max(now_ms, self.now_ms))

    def services_page(self, tenant: Tenant | None, query: ServicesQuery) -> ServicesPage:
        found = [
            views.service_view(self.cluster, key, service)
            for key, service in sorted(self.cluster.services.items(), key=lambda item: item[0])
            if tenant in (None, key[0]) and query.service in ("", key[1])
        ]
        return ServicesPage(services=tuple(found))

    def has_service(self, tenant: Tenant, name: ServiceName) -> bool:
        return (tenant, name) in self.cluster.services

    def node_views(self, tenant: Tenant | None) -> tuple[NodeView, ...]:
        """All nodes by id; of jobs on cards, a tenant sees its own. Heartbeats and samples are the shell's to add."""
        spaces = sorted(self.cluster.pool.spaces.items())
        return tuple(views.node_view(self.cluster, space, tenant) for _, space in spaces if not space.node.is_removed)

    def usage(self, tenant: Tenant | None, now_ms: int) -> UsageReport:
        """What a tenant (None: each) holds, has used and may have."""
        return usage_views.usage_report(self.cluster, tenant, max(now_ms, self.now_ms))

    def stats(self, now_ms: int) -> Stats:
        return views.stats(self.cluster, now_ms, self.turn)

    def metrics(self) -> Gauges:
        return views.gauges(self.cluster, self.turn)


def _take(draft: Draft, given: Input) -> None:
    match given:
        case i.JobSubmitted():
            admission.submit(draft, given)
        case i.NodeReported():
            outcomes.take_reports(draft, given)
        case i.RequestMalformed():
            admission.refuse_malformed(draft, given)
        case i.RequestRefused():
            admission.refuse_unseen(draft, given)
        case (
            i.CancelRequested()
            | i.HoldRequested()
            | i.ReleaseRequested()
            | i.SuspendRequested()
            | i.ResumeRequested()
            | i.RequeueRequested()
        ):
            directives.direct(draft, given)
        case i.ScaleRequested():
            scaling.scale_job(draft, given)
        case i.ServiceScaleAsked():
            scaling.scale_service(draft, given)
        case i.RolloutAsked():
            scaling.roll_out(draft, given)
        case i.ServiceApplied():
            admission.apply(draft, given)
        case i.ServiceDeleted():
            admission.delete(draft, given)
        case i.LoadReported():
            services.take_load(draft, given)
        case (
            i.NodeSuspected()
            | i.NodeLost()
            | i.NodeReturned()
            | i.NodeIncompatible()
            | i.NodeDeclaredDead()
            | i.NodeRemoved()
        ):
            lost_nodes.take_node_change(draft, given)
        case i.NodeCordonAsked() | i.NodeUncordonAsked():
            cordons.take_cordon(draft, given)
        case i.PolicyChanged(policy=policy):
            if draft.cluster.tenancy.policy != policy:
                draft.add(f.PolicySet(policy))
        case i.RequeueAll():
            if not draft.cluster.draining:
                draft.add(f.YardDraining())
        case i.YardStarted(epoch=epoch):
            if draft.cluster.draining:
                draft.add(f.YardResumed(epoch))
            lost_nodes.count_leases_anew(draft)
