"""Events to tenants: what the journal has made true, told on `evt.<tenant>.…`.

Events are derived from the journal and safe to lose: a caller that misses one asks. So telling never holds up a turn:
notices wait in a bounded queue (the oldest go first when it is full), at most a window of them is under way, and each
carries the journal's sequence and its place as its message id, so that sending one twice stores it once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from gpuyard_daemon.core.turn import JobNotice, Notice
from gpuyard_protocol.bus.base import Bus, BusError, PubAck, PublishRefused
from gpuyard_protocol.codec import encode
from gpuyard_protocol.subjects import job_events, submission_events

log = structlog.get_logger("announce")

#: Notices that wait at most; about 50 MiB at the worst, some seconds of full load.
WAITING_MAX = 50_000
WINDOW = 128
ATTEMPTS_MAX = 3


class _Event(NamedTuple):
    notice: Notice
    message_id: str
    attempts: int


class Announcer:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: deque[_Event] = deque()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.published = 0
        #: Never told: the queue was full, or the stream would not take them.
        self.lost = 0
        bus.on_reconnect(self._pump)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._in_flight

    def announce(self, notices: Sequence[Notice], sequence: int) -> None:
        """Tell what the record at `sequence` decided."""
        for place, notice in enumerate(notices):
            if len(self._waiting) >= WAITING_MAX:
                self._waiting.popleft()
                self.lost += 1
            self._waiting.append(_Event(notice, f"{sequence}.{place}", 0))
        self._pump()

    async def drain(self, timeout: float) -> None:
        """Wait until everything is told, or give up after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("events.undelivered", waiting=self.waiting)

    def _pump(self) -> None:
        while self._waiting and self._in_flight < WINDOW and self._bus.is_connected:
            event = self._waiting.popleft()
            self._in_flight += 1
            self._send(event)
        if self._in_flight or self._waiting:
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
        future = self._bus.begin_stream_publish(subject, data, headers={"Nats-Msg-Id": event.message_id})

        def done(outcome: asyncio.Future[PubAck]) -> None:
            self._in_flight -= 1
            self._settle(event, outcome)

        future.add_done_callback(done)

    def _settle(self, event: _Event, outcome: asyncio.Future[PubAck]) -> None:
        error = None if outcome.cancelled() else outcome.exception()
        if error is None:
            self.published += 1
        elif isinstance(error, BusError) and not isinstance(error, PublishRefused) and event.attempts < ATTEMPTS_MAX:
            self._waiting.appendleft(event._replace(attempts=event.attempts + 1))
        else:
            self.lost += 1
            log.warning("event.lost", message_id=event.message_id, error=str(error))
        self._pump()
