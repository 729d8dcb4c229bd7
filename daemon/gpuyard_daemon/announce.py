"""Events to tenants: what the journal has made true, told on `evt.<tenant>.…`.

Events are derived from the journal and safe to lose: a caller that misses one asks. So telling never holds up a turn:
notices wait in a bounded queue (the oldest go first when it is full), at most a window of them is under way, and each
carries the journal's sequence and its place as its message id, so that sending one twice stores it once.
"""

from __future__ import annotations

import asyncio
import heapq
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import structlog

from gpuyard_daemon.core.state.turn import JobNotice, Notice
from gpuyard_protocol.bus.base import Bus, BusError, PubAck, PublishRefused, StoredMessage
from gpuyard_protocol.codec import encode
from gpuyard_protocol.subjects import job_events, submission_events

log = structlog.get_logger("announce")

#: Notices that wait at most; about 50 MiB at the worst, some seconds of full load.
WAITING_MAX = 50_000
WINDOW = 128
ATTEMPTS_MAX = 3
MESSAGE_ID = "Nats-Msg-Id"
_MESSAGE_ID = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")


class _Event(NamedTuple):
    #: Of the record that decided it, and the place among its notices: the order of telling.
    sequence: int
    place: int
    notice: Notice
    attempts: int = 0

    @property
    def message_id(self) -> str:
        return f"{self.sequence}.{self.place}"


class Announcer:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: deque[_Event] = deque()
        #: Those to be sent once more, before any that waits: sequence and place tell them apart.
        self._again: list[_Event] = []
        self._in_flight = 0
        #: Events of each record that are neither told nor lost; records in order.
        self._untold: dict[int, int] = {}
        self._listeners: list[tuple[int, asyncio.Future[None]]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self.published = 0
        #: Never told: the queue was full, or the stream would not take them.
        self.lost = 0
        bus.on_reconnect(self._pump)

    @property
    def waiting(self) -> int:
        return len(self._again) + len(self._waiting) + self._in_flight

    async def retell(self, stream: str, recent: Iterable[tuple[int, Sequence[Notice]]]) -> None:
        """After a start: tell what the daemon before decided and did not come to tell.

        Events are sent in order, so the newest one in the stream says how far it came.
        """
        told = await told_up_to(self._bus, stream)
        for sequence, notices in recent:
            self.announce(notices, sequence, after=told)

    def announce(self, notices: Sequence[Notice], sequence: int, *, after: tuple[int, int] = (0, 0)) -> None:
        """Tell what the record at `sequence` decided (beyond the record and place `after`)."""
        for place, notice in enumerate(notices):
            if (sequence, place) <= after:
                continue
            if len(self._waiting) >= WAITING_MAX:
                self.lost += 1
                self._done(self._waiting.popleft())
            self._waiting.append(_Event(sequence, place, notice))
            self._untold[sequence] = self._untold.get(sequence, 0) + 1
        self._pump()

    async def drain(self, timeout: float) -> None:
        """Wait until everything is told, or give up after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("events.undelivered", waiting=self.waiting)

    async def until_told(self, sequence: int, timeout: float) -> None:
        """Wait until nothing is left to tell of the records up to `sequence`, at most `timeout` seconds."""
        if next(iter(self._untold), sequence + 1) > sequence:
            return
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listeners.append((sequence, told))
        await asyncio.wait([told], timeout=timeout)
        self._listeners.remove((sequence, told))

    def _done(self, event: _Event) -> None:
        """Told or lost: nothing more will be done about it."""
        left = self._untold[event.sequence] - 1
        if left:
            self._untold[event.sequence] = left
            return
        del self._untold[event.sequence]
        first = next(iter(self._untold), None)
        for sequence, told in self._listeners:
            if not told.done() and (first is None or first > sequence):
                told.set_result(None)

    def _pump(self) -> None:
        while (self._again or self._waiting) and self._in_flight < WINDOW and self._bus.is_connected:
            event = heapq.heappop(self._again) if self._again else self._waiting.popleft()
            self._in_flight += 1
            self._send(event)
        if self.waiting:
            self._idle.clear()
        else:
            self._idle.set()

    def _send(self, event: _Event) -> None:
        notice = event.notice
        if isinstance(notice, JobNotice):
            subject, data = job_events(notice.tenant, notice.event.job), encode(notice.event)
        else:
            answer = notice.answer
            subject, data = submission_events(notice.tenant, answer.submission_id), encode(answer)
        future = self._bus.begin_stream_publish(subject, data, headers={MESSAGE_ID: event.message_id})

        def done(outcome: asyncio.Future[PubAck]) -> None:
            self._in_flight -= 1
            self._settle(event, outcome)

        future.add_done_callback(done)

    def _settle(self, event: _Event, outcome: asyncio.Future[PubAck]) -> None:
        error = None if outcome.cancelled() else outcome.exception()
        is_passing = isinstance(error, BusError) and not isinstance(error, PublishRefused)
        if is_passing and event.attempts < ATTEMPTS_MAX:
            heapq.heappush(self._again, event._replace(attempts=event.attempts + 1))
        else:
            if error is None:
                self.published += 1
            else:
                self.lost += 1
                log.warning("event.lost", message_id=event.message_id, error=str(error))
            self._done(event)
        self._pump()


async def told_up_to(bus: Bus, stream: str) -> tuple[int, int]:
    """Journal sequence and place of the newest event in the stream; (0, 0) if there is none."""
    last = (await bus.stream_state(stream)).last_sequence
    return _message_place(await bus.get_message(stream, last) if last else None)


def _message_place(message: StoredMessage | None) -> tuple[int, int]:
    """Journal sequence and place of an event, read from its id; (0, 0) if there is none."""
    match = _MESSAGE_ID.fullmatch(message.headers.get(MESSAGE_ID, "")) if message is not None else None
    return (int(match[1]), int(match[2])) if match else (0, 0)
