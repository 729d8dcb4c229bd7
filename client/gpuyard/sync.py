"""The SDK without `await`: the same client on an event loop in a thread of its own.

For scripts, notebooks and threads. Each call blocks its caller only; calls from several threads share the one
connection. Nothing is decided here: every method passes on to `gpuyard.client.Client`, whose docstrings hold.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from gpuyard.client import WINDOW, Client
from gpuyard.context import Context, load_context
from gpuyard.errors import Rejected
from gpuyard.job import BOTH, Job, LogStream
from gpuyard.link import Connector, connect_as_tenant
from gpuyard.requests import JobLike, ServiceLike
from gpuyard_protocol.jobs import JobView, SubmissionAnswer
from gpuyard_protocol.nodes import LogChunk
from gpuyard_protocol.queries import DryRun, NodeView, Stats, TenantUsage, WhyAnswer
from gpuyard_protocol.services import ServiceView

T = TypeVar("T")


class SyncJob:
    """A job in one's hand; see `gpuyard.job.Job`."""

    def __init__(self, client: SyncClient, job: Job) -> None:
        self._client = client
        self._job = job

    def __repr__(self) -> str:
        return f"SyncJob({self.number})"

    @property
    def number(self) -> int:
        return self._job.number

    @property
    def submission_id(self) -> str:
        return self._job.submission_id

    @property
    def note(self) -> str:
        return self._job.note

    def view(self) -> JobView:
        return self._client.run(self._job.view())

    def why(self) -> WhyAnswer:
        return self._client.run(self._job.why())

    def cancel(self) -> None:
        self._client.run(self._job.cancel())

    def wait(self, timeout: float | None = None) -> JobView:
        return self._client.run(self._job.wait(timeout))

    def views(self) -> list[JobView]:
        return self._client.run(self._job.views())

    def logs(
        self, *, stream: LogStream = "out", replica: int = 0, attempt: int = 0, tail_bytes: int | None = None
    ) -> bytes:
        return self._client.run(self._job.logs(stream=stream, replica=replica, attempt=attempt, tail_bytes=tail_bytes))

    def follow(
        self,
        *,
        streams: Sequence[LogStream] = BOTH,
        replica: int = 0,
        attempt: int = 0,
        tail_bytes: int | None = None,
    ) -> Iterator[LogChunk]:
        return self._client.iterate(
            self._job.follow(streams=streams, replica=replica, attempt=attempt, tail_bytes=tail_bytes)
        )


