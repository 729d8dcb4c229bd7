"""Many durable publishes at once, a bounded number of them under way.

Used where one publish after the other would be paced by the disk: bulk submissions and the agent's outbox. Every
future ends with an acknowledgement or a `BusError`, whatever the server and the connection do, so the window always
empties again (nats-py's own window fills up with futures that never end, and then stands still).

It does not retry: only the caller knows whether a message with an unknown outcome may be sent twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from gpuyard_protocol.bus.base import Bus, PubAck


class WindowedPublisher:
    def __init__(self, bus: Bus, *, window: int = 256, timeout: float = 5.0) -> None:
        self._bus = bus
        self._window = window
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def submit(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> asyncio.Future[PubAck]:
        """Send once there is room in the window, in the order of the calls; the future carries the outcome."""
        if self._in_flight < self._window and not self._waiting:
            self._in_flight += 1
            self._idle.clear()
        else:
            await self._wait_for_place()
        future = self._bus.begin_stream_publish(subject, data, timeout=self._timeout, headers=headers)
        future.add_done_callback(self._release)
        return future

    async def drain(self) -> None:
        """Return when nothing is under way any more."""
        await self._idle.wait()

    async def _wait_for_place(self) -> None:
        place: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                if place in self._waiting:
                    self._waiting.remove(place)
            else:
                self._release()  # given in the same moment: somebody else's now
            raise

    def _release(self, _: object = None) -> None:
        self._in_flight -= 1
        while self._waiting and self._in_flight < self._window:
            place = self._waiting.popleft()
            if not place.done():
                # Taken on the waiter's behalf, so that nobody who calls before it wakes slips in ahead.
                self._in_flight += 1
                place.set_result(None)
        if self._in_flight == 0:
            self._idle.set()
