"""Reading a stream in order, without a gap, over reconnects and server restarts.

A reader keeps one nameless pull consumer on the server that acknowledges nothing: the reader's place is `position`,
kept by whoever uses it. A pull is always outstanding, so a message stored is handed over at once. Every delivery
carries a consumer sequence number; one that is not the next means something was lost, and the consumer is made anew
from `position + 1`. The same happens after a reconnect and when the server has been silent for two heartbeats.
nats-py's ordered consumer does this too, but takes 18 s to notice a restarted server.

What this file does not know: connections (see `ReaderLink`), and what the messages mean. A stored message that cannot
be read as text is handed over all the same, with its subject escaped and without headers: somebody holds an
acknowledgement for it and is owed an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from gpuyard_protocol.bus import jetstream
from gpuyard_protocol.bus.base import BatchHandler, BusError, StoredMessage
from gpuyard_protocol.bus.client import Route
from gpuyard_protocol.bus.wire import MalformedMessage, decode_headers

#: How long one pull stays open, and how often the server says that it still is.
#: For one attempt to have a consumer made again.
CREATE_TIMEOUT_S = 2.5
PULL_EXPIRES_S = 60.0
HEARTBEAT_S = 1.0
#: Silent heartbeat intervals after which the consumer is given up.
HEARTBEAT_MISSES = 2
#: What one pull may carry. Two are open at most; above 64 MiB unread the server drops a client as too slow.
PULL_BYTES = 16 * 1024 * 1024
#: After this long without any pull the server forgets the consumer.
INACTIVE_S = 30.0
RETRY_MIN_S = 0.02
RETRY_MAX_S = 2.0

_ACK_PREFIX = b"$JS.ACK."
_NO_HEADERS: dict[str, str] = {}
_numbers = itertools.count(1)


class ReaderLink(Protocol):
    """What a reader needs of its bus."""

    @property
    def is_connected(self) -> bool: ...
    def new_inbox(self, suffix: str) -> str: ...
    def open_route(self, pattern: str, route: Route) -> int: ...
    def close_route(self, sid: int) -> None: ...
    def send_quietly(self, subject: str, data: bytes, reply: str = "") -> None: ...
    def after_chunk(self, call: Callable[[], None]) -> None: ...
    async def api(self, what: str, operation: str, body: dict[str, Any] | None) -> jetstream.ApiAnswer: ...
    def report(self, error: BusError) -> None: ...
    def report_malformed(self, where: str, error: MalformedMessage) -> None: ...
    def forget_reader(self, reader: StreamReader) -> None: ...


class StreamReader:
    """See `gpuyard_protocol.bus.base.StreamReader`."""

    def __init__(
        self,
        link: ReaderLink,
        stream: str,
        handler: BatchHandler,
        *,
        start: int,
        filter_subject: str,
        batch: int,
    ) -> None:
        self.position = max(start, 1) - 1
        self._link = link
        self._stream = stream
        self._handler = handler
        self._filter = filter_subject
        self._batch_size = batch
        self._loop = asyncio.get_running_loop()
        self._number = next(_numbers)
        #: Received in this chunk of input and not handed over yet; `_received` is the last one's sequence.
        self._batch: list[StoredMessage] = []
        self._received = self.position
        #: The consumer on the server, "" while there is none.
        self._consumer = ""
        self._inbox = ""
        self._sid = 0
        self._next_delivery = 1
        #: Messages the open pulls still allow.
        self._wanted = 0
        self._pulls = 0
        self._heard = True
        self._silent_intervals = 0
        self._watch: asyncio.TimerHandle | None = None
        self._recreation: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_paused = False

    # -- for its user ----------------------------------------------------------------------------------------

    async def close(self) -> None:
        """No handler call happens after this returns."""
        if self._is_closed:
            return
        self._is_closed = True
        self._batch.clear()
        if self._recreation is not None:
            self._recreation.cancel()
        if self._watch is not None:
            self._watch.cancel()
        self._drop_consumer()
        self._link.forget_reader(self)

    def pause(self) -> None:
        """Ask for nothing more until `resume`; up to one and a half batches that were asked for still come."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        if self._consumer and self._wanted <= self._batch_size // 2:
            self._pull()

    # -- for its bus -----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        await self._create()
        self._watch = self._loop.call_later(HEARTBEAT_S, self._check_heartbeat)

    def connection_ended(self) -> None:
        self._deliver()
        self._consumer = ""
        if self._sid:
            self._link.close_route(self._sid)
            self._sid = 0
        if self._recreation is not None:
            self._recreation.cancel()
            self._recreation = None

    def connection_restored(self) -> None:
        self._start_recreation()

    # -- the consumer ----------------------------------------------------------------------------------------

    async def _create(self) -> None:
        name = f"r{secrets.token_hex(6)}"
        inbox = self._link.new_inbox(f"r{self._number}-{name}")
        sid = self._link.open_route(f"{inbox}.*", self._route)
        operation = f"CONSUMER.CREATE.{self._stream}.{name}"
        if self._filter:
            operation += f".{self._filter}"
        self._next_delivery = 1
        body = {
            "stream_name": self._stream,
            "config": jetstream.consumer_config(name, self._received + 1, self._filter, INACTIVE_S),
            "action": "create",
        }
        try:
            await self._link.api(f"read stream {self._stream}", operation, body)
        except BaseException:
            self._link.close_route(sid)
            raise
        if self._sid:
            self._link.close_route(self._sid)
        self._consumer, self._inbox, self._sid = name, inbox, sid
        self._wanted = 0
        self._heard, self._silent_intervals = True, 0
        if not self._is_paused:
            self._pull()

    def _drop_consumer(self) -> None:
        if self._sid:
            self._link.close_route(self._sid)
        if self._consumer:
            # Nobody waits for the answer: if it does not arrive, the server drops the consumer after INACTIVE_S.
            self._link.send_quietly(f"{jetstream.API}.CONSUMER.DELETE.{self._stream}.{self._consumer}", b"")
        self._sid, self._consumer = 0, ""

    def _restart(self) -> None:
        self._deliver()
        self._drop_consumer()
        self._start_recreation()

    def _start_recreation(self) -> None:
        if self._is_closed or (self._recreation is not None and not self._recreation.done()):
            return
        self._recreation = self._loop.create_task(self._recreate(), name=f"reader of {self._stream}")

    async def _recreate(self) -> None:
        delay_s = RETRY_MIN_S
        reported = ""
        while self._link.is_connected:
            try:
                async with asyncio.timeout(CREATE_TIMEOUT_S):
                    await self._create()
                return
            except TimeoutError:
                # In a cluster, a stream without a leader does not answer, and has lost the question when it has one.
                continue
            except BusError as error:
                # Right after a server's start JetStream is not ready for a moment: that is no news.
                if delay_s > 0.5 and str(error) != reported:
                    reported = str(error)
                    self._link.report(error)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    def _pull(self) -> None:
        self._pulls += 1
        self._wanted += self._batch_size
        body = {
            "batch": self._batch_size,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
            "max_bytes": PULL_BYTES,
        }
        self._link.send_quietly(
            f"{jetstream.API}.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            msgspec.json.encode(body),
            f"{self._inbox}.{self._pulls}",
        )

    def _check_heartbeat(self) -> None:
        self._watch = self._loop.call_later(HEARTBEAT_S, self._check_heartbeat)
        if self._heard or not self._consumer or self._wanted <= 0:
            self._silent_intervals = 0
        else:
            self._silent_intervals += 1
            if self._silent_intervals > HEARTBEAT_MISSES:
                self._silent_intervals = 0
                self._restart()
        self._heard = False

    # -- what arrives ----------------------------------------------------------------------------------------

    def _route(self, subject: bytes, reply: bytes, data: bytes, header_block: bytes | None) -> None:
        self._heard = True
        # A message is told from the server's own words by its reply subject, never by its headers: those are the
        # publisher's, and may pretend to be a status.
        if not reply.startswith(_ACK_PREFIX):
            self._on_status(header_block)
            return
        tokens = reply.split(b".")
        # $JS.ACK.[domain.account.]stream.consumer.delivered.stream_seq.consumer_seq.time.pending[.random]
        first = 5 if len(tokens) == 9 else 7
        sequence, delivery, stored_ns = int(tokens[first]), int(tokens[first + 1]), int(tokens[first + 2])
        if delivery != self._next_delivery:
            self._restart()
            return
        self._next_delivery += 1
        self._wanted -= 1
        if sequence <= self._received or self._is_closed:
            return
        self._received = sequence
        headers = _NO_HEADERS if header_block is None else self._headers(header_block)
        try:
            text = subject.decode()
        except UnicodeDecodeError:
            text = subject.decode("utf-8", "backslashreplace")
            self._report_malformed(f"subject {text}")
        self._batch.append(StoredMessage(text, data, sequence, headers, stored_ns // 1_000_000))
        if len(self._batch) == 1:
            self._link.after_chunk(self._deliver)
        elif len(self._batch) >= self._batch_size:
            self._deliver()
        if self._wanted <= self._batch_size // 2 and not self._is_paused:
            self._pull()

    def _headers(self, block: bytes) -> dict[str, str]:
        try:
            return decode_headers(block)[2]
        except MalformedMessage as error:
            self._report_malformed(str(error))
            return {}

    def _report_malformed(self, what: str) -> None:
        self._link.report_malformed(f"stream {self._stream} at {self._received}", MalformedMessage(what))

    def _deliver(self) -> None:
        if not self._batch or self._is_closed:
            return
        batch, self._batch = self._batch, []
        self.position = batch[-1].sequence
        self._handler(batch)

    def _on_status(self, header_block: bytes | None) -> None:
        if header_block is None:
            return
        status, description, headers = decode_headers(header_block)
        if status == jetstream.STATUS_IDLE_HEARTBEAT:
            return
        is_end_of_pull = status in (jetstream.STATUS_NOT_FOUND, jetstream.STATUS_TIMEOUT) or (
            status == jetstream.STATUS_CONFLICT and ("MaxBytes" in description or "Batch Completed" in description)
        )
        if not is_end_of_pull:
            self._restart()
            return
        left = headers.get("Nats-Pending-Messages", "")
        self._wanted = max(0, self._wanted - int(left)) if left.isdigit() else 0
        if self._wanted <= self._batch_size // 2 and not self._is_paused and self._consumer:
            self._pull()
