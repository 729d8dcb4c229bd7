"""What every component may ask of the message bus, and how it can fail.

`Bus` is the one door to messaging: the daemon, the agents and the client use nothing else. Two implementations pass
one contract suite: `gpuyard_protocol.bus.nats` (real, hardened against what its client library does not survive) and
`gpuyard_protocol.bus.memory` (for tests and simulations). No caller ever sees an exception of the client library.

Rules of this file:

- A call either did what it says or raises a `BusError`; nothing is buffered for a later connection (a command sent
  after a reconnect that nobody waits for any more is worse than none).
- Handlers are plain functions called from the reader: they must not block and must not raise. Whoever needs to wait
  puts the message in an inbox of its own.
- `Unanswered` means the outcome is unknown: the message may have arrived. `NoResponders`, `Disconnected`,
  `PermissionDenied` and `PublishRefused` mean it certainly had no effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class BusError(Exception):
    """The bus could not do what was asked; the message says what, and on which subject or stream."""


class Disconnected(BusError):
    """There is no connection right now; nothing was sent."""


class Unanswered(BusError):
    """No answer within the deadline: the outcome is unknown."""


class NoResponders(BusError):
    """Nobody listens on that subject; nothing happened."""


class PermissionDenied(BusError):
    """The server refused this subject to this key; nothing happened."""


class PublishRefused(BusError):
    """A stream refused the message (limit, fence, header); nothing was stored.

    `code` is JetStream's `err_code`: 10071 a fence or sequence that no longer holds, 10077 a stream or subject at its
    limit, 10164 a conflict with a write in flight.
    """

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} (JetStream error {code})")
        self.code = code
        self.description = description


class StreamUnavailable(BusError):
    """JetStream or this stream does not answer, or does not exist."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message as delivered."""

    subject: str
    data: bytes
    reply: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message of a stream."""

    subject: str
    data: bytes
    sequence: int
    headers: Mapping[str, str] = field(default_factory=dict)
    #: When the server stored it, Unix milliseconds.
    stored_ms: int = 0


@dataclass(frozen=True, slots=True)
class PubAck:
    """A stream's word that a message is durable."""

    stream: str
    sequence: int
    #: The same Nats-Msg-Id was stored before, within the stream's window; `sequence` is that message's.
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class StreamState:
    """How full a stream is. `first_sequence > last_sequence` where it is empty."""

    first_sequence: int
    last_sequence: int
    messages: int
    bytes: int
    #: 0 = unbounded.
    max_bytes: int


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream's settings. Always: file storage, limits retention, `discard: new` unless `discard_old`, one replica."""

    name: str
    subjects: tuple[str, ...]
    max_bytes: int
    max_message_bytes: int = -1
    max_messages_per_subject: int = -1
    #: With `max_messages_per_subject`: a full subject refuses its own writer and nobody else.
    discard_new_per_subject: bool = False
    discard_old: bool = False
    #: 0 = keep for ever.
    max_age_s: int = 0
    duplicate_window_s: float = 0.1
    allow_direct: bool = True
    replicas: int = 1
    #: Written to disk some moments after it is acknowledged: ten times the rate, and what a crash of the server takes
    #: is gone. For streams that are derived from another one alone. Ignored with more than one replica.
    is_lazy: bool = False
    #: Nobody may delete or purge a message, whatever his key allows; only age and size take the oldest.
    is_append_only: bool = False


MessageHandler = Callable[[Message], None]
BatchHandler = Callable[[list[StoredMessage]], None]


class Subscription(Protocol):
    """A live core subscription; it survives reconnects."""

    #: Messages not handed over because they could not be read as text. Nothing else is dropped: the handler is called
    #: straight from the reader, and whoever queues bounds his own queue.
    dropped: int

    async def unsubscribe(self) -> None: ...


class StreamReader(Protocol):
    """A gap-checked reader of one stream from a sequence on; it survives reconnects and server restarts."""

    #: The last sequence handed to the handler.
    position: int

    async def close(self) -> None: ...

    def pause(self) -> None:
        """Ask for nothing more until `resume`; up to one and a half batches already asked for still come."""

    def resume(self) -> None: ...


class Bus(Protocol):
    """See the module's rules. All timeouts are seconds."""

    @property
    def is_connected(self) -> bool: ...

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send without confirmation (core NATS). Raises `Disconnected`; a refusal shows in `on_error` only."""

    async def request(
        self, subject: str, data: bytes, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> Message:
        """One answer, or `NoResponders`, `Unanswered`, `PermissionDenied`, `Disconnected`."""

    async def subscribe(
        self, subject: str, handler: MessageHandler, *, queue: str = "", pending_messages: int = 65536
    ) -> Subscription:
        """Confirmed by the server before it returns; `PermissionDenied` if refused."""

    async def stream_publish(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> PubAck:
        """Durable once it returns. `PublishRefused`, `Unanswered`, `NoResponders` (no stream takes this subject), …"""

    def begin_stream_publish(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> asyncio.Future[PubAck]:
        """The same without waiting: sent in the order of the calls; every error arrives in the future.

        The way to many publishes at once, through `gpuyard_protocol.bus.publisher.WindowedPublisher`, which bounds
        them.
        """

    async def ensure_stream(self, spec: StreamSpec) -> None:
        """Create the stream or bring its settings up to date. Idempotent."""

    async def stream_state(self, stream: str) -> StreamState: ...

    async def purge_stream(self, stream: str, *, up_to: int, subject: str = "") -> None:
        """Drop every message (of `subject`, if given) with sequence <= `up_to`."""

    async def get_message(self, stream: str, sequence: int) -> StoredMessage | None:
        """The message with exactly that sequence, or None."""

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """The newest message on that subject of the stream, or None."""

    async def read_stream(
        self,
        stream: str,
        handler: BatchHandler,
        *,
        start: int = 1,
        filter_subject: str = "",
        batch: int = 256,
    ) -> StreamReader:
        """Call `handler` with every message from sequence `start` on, in order, once each, in batches as they come.

        Nothing is acknowledged to the server: the reader's place is the caller's to keep. Sequences may be missing
        (purged, or filtered out); none is repeated or reordered.
        """

    def on_disconnect(self, callback: Callable[[], None]) -> None: ...

    def on_reconnect(self, callback: Callable[[], None]) -> None: ...

    def on_error(self, callback: Callable[[BusError], None]) -> None:
        """Errors that belong to no call: slow consumers, refused publishes."""

    async def flush(self, timeout: float = 5.0) -> None:
        """Return when the server has seen everything sent before."""

    async def close(self) -> None: ...


Connector = Callable[[], Awaitable[Bus]]
