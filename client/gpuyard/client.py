"""The SDK: one connection to one yard, as one user.

`Client` turns each thing a person may ask into the documented NATS message for it, waits for the yard's decision, and
hands back the protocol's own types; it adds no state and no policy. What the yard refuses is raised as `Rejected`,
with the code, the path of what is wrong and the nearest that exists.

    async with gpuyard.connect() as yard:
        job = await yard.submit(command=["python", "train.py"], gpus=2)
        end = await job.wait()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from gpuyard.context import Context, load_context
from gpuyard.errors import GpuyardError, QueryFailed, Rejected, Unreachable
from gpuyard.events import Events, JobListener, check_ids
from gpuyard.job import Job
from gpuyard.link import Connector, Link, connect_as_tenant, told
from gpuyard.requests import JobLike, ServiceLike, batches, job_request, service_request
from gpuyard.uploads import pack
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.directives import CancelRequest, HoldRequest, RequeueRequest
from gpuyard_protocol.jobs import BatchRequest, JobRequest, JobView, SubmissionAnswer
from gpuyard_protocol.names import given_submission_id
from gpuyard_protocol.nodes import LogChunk
from gpuyard_protocol.queries import (
    PAGE_ROWS_MAX,
    DryRun,
    JobQuery,
    JobsPage,
    JobsQuery,
    LogsQuery,
    NodesPage,
    NodesQuery,
    NodeView,
    ServicesPage,
    ServicesQuery,
    Stats,
    StatsQuery,
    SubmissionQuery,
    SubmissionStatus,
    TenantUsage,
    UsageQuery,
    UsageReport,
    WhyAnswer,
)
from gpuyard_protocol.scaling import RolloutAction, RolloutRequest, ScaleRequest
from gpuyard_protocol.services import DeleteRequest, LoadReport, ServiceView
from gpuyard_protocol.uploads import PIECE_BYTES, UploadHeld, UploadPiece

#: How long to wait for the yard's decision on a request.
DECISION_TIMEOUT_S = 60.0
#: Requests of `submit_many` under way at once, where each travels alone.
WINDOW = 256


class Client:
    """A connection to a yard; open it with `async with`, or with `open()` and `close()`."""

    def __init__(self, context: Context, *, connector: Connector = connect_as_tenant) -> None:
        self.context = context
        self._connector = connector
        self._link: Link | None = None
        self._events: Events | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        if self._link is None:
            bus = await self._connector(self.context)
            self._link = Link(bus, self.context)
            self._events = Events(bus, self.context.tenant)
        return self

    async def close(self) -> None:
        if self._link is not None:
            await self._link.bus.close()
            self._link = self._events = None

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def link(self) -> Link:
        """The raw way to the yard, for what this class has no method for."""
        if self._link is None:
            raise _not_open()
        return self._link

    async def events(self) -> Events:
        """The tenant's events, subscribed to."""
        if self._events is None:
            raise _not_open()
        try:
            await self._events.begin()
        except BusError as error:
            raise told(error) from None
        return self._events

    async def listen(self, listener: JobListener) -> Callable[[], None]:
        """Call `listener` with every event of the tenant's jobs from now on; what is returned ends that.

        The listener runs in the reader: it must not block and must not raise. Events are lossy over a reconnect.
        """
        return (await self.events()).listen(listener)

    # -- jobs: requests -----------------------------------------------------------------------------------------------

    async def submit(self, request: JobLike | None = None, /, **fields: Any) -> Job:
        """Hand in one job, as a `JobRequest`, a dict or its fields: the `Job` once accepted, `Rejected` if not."""
        job = job_request(request, fields)
        answer = await self._request("submit", encode(job), job.submission_id)
        return Job(self, answer.job, answer.submission_id, answer.elements, answer.note)

    async def upload(self, directory: str | Path) -> str:
        """Hand in what is in a directory, for jobs to bring along: the name that goes into `upload`."""
        name, data = await asyncio.to_thread(pack, Path(directory))
        held = await self._ask_upload(UploadPiece(upload=name, size=len(data)))
        while not held.complete:
            piece = data[held.held : held.held + PIECE_BYTES]
            before = held.held
            held = await self._ask_upload(UploadPiece(upload=name, size=len(data), offset=before, data=piece))
            if not held.complete and held.held <= before and not piece:
                raise GpuyardError(f"{directory} could not be handed in")
        return name

    async def _ask_upload(self, piece: UploadPiece) -> UploadHeld:
        held = await self.link.ask("upload", piece, UploadHeld)
        if held.error:
            raise GpuyardError(held.error)
        return held

    async def submit_many(
        self, requests: Iterable[JobLike], *, batched: bool = True, window: int = WINDOW
    ) -> list[Job | Rejected]:
        """Hand in many, each decided alone; their outcomes in order, refusals as values.

        `batched` packs up to 1,000 into one message; otherwise each is a message of its own, `window` of them under
        way at once.
        """
        jobs = [job_request(request, {}) for request in requests]
        check_ids(job.submission_id for job in jobs if job.submission_id is not None)
        await self.events()
        if batched:
            answers = [answer for group in batches(jobs) for answer in await self._submit_batch(group)]
        else:
            answers = await self._submit_windowed(jobs, window)
        return [
            Job(self, answer.job, answer.submission_id, note=answer.note)
            if answer.accepted
            else Rejected.from_answer(answer)
            for answer in answers
        ]

    async def _submit_batch(self, group: Sequence[JobRequest]) -> list[SubmissionAnswer]:
        payload = encode(BatchRequest(jobs=list(group)))
        may_repeat = all(job.submission_id is not None for job in group)
        sequence = await self.link.send("submit-many", payload, may_repeat=may_repeat)
        ids = [job.submission_id or given_submission_id(sequence, index) for index, job in enumerate(group)]
        return await self._decisions(ids)

    async def _submit_windowed(self, jobs: Sequence[JobRequest], window: int) -> list[SubmissionAnswer]:
        slots = asyncio.Semaphore(window)

        async def send(job: JobRequest) -> str:
            async with slots:
                sequence = await self.link.send("submit", encode(job), may_repeat=job.submission_id is not None)
            return job.submission_id or given_submission_id(sequence)

        # Each runs to its own end, also when another fails: what was sent is sent.
        sent = await asyncio.gather(*(send(job) for job in jobs), return_exceptions=True)
        for outcome in sent:
            if isinstance(outcome, BaseException):
                raise outcome
        return await self._decisions([outcome for outcome in sent if isinstance(outcome, str)])

    async def cancel(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        """End a job, or take it out of the queue. Returns when that is decided; the job may take its grace to end.

        `array`: every element of the array that the job belongs to; the same for `hold` and `release`.
        """
        request = CancelRequest(job=job, array=array, submission_id=submission_id)
        await self._request("cancel", encode(request), submission_id)

    async def hold(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        """Keep a job that waits from starting, until it is released."""
        request = HoldRequest(job=job, array=array, submission_id=submission_id)
        await self._request("hold", encode(request), submission_id)

    async def release(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        """Let a held job start again."""
        request = HoldRequest(job=job, array=array, submission_id=submission_id)
        await self._request("release", encode(request), submission_id)

    async def suspend(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        """Take a running job off its card, into its host's memory, until it is resumed.

        Only a job with `preemption: suspend` can be; anything else is refused with the reason.
        """
        request = HoldRequest(job=job, array=array, submission_id=submission_id)
        await self._request("suspend", encode(request), submission_id)

    async def resume(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        """Let a suspended job go back to its card, as soon as that is free for it."""
        request = HoldRequest(job=job, array=array, submission_id=submission_id)
        await self._request("resume", encode(request), submission_id)

    async def requeue(
        self, job: int, *, hold: bool = False, array: bool = False, submission_id: str | None = None
    ) -> None:
        """End a job's attempt with grace; it waits again, uncharged, and held if `hold` says so.

        `array`: the same for every running element of the array that the job belongs to.
        """
        request = RequeueRequest(job=job, hold=hold, array=array, submission_id=submission_id)
        await self._request("requeue", encode(request), submission_id)

    async def scale(self, job: int, replicas: int, *, submission_id: str | None = None) -> None:
        """Say how many replicas an elastic job is to have at most: fewer at once, more as there is room."""
        request = ScaleRequest(job=job, replicas=replicas, submission_id=submission_id)
        await self._request("scale", encode(request), submission_id)

    # -- jobs: questions ----------------------------------------------------------------------------------------------

    def handle(self, job: int) -> Job:
        """A handle on a job by its number, without asking whether it exists."""
        return Job(self, job)

    async def job(self, job: int) -> JobView:
        return await self.link.ask("job", JobQuery(job=job), JobView)

    async def why(self, job: int, *, brief: bool = False) -> WhyAnswer:
        """Why a job is where it is, and what would start it; `brief`: the reasons and its place in line alone."""
        return await self.link.ask("why", JobQuery(job=job, brief=brief), WhyAnswer)

    async def plan(self, request: JobLike | None = None, /, **fields: Any) -> DryRun:
        """What would become of a job if it were submitted now. Nothing is changed, and nothing promised."""
        return await self.link.ask("plan", job_request(request, fields), DryRun)

    async def jobs_page(self, query: JobsQuery) -> JobsPage:
        return await self.link.ask("jobs", query, JobsPage)

    async def jobs(
        self,
        *,
        states: Sequence[str] = (),
        all: bool = False,  # noqa: A002  the word of the protocol and of the CLI
        user: str = "",
        service: str = "",
        fold: bool = False,
        limit: int = 0,
    ) -> AsyncIterator[JobView]:
        """The tenant's jobs, newest first, page by page; `limit` 0: all of them.

        `fold`: one row for all waiting elements of an array, with their number in `elements`.
        """
        cursor, left = 0, limit or None
        while True:
            rows = PAGE_ROWS_MAX if left is None else min(left, PAGE_ROWS_MAX)
            query = JobsQuery(
                states=list(states), all=all, user=user, service=service, fold=fold, limit=rows, cursor=cursor
            )
            page = await self.jobs_page(query)
            for view in page.jobs:
                yield view
            left = None if left is None else left - len(page.jobs)
            cursor = page.next
            if not cursor or left == 0:
                return

    async def read_log(
        self,
        job: int,
        *,
        attempt: int = 0,
        replica: int = 0,
        stream: Literal["out", "err"] = "out",
        offset: int = 0,
        limit: int = 262_144,
        follow: bool = False,
    ) -> LogChunk:
        """One range of a replica's output; `Job.logs` and `Job.follow` read all of it."""
        query = LogsQuery(
            job=job, attempt=attempt, replica=replica, stream=stream, offset=offset, limit=limit, follow=follow
        )
        return await self.link.ask("logs", query, LogChunk)

    # -- services -----------------------------------------------------------------------------------------------------

    async def apply(self, request: ServiceLike | None = None, /, **fields: Any) -> SubmissionAnswer:
        """Create a service or change it in place."""
        service = service_request(request, fields)
        return await self._request("apply", encode(service), service.submission_id)

    async def delete(self, service: str, *, submission_id: str | None = None) -> SubmissionAnswer:
        """Stop a service's replicas and forget it."""
        request = DeleteRequest(service=service, submission_id=submission_id)
        return await self._request("delete", encode(request), submission_id)

    async def scale_service(
        self, service: str, replicas: int, max_replicas: int | None = None, *, submission_id: str | None = None
    ) -> SubmissionAnswer:
        """Say how many replicas a service has: just so many, or `replicas` at least and `max_replicas` at most."""
        request = ScaleRequest(
            service=service, replicas=replicas, max_replicas=max_replicas, submission_id=submission_id
        )
        return await self._request("scale", encode(request), submission_id)

    async def rollout(self, service: str, *, undo: bool = False, submission_id: str | None = None) -> SubmissionAnswer:
        """Replace a service's replicas one by one, by equal ones or (`undo`) by what they were before."""
        action: RolloutAction = "undo" if undo else "restart"
        request = RolloutRequest(service=service, action=action, submission_id=submission_id)
        return await self._request("rollout", encode(request), submission_id)

    async def services(self, service: str = "") -> tuple[ServiceView, ...]:
        return (await self.link.ask("services", ServicesQuery(service=service), ServicesPage)).services

    async def report_load(
        self,
        service: str,
        concurrency: int,
        *,
        queue_depth: int = 0,
        qps: float = 0.0,
        p95_ms: int = 0,
        source: str = "gateway",
    ) -> None:
        """Say how much a service has to do now. Lossy, newest wins: report each second or so, not once."""
        report = LoadReport(concurrency=concurrency, source=source, qps=qps, queue_depth=queue_depth, p95_ms=p95_ms)
        try:
            await self.link.bus.publish(subjects.load(self.context.tenant, service), encode(report))
            await self.link.bus.flush()
        except BusError as error:
            raise told(error) from None

    # -- the yard -----------------------------------------------------------------------------------------------------

    async def nodes(self, node: str = "") -> tuple[NodeView, ...]:
        return (await self.link.ask("nodes", NodesQuery(node=node), NodesPage)).nodes

    async def stats(self) -> Stats:
        return await self.link.ask("stats", StatsQuery(), Stats)

    async def usage(self) -> TenantUsage:
        """What the tenant holds, has used, and may have."""
        [usage] = (await self.link.ask("usage", UsageQuery(), UsageReport)).tenants
        return usage

    async def submission(self, submission_id: str) -> SubmissionAnswer | None:
        """What became of a request; None while it is undecided, or if nobody ever heard of it."""
        query = SubmissionQuery(submission_id=submission_id)
        return (await self.link.ask("submission", query, SubmissionStatus)).answer

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _request(self, verb: str, payload: bytes, submission_id: str | None) -> SubmissionAnswer:
        check_ids([] if submission_id is None else [submission_id])
        await self.events()
        sequence = await self.link.send(verb, payload, may_repeat=submission_id is not None)
        [answer] = await self._decisions([submission_id or given_submission_id(sequence)])
        if not answer.accepted:
            raise Rejected.from_answer(answer)
        return answer

    async def _decisions(self, ids: Sequence[str]) -> list[SubmissionAnswer]:
        return await (await self.events()).decisions(ids, self._decision_of, DECISION_TIMEOUT_S)

    async def _decision_of(self, submission_id: str) -> SubmissionAnswer | None:
        try:
            return await self.submission(submission_id)
        except (Unreachable, QueryFailed):
            return None  # the daemon may be restarting: the event will come, or the next question be answered


def _not_open() -> GpuyardError:
    return GpuyardError("not connected: use `async with gpuyard.connect() as yard`, or `await yard.open()`")


def connect(context: str | Path | Context | None = None, *, connector: Connector = connect_as_tenant) -> Client:
    """A client of the yard that `context` names: a file, a directory with one, or itself; else the usual places."""
    return Client(context if isinstance(context, Context) else load_context(context), connector=connector)
