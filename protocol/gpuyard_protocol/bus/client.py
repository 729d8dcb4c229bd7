"""One connection to a NATS server, from its handshake to its end; it never comes back to life.

nats-py does the handshake (INFO, TLS, nkey signature, CONNECT). What follows is ours, because what nats-py 2.16 does
there breaks promises:

- its read loop ends without a word on an exception while one message is parsed, and the client goes on saying it is
  connected: one message with a subject that is not UTF-8 deafens the receiver;
- its flusher buffers publishes while disconnected and sends them after a reconnect, and swallows cancellation;
- its reconnects leave calls waiting out their timeouts, and some server errors close it for good.

So this class dies at once and says so once (`lost`); `gpuyard_protocol.bus.nats` builds the next one. Messages go
straight from the read loop to a plain function per subscription: no queue, no task, no copy. It knows nothing of
requests, streams or permissions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from typing import Any

from nats import errors
from nats.aio.client import Client

from gpuyard_protocol.bus.base import BusError, Disconnected
from gpuyard_protocol.bus.credentials import has_token
from gpuyard_protocol.bus.wire import PING, PONG, MalformedMessage, ProtocolViolation, WireParser

#: What takes the messages of one subscription: subject, reply, data, header block.
Route = Callable[[bytes, bytes, bytes, bytes | None], None]

READ_BYTES = 256 * 1024
#: Unsent bytes at which a sender waits for the socket instead of piling up more.
HIGH_WATER_BYTES = 256 * 1024
#: The read loop and the server are asked for a sign of life this often …
WATCHDOG_INTERVAL_S = 5.0
#: … and have this long to give it; missing it twice ends the connection.
WATCHDOG_TIMEOUT_S = 2.0
WATCHDOG_MISSES = 2


class Connection(Client):
    """A live connection. `routes` is shared with its owner and looked up for every message."""

    def __init__(
        self,
        routes: dict[int, Route],
        *,
        on_error_line: Callable[[str], None],
        on_fault: Callable[[int, Exception], None],
        on_lost: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._routes = routes
        self._on_error_line = on_error_line
        self._on_fault = on_fault
        self._on_lost = on_lost
        self._parser = WireParser(self)
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.StreamWriter | None = None
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._awaited_pongs: list[asyncio.Future[None]] = []
        #: Called once each after the chunk of input being read has been handed out.
        self._after_chunk: list[Callable[[], None]] = []
        self._reading = False
        self._last_error_line = ""
        self.is_live = False
        #: Resolves with the reason when the connection has ended.
        self.lost: asyncio.Future[str] = self._loop.create_future()

    # -- life ------------------------------------------------------------------------------------------------

    async def open(
        self,
        url: str,
        *,
        name: str,
        seed: str | None,
        tls: ssl.SSLContext | None,
        timeout_s: float,
    ) -> None:
        """Connect and log in, once; raises OSError, TimeoutError or an error of nats-py."""
        by_token = seed is not None and has_token(seed)
        try:
            async with asyncio.timeout(timeout_s):
                await self.connect(
                    servers=[url],
                    name=name,
                    nkeys_seed=None if by_token else seed,
                    user_credentials=seed if by_token else None,
                    tls=tls,
                    allow_reconnect=False,
                    connect_timeout=max(1, int(timeout_s)),
                    error_cb=_ignore,
                )
            if not self.is_connected:
                raise errors.Error("nats: the server did not confirm the login")
        except BaseException:
            self._discard()
            await self.gone()
            raise
        self._writer = self._socket_writer()
        self.is_live = not self.lost.done()

    def lose(self, reason: str) -> None:
        """End the connection now; nothing unsent is sent any more."""
        if self.lost.done():
            return
        self.is_live = False
        self.lost.set_result(self._last_error_line or reason)
        self._discard()
        self._on_lost(self.lost.result())

    async def shut(self) -> None:
        """End the connection in an orderly way: what was sent is handed to the server first."""
        if self.is_live and self._writer is not None:
            self._flush_outgoing()
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.ping()
        self.lose("closed by this side")
        await self.gone()

    async def gone(self) -> None:
        """Return when an ended connection has let go of its socket and its tasks."""
        tasks = [self._reading_task, self._ping_interval_task, self._flusher_task]
        current = asyncio.current_task()
        await asyncio.gather(
            *(task for task in tasks if task is not None and task is not current), return_exceptions=True
        )
        if self._writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._writer.wait_closed()

    def _socket_writer(self) -> asyncio.StreamWriter | None:
        """TcpTransport's writer (after TLS, if there is TLS); there is no public way to it."""
        return getattr(self._transport, "_io_writer", None)

    def _discard(self) -> None:
        self._status = Client.CLOSED
        self._outgoing.clear()
        self._outgoing_bytes = 0
        current = asyncio.current_task()
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None and task is not current:
                task.cancel()
        self._writer = self._socket_writer()
        if self._writer is not None:
            self._writer.transport.abort()
        gone = Disconnected("the connection ended before the server answered")
        for pong in self._awaited_pongs:
            if not pong.done():
                pong.set_exception(gone)
                pong.exception()  # whoever waits gets it; nobody else needs a log line
        self._awaited_pongs.clear()

    # -- what nats-py calls, replaced ------------------------------------------------------------------------

    async def _select_next_server(self) -> None:
        """One attempt; nats-py's own loops over refused connections for two minutes."""
        self._current_server = self._server_pool[0]
        await self._connect_to_server(self._current_server)

    async def _read_loop(self) -> None:
        transport = self._transport
        if transport is None:
            return
        reason = "the server closed the connection"
        try:
            while data := await transport.read(READ_BYTES):
                self._reading = True
                self._parser.feed(data)
                self._run_after_chunk()
                self._reading = False
        except (OSError, ProtocolViolation) as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            # Also when this loop ends by a fault nobody thought of: a connection without a reader must not look alive.
            self._reading = False
            self.lose(reason)

    def _run_after_chunk(self) -> None:
        while self._after_chunk:
            calls, self._after_chunk = self._after_chunk, []
            for call in calls:
                call()

    async def _ping_interval(self) -> None:
        """The watchdog: the server and our read loop answer, or the connection is given up."""
        misses = 0
        while True:
            await asyncio.sleep(WATCHDOG_INTERVAL_S)
            try:
                async with asyncio.timeout(WATCHDOG_TIMEOUT_S):
                    await self.ping()
                misses = 0
            except TimeoutError:
                misses += 1
                if misses >= WATCHDOG_MISSES:
                    self.lose(f"the server did not answer {misses} pings")
                    return
            except BusError:
                return

    async def _flusher(self) -> None:
        """Nothing to do: `send` writes."""

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, command: bytes) -> None:
        """Queue one command; everything queued in one turn of the loop leaves in one write."""
        if not self._outgoing:
            self._loop.call_soon(self._flush_outgoing)
        self._outgoing.append(command)
        self._outgoing_bytes += len(command)

    async def relieve(self) -> None:
        """Wait while the socket is behind; also lets the loop run when somebody publishes in a tight loop."""
        if self._outgoing_bytes < HIGH_WATER_BYTES or self._writer is None:
            return
        self._flush_outgoing()
        try:
            await self._writer.drain()
        except OSError as error:
            raise Disconnected(f"the connection was lost while sending: {error}") from error
        await asyncio.sleep(0)

    @property
    def version_of_server(self) -> str:
        return str(self._server_info.get("version", ""))

    @property
    def is_behind(self) -> bool:
        return self._outgoing_bytes >= HIGH_WATER_BYTES

    def _flush_outgoing(self) -> None:
        if not self._outgoing:
            return
        if self._writer is not None and not self.lost.done():
            self._writer.write(self._outgoing[0] if len(self._outgoing) == 1 else b"".join(self._outgoing))
        self._outgoing.clear()
        self._outgoing_bytes = 0

    def ping(self) -> asyncio.Future[None]:
        """Resolves when the server has taken everything sent before; `Disconnected` if the connection ends first."""
        pong: asyncio.Future[None] = self._loop.create_future()
        if self.lost.done():
            pong.set_exception(Disconnected("there is no connection"))
            return pong
        self._awaited_pongs.append(pong)
        self.send(PING)
        return pong

    # -- the parser's sink -----------------------------------------------------------------------------------

    def on_message(self, sid: int, subject: bytes, reply: bytes, data: bytes, header_block: bytes | None) -> None:
        route = self._routes.get(sid)
        if route is None:
            return
        try:
            route(subject, reply, data, header_block)
        except MalformedMessage as error:
            self._on_fault(sid, error)
        except Exception as error:  # noqa: BLE001  a faulty handler must not end everybody's connection
            self._on_fault(sid, error)

    def after_chunk(self, call: Callable[[], None]) -> None:
        """Have `call` called once what was received together has been handed out; soon, if nothing is being read."""
        self._after_chunk.append(call)
        if not self._reading:
            self._loop.call_soon(self._run_after_chunk)

    def on_error_line(self, text: str) -> None:
        if "permissions violation" not in text.lower():
            # After any other error the server hangs up; the text is the reason to tell.
            self._last_error_line = f"the server said '{text}'"
        self._on_error_line(text)

    def on_ping(self) -> None:
        self.send(PONG)

    def on_pong(self) -> None:
        if self._awaited_pongs:
            pong = self._awaited_pongs.pop(0)
            if not pong.done():
                pong.set_result(None)

    def on_info(self, line: bytes) -> None:
        try:
            info: dict[str, Any] = json.loads(line)
            self._max_payload = int(info.get("max_payload", self._max_payload))
        except (ValueError, AttributeError, TypeError) as error:
            raise ProtocolViolation(f"unreadable INFO line: {error}") from error


async def _ignore(_: Exception) -> None:
    """nats-py reports each error twice; we take the one it raises."""
