"""The bus between the parties of a simulation: slow, lossy, repeating, reordering, and cut in one direction or both.

It is the memory bus with its streams, fences and limits; what this file adds is the way there and back. Every message
travels twice, from its sender to the broker and from the broker to each listener, and on each leg the weather of that
party's line decides. When a connection ends, what was under way on it is gone; what a process sent before it died
still arrives.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gpuyard_protocol.bus.base import BatchHandler, Message, StoredMessage, StreamSpec, StreamState, Unanswered
from gpuyard_protocol.bus.calls import Decode, T
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus, MemoryReader, MemorySubscription

#: What a question to JetStream that is not answered costs.
QUESTION_TIMEOUT_S = 5.0
#: How late a straggler comes.
STRAGGLE_S = (3.0, 30.0)


@dataclass(slots=True)
class Weather:
    """Of one party's line, in both directions. Chances are per message and leg."""

    loss: float = 0.0
    duplicate: float = 0.0
    #: A message may overtake those before it.
    reorder: bool = False
    #: A copy of it arrives much later, too.
    straggle: float = 0.0
    delay_min_s: float = 0.0002
    delay_max_s: float = 0.002
    #: Nothing this party sends arrives.
    mute: bool = False
    #: Nothing arrives at this party.
    deaf: bool = False


class FaultyBroker(MemoryBroker):
    """`on_stored` sees every message that a stream has just taken, in order."""

    def __init__(self, rng: random.Random, clock_ms: Callable[[], int]) -> None:
        super().__init__(clock_ms)
        self.rng = rng
        self.on_stored: Callable[[StoredMessage], None] = lambda message: None
        #: Whose publish is being routed.
        self.sender: FaultyBus | None = None
        #: Subscriptions by the first two words of their subjects ("" for a wildcard), each with its place in the list
        #: that they were read from: a yard of hundreds does not look through all of them for each message.
        self._index: dict[tuple[str, str], list[tuple[int, MemorySubscription]]] = {}
        self._indexed: list[MemorySubscription] = []

    def _listeners(self, subject: str) -> list[MemorySubscription]:
        if self._indexed != self.subscriptions:
            self._indexed = list(self.subscriptions)
            self._index = {}
            for place, subscription in enumerate(self._indexed):
                self._index.setdefault(_first_words(subscription.subject), []).append((place, subscription))
        first, second = _first_words(subject)
        found = [
            *self._index.get((first, second), ()),
            *self._index.get((first, ""), ()),
            *self._index.get(("", ""), ()),
        ]
        everybody, self.subscriptions = (
            self.subscriptions,
            [subscription for _, subscription in sorted(found, key=_place)],
        )
        try:
            return super()._listeners(subject)
        finally:
            self.subscriptions = everybody

    def rewrite(self, subject: str, data: bytes) -> bytes:
        """What a message is on its way; a test makes it that of another version."""
        return data

    def route(self, subject: str, data: bytes, reply: str, headers: Mapping[str, str]) -> None:
        sender = self.sender
        assert sender is not None
        if sender.weather.mute:
            return
        connection, data = sender.connection, self.rewrite(subject, data)

        def arrive() -> None:
            if self.is_running and sender.connection == connection:
                MemoryBroker.route(self, subject, data, reply, headers)

        sender.travel(arrive, "out")

    def _store(self, stream: object, subject: str, data: bytes, headers: Mapping[str, str]) -> bytes:
        memory_stream = self.streams[stream.spec.name]  # type: ignore[attr-defined]  # a MemoryStream, as in the parent
        before = memory_stream.state(self.clock_ms()).last_sequence
        # Most parties of a large yard read no stream.
        everybody, self.buses = self.buses, [bus for bus in self.buses if bus.readers]
        try:
            answer = super()._store(memory_stream, subject, data, headers)
        finally:
            self.buses = everybody
        after = memory_stream.state(self.clock_ms()).last_sequence
        if after != before:
            message = memory_stream.get(after)
            assert message is not None
            self.on_stored(message)
        return answer

    def _call_soon(self, subscription: MemorySubscription, message: Message) -> None:
        bus = subscription.bus
        assert isinstance(bus, FaultyBus)
        if bus.weather.deaf:
            return
        connection = bus.connection

        def arrive() -> None:
            if bus.connection == connection and bus.is_connected and not subscription.is_closed:
                subscription.handler(message)

        bus.travel(arrive, "in")


def _first_words(subject: str) -> tuple[str, str]:
    first, _, rest = subject.partition(".")
    second = rest.partition(".")[0]
    return ("", "") if first in "*>" else (first, "" if second in ("*", ">") else second)


def _place(entry: tuple[int, MemorySubscription]) -> int:
    return entry[0]


class _InOrder(set[MemoryReader]):
    """Readers in the order in which they were opened: a plain set would go by address, and differ from run to run."""

    def __iter__(self) -> Iterator[MemoryReader]:
        if not self:
            return iter(())
        return iter(sorted(super().__iter__(), key=lambda reader: reader.number if isinstance(reader, _Reader) else 0))


