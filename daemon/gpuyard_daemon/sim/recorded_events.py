"""What happened to a yard from outside, told back from what its journal says was decided.

Facts say what was believed and decided; a replay needs what came in. Submissions, cancels, holds, applied services and
their load, nodes and their states stand in them as they were. How long a job runs is read from its attempts: an attempt
that ended by itself is what the job does, whenever and wherever it is started; one that was stopped says nothing, but
for jobs that keep their progress. A job that never ended by itself has no known run time, and runs until it is
cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.state.turn import Record
from gpuyard_daemon.sim.recording import Recording
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId, NodeId, Tenant, User
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.services import ServiceSpec
from gpuyard_protocol.units import MILLI

#: Of jobs that go on where they were when they start anew.
KEEPS_PROGRESS = frozenset({"checkpoint", "suspend"})
_TIME_LIMIT = "TimeLimit"


#: What a shell says of a command that could not be started.
NEVER_BEGAN = 127


class Attempt(msgspec.Struct, frozen=True):
    """One run of a job that ended by itself."""

    #: As on the fastest card, where the recorded yard knew how fast its cards were.
    run_ms: int
    exit_code: int = 0
    #: Of the node: why it ended, if that was not the job's own doing.
    code: str = ""


class RecordedJob(msgspec.Struct):
    """A job of the recorded yard, under its number there."""

    number: JobId
    tenant: Tenant
    user: User
    spec: JobSpec
    submitted_ms: int
    #: Those that ended by themselves, in order.
    attempts: list[Attempt] = []
    first_started_ms: int = 0
    #: 0: it had not ended when the recording did.
    ended_ms: int = 0
    #: Run time of stopped attempts that is not lost.
    kept_ms: int = 0
    is_cancelled: bool = False
    preemptions: int = 0

    @property
    def has_run_time(self) -> bool:
        return bool(self.attempts)


class Submitted(msgspec.Struct, frozen=True):
    #: Number of the job, or of an array's first.
    job: JobId
    tenant: Tenant
    user: User
    spec: JobSpec


class NodeSeen(msgspec.Struct, frozen=True):
    """A node joined with this inventory."""

    node: NodeId
    inventory: Inventory


class JobAsked(msgspec.Struct, frozen=True):
    """A request about a job, under its recorded number."""

    job: JobId
    make: Callable[[Tenant, User, str, JobId], i.Input]


Event: TypeAlias = Submitted | NodeSeen | JobAsked | i.Input


class Recorded(msgspec.Struct):
    """A recording as a replay needs it."""

    begin_ms: int
    end_ms: int
    jobs: dict[JobId, RecordedJob]
    #: (when, what), in order.
    events: list[tuple[int, Event]]
    #: GPU compute held, and there, over the recording: thousandths of a card × ms.
    held_milli_ms: int
    capacity_milli_ms: int
    #: It was told how fast models of cards are.
    knows_speeds: bool = False


def understand(recording: Recording) -> Recorded:
    """Go through a recording once."""
    core = Scheduler.restore(recording.begin) if recording.begin is not None else Scheduler()
    first = recording.records[0]
    reader = _Reader(core, max(core.now_ms, 0) or first.now_ms)
    if recording.begin is not None:
        reader.begin_with_state()
    before = _sums(core)
    for record in recording.records:
        reader.read(record)
    after = _sums(core)
    return Recorded(
        reader.begin_ms,
        recording.records[-1].now_ms,
        reader.jobs,
        reader.events,
        after[0] - before[0],
        after[1] - before[1],
        bool(core.cluster.speeds.named),
    )


def _sums(core: Scheduler) -> tuple[int, int]:
    totals = core.cluster.totals
    return totals.held_milli_ms, totals.capacity_milli_ms


class _Reader:
    """Applies records to a core, so that each fact is seen in the state that it came into."""

    def __init__(self, core: Scheduler, begin_ms: int) -> None:
        self._core = core
        self.begin_ms = begin_ms
        self.jobs: dict[JobId, RecordedJob] = {}
        self.events: list[tuple[int, Event]] = []
        #: When all replicas of each running job's attempt had started.
        self._started: dict[JobId, int] = {}
        #: What ended each attempt that is ending: exit code and code of the first replica that did not end well.
        self._ends: dict[JobId, tuple[int, str]] = {}

    def begin_with_state(self) -> None:
        """Take what the snapshot knows as if it had come in at its moment."""
        cluster, now_ms = self._core.cluster, self.begin_ms
        self._add(now_ms, i.PolicyChanged(policy=cluster.tenancy.policy))
        for node in cluster.nodes.values():
            if node.inventory is not None and node.state != "joining":
                self._add(now_ms, NodeSeen(node.id, node.inventory))
                self._node_state(now_ms, node.id, node.state)
        for service in cluster.services.values():
            self._add(now_ms, _applied(service.tenant, service.user, service.spec, f"r{len(self.events)}"))
        for job in cluster.jobs.values():
            if not job.is_final and not job.service:
                self._submit_one(job, now_ms)
                if job.started_ms and job.state == "running":
                    self._started[job.id] = now_ms

    def _submit_one(self, job: Job, now_ms: int) -> None:
        # An element of an array stands alone from here on: its index is known, its siblings may be gone.
        spec = msgspec.structs.replace(job.spec, array=None)
        self.jobs[job.id] = RecordedJob(job.id, job.tenant, job.user, spec, now_ms)
        self._add(now_ms, Submitted(job.id, job.tenant, job.user, spec))

    def read(self, record: Record) -> None:
        for fact in record.facts:
            self._read_fact(fact, record.now_ms)
        self._core.apply(record)

    def _add(self, now_ms: int, event: Event) -> None:
        self.events.append((now_ms, event))

    def _read_fact(self, fact: f.Fact, now_ms: int) -> None:
        match fact:
            case f.JobAccepted(job=job, tenant=tenant, user=user, spec=spec):
                self.jobs[job] = RecordedJob(job, tenant, user, spec, now_ms)
                self._add(now_ms, Submitted(job, tenant, user, spec))
            case f.ArrayAccepted(first=first, tenant=tenant, user=user, spec=spec):
                count = spec.array.count if spec.array else 1
                for number in range(first, first + count):
                    self.jobs[number] = RecordedJob(number, tenant, user, spec, now_ms)
                self._add(now_ms, Submitted(first, tenant, user, spec))
            case f.ReplicaStarted(key=key):
                if (known := self.jobs.get(key.job)) is not None:
                    self._started[key.job] = now_ms
                    known.first_started_ms = known.first_started_ms or now_ms
            case f.ReplicaEnded():
                self._replica_ended(fact)
            case f.JobRequeued() | f.JobEnded():
                self._attempt_over(fact, now_ms)
            case f.JobStopping() | f.ArrayCancelled() | f.JobHeld() | f.JobReleased() | f.JobSuspending():
                self._asked(fact, now_ms)
            case f.NodeJoined(node=node, inventory=inventory):
                self._add(now_ms, NodeSeen(node, inventory))
            case f.NodeChanged(node=node, state=state):
                self._node_state(now_ms, node, state)
            case f.PolicySet(policy=policy):
                self._add(now_ms, i.PolicyChanged(policy=policy))
            case f.YardDraining():
                self._add(now_ms, i.RequeueAll())
            case f.YardResumed(epoch=epoch):
                self._add(now_ms, i.YardStarted(epoch=epoch))
            case _:
                self._read_service_fact(fact, now_ms)

    def _read_service_fact(self, fact: f.Fact, now_ms: int) -> None:
        name = f"r{len(self.events)}"
        match fact:
            case f.ServiceSet(tenant=tenant, user=user, spec=spec):
                self._add(now_ms, _applied(tenant, user, spec, name))
            case f.ServiceRemoved(tenant=tenant, service=service):
                owner = self._core.cluster.services[tenant, service].user
                self._add(now_ms, i.ServiceDeleted(tenant=tenant, user=owner, submission_id=name, service=service))
            case f.LoadTaken(tenant=tenant, service=service, concurrency=concurrency, queue_depth=depth):
                self._add(
                    now_ms, i.LoadReported(tenant=tenant, service=service, concurrency=concurrency, queue_depth=depth)
                )
            case _:
                pass

    def _node_state(self, now_ms: int, node: NodeId, state: str) -> None:
        match state:
            case "suspected":
                self._add(now_ms, i.NodeSuspected(node=node))
            case "lost" | "incompatible":
                self._add(now_ms, i.NodeLost(node=node))
            case "ready":
                self._add(now_ms, i.NodeReturned(node=node, instance=""))
            case _:
                pass

    def _replica_ended(self, fact: f.ReplicaEnded) -> None:
        went_well = fact.outcome == "exited" and not fact.exit_code
        if fact.key.job not in self._ends or self._ends[fact.key.job] == (0, ""):
            if went_well:
                self._ends[fact.key.job] = (0, "")
            elif fact.outcome in ("exited", "signalled"):
                self._ends[fact.key.job] = (fact.exit_code or 128 + fact.signal, fact.code)

    def _attempt_over(self, fact: f.JobRequeued | f.JobEnded, now_ms: int) -> None:
        job = self.jobs.get(fact.job)
        started_ms, end = self._started.pop(fact.job, 0), self._ends.pop(fact.job, (0, ""))
        if job is None:
            return
        known = self._core.cluster.jobs.get(fact.job)
        speed_milli = known.speed_milli if known is not None else MILLI
        ran_ms = (now_ms - started_ms) * speed_milli // MILLI if started_ms else 0
        match fact:
            case f.JobRequeued(charged=False):
                job.preemptions += bool(started_ms)
                if job.spec.preemption in KEEPS_PROGRESS:
                    job.kept_ms += ran_ms
                return
            case f.JobEnded(state="cancelled"):
                if fact.why is not None and fact.why.code == "Cancelled" and not job.is_cancelled:
                    self._cancel(job, now_ms)
            case _ if started_ms:
                job.attempts.append(Attempt(job.kept_ms + ran_ms, *end))
                job.kept_ms = 0
            case _:
                # A node refused it for what is its own fault: it had its place for a moment, and must not keep it now.
                job.first_started_ms = job.first_started_ms or now_ms
                job.attempts.append(Attempt(1, NEVER_BEGAN, fact.why.code if fact.why else ""))
        if isinstance(fact, f.JobEnded):
            job.ended_ms = now_ms

    def _asked(
        self, fact: f.JobStopping | f.ArrayCancelled | f.JobHeld | f.JobReleased | f.JobSuspending, now_ms: int
    ) -> None:
        match fact:
            case f.JobStopping(job=number, verdict="cancel", why=why) if why.code == "Cancelled":
                if (job := self.jobs.get(number)) is not None and not job.is_cancelled:
                    self._cancel(job, now_ms)
            case f.JobStopping(job=number, verdict="requeue", why=why) if why.code == "Requeued":
                self._add(now_ms, JobAsked(number, _requeue))
            case f.ArrayCancelled(array=first):
                for element in self._core.cluster.pending_elements(first):
                    if (job := self.jobs.get(element.id)) is not None and not job.is_cancelled:
                        self._cancel(job, now_ms)
            case f.JobSuspending(job=number, idle=False):
                self._add(now_ms, JobAsked(number, _suspend))
            case f.JobHeld(job=number, whole_array=whole):
                self._add(now_ms, JobAsked(number, _hold_array if whole else _hold))
            case f.JobReleased(job=number, whole_array=whole):
                self._add(now_ms, JobAsked(number, _release_array if whole else _release))
            case _:
                pass

    def _cancel(self, job: RecordedJob, now_ms: int) -> None:
        job.is_cancelled = True
        self._add(now_ms, JobAsked(job.number, _cancel))


def _applied(tenant: Tenant, user: User, spec: ServiceSpec, name: str) -> i.ServiceApplied:
    return i.ServiceApplied(tenant=tenant, user=user, submission_id=name, spec=spec)


def _cancel(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.CancelRequested(tenant=tenant, user=user, submission_id=name, job=job)


def _requeue(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.RequeueRequested(tenant=tenant, user=user, submission_id=name, job=job)


def _suspend(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.SuspendRequested(tenant=tenant, user=user, submission_id=name, job=job)


def _hold(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.HoldRequested(tenant=tenant, user=user, submission_id=name, job=job)


def _hold_array(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.HoldRequested(tenant=tenant, user=user, submission_id=name, job=job, array=True)


def _release(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.ReleaseRequested(tenant=tenant, user=user, submission_id=name, job=job)


def _release_array(tenant: Tenant, user: User, name: str, job: JobId) -> i.Input:
    return i.ReleaseRequested(tenant=tenant, user=user, submission_id=name, job=job, array=True)
