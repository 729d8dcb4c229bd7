"""The bus over NATS: one connection after another, and what outlives each of them.

A `Connection` dies at the first thing that is wrong with it. This file replaces it, subscribes again, makes readers
go on from their place, and ends every call that was under way at the moment of death: "unanswered", because the
message may have arrived. Nothing is sent later on anybody's behalf.

The server tells refusals (`Permissions Violation`) apart from the message they belong to, in a line of its own that
names the subject; here they are matched to the call that waits on that subject, within the round trip that a silent
failure would turn into a full timeout.

It does not know what messages mean, and holds no policy but how fast to reconnect.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from nats import errors

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
    Unanswered,
)
from gpuyard_protocol.bus.calls import Decode, PendingCalls, T, begun
from gpuyard_protocol.bus.client import Connection, Route
from gpuyard_protocol.bus.credentials import read_public_key, tls_context, untrusted
from gpuyard_protocol.bus.reader import StreamReader
from gpuyard_protocol.bus.wire import (
    MalformedMessage,
    check_subject,
    decode_headers,
    decode_text,
    encode_publish,
    encode_subscribe,
    encode_unsubscribe,
)

#: One attempt's share of the time; a server that is there answers within milliseconds.
ATTEMPT_TIMEOUT_S = 3.0
#: JetStream's own operations; above the 6 s that a cluster may take to elect a leader.
API_TIMEOUT_S = 10.0
#: Failed reconnects after which the pauses become four times as long.
PATIENCE_ATTEMPTS = 20

_NO_HEADERS: dict[str, str] = {}
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "(.*?)"', re.IGNORECASE)
_OPEN_FAILURES = (OSError, errors.Error, ValueError)


class CoreSubscription:
    """A core subscription and its place in the routing table."""

    def __init__(self, bus: NatsBus, sid: int, subject: str, queue: str, handler: MessageHandler) -> None:
        #: Messages that could not be read as text and were not handed over; nothing else is ever dropped here, since
        #: the handler is called straight from the reader.
        self.dropped = 0
        self.subject = subject
        self.queue = queue
        #: The server has let it pass once; a refusal after that (at a reconnect) belongs to no call.
        self.is_confirmed = False
        self.is_refused = False
        self._bus = bus
        self._sid = sid
        self._handler = handler

    def route(self, subject: bytes, reply: bytes, data: bytes, header_block: bytes | None) -> None:
        try:
            headers = _NO_HEADERS if header_block is None else decode_headers(header_block)[2]
            message = Message(decode_text(subject, "subject"), data, decode_text(reply, "reply"), headers)
        except MalformedMessage:
            self.dropped += 1
            raise
        self._handler(message)

    async def unsubscribe(self) -> None:
        """What the server sent before it heard of it is still handed over."""
        await self._bus.drain_route(self._sid)


class NatsBus:
    """See `gpuyard_protocol.bus.base.Bus`. Made by `connect`."""

    def __init__(
        self,
        urls: list[str],
        *,
        name: str,
        inbox_prefix: str,
        seed: str | None,
        reconnect_jitter_s: tuple[float, float],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._urls = urls
        self._name = name
        self._seed = seed
        self._jitter_s = reconnect_jitter_s
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        #: Shared with every connection: subscription id -> who takes its messages.
        self._routes: dict[int, Route] = {}
        #: What to subscribe again: id -> (pattern, queue, the core subscription if it is one).
        self._patterns: dict[int, tuple[str, str, CoreSubscription | None]] = {}
        self._last_sid = 0
        self._inbox = f"{inbox_prefix}.{secrets.token_hex(8)}"
        self._inbox_refused = False
        self._calls = PendingCalls(self._loop)
        self._readers: list[StreamReader] = []
        self._connection: Connection | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_closing = False
        #: Why there is no connection, for the error messages.
        self._trouble = ""
        self._disconnect_callbacks: list[Callable[[], None]] = []
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._error_callbacks: list[Callable[[BusError], None]] = []
        #: Messages met that could not be read as text.
        self.malformed_messages = 0
        #: Connections made after the first one.
        self.reconnects = 0
        self.open_route(f"{self._inbox}.*", self._on_reply)

    # -- connection ------------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and self._connection.is_live

    @property
    def max_payload(self) -> int:
        """The largest message the server takes, bytes (0 while disconnected)."""
        return self._connection.max_payload if self._connection is not None else 0

    @property
    def server_version(self) -> str:
        """As the server said at the handshake; "" while disconnected."""
        return self._connection.version_of_server if self._connection is not None else ""

    async def open_first(self, timeout_s: float) -> None:
        """Connect within `timeout_s` or raise a `BusError` that says who did not answer and what to do."""
        deadline = self._loop.time() + timeout_s
        where = ", ".join(self._urls)
        while True:
            left_s = deadline - self._loop.time()
            try:
                await self._open(max(0.1, min(ATTEMPT_TIMEOUT_S, left_s)))
                break
            except _OPEN_FAILURES as error:
                if _is_refused_key(error):
                    raise PermissionDenied(self._refused_key_text(where)) from error
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise untrusted(where, error) from error
                if self._loop.time() >= deadline:
                    raise Disconnected(
                        f"no NATS server answers at {where} within {timeout_s:g} s ({_describe(error)}): "
                        "check that the yard is up and that the address is right"
                    ) from error
            await asyncio.sleep(min(0.1, max(0.0, deadline - self._loop.time())))
        await self.flush()
        if self._inbox_refused:
            await self.close()
            raise PermissionDenied(f"this key may not subscribe to {self._inbox}.*: wrong inbox prefix for it")
        self._supervisor = self._loop.create_task(self._supervise(), name=f"bus {self._name}")

    async def _open(self, timeout_s: float) -> None:
        connection = Connection(
            self._routes,
            on_error_line=self._on_error_line,
            on_fault=self._on_fault,
            on_lost=self._on_lost,
        )
        if self._seed is not None:
            read_public_key(self._seed)
        await connection.open(
            random.choice(self._urls), name=self._name, seed=self._seed, tls=self._tls, timeout_s=timeout_s
        )
        for sid, (pattern, queue, _) in self._patterns.items():
            connection.send(encode_subscribe(pattern, queue, sid))
        self._connection = connection

    async def _supervise(self) -> None:
        """Replace each lost connection, for ever."""
        while not self._is_closing:
            connection = self._connection
            if connection is not None:
                self._trouble = await asyncio.shield(connection.lost)
            attempts = 0
            while not self._is_closing:
                low_s, high_s = self._jitter_s
                factor = 1.0 if attempts < PATIENCE_ATTEMPTS else 4.0
                await asyncio.sleep(random.uniform(low_s, high_s) * factor)
                attempts += 1
                try:
                    await self._open(ATTEMPT_TIMEOUT_S)
                    break
                except (*_OPEN_FAILURES, BusError) as error:
                    self._note_trouble(error)
            if self.is_connected:
                self.reconnects += 1
                for reader in list(self._readers):
                    reader.connection_restored()
                self._call_all(self._reconnect_callbacks)

    def _note_trouble(self, error: BaseException) -> None:
        where = ", ".join(self._urls)
        if _is_refused_key(error):
            text = self._refused_key_text(where)
        else:
            text = f"cannot reconnect to {where}: {_describe(error)}"
        if text != self._trouble:
            self._trouble = text
            self.report(PermissionDenied(text) if _is_refused_key(error) else Disconnected(text))

    def _refused_key_text(self, where: str) -> str:
        key = "no key" if self._seed is None else f"key {read_public_key(self._seed)} of {self._seed}"
        return (
            f"{where} refuses {self._name} ({key}): it is in none of the server's accounts, or was taken out; "
            "ask the operator of the yard"
        )

    def _on_lost(self, reason: str) -> None:
        for reader in self._readers:
            reader.connection_ended()
        self._calls.connection_ended(reason)
        if not self._is_closing:
            self._call_all(self._disconnect_callbacks)

    def _required(self) -> Connection:
        connection = self._connection
        if connection is None or not connection.is_live:
            trouble = f" ({self._trouble})" if self._trouble else ""
            raise Disconnected(f"{self._name} has no connection to the bus right now{trouble}; nothing was sent")
        return connection

    async def flush(self, timeout: float = 5.0) -> None:
        connection = self._required()
        try:
            async with asyncio.timeout(timeout):
                await connection.ping()
        except TimeoutError:
            raise Unanswered(f"the server did not confirm within {timeout:g} s") from None

    async def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        for reader in list(self._readers):
            await reader.close()
        if self._connection is not None:
            await self._connection.shut()
        self._calls.connection_ended("the bus was closed")
        self._calls.close()

    # -- publishing and asking -------------------------------------------------------------------------------

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        connection = self._required()
        self._check_size(connection, subject, data)
        if reply:
            check_subject(reply)
        connection.send(encode_publish(subject, reply, data, headers))
        if connection.is_behind:
            await connection.relieve()

    async def request(
        self, subject: str, data: bytes, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> Message:
        future = self._begin(subject, data, headers, timeout, jetstream.decode_reply)
        connection = self._connection
        if connection is not None and connection.is_behind:
            await connection.relieve()
        return await future

    async def stream_publish(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> PubAck:
        future = self._begin(subject, data, headers, timeout, jetstream.decode_ack)
        connection = self._connection
        if connection is not None and connection.is_behind:
            await connection.relieve()
        return await future

    def begin_stream_publish(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> asyncio.Future[PubAck]:
        return begun(lambda: self._begin(subject, data, headers, timeout, jetstream.decode_ack))

    def _begin(
        self,
        subject: str,
        data: bytes,
        headers: Mapping[str, str] | None,
        timeout: float,
        decode: Decode[T],
    ) -> asyncio.Future[T]:
        connection = self._required()
        self._check_size(connection, subject, data)
        token, future = self._calls.begin(subject, decode, timeout)
        try:
            connection.send(encode_publish(subject, f"{self._inbox}.{token}", data, headers))
        except BusError:
            self._calls.forget(token)
            raise
        return future

    def _check_size(self, connection: Connection, subject: str, data: bytes) -> None:
        if len(data) > connection.max_payload:
            raise PublishRefused(
                jetstream.ERROR_MESSAGE_TOO_LARGE,
                f"{subject}: {len(data)} bytes are more than the server takes ({connection.max_payload})",
            )

    def _on_reply(self, subject: bytes, _: bytes, data: bytes, header_block: bytes | None) -> None:
        self._calls.answer(subject[subject.rfind(b".") + 1 :], data, header_block)

    # -- subscriptions ---------------------------------------------------------------------------------------

    async def subscribe(
        self, subject: str, handler: MessageHandler, *, queue: str = "", pending_messages: int = 65536
    ) -> CoreSubscription:
        """`pending_messages` bounds a queue that does not exist here: the handler is called as messages are read."""
        connection = self._required()
        check_subject(subject)
        if queue:
            check_subject(queue)
        self._last_sid += 1
        sid = self._last_sid
        subscription = CoreSubscription(self, sid, subject, queue, handler)
        self._routes[sid] = subscription.route
        self._patterns[sid] = (subject, queue, subscription)
        connection.send(encode_subscribe(subject, queue, sid))
        try:
            await self.flush()
        except BaseException:
            self.close_route(sid)
            raise
        if subscription.is_refused:
            self._routes.pop(sid, None)
            self._patterns.pop(sid, None)
            raise PermissionDenied(f"this key may not subscribe to {subject}")
        subscription.is_confirmed = True
        return subscription

    def open_route(self, pattern: str, route: Route) -> int:
        """Subscribe without waiting for the server's word; what follows on the connection comes after it anyway."""
        self._last_sid += 1
        self._routes[self._last_sid] = route
        self._patterns[self._last_sid] = (pattern, "", None)
        if self.is_connected:
            self._required().send(encode_subscribe(pattern, "", self._last_sid))
        return self._last_sid

    def close_route(self, sid: int) -> None:
        known = self._patterns.pop(sid, None)
        self._routes.pop(sid, None)
        if known is not None and self.is_connected:
            self._required().send(encode_unsubscribe(sid))

    async def drain_route(self, sid: int) -> None:
        route = self._routes.get(sid)
        self.close_route(sid)
        if route is not None and self.is_connected:
            self._routes[sid] = route
            try:
                await self.flush()
            except BusError:
                pass  # The connection ended, and with it whatever was under way.
            finally:
                self._routes.pop(sid, None)

    def new_inbox(self, suffix: str) -> str:
        return f"{self._inbox}.{suffix}"

    def send_quietly(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send if there is a connection; for messages whose loss the sender notices by other means."""
        if self.is_connected:
            self._required().send(encode_publish(subject, reply, data, None))

    def after_chunk(self, call: Callable[[], None]) -> None:
        if self._connection is not None:
            self._connection.after_chunk(call)

    # -- streams ---------------------------------------------------------------------------------------------

    async def api(self, what: str, operation: str, body: dict[str, Any] | None) -> jetstream.ApiAnswer:
        """One JetStream operation; its errors become `StreamUnavailable` that begins with `what`."""
        answer = await self._api_answer(what, operation, body)
        if answer.error is not None:
            raise jetstream.unavailable(what, answer.error)
        return answer

    async def _api_answer(self, what: str, operation: str, body: dict[str, Any] | None) -> jetstream.ApiAnswer:
        payload = b"" if body is None else msgspec.json.encode(body)
        try:
            reply = await self.request(f"{jetstream.API}.{operation}", payload, timeout=API_TIMEOUT_S)
        except NoResponders:
            raise StreamUnavailable(
                f"{what}: JetStream does not answer: not enabled for this account, or not ready yet"
            ) from None
        return jetstream.decode_answer(what, reply.data)

    async def ensure_stream(self, spec: StreamSpec) -> None:
        # Not "create, and update if it is there": the server counts the room for a stream that exists a second time.
        known = await self._api_answer(f"state of stream {spec.name}", f"STREAM.INFO.{spec.name}", None)
        if known.error is None:
            config = jetstream.changed_config(spec, known)
            await self.api(f"update stream {spec.name}", f"STREAM.UPDATE.{spec.name}", config)
        elif known.error.err_code == jetstream.ERROR_STREAM_NOT_FOUND:
            await self.api(f"create stream {spec.name}", f"STREAM.CREATE.{spec.name}", jetstream.stream_config(spec))
        else:
            raise jetstream.unavailable(f"state of stream {spec.name}", known.error)

    async def stream_state(self, stream: str) -> StreamState:
        return jetstream.stream_state(await self.api(f"state of stream {stream}", f"STREAM.INFO.{stream}", None))

    async def purge_stream(self, stream: str, *, up_to: int, subject: str = "") -> None:
        body: dict[str, Any] = {"seq": up_to + 1}
        if subject:
            body["filter"] = subject
        await self.api(f"purge stream {stream}", f"STREAM.PURGE.{stream}", body)

    async def get_message(self, stream: str, sequence: int) -> StoredMessage | None:
        return await self._direct(stream, "", {"seq": sequence})

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        if "*" in subject or ">" in subject:
            return await self._direct(stream, "", {"last_by_subj": subject})
        # The form with the subject in the subject can be granted subject by subject.
        return await self._direct(stream, f".{subject}", None)

    async def _direct(self, stream: str, suffix: str, body: dict[str, Any] | None) -> StoredMessage | None:
        payload = b"" if body is None else msgspec.json.encode(body)

        def decode(_: str, data: bytes, header_block: bytes | None) -> StoredMessage | None:
            return jetstream.decode_direct(stream, data, header_block)

        subject = f"{jetstream.API}.DIRECT.GET.{stream}{suffix}"
        return await self._begin(subject, payload, None, API_TIMEOUT_S, decode)

    async def read_stream(
        self, stream: str, handler: BatchHandler, *, start: int = 1, filter_subject: str = "", batch: int = 256
    ) -> StreamReader:
        self._required()
        reader = StreamReader(self, stream, handler, start=start, filter_subject=filter_subject, batch=batch)
        self._readers.append(reader)
        try:
            await reader.begin()
        except BaseException:
            self._readers.remove(reader)
            raise
        return reader

    def forget_reader(self, reader: StreamReader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)

    # -- news that belong to no call -------------------------------------------------------------------------

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        self._disconnect_callbacks.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnect_callbacks.append(callback)

    def on_error(self, callback: Callable[[BusError], None]) -> None:
        self._error_callbacks.append(callback)

    def report(self, error: BusError) -> None:
        for callback in self._error_callbacks:
            try:
                callback(error)
            except Exception as fault:  # noqa: BLE001  a faulty callback must not take the connection with it
                self._blame("error callback", fault)

    def report_malformed(self, where: str, error: MalformedMessage) -> None:
        self.malformed_messages += 1
        self.report(BusError(f"malformed message on {where}: {error}"))

    def _on_fault(self, sid: int, error: Exception) -> None:
        pattern = self._patterns.get(sid, ("?", "", None))[0]
        if isinstance(error, MalformedMessage):
            self.report_malformed(pattern, error)
        else:
            self._blame(f"handler of {pattern}", error)

    def _on_error_line(self, text: str) -> None:
        found = _VIOLATION.search(text)
        if found is None:
            self.report(BusError(f"the server reports: {text}"))
            return
        kind, subject = found.groups()
        if kind.lower() == "publish":
            if not self._calls.refuse(subject):
                self.report(PermissionDenied(f"this key may not publish on {subject}; nothing was sent"))
            return
        is_awaited = subject == f"{self._inbox}.*"
        self._inbox_refused = self._inbox_refused or is_awaited
        for pattern, _, subscription in self._patterns.values():
            if pattern == subject and subscription is not None and not subscription.is_confirmed:
                subscription.is_refused = is_awaited = True
        if not is_awaited:
            self.report(PermissionDenied(f"this key may not subscribe to {subject}"))

    def _call_all(self, callbacks: list[Callable[[], None]]) -> None:
        for callback in callbacks:
            try:
                callback()
            except Exception as fault:  # noqa: BLE001  a faulty callback must not take the connection with it
                self._blame("connection callback", fault)

    def _blame(self, who: str, fault: Exception) -> None:
        self._loop.call_exception_handler({"message": f"bus {self._name}: {who} raised {fault!r}", "exception": fault})


def _is_refused_key(error: BaseException) -> bool:
    return "authorization violation" in str(error).lower()


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def connect(
    url: str,
    *,
    name: str,
    inbox_prefix: str,
    seed: str | None = None,
    reconnect_jitter_s: tuple[float, float] = (0.05, 0.25),
    connect_timeout_s: float = 5.0,
    tls_ca: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> NatsBus:
    """Connect to one of the servers in `url` (comma-separated); `BusError` after `connect_timeout_s` or when refused.

    `seed` is the path of the nkey seed file. `inbox_prefix` must lie inside what the key may subscribe to. Each
    reconnect waits a random time of `reconnect_jitter_s` first, so that a thousand agents do not come back in one
    instant.
    """
    urls = [part.strip() for part in url.split(",") if part.strip()]
    for part in urls:
        if urlsplit(part if "://" in part else f"nats://{part}").scheme not in ("nats", "tls"):
            raise BusError(f"{part!r} is no address of a NATS server: expected nats://HOST:PORT or tls://HOST:PORT")
    if not urls:
        raise BusError("no address of a NATS server given: expected nats://HOST:PORT")
    if seed is not None:
        read_public_key(seed)
    check_subject(inbox_prefix)
    wants_tls = tls_ca is not None or tls_cert is not None or any(u.startswith("tls://") for u in urls)
    bus = NatsBus(
        urls,
        name=name,
        inbox_prefix=inbox_prefix,
        seed=seed,
        reconnect_jitter_s=reconnect_jitter_s,
        tls=tls_context(tls_ca, tls_cert, tls_key) if wants_tls else None,
    )
    await bus.open_first(connect_timeout_s)
    return bus
