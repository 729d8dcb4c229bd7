"""The bus inside one process: a broker, and a `MemoryBus` for each party, with the semantics of the real one.

For tests and simulations of whatever speaks over the bus. It passes the contract suite that the NATS bus passes,
streams, fences and limits included, and adds what a real server does not offer: it is deterministic (delivery is
`loop.call_soon`, in order), its clock can be given, and parties can be cut off and the broker stopped at will.

Not modelled: accounts, permissions of JetStream's own operations, storage failures.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from gpuyard_protocol.bus import jetstream
from gpuyard_protocol.bus.base import (
    BatchHandler,
    BusError,
    Disconnected,
    Message,
    MessageHandler,
    NoResponders,
    PermissionDenied,
    PubAck,
    PublishRefused,
    StoredMessage,
    StreamSpec,
    StreamState,
    StreamUnavailable,
)
from gpuyard_protocol.bus.calls import Decode, PendingCalls, T, begun
from gpuyard_protocol.bus.memory_stream import MemoryStream, Refusal
from gpuyard_protocol.bus.wire import check_subject, decode_headers, encode_headers, subject_matches

_NO_RESPONDERS = b"NATS/1.0 503\r\n\r\n"
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class MemorySubscription:
    """A live subscription of one bus."""

    def __init__(self, bus: MemoryBus, subject: str, queue: str, handler: MessageHandler) -> None:
        self.dropped = 0
        self.bus = bus
        self.subject = subject
        self.queue = queue
        self.handler = handler
        self.is_closed = False

    async def unsubscribe(self) -> None:
        self.is_closed = True
        self.bus.broker.subscriptions.remove(self)


class MemoryReader:
    """See `gpuyard_protocol.bus.base.StreamReader`."""

    def __init__(
        self, bus: MemoryBus, stream: str, handler: BatchHandler, start: int, filter_subject: str, batch: int
    ) -> None:
        self.position = max(start, 1) - 1
        self._bus = bus
        self._stream = stream
        self._handler = handler
        self._filter = filter_subject
        self._batch = batch
        #: Up to where the stream was searched; beyond `position` where the filter left messages out.
        self._searched = self.position
        self._is_closed = False
        self._is_paused = False
        self._is_scheduled = False

    async def close(self) -> None:
        self._is_closed = True
        self._bus.readers.discard(self)

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self.wake()

    def wake(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._is_scheduled = False
        stream = self._bus.broker.streams.get(self._stream)
        if self._is_closed or self._is_paused or stream is None or not self._bus.is_connected:
            return
        batch, self._searched = stream.after(self._searched, self._filter, self._batch)
        if batch:
            self.position = batch[-1].sequence
            self._handler(batch)
            self.wake()


class MemoryBroker:
    """What all buses of one test share. `clock_ms` gives Unix milliseconds; tests may hand in their own."""

    def __init__(self, clock_ms: Callable[[], int] = _wall_clock_ms) -> None:
        self.clock_ms = clock_ms
        self.streams: dict[str, MemoryStream] = {}
        self.subscriptions: list[MemorySubscription] = []
        self.buses: list[MemoryBus] = []
        self.is_running = True
        self._turns = itertools.count()

    def stop(self) -> None:
        """As if the server died: everybody loses the connection; streams keep what they acknowledged."""
        self.is_running = False
        for bus in list(self.buses):
            bus.connection_ended("the server went away")

    def start(self) -> None:
        self.is_running = True
        for bus in list(self.buses):
            bus.connection_restored()

    def route(self, subject: str, data: bytes, reply: str, headers: Mapping[str, str]) -> None:
        """Store in the stream that takes it, hand it to whoever listens, or tell the asker that nobody does."""
        is_taken = False
        for stream in self.streams.values():
            if stream.takes(subject):
                is_taken = True
                answer = self._store(stream, subject, data, headers)
                if reply:
                    self._deliver(Message(reply, answer))
        listeners = self._listeners(subject)
        message = Message(subject, data, reply, dict(headers))
        for subscription in listeners:
            self._call_soon(subscription, message)
        if reply and not listeners and not is_taken:
            self._deliver(Message(reply, b"", "", {"Status": "503"}))

    def _store(self, stream: MemoryStream, subject: str, data: bytes, headers: Mapping[str, str]) -> bytes:
        try:
            sequence, is_duplicate = stream.store(subject, data, headers, self.clock_ms())
        except Refusal as refusal:
            error = {"code": 400, "err_code": refusal.code, "description": refusal.description}
            return msgspec.json.encode({"stream": stream.spec.name, "seq": 0, "error": error})
        for bus in self.buses:
            for reader in list(bus.readers):
                reader.wake()
        ack = {"stream": stream.spec.name, "seq": sequence}
        return msgspec.json.encode(ack | {"duplicate": True} if is_duplicate else ack)

    def _listeners(self, subject: str) -> list[MemorySubscription]:
        """Every plain subscription, and one of each queue group, taking turns."""
        plain: list[MemorySubscription] = []
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        for subscription in self.subscriptions:
            if subscription.bus.is_connected and subject_matches(subscription.subject, subject):
                if subscription.queue:
                    groups.setdefault((subscription.subject, subscription.queue), []).append(subscription)
                else:
                    plain.append(subscription)
        return plain + [members[next(self._turns) % len(members)] for members in groups.values()]

    def _deliver(self, message: Message) -> None:
        for subscription in self._listeners(message.subject):
            self._call_soon(subscription, message)

    def _call_soon(self, subscription: MemorySubscription, message: Message) -> None:
        def call() -> None:
            if subscription.bus.is_connected and not subscription.is_closed:
                subscription.handler(message)

        asyncio.get_running_loop().call_soon(call)


class MemoryBus:
    """See `gpuyard_protocol.bus.base.Bus`. Must be made inside a running loop.

    `may_publish` and `may_subscribe` are patterns, None = everything; a party's own inbox is always its own.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        name: str = "bus",
        inbox_prefix: str = "_INBOX",
        may_publish: Sequence[str] | None = None,
        may_subscribe: Sequence[str] | None = None,
    ) -> None:
        self.broker = broker
        self.readers: set[MemoryReader] = set()
        self.malformed_messages = 0
        self._name = name
        self._may_publish = may_publish
        self._may_subscribe = may_subscribe
        self._loop = asyncio.get_running_loop()
        self._inbox = f"{inbox_prefix}.{name}-{len(broker.buses)}"
        self._calls = PendingCalls(self._loop)
        self._is_cut = False
        self._is_closed = False
        self._disconnect_callbacks: list[Callable[[], None]] = []
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._error_callbacks: list[Callable[[BusError], None]] = []
        broker.buses.append(self)
        broker.subscriptions.append(MemorySubscription(self, f"{self._inbox}.*", "", self._on_reply))

    # -- connection -------------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self.broker.is_running and not self._is_cut and not self._is_closed

    @property
    def max_payload(self) -> int:
        return MAX_PAYLOAD_BYTES

    def cut(self) -> None:
        """Lose the connection until `heal`."""
        self._is_cut = True
        self.connection_ended("cut off")

    def heal(self) -> None:
        self._is_cut = False
        self.connection_restored()

    def connection_ended(self, reason: str) -> None:
        self._calls.connection_ended(reason)
        for callback in self._disconnect_callbacks:
            callback()

    def connection_restored(self) -> None:
        if self.is_connected:
            for reader in self.readers:
                reader.wake()
            for callback in self._reconnect_callbacks:
                callback()

    def _require_connection(self) -> None:
        if not self.is_connected:
            raise Disconnected(f"{self._name} has no connection to the bus right now; nothing was sent")

    async def flush(self, timeout: float = 5.0) -> None:
        self._require_connection()
        await asyncio.sleep(0)

    async def close(self) -> None:
        self._is_closed = True
        self._calls.connection_ended("the bus was closed")
        self._calls.close()
        self.readers.clear()
        broker = self.broker
        broker.subscriptions[:] = [known for known in broker.subscriptions if known.bus is not self]
        if self in broker.buses:
            broker.buses.remove(self)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        self._disconnect_callbacks.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnect_callbacks.append(callback)

    def on_error(self, callback: Callable[[BusError], None]) -> None:
        self._error_callbacks.append(callback)

    # -- messages ---------------------------------------------------------------------------------------------

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self._check(subject, data, headers)
        if reply:
            check_subject(reply)
        if not self._may(self._may_publish, subject):
            for callback in self._error_callbacks:
                self._loop.call_soon(callback, PermissionDenied(f"this key may not publish on {subject}"))
            return
        self.broker.route(subject, data, reply, headers or {})

    async def request(
        self, subject: str, data: bytes, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> Message:
        return await self._begin(subject, data, headers, timeout, _decode_reply)

    async def stream_publish(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> PubAck:
        return await self._begin(subject, data, headers, timeout, jetstream.decode_ack)

    def begin_stream_publish(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> asyncio.Future[PubAck]:
        return begun(lambda: self._begin(subject, data, headers, timeout, jetstream.decode_ack))

    async def subscribe(
        self, subject: str, handler: MessageHandler, *, queue: str = "", pending_messages: int = 65536
    ) -> MemorySubscription:
        self._require_connection()
        check_subject(subject)
        if not self._may(self._may_subscribe, subject):
            raise PermissionDenied(f"this key may not subscribe to {subject}")
        subscription = MemorySubscription(self, subject, queue, handler)
        self.broker.subscriptions.append(subscription)
        return subscription

    def _begin(
        self,
        subject: str,
        data: bytes,
        headers: Mapping[str, str] | None,
        timeout: float,
        decode: Decode[T],
    ) -> asyncio.Future[T]:
        self._check(subject, data, headers)
        if not self._may(self._may_publish, subject):
            raise PermissionDenied(f"this key may not publish on {subject}; nothing was sent")
        token, future = self._calls.begin(subject, decode, timeout)
        self.broker.route(subject, data, f"{self._inbox}.{token}", headers or {})
        return future

    def _check(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> None:
        self._require_connection()
        check_subject(subject)
        encode_headers(headers or {})
        if len(data) > MAX_PAYLOAD_BYTES:
            raise PublishRefused(
                jetstream.ERROR_MESSAGE_TOO_LARGE,
                f"{subject}: {len(data)} bytes are more than the server takes ({MAX_PAYLOAD_BYTES})",
            )

    def _may(self, patterns: Sequence[str] | None, subject: str) -> bool:
        return patterns is None or any(subject_matches(pattern, subject) for pattern in patterns)

    def _on_reply(self, message: Message) -> None:
        token = message.subject.rpartition(".")[2].encode()
        is_nobody = message.headers.get("Status") == "503" and not message.data
        block = _NO_RESPONDERS if is_nobody else encode_headers(message.headers) if message.headers else None
        self._calls.answer(token, message.data, block)

    # -- streams ----------------------------------------------------------------------------------------------

    async def ensure_stream(self, spec: StreamSpec) -> None:
        self._require_connection()
        for name, other in self.broker.streams.items():
            if name != spec.name and other.overlaps(spec):
                raise StreamUnavailable(
                    f"create stream {spec.name}: subjects overlap with an existing stream (JetStream error 10065)"
                )
        known = self.broker.streams.get(spec.name)
        if known is None:
            self.broker.streams[spec.name] = MemoryStream(spec)
        else:
            known.spec = spec

    async def stream_state(self, stream: str) -> StreamState:
        return self._stream(stream).state(self.broker.clock_ms())

    async def purge_stream(self, stream: str, *, up_to: int, subject: str = "") -> None:
        self._stream(stream).purge(up_to, subject)

    async def get_message(self, stream: str, sequence: int) -> StoredMessage | None:
        return self._stream(stream).get(sequence)

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        return self._stream(stream).last_on(subject)

    async def read_stream(
        self, stream: str, handler: BatchHandler, *, start: int = 1, filter_subject: str = "", batch: int = 256
    ) -> MemoryReader:
        self._stream(stream)
        reader = MemoryReader(self, stream, handler, start, filter_subject, batch)
        self.readers.add(reader)
        reader.wake()
        return reader

    def _stream(self, name: str) -> MemoryStream:
        self._require_connection()
        stream = self.broker.streams.get(name)
        if stream is None:
            raise StreamUnavailable(f"stream {name}: stream not found (JetStream error 10059)")
        return stream


def _decode_reply(subject: str, data: bytes, header_block: bytes | None) -> Message:
    headers: dict[str, str] = {}
    if header_block is not None:
        status, _, headers = decode_headers(header_block)
        if status == jetstream.STATUS_NO_RESPONDERS and not data:
            raise NoResponders(f"nobody listens on {subject}")
    return Message(subject, data, "", headers)