class FaultyBus(MemoryBus):
    """One party's connection. `before_send` and `after_send` see the subject of everything sent: fault points."""

    def __init__(self, broker: FaultyBroker, name: str, weather: Weather) -> None:
        super().__init__(broker, name=name)
        self.readers = _InOrder()
        self.weather = weather
        #: Counts up whenever the connection ends.
        self.connection = 0
        self.before_send: Callable[[str], None] = lambda subject: None
        self.after_send: Callable[[str], None] = lambda subject: None
        self._rng = broker.rng
        self._broker = broker
        self._opened = 0
        #: When the last message of each direction arrives: the next one does not overtake it.
        self._free_at = {"in": 0.0, "out": 0.0}

    def travel(self, arrive: Callable[[], None], direction: str) -> None:
        weather, rng = self.weather, self._rng
        if weather.loss and rng.random() < weather.loss:
            return
        copies = 2 if weather.duplicate and rng.random() < weather.duplicate else 1
        for _ in range(copies):
            at = self._loop.time() + rng.uniform(weather.delay_min_s, weather.delay_max_s)
            if not weather.reorder:
                at = self._free_at[direction] = max(at, self._free_at[direction])
            self._loop.call_at(at, arrive)
        if weather.straggle and rng.random() < weather.straggle:
            self._loop.call_later(rng.uniform(*STRAGGLE_S), arrive)

    def connection_ended(self, reason: str) -> None:
        self.connection += 1
        super().connection_ended(reason)

    def drop(self) -> None:
        """The process behind it died: whoever waited is gone already."""
        self._is_closed = True
        self._calls.connection_ended("its process died")
        self._calls.close()
        self.readers.clear()
        broker = self._broker
        broker.subscriptions[:] = [known for known in broker.subscriptions if known.bus is not self]
        if self in broker.buses:
            broker.buses.remove(self)

    def hear_again(self) -> None:
        """The way in is open again: what the streams took meanwhile is read."""
        for reader in self.readers:
            reader.wake()

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self._broker.sender = self
        await super().publish(subject, data, reply=reply, headers=headers)

    def _begin(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None, timeout: float, decode: Decode[T]
    ) -> asyncio.Future[T]:
        self.before_send(subject)
        self._broker.sender = self
        future = super()._begin(subject, data, headers, timeout, decode)
        self.after_send(subject)
        return future

    # --- questions to JetStream: both ways must be open ---

    async def _ask(self) -> None:
        self._require_connection()
        connection = self.connection
        if self.weather.mute or self.weather.deaf or self._rng.random() < self.weather.loss:
            await asyncio.sleep(QUESTION_TIMEOUT_S)
            raise Unanswered("a question to JetStream was not answered")
        await asyncio.sleep(2 * self._rng.uniform(self.weather.delay_min_s, self.weather.delay_max_s))
        if self.connection != connection:
            raise Unanswered("the connection ended before JetStream answered")

    async def ensure_stream(self, spec: StreamSpec) -> None:
        await self._ask()
        await super().ensure_stream(spec)

    async def stream_state(self, stream: str) -> StreamState:
        await self._ask()
        return await super().stream_state(stream)

    async def purge_stream(self, stream: str, *, up_to: int, subject: str = "") -> None:
        await self._ask()
        await super().purge_stream(stream, up_to=up_to, subject=subject)

    async def get_message(self, stream: str, sequence: int) -> StoredMessage | None:
        await self._ask()
        return await super().get_message(stream, sequence)

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        await self._ask()
        return await super().last_message(stream, subject)

    async def read_stream(
        self, stream: str, handler: BatchHandler, *, start: int = 1, filter_subject: str = "", batch: int = 256
    ) -> MemoryReader:
        await self._ask()
        self._stream(stream)
        self._opened += 1
        reader = _Reader(self, self._opened, stream, handler, start, filter_subject, batch)
        self.readers.add(reader)
        reader.wake()
        return reader


class _Reader(MemoryReader):
    """Reads with the delay of its party's line, and nothing while that line brings nothing."""

    def __init__(
        self,
        bus: FaultyBus,
        number: int,
        stream: str,
        handler: BatchHandler,
        start: int,
        filter_subject: str,
        batch: int,
    ) -> None:
        super().__init__(bus, stream, handler, start, filter_subject, batch)
        self.number = number
        self._line = bus

    def wake(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            weather = self._line.weather
            delay_s = self._line.broker.rng.uniform(weather.delay_min_s, weather.delay_max_s)  # type: ignore[attr-defined]  # a FaultyBroker
            asyncio.get_running_loop().call_later(delay_s, self._hand_over)

    def _hand_over(self) -> None:
        if self._line.weather.deaf:
            self._is_scheduled = False
        else:
            super()._hand_over()
