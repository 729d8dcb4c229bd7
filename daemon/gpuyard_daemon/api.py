"""Questions and their answers: `q.<tenant>.<user>.<verb>` for tenants, `adm.<user>.<verb>` for operators.

They come over a connection of their own, in the queue group `api`. Who asks is read from the subject; a tenant sees
its own jobs and services, an operator everybody's. A question is answered from the core's state at a moment when that
is the journal's state: nobody is told what is not durable. What left the core is answered from the history.

Whatever arrives gets one answer: what was asked for, or a `QueryError`. A message without a place to answer to is
dropped.

Operators may also stop the yard: `adm.<user>.shutdown` ends every replica with grace, requeues its job uncharged, and
answers when all have ended. `adm.<user>.handover` lets a standby lead.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import NamedTuple, Protocol

import msgspec
import structlog

from gpuyard_daemon.audit import AuditLog, read_audit
from gpuyard_daemon.core.state.inputs import Input, RequeueAll
from gpuyard_daemon.history import History, HistoryFilter
from gpuyard_daemon.logs import LogForwarder
from gpuyard_daemon.node_monitor import NodeMonitor
from gpuyard_daemon.uploads import UploadStore, answer_upload
from gpuyard_protocol.audit import ENTRIES_PAGE_MAX, READING_VERBS, AuditQuery
from gpuyard_protocol.bus.base import Bus, BusError, Message, Subscription
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.jobs import FINAL_STATES, JobRequest, JobSpec, JobView, SubmissionAnswer, Why
from gpuyard_protocol.names import JobId, NodeId, Tenant, User, nearest
from gpuyard_protocol.queries import (
    PAGE_ROWS_MAX,
    CardView,
    DryRun,
    HandOverRequest,
    JobQuery,
    JobsPage,
    JobsQuery,
    LogsQuery,
    NodesPage,
    NodesQuery,
    NodeView,
    Ok,
    PingQuery,
    QueryError,
    ServicesPage,
    ServicesQuery,
    ShutdownRequest,
    Stats,
    StatsQuery,
    SubmissionQuery,
    SubmissionStatus,
    UsageQuery,
    UsageReport,
    WhyAnswer,
)
from gpuyard_protocol.subjects import ALL_OPERATIONS, ALL_QUERIES, parse_operation, parse_tenant_subject

log = structlog.get_logger("api")

QUEUE_GROUP = "api"
#: Verbs that are not for tenants.
OPERATORS_VERBS = {"shutdown", "audit", "handover", "declare-dead", "remove-node", "cordon", "uncordon"}
#: Questions that wait for the journal; more are refused at once.
WAITING_MAX = 2000
#: Answers under way: those that wait for a node's log, the history, or the connection.
ANSWERING_MAX = 4000
#: Time that answers may take between two turns; what is left waits for the next pause.
ANSWERING_S = 0.01
QUESTION_BYTES_MAX = 64 * 1024
#: For answers under way when the daemon ends.
FINISH_S = 1.0
#: Longest that anybody waits for the yard to empty.
SHUTDOWN_DEADLINE_MAX_S = 3600.0


class ReadableCore(Protocol):
    """What this file reads of the core."""

    def job_view(self, job: JobId, *, with_spec: bool = False) -> JobView | None: ...
    def job_owner(self, job: JobId) -> tuple[Tenant, User] | None: ...
    def nearest_job(self, tenant: Tenant | None, job: JobId) -> JobId: ...
    def jobs_page(self, tenant: Tenant | None, query: JobsQuery) -> JobsPage: ...
    def submission(self, tenant: Tenant, submission_id: str) -> SubmissionAnswer | None: ...
    def why(
        self, job: JobId, now_ms: int = 0, *, viewer: Tenant | None = None, brief: bool = False
    ) -> WhyAnswer | None: ...
    def plan(self, tenant: Tenant, user: User, spec: JobSpec, now_ms: int = 0) -> DryRun: ...
    def services_page(self, tenant: Tenant | None, query: ServicesQuery) -> ServicesPage: ...
    def node_views(self, tenant: Tenant | None) -> tuple[NodeView, ...]: ...
    def stats(self, now_ms: int) -> Stats: ...
    def usage(self, tenant: Tenant | None, now_ms: int) -> UsageReport: ...
    def held_on(self, node: NodeId) -> int: ...
    def known_nodes(self) -> tuple[NodeId, ...]: ...
    def node_state(self, node: NodeId) -> str: ...


class _Question(NamedTuple):
    #: None: an operator.
    tenant: Tenant | None
    verb: str
    message: Message
    user: User


class _Stop:
    """Somebody waits for the yard to be empty."""

    def __init__(self, emptied: asyncio.Future[None], turns: int) -> None:
        self.emptied = emptied
        #: Turns that must end before emptiness means anything.
        self.turns = turns


class _Refused(Exception):
    """The question is answered with an error."""

    def __init__(self, code: str, text: str, near: str = "") -> None:
        super().__init__(text)
        self.answer = QueryError(code=code, text=text, nearest=near)


class Api:
    def __init__(
        self,
        bus: Bus,
        core: ReadableCore,
        history: History,
        monitor: NodeMonitor,
        logs: LogForwarder,
        *,
        yard: str,
        now_ms: Callable[[], int],
        is_settled: Callable[[], bool],
        add_fact: Callable[[Input], None],
        audit: AuditLog | None = None,
        hand_over: Callable[[], Awaitable[str]] | None = None,
        said_by: Mapping[str, Callable[[User, bytes], Awaitable[object]]] | None = None,
        alarms: Callable[[], tuple[str, ...]] = lambda: (),
        uploads: UploadStore | None = None,
    ) -> None:
        self._bus = bus
        self._core = core
        self._history = history
        self._monitor = monitor
        self._logs = logs
        self._yard = yard
        self._now_ms = now_ms
        self._is_settled = is_settled
        self._add_fact = add_fact
        self._audit = audit
        #: Lets a standby lead; who does then. A `BusError` says why nobody does.
        self._let_lead = hand_over
        #: Verbs of operators that are handled elsewhere and want to know who speaks.
        self._said_by = said_by or {}
        #: What a person should do something about.
        self._alarms = alarms
        self._uploads = uploads
        self._subscriptions: list[Subscription] = []
        self._waiting: deque[_Question] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stops: list[_Stop] = []
        #: Questions by verb, and those that were no questions (`poison`).
        self.counts: Counter[str] = Counter()
        self._verbs: dict[str, Callable[[Tenant | None, bytes], object | Awaitable[object]]] = {
            "ping": self._ping,
            "jobs": self._jobs,
            "job": self._job,
            "why": self._why,
            "services": self._services,
            "nodes": self._nodes,
            "stats": self._stats,
            "usage": self._usage,
            "submission": self._submission,
            "logs": self._read_logs,
            "upload": self._take_upload,
            "shutdown": self._shutdown,
            "audit": self._read_audit,
            "handover": self._hand_over,
        }
        #: Tenants' questions that depend on which user asks.
        self._asked_by: dict[str, Callable[[Tenant, User, bytes], object]] = {"plan": self._plan}

    async def open(self) -> None:
        for subject in (ALL_QUERIES, ALL_OPERATIONS):
            self._subscriptions.append(await self._bus.subscribe(subject, self._on_message, queue=QUEUE_GROUP))

    async def leave(self) -> None:
        """Take no more questions: whoever asks is told at once that nobody listens, and asks the next leader."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.unsubscribe()

    async def finish(self) -> None:
        """Wait until everybody who asked has an answer."""
        if self._is_settled():
            self._work()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=FINISH_S)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    # -- what arrives ----------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        question = _question(message)
        if question is None or not message.reply:
            self.counts["poison"] += 1
            return
        is_known = any(question.verb in verbs for verbs in (self._verbs, self._said_by, self._asked_by))
        self.counts[question.verb if is_known else "unknown"] += 1
        if len(self._waiting) >= WAITING_MAX or len(self._tasks) >= ANSWERING_MAX:
            self._answer(message, QueryError(code="Unavailable", text="too many questions wait; ask again later"))
            return
        self._waiting.append(question)
        if self._is_settled():
            self._work()

    def settled(self) -> None:
        """The core's state is the journal's: answer what waits, within bounds."""
        if self._stops:
            self._look_at_stops()
        if self._waiting:
            self._work()

    def _work(self) -> None:
        until = time.monotonic() + ANSWERING_S
        while self._waiting:
            self._take(self._waiting.popleft())
            if time.monotonic() > until:
                break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._work_on)

    def _work_on(self) -> None:
        if self._waiting and self._is_settled():
            self._work()

    def _take(self, question: _Question) -> None:
        tenant, verb, message, user = question
        try:
            handler = self._verbs.get(verb)
            if tenant is not None and (asked := self._asked_by.get(verb)) is not None:
                self._answer(message, asked(tenant, user, message.data or b"{}"))
                return
            if tenant is None and (said := self._said_by.get(verb)) is not None:
                self._spawn(self._answer_later(message, said(user, message.data or b"{}")))
                return
            if handler is None or (verb in OPERATORS_VERBS and tenant is not None):
                own = {*self._verbs, *self._said_by} if tenant is None else {*self._verbs, *self._asked_by}
                known = sorted(own - (OPERATORS_VERBS if tenant is not None else set()))
                text = f"there is no question {verb!r}; there are {', '.join(known)}"
                raise _Refused("UnknownVerb", text, nearest(verb, known))
            answer = handler(tenant, message.data or b"{}")
        except _Refused as refusal:
            answer = refusal.answer
        except Malformed as error:
            answer = QueryError(code="Malformed", text=str(error), nearest=error.nearest)
        if isinstance(answer, Awaitable):
            self._spawn(self._answer_later(message, answer))
        else:
            self._answer(message, answer)

    async def _answer_later(self, message: Message, coming: Awaitable[object]) -> None:
        try:
            answer = await coming
        except _Refused as refusal:
            answer = refusal.answer
        except Malformed as error:
            answer = QueryError(code="Malformed", text=str(error), nearest=error.nearest)
        except BusError as error:
            answer = QueryError(code="Unavailable", text=str(error))
        except sqlite3.Error as error:
            answer = QueryError(code="Unavailable", text=f"the history cannot be read: {error}")
        self._answer(message, answer)

    def _answer(self, message: Message, answer: object) -> None:
        self._note_operation(message, answer)
        self._spawn(self._publish(message.reply, encode(answer)))

    def _note_operation(self, message: Message, answer: object) -> None:
        """What operators do goes into the audit, with its outcome; what they only look at does not."""
        operation = parse_operation(message.subject)
        if self._audit is not None and operation is not None and operation[1] not in READING_VERBS:
            outcome = answer.code if isinstance(answer, QueryError) else "ok"
            self._audit.acted(f"operator {operation[0]}", operation[1], outcome, about=_about(message.data))

    def _read_audit(self, tenant: Tenant | None, data: bytes) -> Awaitable[object]:
        query = decode(AuditQuery, data, max_bytes=QUESTION_BYTES_MAX)
        if not 1 <= query.limit <= ENTRIES_PAGE_MAX:
            raise Malformed("$.limit", str(query.limit), f"a number between 1 and {ENTRIES_PAGE_MAX}")
        return read_audit(self._bus, self._yard, query)

    async def _publish(self, reply: str, data: bytes) -> None:
        try:
            await self._bus.publish(reply, data)
        except BusError as error:
            # Who asked will ask again, or has gone.
            log.warning("answer.unsent", error=str(error))

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ping(self, tenant: Tenant | None, data: bytes) -> Ok:
        decode(PingQuery, data, max_bytes=QUESTION_BYTES_MAX)
        return Ok(self._yard)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def _jobs(self, tenant: Tenant | None, data: bytes) -> JobsPage | Awaitable[JobsPage]:
        query = decode(JobsQuery, data, max_bytes=QUESTION_BYTES_MAX)
        if not 1 <= query.limit <= PAGE_ROWS_MAX:
            raise Malformed("$.limit", str(query.limit), f"a number between 1 and {PAGE_ROWS_MAX}")
        page = self._core.jobs_page(tenant, query)
        wants_past = query.all or any(state in FINAL_STATES for state in query.states)
        return self._with_history(tenant, query, page) if wants_past else page

    async def _with_history(self, tenant: Tenant | None, query: JobsQuery, page: JobsPage) -> JobsPage:
        """The core's page, filled up with jobs that have left it: newest first over both."""
        past = await self._history.jobs(
            HistoryFilter(
                tenant=tenant,
                user=query.user,
                service=query.service,
                states=tuple(state for state in query.states if state in FINAL_STATES),
                below=query.cursor,
                limit=query.limit,
            )
        )
        # What the core still has is newer than the same job's row in the history can be; below the page's end the core
        # may have more rows than it showed, so older ones of the history wait for the next page.
        end = page.next
        rows = {view.job: view for view in past if view.job >= end}
        rows.update({view.job: view for view in page.jobs})
        newest = sorted(rows.values(), key=lambda view: -view.job)
        shown = newest[: query.limit]
        has_more = len(newest) > len(shown) or bool(page.next) or len(past) == query.limit
        following = shown[-1].job if has_more and shown else 0
        return JobsPage(jobs=tuple(shown), next=following, counts=page.counts)

    def _job(self, tenant: Tenant | None, data: bytes) -> JobView | Awaitable[JobView]:
        job = decode(JobQuery, data, max_bytes=QUESTION_BYTES_MAX).job
        if self._is_visible(tenant, job):
            view = self._core.job_view(job, with_spec=True)
            if view is not None:
                return view
        return self._past_job(tenant, job)

    async def _past_job(self, tenant: Tenant | None, job: JobId) -> JobView:
        view = await self._history.job(job) if 0 < job < 2**63 else None
        if view is None or (tenant is not None and view.tenant != tenant):
            raise self._unknown_job(tenant, job)
        return view

    def _why(self, tenant: Tenant | None, data: bytes) -> WhyAnswer | Awaitable[WhyAnswer]:
        query = decode(JobQuery, data, max_bytes=QUESTION_BYTES_MAX)
        job, answer = query.job, None
        if self._is_visible(tenant, job):
            answer = self._core.why(job, self._now_ms(), viewer=tenant, brief=query.brief)
        return answer if answer is not None else self._past_why(tenant, job)

    def _plan(self, tenant: Tenant, user: User, data: bytes) -> DryRun:
        """A request as it would be submitted, and decided as that would be, but for the deciding."""
        try:
            spec = decode(JobRequest, data).specify()
        except Malformed as error:
            refusal = SubmissionAnswer(
                submission_id="",
                accepted=False,
                reason=Why("Malformed", str(error)),
                path=error.path,
                found=error.found,
                expected=error.expected,
                nearest=error.nearest,
            )
            return DryRun(verdict="rejected", summary=str(error), refusal=refusal)
        return self._core.plan(tenant, user, spec, self._now_ms())

    async def _past_why(self, tenant: Tenant | None, job: JobId) -> WhyAnswer:
        view = await self._past_job(tenant, job)
        reason = f": {view.reason.text}" if view.reason else ""
        return WhyAnswer(job=job, state=view.state, summary=view.state + reason)

    def _is_visible(self, tenant: Tenant | None, job: JobId) -> bool:
        owner = self._core.job_owner(job)
        return owner is not None and (tenant is None or owner[0] == tenant)

    def _unknown_job(self, tenant: Tenant | None, job: JobId) -> _Refused:
        near = self._core.nearest_job(tenant, job)
        return _Refused("UnknownJob", f"there is no job {job}", str(near) if near else "")

    def _submission(self, tenant: Tenant | None, data: bytes) -> SubmissionStatus:
        query = decode(SubmissionQuery, data, max_bytes=QUESTION_BYTES_MAX)
        if tenant is None:
            raise _Refused("Malformed", "submission ids are a tenant's own: ask as one of its users")
        return SubmissionStatus(answer=self._core.submission(tenant, query.submission_id))

    # -- services, nodes, the yard -------------------------------------------------------------------------------------

    def _services(self, tenant: Tenant | None, data: bytes) -> ServicesPage:
        query = decode(ServicesQuery, data, max_bytes=QUESTION_BYTES_MAX)
        page = self._core.services_page(tenant, query)
        if query.service and not page.services:
            known = [view.service for view in self._core.services_page(tenant, ServicesQuery()).services]
            raise _Refused("UnknownService", f"there is no service {query.service!r}", nearest(query.service, known))
        return page

    def _nodes(self, tenant: Tenant | None, data: bytes) -> NodesPage:
        query = decode(NodesQuery, data, max_bytes=QUESTION_BYTES_MAX)
        views = self._core.node_views(tenant)
        chosen = [view for view in views if query.node in ("", view.node, view.hostname)]
        if query.node and not chosen:
            known = [view.node for view in views]
            raise _Refused("UnknownNode", f"there is no node {query.node!r}", nearest(query.node, known))
        return NodesPage(nodes=tuple(self.with_samples(view) for view in chosen))

    def with_samples(self, view: NodeView) -> NodeView:
        """A node with what is known of it right now: when it was heard, what its cards do."""
        telemetry = self._monitor.telemetry.get(view.node)
        samples = {sample.uuid: sample for sample in telemetry.devices} if telemetry else {}

        def with_sample(card: CardView) -> CardView:
            sample = samples.get(card.uuid)
            return msgspec.structs.replace(card, sample=sample) if sample else card

        return msgspec.structs.replace(
            view,
            cards=tuple(with_sample(card) for card in view.cards),
            heard_ms_ago=self._monitor.heard_ms_ago(view.node),
        )

    def _stats(self, tenant: Tenant | None, data: bytes) -> Stats:
        decode(StatsQuery, data, max_bytes=QUESTION_BYTES_MAX)
        return self.stats()

    def stats(self) -> Stats:
        alarms = self._alarms()
        return msgspec.structs.replace(self._core.stats(self._now_ms()), yard=self._yard, alarms=alarms)

    def _usage(self, tenant: Tenant | None, data: bytes) -> UsageReport:
        wanted = decode(UsageQuery, data, max_bytes=QUESTION_BYTES_MAX).tenant
        report = self._core.usage(tenant, self._now_ms())
        if not wanted:
            return report
        known = [usage.tenant for usage in report.tenants]
        if wanted not in known:
            raise _Refused("UnknownTenant", f"there is no tenant {wanted!r} here", nearest(wanted, known))
        return UsageReport(tenants=tuple(u for u in report.tenants if u.tenant == wanted), now_ms=report.now_ms)

    # -- logs ----------------------------------------------------------------------------------------------------------

    def _read_logs(self, tenant: Tenant | None, data: bytes) -> Awaitable[object]:
        query = decode(LogsQuery, data, max_bytes=QUESTION_BYTES_MAX)
        return self._forward_logs(tenant, query)

    async def _forward_logs(self, tenant: Tenant | None, query: LogsQuery) -> object:
        owner = self._core.job_owner(query.job)
        past: JobView | None = None
        if owner is None or (tenant is not None and owner[0] != tenant):
            past = await self._past_job(tenant, query.job)
            owner = (past.tenant, past.user)
        return await self._logs.read(owner[0], query, past)

    # -- stopping ------------------------------------------------------------------------------------------------------

    def _take_upload(self, tenant: Tenant | None, data: bytes) -> Awaitable[object]:
        if tenant is None or self._uploads is None:
            raise _Refused("UnknownVerb", "uploads are for tenants to hand in")
        return answer_upload(self._uploads, tenant, data)

    def _shutdown(self, tenant: Tenant | None, data: bytes) -> Awaitable[object]:
        request = decode(ShutdownRequest, data, max_bytes=QUESTION_BYTES_MAX)
        deadline_s = min(request.deadline_ms / 1000, SHUTDOWN_DEADLINE_MAX_S)
        log.info("yard.stopping", deadline_s=deadline_s)
        # The turn that takes the order in is the next one: a turn under way now ends before it.
        turns = 1 if self._is_settled() else 2
        emptied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stops.append(_Stop(emptied, turns))
        self._add_fact(RequeueAll())
        return self._wait_until_empty(emptied, deadline_s)

    def _hand_over(self, tenant: Tenant | None, data: bytes) -> Awaitable[object]:
        decode(HandOverRequest, data, max_bytes=QUESTION_BYTES_MAX)
        return self._handed_over()

    async def _handed_over(self) -> object:
        if self._let_lead is None:
            return QueryError(code="Unavailable", text="this daemon cannot hand over")
        return Ok(f"{await self._let_lead()} leads now")

    async def _wait_until_empty(self, emptied: asyncio.Future[None], deadline_s: float) -> object:
        try:
            async with asyncio.timeout(deadline_s):
                await emptied
        except TimeoutError:
            text = f"not every replica has ended within {deadline_s:g} s: {_counted(self.held())}"
            return QueryError(code="Unavailable", text=text)
        finally:
            self._stops = [stop for stop in self._stops if stop.emptied is not emptied]
        if left := self.held():
            return Ok(f"every replica that can be reached has ended; on lost nodes are left: {_counted(left)}")
        return Ok("every replica has ended; its job waits for the next start")

    def _look_at_stops(self) -> None:
        for stop in self._stops:
            stop.turns -= 1
        due = [stop for stop in self._stops if stop.turns <= 0 and not stop.emptied.done()]
        # A lost node hears nobody, and may stay lost: what it has is settled when it returns.
        if due and all(self._core.node_state(node) == "lost" for node in self.held()):
            for stop in due:
                stop.emptied.set_result(None)

    def held(self) -> dict[NodeId, int]:
        """Nodes that still have something to run or to end, and how much."""
        counts = {node: self._core.held_on(node) for node in self._core.known_nodes()}
        return {node: count for node, count in counts.items() if count}


class _Named(msgspec.Struct):
    """Of an operator's order, what it is about."""

    node: str = ""


def _about(data: bytes) -> str:
    """For the audit: `node gpu-7`; "" where the order is about the yard, or is none."""
    try:
        node = decode(_Named, data, max_bytes=QUESTION_BYTES_MAX).node if data else ""
    except Malformed:
        return ""
    return f"node {node[:80]}" if node else ""


def _counted(held: dict[NodeId, int]) -> str:
    return ", ".join(f"{count} on {node}" for node, count in held.items())


def _question(message: Message) -> _Question | None:
    caller = parse_tenant_subject(message.subject)
    if caller is not None:
        return _Question(caller.tenant, caller.verb, message, caller.user)
    operation = parse_operation(message.subject)
    return _Question(None, operation[1], message, operation[0]) if operation is not None else None
