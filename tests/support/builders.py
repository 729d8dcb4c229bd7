"""Builders for tests of the scheduler's core, and a harness that is suspicious after every turn.

Plain functions with defaults that mean "the simplest of its kind"; numbers come from counters, so that equal tests give
equal inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.facts import Fact
from gpuyard_daemon.core.state.inputs import (
    CancelRequested,
    Cursors,
    HoldRequested,
    Input,
    JobSubmitted,
    NodeReported,
    PolicyChanged,
    ReleaseRequested,
    RequeueRequested,
)
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.turn import AnswerNotice, JobNotice, Record, Turn
from gpuyard_daemon.core.tenants.policy import Policy, TenantLimits
from gpuyard_protocol.jobs import DependencyKind, JobEvent, JobSpec, JobView, SubmissionAnswer, Why
from gpuyard_protocol.names import AssignmentKey, JobId
from gpuyard_protocol.nodes import Ended, Go, Inventory, Joined, Order, Prepared, Report, Start, Started, Stop
from gpuyard_protocol.resources import ABILITIES, Device, MigProfileFacts, Mode, ResourceNeed

T = TypeVar("T")

#: When every test begins.
START_MS = 1_700_000_000_000

H100_PROFILES = (
    MigProfileFacts("1g.10gb", 9_984, 1, (0, 1, 2, 3, 4, 5, 6), 1, 7),
    MigProfileFacts("1g.10gb+me", 9_984, 1, (0, 1, 2, 3, 4, 5, 6), 1, 1),
    MigProfileFacts("1g.20gb", 20_096, 2, (0, 2, 4, 6), 1, 4),
    MigProfileFacts("2g.20gb", 20_096, 2, (0, 2, 4), 2, 3),
    MigProfileFacts("3g.40gb", 40_448, 4, (0, 4), 3, 2),
    MigProfileFacts("4g.40gb", 40_448, 4, (0,), 4, 1),
    MigProfileFacts("7g.80gb", 81_152, 8, (0,), 7, 1),
)
ALL_MODES: tuple[Mode, ...] = ("whole", "mig", "mps", "timeslice")


def gpu(
    index: int = 0,
    *,
    node: str = "n-1",
    model: str = "NVIDIA H100 80GB HBM3",
    memory_mib: int = 81_152,
    modes: tuple[Mode, ...] = ALL_MODES,
    healthy: bool = True,
) -> Device:
    """A card; an H100 with all it can do unless said otherwise."""
    mig = "mig" in modes
    return Device(
        uuid=f"GPU-{node}-{index}",
        index=index,
        model=model,
        memory_mib=memory_mib,
        modes=modes,
        mig_slices=8 if mig else 0,
        mig_compute_slices=7 if mig else 0,
        mig_profiles=H100_PROFILES if mig else (),
        healthy=healthy,
        fault="" if healthy else "Xid 79",
    )


def linked_in_pairs(node: str, count: int) -> list[Device]:
    """Cards of which each two are joined by NVLinks and stand behind a PCIe switch of their own."""
    cards = [gpu(index, node=node) for index in range(count)]
    return [
        msgspec.structs.replace(
            card,
            nvlinks=tuple((other.uuid, 4) for other in cards if other.index == card.index ^ 1),
            pcie_peers=tuple(
                (other.uuid, "same-switch" if other.index == card.index ^ 1 else "system")
                for other in cards
                if other is not card
            ),
        )
        for card in cards
    ]


def node(
    name: str = "n-1",
    gpus: int = 8,
    *,
    devices: Sequence[Device] | None = None,
    cpu_milli: int = 128_000,
    memory_mib: int = 1024 * 1024,
    labels: dict[str, str] | None = None,
    accounts: tuple[str, ...] = ("*/*",),
    keeps_leases: bool = False,
) -> Inventory:
    """What a node has: eight H100 and plenty of everything else."""
    cards = tuple(devices) if devices is not None else tuple(gpu(index, node=name) for index in range(gpus))
    return Inventory(
        hostname=f"host-{name}",
        address=f"10.0.0.{name.rpartition('-')[2]}",
        cpu_milli=cpu_milli,
        memory_mib=memory_mib,
        devices=cards,
        labels=tuple(sorted((labels or {}).items())),
        accounts=accounts,
        simulated=True,
        keeps_leases=keeps_leases,
        abilities=ABILITIES,
    )


def need(**fields: Any) -> ResourceNeed:
    """A need of one core and a GiB, and what is named: `gpus=2`, `share_milli=300`, `mig="1g.10gb"`."""
    return msgspec.structs.replace(ResourceNeed(), **fields)


def job(
    *,
    replicas: int = 1,
    priority: int = 0,
    retries: int = 0,
    time_limit_ms: int = 0,
    estimate_ms: int = 0,
    allow_pending: bool = False,
    name: str = "",
    hold: bool = False,
    begin_after_ms: int = 0,
    begin_ms: int = 0,
    depends_on: Sequence[tuple[DependencyKind, JobId]] = (),
    singleton: bool = False,
    **fields: Any,
) -> JobSpec:
    """A job of `/bin/true`; what is not a field of the job is one of its need."""
    return JobSpec(
        argv=("/bin/true",),
        name=name,
        replicas=replicas,
        need=need(**fields),
        priority=priority,
        retries=retries,
        time_limit_ms=time_limit_ms,
        estimate_ms=estimate_ms,
        allow_pending=allow_pending,
        hold=hold,
        begin_after_ms=begin_after_ms,
        begin_ms=begin_ms,
        depends_on=tuple(depends_on),
        singleton=singleton,
    )


class CoreHarness:
    """A scheduler whose every turn is checked: invariants, a twin that only applies records, and restart.

    It also plays the nodes: it numbers their reports, and remembers what they were ordered.
    """

    def __init__(self, settings: CoreSettings | None = None, *, restart_every: int = 0) -> None:
        self.settings = settings or CoreSettings()
        self.core = Scheduler(self.settings)
        self.twin = Scheduler(self.settings)
        self.now_ms = START_MS
        self.records: list[Record] = []
        #: Everything the last turn put out.
        self.last = Turn(record=None)
        #: Every order a node ever got, in order; its position + 1 is its number.
        self.orders: dict[str, list[Order]] = {}
        self.answers: list[SubmissionAnswer] = []
        self.events: list[JobEvent] = []
        self._reported: dict[str, int] = {}
        self._instances: dict[str, int] = {}
        self._submissions = 0
        self._cursors = Cursors()
        #: Replace the core by its restored snapshot after so many records; 0: never.
        self._restart_every = restart_every

    # --- turns ---

    def turn(self, *inputs: Input, after_ms: int = 0) -> Turn:
        """One turn, checked. `after_ms`: let so much time pass first."""
        self.now_ms += after_ms
        if inputs:
            self._cursors = Cursors(self._cursors.submissions + 1, self._cursors.reports + 1)
        turn = self.last = self.core.handle(inputs, self.now_ms, self._cursors)
        check(self.core.cluster)
        self._check_twin(turn)
        for batch in turn.orders:
            known = self.orders.setdefault(batch.node, [])
            assert batch.first == len(known) + 1, f"orders for {batch.node} are not dense"
            known.extend(batch.orders)
        for notice in turn.notices:
            match notice:
                case AnswerNotice(answer=answer):
                    self.answers.append(answer)
                case JobNotice(event=event):
                    self.events.append(event)
        if turn.record is not None and self._restart_every and len(self.records) % self._restart_every == 0:
            self.restart()
        return turn

    def _check_twin(self, turn: Turn) -> None:
        if turn.record is not None:
            self.records.append(turn.record)
            repeated = self.twin.apply(_through_bytes(turn.record))
            assert repeated.orders == turn.orders
            assert repeated.notices == turn.notices
        assert self.twin.digest() == self.core.digest(), "what was decided is not what was written down"

    def restart(self) -> None:
        """Go on from a snapshot, as after a restart of the daemon."""
        digest = self.core.digest()
        self.core = Scheduler.restore(self.core.snapshot(), self.settings)
        assert self.core.digest() == digest
        check(self.core.cluster)

    def settle(self, *, most_ms: int = 0) -> None:
        """Follow the core's deadlines for so long, turn by turn."""
        end_ms = self.now_ms + most_ms
        while (due_ms := self.core.next_deadline_ms()) is not None and due_ms <= end_ms:
            self.now_ms = max(self.now_ms, due_ms)
            self.turn()
        self.now_ms = end_ms

    # --- tenants ---

    def submit(
        self, spec: JobSpec | None = None, *, tenant: str = "acme", user: str = "alice", submission_id: str = ""
    ) -> JobId:
        """Submit one job and return its number, 0 if it was refused."""
        return self.submit_many([spec or job()], tenant=tenant, user=user, submission_id=submission_id)[0]

    def submit_many(
        self, specs: Sequence[JobSpec], *, tenant: str = "acme", user: str = "alice", submission_id: str = ""
    ) -> list[JobId]:
        before = len(self.answers)
        self.turn(*[self.submission(spec, tenant=tenant, user=user, submission_id=submission_id) for spec in specs])
        return [answer.job for answer in self.answers[before:]]

    def submission(
        self, spec: JobSpec, *, tenant: str = "acme", user: str = "alice", submission_id: str = ""
    ) -> JobSubmitted:
        self._submissions += 1
        return JobSubmitted(
            tenant=tenant,
            user=user,
            submission_id=submission_id or f"s{self._submissions}",
            spec=spec,
            chosen_id=bool(submission_id),
        )

    def limit(self, tenant: str = "acme", *, gpus_milli: int = 0, jobs: int = 0) -> None:
        """Set one tenant's limits; every other has none."""
        policy = Policy(tenants=((tenant, TenantLimits(gpus_milli, jobs)),))
        self.turn(PolicyChanged(policy=policy))

    def cancel(self, number: JobId, *, tenant: str = "acme", user: str = "alice") -> SubmissionAnswer:
        self._submissions += 1
        self.turn(CancelRequested(tenant=tenant, user=user, submission_id=f"s{self._submissions}", job=number))
        return self.answers[-1]

    def hold(self, number: JobId, *, user: str = "alice") -> SubmissionAnswer:
        return self._ask(HoldRequested(tenant="acme", user=user, submission_id="", job=number))

    def release(self, number: JobId) -> SubmissionAnswer:
        return self._ask(ReleaseRequested(tenant="acme", user="alice", submission_id="", job=number))

    def requeue(self, number: JobId, *, hold: bool = False) -> SubmissionAnswer:
        return self._ask(RequeueRequested(tenant="acme", user="alice", submission_id="", job=number, hold=hold))

    def _ask(self, request: HoldRequested | ReleaseRequested | RequeueRequested) -> SubmissionAnswer:
        self._submissions += 1
        self.turn(msgspec.structs.replace(request, submission_id=f"s{self._submissions}"))
        return self.answers[-1]

    # --- nodes ---

    def join(self, *inventories: Inventory, held: dict[str, Sequence[AssignmentKey]] | None = None) -> None:
        """Nodes join (again), each with a new agent process. Their ids are in their hostnames: `host-<id>`."""
        for inventory in inventories:
            name = inventory.hostname.removeprefix("host-")
            self._instances[name] = self._instances.get(name, 0) + 1
            live = self.live_on(name) if held is None else held.get(name, ())
            self.report(name, Joined(inventory=inventory, held=tuple(live)))

    def live_on(self, name: str) -> tuple[AssignmentKey, ...]:
        space = self.core.cluster.pool.spaces.get(name)
        return tuple(sorted(space.assignments)) if space else ()

    def batch(self, name: str, *reports: Report, first: int = 0) -> NodeReported:
        """A batch from a node's outbox. `first`: 0 for the next new number."""
        if not first:
            first = self._reported.get(name, 0) + 1
            self._reported[name] = first + len(reports) - 1
        return NodeReported(
            node=name, instance=self.instance(name), boot_id="boot-1", first=first, reports=tuple(reports)
        )

    def instance(self, name: str) -> str:
        return f"{name}-process-{self._instances.get(name, 1)}"

    def report(self, name: str, *reports: Report) -> Turn:
        return self.turn(self.batch(name, *reports))

    def started(self, number: JobId, *, port: int = 0) -> Turn:
        """Every ordered replica of a job starts."""
        return self._report_all(number, lambda key: Started(key=key, at_ms=self.now_ms, port=port))

    def prepared(self, number: JobId, *, port: int = 29_500) -> Turn:
        return self._report_all(number, lambda key: Prepared(key=key, port=port))

    def ended(self, number: JobId, exit_code: int = 0) -> Turn:
        """Every live replica of a job exits."""
        return self._report_all(number, lambda key: exited(key, exit_code))

    def stopped(self, number: JobId) -> Turn:
        """Every live replica of a job ends as it was told to."""
        return self._report_all(number, lambda key: Ended(key=key, outcome="stopped", at_ms=self.now_ms))

    def _report_all(self, number: JobId, report: Callable[[AssignmentKey], Report]) -> Turn:
        live = [a for a in self.core.cluster.jobs[number].assignments if a.is_live]
        return self.turn(*[self.batch(a.node, report(a.key)) for a in live])

    def run(self, number: JobId) -> None:
        """Start a job that has been placed, gang or not."""
        if self.core.cluster.jobs[number].spec.replicas > 1:
            self.prepared(number)
        self.started(number)

    # --- looking ---

    def view(self, number: JobId) -> JobView:
        view = self.core.job_view(number, with_spec=True)
        assert view is not None, f"job {number} is gone"
        return view

    def state(self, number: JobId) -> str:
        view = self.core.job_view(number)
        return view.state if view else "gone"

    def states(self, *numbers: JobId) -> list[str]:
        return [self.state(number) for number in numbers]

    def nodes_of(self, number: JobId) -> list[str]:
        return [assignment.node for assignment in self.core.cluster.jobs[number].assignments]

    def partitions_of(self, number: JobId) -> list[object]:
        return [assignment.partition for assignment in self.core.cluster.jobs[number].assignments]

    def new_orders(self, kind: type[T]) -> list[T]:
        """Orders of one kind that the last turn made."""
        return [order for batch in self.last.orders for order in batch.orders if isinstance(order, kind)]

    def refused(self) -> Why:
        """Why the last request was refused."""
        answer = self.answers[-1]
        assert not answer.accepted
        assert answer.reason is not None
        return answer.reason

    def facts(self, kind: type[T]) -> list[T]:
        """Facts of one kind in all records so far."""
        return [fact for record in self.records for fact in record.facts if isinstance(fact, kind)]

    def new_facts(self, kind: type[T]) -> list[T]:
        facts: tuple[Fact, ...] = self.last.record.facts if self.last.record else ()
        return [fact for fact in facts if isinstance(fact, kind)]

    def starts(self) -> Iterator[tuple[str, Start]]:
        """Every start ever ordered."""
        for name, orders in self.orders.items():
            for order in orders:
                if isinstance(order, Start):
                    yield name, order

    def check_no_other_orders(self, *expected: type[Start] | type[Go] | type[Stop]) -> None:
        found = [type(order) for batch in self.last.orders for order in batch.orders]
        assert found == list(expected)


def exited(key: AssignmentKey, exit_code: int = 0) -> Ended:
    return Ended(key=key, outcome="exited", at_ms=0, exit_code=exit_code)


_RECORDS = msgspec.json.Decoder(Record)


def _through_bytes(record: Record) -> Record:
    """As the journal would give it back."""
    return _RECORDS.decode(msgspec.json.encode(record))
