"""A job in one's hand: wait for it, read what it wrote, end it.

Output comes by ranges, which are complete, and live, which is fast and lossy. `follow` joins both: live pieces are
passed on as long as each continues the last, and whatever is missing is read as a range; so every byte comes once and
in order, whatever was lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal

from gpuyard.errors import GpuyardError, QueryFailed
from gpuyard.events import POLL_MAX_S, POLL_S
from gpuyard.link import told
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import BusError, Message
from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.jobs import FINAL_STATES, JobEvent, JobView
from gpuyard_protocol.nodes import LogChunk
from gpuyard_protocol.queries import PAGE_ROWS_MAX, JobsQuery, WhyAnswer

if TYPE_CHECKING:
    from gpuyard.client import Client

LogStream = Literal["out", "err"]
BOTH: tuple[LogStream, ...] = ("out", "err")

#: A node sends live output for 30 s after it was last asked; ask again well before.
RENEW_S = 10.0
#: While the job has no output anywhere, and after live pieces stop, look this often.
IDLE_POLL_S = 1.0
#: The output of a job that has ended is waited for so many times where its node does not answer.
AWAY_TRIES = 5
LIVE_QUEUE = 4096
RANGE_BYTES = 262_144


class Job:
    """A job of this tenant by its number."""

    def __init__(self, client: Client, number: int, submission_id: str = "", elements: int = 0, note: str = "") -> None:
        self._client = client
        self.number = number
        #: Of an array just submitted, of which this is the first: its jobs are `number`, `number` + 1, …, so many.
        self.elements = elements
        #: Of the request that made it; "" where the handle was made from a number.
        self.submission_id = submission_id
        #: What the yard has to say of a job just submitted, such as a deadline that it cannot promise; "": nothing.
        self.note = note

    def __repr__(self) -> str:
        return f"Job({self.number})"

    async def view(self) -> JobView:
        return await self._client.job(self.number)

    async def why(self) -> WhyAnswer:
        return await self._client.why(self.number)

    async def cancel(self) -> None:
        """End it; of an array just submitted, every element."""
        await self._client.cancel(self.number, array=bool(self.elements))

    async def views(self) -> list[JobView]:
        """Of an array just submitted: its elements, in order; else the job alone."""
        if not self.elements:
            return [await self.view()]
        found: list[JobView] = []
        cursor = self.number + self.elements
        while cursor > self.number:
            page = await self._client.jobs_page(JobsQuery(all=True, limit=PAGE_ROWS_MAX, cursor=cursor))
            found += [view for view in page.jobs if view.job >= self.number]
            cursor = page.next
        return found[::-1]

    async def wait(self, timeout: float | None = None) -> JobView:
        """The job as it ended. `TimeoutError` if that takes longer than `timeout` seconds.

        Of an array just submitted: once every element has ended, the first that did not succeed, or else the last.
        """
        if self.elements:
            async with asyncio.timeout(timeout):
                views = await self._all_ended()
            return next((view for view in views if view.state != "succeeded"), views[-1])
        last: JobView | None = None

        async def is_final() -> bool:
            nonlocal last
            last = await self.view()
            return last.state in FINAL_STATES

        async with asyncio.timeout(timeout):
            await (await self._client.events()).job_end(self.number, is_final)
            if last is None or last.state not in FINAL_STATES:
                last = await self.view()
        return last

    async def _all_ended(self) -> list[JobView]:
        """The elements, once all have ended. Events wake it; what they miss is asked for."""
        elements = range(self.number, self.number + self.elements)
        ended: set[int] = set()
        complete = asyncio.Event()

        def hear(event: JobEvent) -> None:
            if event.job in elements and event.state in FINAL_STATES:
                ended.add(event.job)
                if len(ended) == len(elements):
                    complete.set()

        stop_listening = await self._client.listen(hear)
        pause_s = POLL_S / 2
        try:
            while True:
                views = await self.views()
                ended.update(view.job for view in views if view.state in FINAL_STATES)
                if len(views) == len(elements) and all(view.state in FINAL_STATES for view in views):
                    return views
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await complete.wait()
                complete.clear()
                pause_s = min(pause_s * 2, POLL_MAX_S)
        finally:
            stop_listening()

    async def logs(
        self, *, stream: LogStream = "out", replica: int = 0, attempt: int = 0, tail_bytes: int | None = None
    ) -> bytes:
        """What the replica has written so far; `attempt` 0: of its newest attempt; `tail_bytes`: only the end."""
        chunks = self.ranges(stream=stream, replica=replica, attempt=attempt, tail_bytes=tail_bytes)
        return b"".join([chunk.data async for chunk in chunks])

    async def ranges(
        self, *, stream: LogStream = "out", replica: int = 0, attempt: int = 0, tail_bytes: int | None = None
    ) -> AsyncIterator[LogChunk]:
        """The same piece by piece."""
        offset = 0 if tail_bytes is None else -min(tail_bytes, RANGE_BYTES)
        is_first = True
        while True:
            chunk = await self._client.read_log(
                self.number, attempt=attempt, replica=replica, stream=stream, offset=offset
            )
            if chunk.error and not chunk.data:
                if not is_first:
                    return
                raise GpuyardError(chunk.error)
            yield chunk
            is_first = False
            attempt = chunk.attempt
            offset = chunk.offset + len(chunk.data)
            if not chunk.data or offset >= chunk.size:
                return

    def follow(
        self,
        *,
        streams: Sequence[LogStream] = BOTH,
        replica: int = 0,
        attempt: int = 0,
        tail_bytes: int | None = None,
    ) -> AsyncIterator[LogChunk]:
        """Output as it comes, from its beginning (or the last `tail_bytes`) until the job has ended.

        With `attempt` 0 a job that is started anew is followed into its next attempt.
        """
        return Follower(self._client, self, tuple(streams), replica, attempt, tail_bytes).run()


class Follower:
    """One `follow` under way."""

    def __init__(
        self,
        client: Client,
        job: Job,
        streams: tuple[LogStream, ...],
        replica: int,
        attempt: int,
        tail_bytes: int | None,
    ) -> None:
        self._client = client
        self._job = job
        self._streams = streams
        self._replica = replica
        #: The attempt asked for; 0: whichever is newest.
        self._wanted = attempt
        #: The attempt whose output is being passed on.
        self._attempt = attempt
        #: Next byte to pass on, by stream; negative: that many before the end, still to be found.
        start = 0 if tail_bytes is None else -min(tail_bytes, RANGE_BYTES)
        self._offsets: dict[LogStream, int] = dict.fromkeys(streams, start)
        self._live: asyncio.Queue[LogChunk] = asyncio.Queue(LIVE_QUEUE)
        #: The node that has the output did not answer when it was last asked.
        self._away = False
        #: Something happened to the job: look at it and at its output now.
        self._nudge = asyncio.Event()

    async def run(self) -> AsyncIterator[LogChunk]:
        subject = subjects.log(self._client.context.tenant, self._job.number, self._replica)
        try:
            subscription = await self._client.link.bus.subscribe(subject, self._on_live)
        except BusError as error:
            raise told(error) from None
        stop_listening = await self._client.listen(self._on_event)
        patience = AWAY_TRIES
        try:
            while True:
                self._nudge.clear()
                # The state is read first: what a job in a final state wrote is complete when it is read afterwards.
                view = await self._job.view()
                is_over = view.state in FINAL_STATES or (self._wanted and view.attempt > self._wanted)
                if view.attempt:
                    self._away = False
                    async for chunk in self._catch_up():
                        yield chunk
                if is_over and not (self._away and patience):
                    return
                patience -= is_over
                async for chunk in self._pass_on_live(RENEW_S if view.state == "running" else IDLE_POLL_S):
                    yield chunk
        finally:
            stop_listening()
            await subscription.unsubscribe()

    def _on_live(self, message: Message) -> None:
        try:
            chunk = decode(LogChunk, message.data, max_bytes=8 * 1024 * 1024)
        except Malformed:
            return
        try:
            self._live.put_nowait(chunk)
        except asyncio.QueueFull:
            self._nudge.set()  # the reader is slow: what is dropped here is read as a range
        if chunk.ended:
            self._nudge.set()

    def _on_event(self, event: JobEvent) -> None:
        if event.job == self._job.number:
            self._nudge.set()

    async def _catch_up(self) -> AsyncIterator[LogChunk]:
        """Everything written so far and not passed on, by ranges; each question also keeps the live pieces coming."""
        for stream in self._streams:
            while (chunk := await self._range(stream)) is not None:
                if chunk.attempt != self._attempt:
                    self._begin_attempt(chunk.attempt)
                # Not always where it was asked for: a file that was rotated begins anew.
                self._offsets[stream] = chunk.offset + len(chunk.data)
                if chunk.data:
                    yield chunk
                if not chunk.data or self._offsets[stream] >= chunk.size:
                    break

    async def _range(self, stream: LogStream) -> LogChunk | None:
        try:
            chunk = await self._client.read_log(
                self._job.number,
                attempt=self._wanted,
                replica=self._replica,
                stream=stream,
                offset=self._offsets[stream],
                follow=True,
            )
        except QueryFailed as error:
            if error.code == "UnknownJob":
                raise
            # The node does not answer now; what it holds is read when it does.
            self._away = error.code == "Unavailable"
            return None
        return None if chunk.error else chunk

    def _begin_attempt(self, attempt: int) -> None:
        if self._attempt:
            self._offsets = dict.fromkeys(self._streams, 0)
        self._attempt = attempt

    async def _pass_on_live(self, for_s: float) -> AsyncIterator[LogChunk]:
        """Live pieces that continue what was passed on, until a piece is missing, the job changes or the time is up."""
        deadline = asyncio.get_running_loop().time() + for_s
        nudge = asyncio.ensure_future(self._nudge.wait())
        try:
            while not nudge.done():
                take = asyncio.ensure_future(self._live.get())
                left_s = deadline - asyncio.get_running_loop().time()
                try:
                    await asyncio.wait((take, nudge), timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not take.done():
                        take.cancel()
                if take.cancelled() or not take.done():
                    return
                chunk = self._continuing(take.result())
                if chunk is None:
                    return
                if chunk.data:
                    yield chunk
        finally:
            nudge.cancel()

    def _continuing(self, chunk: LogChunk) -> LogChunk | None:
        """The part of a live piece that is new (it may be empty); None if something before it is missing."""
        if chunk.stream not in self._streams or (self._wanted and chunk.attempt != self._wanted):
            return LogChunk(job=chunk.job, attempt=chunk.attempt, replica=chunk.replica)
        if chunk.attempt < self._attempt:
            return LogChunk(job=chunk.job, attempt=chunk.attempt, replica=chunk.replica)
        expected = self._offsets[chunk.stream]
        if chunk.attempt != self._attempt or expected < 0 or chunk.offset > expected:
            return None
        fresh = chunk.data[expected - chunk.offset :]
        self._offsets[chunk.stream] = expected + len(fresh)
        return LogChunk(
            job=chunk.job,
            attempt=chunk.attempt,
            replica=chunk.replica,
            stream=chunk.stream,
            offset=expected,
            data=fresh,
            size=chunk.size,
            ended=chunk.ended,
        )
