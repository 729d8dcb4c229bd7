"""Letting in GPU hosts: `join.<node>`, asked with a one-time token, brings the public half of the node's new key.

The server lets a token's key publish on that one subject, so who gets here has the token; whether it may still be used
is decided here, one question at a time: it names this node, has not expired, and was used for no other key. Then the
key is trusted, the server's configuration written anew and reloaded (of several servers that believe signed tokens: the
accounts are pushed to them), and only when the server lets the key in is the host told so, and given what it is let in
with. A host that missed the answer may ask again with the same key.

A token that was used is taken out of the server's configuration, or revoked, some moments later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import structlog

from gpuyard_daemon.audit import AuditLog
from gpuyard_daemon.yard.keys import YardKeys, checked_key
from gpuyard_daemon.yard.operator_mode import node_credential
from gpuyard_daemon.yard.reload import apply_keys
from gpuyard_daemon.yard.server_files import ConfigurationError, Server, read_server
from gpuyard_daemon.yard.tokens import AFTERLIFE_MS, Issued, is_expired
from gpuyard_protocol.bus.base import Bus, BusError, Message, PermissionDenied
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.joining import ALL_JOINS, JoinAnswer, JoinRequest, parse_join
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.queries import QueryError

log = structlog.get_logger("joining")

REQUEST_BYTES_MAX = 4096
#: Questions that wait for the one before them; more are not answered, and the host asks again.
WAITING_MAX = 16
#: The token goes out of the configuration a moment after the server's own patience with it has ended.
CLEAN_UP_S = AFTERLIFE_MS / 1000 + 1.0


class _Refused(Exception):
    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.answer = QueryError(code=code, text=text)


class Joining:
    def __init__(self, bus: Bus, state: Path, yard: str, audit: AuditLog) -> None:
        self._bus = bus
        self._state = state
        self._yard = yard
        self._audit = audit
        self._waiting: asyncio.Queue[Message] = asyncio.Queue(WAITING_MAX)
        self._clean_up_at: float | None = None
        #: One change of the keys at a time.
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        try:
            await self._bus.subscribe(ALL_JOINS, self._on_message, queue="api")
        except PermissionDenied:
            log.warning("joining.unavailable", why="the server's configuration is older than this daemon")

    def _on_message(self, message: Message) -> None:
        if message.reply and not self._waiting.full():
            self._waiting.put_nowait(message)

    async def run(self) -> None:
        """For ever: one question after another, and used tokens cleaned up behind them."""
        loop = asyncio.get_running_loop()
        while True:
            left_s = None if self._clean_up_at is None else max(0.0, self._clean_up_at - loop.time())
            try:
                async with asyncio.timeout(left_s):
                    message = await self._waiting.get()
            except TimeoutError:
                self._clean_up_at = None
                await self._tolerantly(self._apply(self._keys()))
                continue
            await self._tolerantly(self._answer(message))

    async def forget(self, node: NodeId) -> None:
        """Take out a node's key and its token: its connection ends, and it is a stranger. A `BusError` says why not."""
        async with self._changing:
            keys = self._keys()
            keys.tokens.revoke(node)
            keys.remove_node(node)
            try:
                await self._apply(keys)
            except (ConfigurationError, OSError) as error:
                raise BusError(f"its key could not be taken out: {error}") from None

    async def _tolerantly(self, work: Awaitable[object]) -> None:
        try:
            async with self._changing:
                await work
        except (BusError, ConfigurationError, OSError) as error:
            log.warning("joining.trouble", error=str(error))

    async def _answer(self, message: Message) -> None:
        node = parse_join(message.subject)
        if node is None:
            return
        hostname = ""
        answer: JoinAnswer | QueryError
        try:
            request = decode(JoinRequest, message.data, max_bytes=REQUEST_BYTES_MAX)
            hostname = request.hostname
            answer = await self._let_in(node, request)
        except _Refused as refusal:
            answer = refusal.answer
        except Malformed as error:
            answer = QueryError(code="Malformed", text=str(error))
        except (BusError, ConfigurationError, OSError) as error:
            log.error("joining.failed", node=node, error=str(error))
            answer = QueryError(code="Unavailable", text=f"the head cannot let it in: {error}")
        outcome = answer.code if isinstance(answer, QueryError) else "ok"
        log.info("node.joins", node=node, hostname=hostname[:100], outcome=outcome)
        self._audit.acted(f"node {node}", "join", outcome, about=f"node {node}", where=hostname)
        await self._bus.publish(message.reply, encode(answer))

    async def _let_in(self, node: NodeId, request: JoinRequest) -> JoinAnswer:
        keys = self._keys()
        try:
            public_key = checked_key(request.public_key)
        except BusError as error:
            raise _Refused("Malformed", str(error)) from None
        issued = self._usable(keys, node, public_key)
        keys.tokens.use(issued, public_key)
        keys.trust_node(node, public_key)
        server = await self._apply(keys)
        self._clean_up_at = asyncio.get_running_loop().time() + CLEAN_UP_S
        credential = node_credential(keys, node) if server.settings.by_tokens else ""
        return JoinAnswer(node=node, yard=self._yard, credential=credential)

    def _usable(self, keys: YardKeys, node: NodeId, public_key: str) -> Issued:
        issued = keys.tokens.find(node)
        if issued is None:
            raise _Refused("TokenUnknown", f"there is no token for {node}: make one with `gpuyard node token {node}`")
        if issued.used_for and issued.used_for != public_key:
            raise _Refused("TokenUsed", f"the token for {node} was used before: each is good for one key")
        if not issued.used_for and is_expired(issued):
            raise _Refused(
                "TokenExpired", f"the token for {node} has expired: make one with `gpuyard node token {node}`"
            )
        known = keys.public_nodes().get(node)
        if known is not None and known != public_key and not issued.replaces:
            raise _Refused(
                "NodeKnown", f"{node} has a key already: choose another name, or `gpuyard node token {node} --replace`"
            )
        return issued

    async def _apply(self, keys: YardKeys) -> Server:
        server = read_server(self._state)
        if not await apply_keys(server, keys):
            raise BusError("the NATS server cannot be reached to be told of the new key")
        return server

    def _keys(self) -> YardKeys:
        return YardKeys.load_or_create(self._state / "keys")
