"""What the yard says about this tenant's requests and jobs, heard on one subscription per connection.

Events are the fast path, never the only one. A subscription that crosses an account boundary becomes live a little
after the server confirmed it, and core messages are lost over a reconnect; so whoever waits here also asks: soon and
often until the first event has proved that the subscription hears anything, then rarely. It knows nothing of how
requests are published.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from gpuyard.errors import GpuyardError, Rejected, Undecided
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, Message
from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.jobs import FINAL_STATES, JobEvent, SubmissionAnswer
from gpuyard_protocol.names import SUBMISSION_EXPECTED, is_submission_id

#: Answers that came before anybody waited for them: the newest so many are kept.
REMEMBERED_ANSWERS = 16_384
#: Pauses between questions while no event has ever been heard, and once events flow.
FIRST_POLL_S = 0.05
POLL_S = 1.0
POLL_MAX_S = 8.0
#: Lost decisions are asked for so many at a time.
POLL_WIDTH = 16

JobListener = Callable[[JobEvent], None]
AskSubmission = Callable[[str], Awaitable[SubmissionAnswer | None]]
AskIsFinal = Callable[[], Awaitable[bool]]


class Events:
    """The tenant's events, handed to whoever waits for them."""

    def __init__(self, bus: Bus, tenant: str) -> None:
        self._bus = bus
        self._tenant = tenant
        self._begun: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Future[SubmissionAnswer]] = {}
        self._remembered: OrderedDict[str, SubmissionAnswer] = OrderedDict()
        self._ends: dict[int, set[asyncio.Future[None]]] = {}
        self._listeners: list[JobListener] = []
        #: An event has come through: the subscription is live.
        self._heard = False
        #: Messages on the tenant's event subjects that could not be read.
        self.malformed = 0
        bus.on_reconnect(self._on_reconnect)

    async def begin(self) -> None:
        """Subscribe, once; later callers wait for the same."""
        if self._begun is None:
            self._begun = asyncio.ensure_future(self._subscribe())
        await asyncio.shield(self._begun)

    async def _subscribe(self) -> None:
        await self._bus.subscribe(subjects.tenant_events(self._tenant), self._on_message)

    def listen(self, listener: JobListener) -> Callable[[], None]:
        """Call `listener` with each job event from now on; what is returned ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def decisions(
        self, submission_ids: Sequence[str], ask: AskSubmission, timeout_s: float
    ) -> list[SubmissionAnswer]:
        """The answers to these requests, in their order; `Undecided` names the first without one after `timeout_s`."""
        futures = {sid: self._future(sid) for sid in submission_ids}
        deadline = asyncio.get_running_loop().time() + timeout_s
        # Not asked again in the loop: an event heard from now on says nothing of one that came too early to be heard.
        pause_s = POLL_S if self._heard else FIRST_POLL_S
        try:
            while open_futures := [future for future in futures.values() if not future.done()]:
                left_s = deadline - asyncio.get_running_loop().time()
                if left_s <= 0:
                    undecided = next(sid for sid, future in futures.items() if not future.done())
                    raise Undecided(undecided, timeout_s)
                await asyncio.wait(open_futures, timeout=min(pause_s, left_s))
                pause_s = min(pause_s * 2, POLL_MAX_S)
                if await self._ask_for(futures, ask):
                    pause_s = FIRST_POLL_S
        finally:
            for sid in submission_ids:
                self._waiting.pop(sid, None)
        return [futures[sid].result() for sid in submission_ids]

    def _future(self, submission_id: str) -> asyncio.Future[SubmissionAnswer]:
        future: asyncio.Future[SubmissionAnswer] = asyncio.get_running_loop().create_future()
        if (known := self._remembered.pop(submission_id, None)) is not None:
            future.set_result(known)
        else:
            self._waiting[submission_id] = future
        return future

    async def _ask_for(self, futures: dict[str, asyncio.Future[SubmissionAnswer]], ask: AskSubmission) -> bool:
        """Ask for some that are still open; whether an answer was there whose event had been lost."""
        lost = [sid for sid, future in futures.items() if not future.done()][:POLL_WIDTH]
        answers = await asyncio.gather(*(ask(sid) for sid in lost))
        found = False
        for sid, answer in zip(lost, answers, strict=True):
            if answer is not None and not futures[sid].done():
                futures[sid].set_result(answer)
                found = True
        return found

    async def job_end(self, job: int, is_final: AskIsFinal) -> None:
        """Return when the job has reached a final state, as an event or the question says."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends.setdefault(job, set()).add(future)
        pause_s = POLL_S / 2
        try:
            while not future.done() and not await is_final():
                await asyncio.wait([future], timeout=pause_s)
                pause_s = min(pause_s * 2, POLL_MAX_S)
        finally:
            waiting = self._ends.get(job, set())
            waiting.discard(future)
            if not waiting:
                self._ends.pop(job, None)

    def _on_reconnect(self) -> None:
        self._heard = False

    def _on_message(self, message: Message) -> None:
        tokens = message.subject.split(".")
        try:
            if len(tokens) == 4 and tokens[2] == "sub":
                self._on_answer(decode(SubmissionAnswer, message.data))
            elif len(tokens) == 3 and tokens[2].isdigit():
                self._on_job(decode(JobEvent, message.data))
        except Malformed:
            self.malformed += 1

    def _on_answer(self, answer: SubmissionAnswer) -> None:
        self._heard = True
        future = self._waiting.pop(answer.submission_id, None)
        if future is None:
            # The word that a request is durable and the decision on it may be read in one go, the waiter comes after.
            self._remembered[answer.submission_id] = answer
            if len(self._remembered) > REMEMBERED_ANSWERS:
                self._remembered.popitem(last=False)
        elif not future.done():
            future.set_result(answer)

    def _on_job(self, event: JobEvent) -> None:
        self._heard = True
        if event.state in FINAL_STATES:
            for future in self._ends.pop(event.job, ()):
                if not future.done():
                    future.set_result(None)
        for listener in list(self._listeners):
            listener(event)


def check_ids(ids: Iterable[str]) -> None:
    """Refuse an id that the yard would not take, and two requests with one id in one call.

    The yard answers a request with a wrong id under one of its own, which nobody here waits for; and of two with one
    id the second would silently be the first.
    """
    seen: set[str] = set()
    for sid in ids:
        if not is_submission_id(sid):
            raise Rejected("Malformed", path="$.submission_id", found=repr(sid)[:80], expected=SUBMISSION_EXPECTED)
        if sid in seen:
            raise GpuyardError(f"submission_id {sid!r} appears twice in one call: each request needs its own")
        seen.add(sid)