class SyncClient:
    """See `gpuyard.client.Client`; open it with `with`, or with `open()` and `close()`."""

    def __init__(self, context: Context, *, connector: Connector = connect_as_tenant) -> None:
        self._client = Client(context, connector=connector)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def context(self) -> Context:
        return self._client.context

    def open(self) -> Self:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="gpuyard", daemon=True)
            self._thread.start()
            try:
                self.run(self._client.open())
            except BaseException:
                self._end_loop()
                raise
        return self

    def close(self) -> None:
        if self._loop is not None:
            try:
                self.run(self._client.close())
            finally:
                self._end_loop()

    def _end_loop(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(_end_tasks())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's loop and wait for it."""
        if self._loop is None:
            work.close()
            raise RuntimeError(
                "the connection is not open: use `with gpuyard.connect_sync() as yard`, or `yard.open()`"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """An async iterator as a plain one; leaving it early ends the source."""

        async def take() -> tuple[bool, T | None]:
            try:
                return True, await anext(source)
            except StopAsyncIteration:
                return False, None

        async def end() -> None:
            if (close := getattr(source, "aclose", None)) is not None:
                await close()

        try:
            while (taken := self.run(take()))[0]:
                yield taken[1]  # type: ignore[misc]  # a T: the flag beside it says that there is one
        finally:
            if self._loop is not None:
                self.run(end())

    def submit(self, request: JobLike | None = None, /, **fields: Any) -> SyncJob:
        return SyncJob(self, self.run(self._client.submit(request, **fields)))

    def upload(self, directory: str | Path) -> str:
        return self.run(self._client.upload(directory))

    def submit_many(
        self, requests: Iterable[JobLike], *, batched: bool = True, window: int = WINDOW
    ) -> list[SyncJob | Rejected]:
        outcomes = self.run(self._client.submit_many(requests, batched=batched, window=window))
        return [SyncJob(self, outcome) if isinstance(outcome, Job) else outcome for outcome in outcomes]

    def cancel(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        self.run(self._client.cancel(job, array=array, submission_id=submission_id))

    def hold(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        self.run(self._client.hold(job, array=array, submission_id=submission_id))

    def release(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        self.run(self._client.release(job, array=array, submission_id=submission_id))

    def suspend(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        self.run(self._client.suspend(job, array=array, submission_id=submission_id))

    def resume(self, job: int, *, array: bool = False, submission_id: str | None = None) -> None:
        self.run(self._client.resume(job, array=array, submission_id=submission_id))

    def requeue(self, job: int, *, hold: bool = False, array: bool = False, submission_id: str | None = None) -> None:
        self.run(self._client.requeue(job, hold=hold, array=array, submission_id=submission_id))

    def scale(self, job: int, replicas: int, *, submission_id: str | None = None) -> None:
        self.run(self._client.scale(job, replicas, submission_id=submission_id))

    def handle(self, job: int) -> SyncJob:
        return SyncJob(self, self._client.handle(job))

    def job(self, job: int) -> JobView:
        return self.run(self._client.job(job))

    def why(self, job: int, *, brief: bool = False) -> WhyAnswer:
        return self.run(self._client.why(job, brief=brief))

    def plan(self, request: JobLike | None = None, /, **fields: Any) -> DryRun:
        return self.run(self._client.plan(request, **fields))

    def jobs(
        self,
        *,
        states: Sequence[str] = (),
        all: bool = False,  # noqa: A002  the word of the protocol and of the CLI
        user: str = "",
        service: str = "",
        limit: int = 0,
    ) -> Iterator[JobView]:
        return self.iterate(self._client.jobs(states=states, all=all, user=user, service=service, limit=limit))

    def apply(self, request: ServiceLike | None = None, /, **fields: Any) -> SubmissionAnswer:
        return self.run(self._client.apply(request, **fields))

    def scale_service(
        self, service: str, replicas: int, max_replicas: int | None = None, *, submission_id: str | None = None
    ) -> SubmissionAnswer:
        return self.run(self._client.scale_service(service, replicas, max_replicas, submission_id=submission_id))

    def rollout(self, service: str, *, undo: bool = False, submission_id: str | None = None) -> SubmissionAnswer:
        return self.run(self._client.rollout(service, undo=undo, submission_id=submission_id))

    def delete(self, service: str, *, submission_id: str | None = None) -> SubmissionAnswer:
        return self.run(self._client.delete(service, submission_id=submission_id))

    def services(self, service: str = "") -> tuple[ServiceView, ...]:
        return self.run(self._client.services(service))

    def report_load(
        self,
        service: str,
        concurrency: int,
        *,
        queue_depth: int = 0,
        qps: float = 0.0,
        p95_ms: int = 0,
        source: str = "gateway",
    ) -> None:
        self.run(
            self._client.report_load(
                service, concurrency, queue_depth=queue_depth, qps=qps, p95_ms=p95_ms, source=source
            )
        )

    def nodes(self, node: str = "") -> tuple[NodeView, ...]:
        return self.run(self._client.nodes(node))

    def stats(self) -> Stats:
        return self.run(self._client.stats())

    def usage(self) -> TenantUsage:
        return self.run(self._client.usage())


async def _end_tasks() -> None:
    """What is still under way on the loop ends with it."""
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def connect_sync(
    context: str | Path | Context | None = None, *, connector: Connector = connect_as_tenant
) -> SyncClient:
    """`gpuyard.connect` for callers without an event loop."""
    return SyncClient(context if isinstance(context, Context) else load_context(context), connector=connector)
