"""What comes in on `cmd.<node>`: orders to the core, questions about output to the files.

Only the daemon may command a node. Between accounts the server puts replies under `_R_.`, a prefix that no client can
forge: a message whose reply does not begin so did not come through the scheduler's import, whatever it claims, and is
dropped. (A server without accounts offers no such mark, and protects nobody.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import structlog

from gpuyard_agent.core.events import OrdersReceived, RenewalReceived, SyncReceived
from gpuyard_agent.inbox import Inbox
from gpuyard_agent.logs import Followers, LogStore
from gpuyard_agent.metrics import Metrics
from gpuyard_agent.sync_parts import OutOfOrder, SyncParts
from gpuyard_agent.uploads import Uploads
from gpuyard_protocol.bus.base import Bus, BusError, Message
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.nodes import (
    Command,
    FollowLog,
    Go,
    OrderAnswer,
    OrderBatch,
    ReadLog,
    Renew,
    Start,
    Sync,
    SyncPart,
    TakeUpload,
)
from gpuyard_protocol.uploads import UploadHeld

#: A `Sync` states the whole desired set of a node.
COMMAND_BYTES_MAX = 8 * 1024 * 1024
#: Commands that wait for the core's answer.
WAITING_MAX = 256
_FORWARDED = "_R_."
_COMMAND = cast("type[Command]", Command)

_log = structlog.get_logger("gpuyard_agent.commands")

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class CommandDoor:
    """`on_message` is the subscription's handler; `answer` sends what the core decided."""

    def __init__(
        self,
        bus: Bus,
        inbox: Inbox,
        store: LogStore,
        followers: Followers,
        metrics: Metrics,
        spawn: Spawn,
        uploads: Uploads,
        *,
        must_be_forwarded: bool,
    ) -> None:
        self._bus = bus
        self._inbox = inbox
        self._store = store
        self._followers = followers
        self._metrics = metrics
        self._spawn = spawn
        self._uploads = uploads
        self._must_be_forwarded = must_be_forwarded
        self._parts = SyncParts()
        self._requests = 0
        #: Where the answer to each request that the core has goes.
        self._replies: dict[int, str] = {}

    def on_message(self, message: Message) -> None:
        if not message.reply or (self._must_be_forwarded and not message.reply.startswith(_FORWARDED)):
            self._metrics.orders.labels("forged").inc()
            _log.warning("command dropped", subject=message.subject, why="not forwarded from the scheduler's account")
            return
        try:
            command = decode(_COMMAND, message.data, max_bytes=COMMAND_BYTES_MAX)
        except Malformed as error:
            self._metrics.orders.labels("malformed").inc()
            _log.warning("command malformed", why=str(error))
            self._reply(message.reply, OrderAnswer(status="malformed", detail=str(error)))
            return
        match command:
            case OrderBatch():
                if self._is_full(message):
                    return
                for order in command.orders:
                    if isinstance(order, Start | Go):
                        self._metrics.ordered(order.key)
                self._inbox.put(OrdersReceived(self._request(message), command))
            case Sync() if not self._is_full(message):
                self._inbox.put(SyncReceived(self._request(message), command))
            case Renew() if not self._is_full(message):
                self._inbox.put(RenewalReceived(self._request(message), command))
            case SyncPart():
                self._take_part(message, command)
            case ReadLog():
                self._spawn(self._read_log(message.reply, command))
            case TakeUpload():
                self._spawn(self._take_upload(message.reply, command))
            case FollowLog():
                self._reply(message.reply, self._followers.follow(command))

    def _take_part(self, message: Message, part: SyncPart) -> None:
        try:
            whole = self._parts.take(part)
        except OutOfOrder as error:
            self._reply(message.reply, OrderAnswer(status="gap", detail=str(error)))
            return
        if whole is None:
            # Kept, and not acted on.
            self._reply(message.reply, OrderAnswer(status="ok"))
        elif not self._is_full(message):
            self._inbox.put(SyncReceived(self._request(message), whole))

    def _is_full(self, message: Message) -> bool:
        """So much waits for the core that nothing more is taken: unanswered, it is sent again as a `Sync`. One leader
        has one command under way, so this is not met by anything that keeps to the protocol.
        """
        if len(self._replies) < WAITING_MAX:
            return False
        self._metrics.orders.labels("dropped").inc()
        _log.warning("command dropped", subject=message.subject, why=f"{WAITING_MAX} commands wait")
        return True

    def answer(self, request: int, answer: OrderAnswer) -> None:
        self._metrics.orders.labels(answer.status).inc()
        if answer.status != "ok":
            _log.warning("orders refused", status=answer.status, applied=answer.applied, why=answer.detail)
        if (reply := self._replies.pop(request, None)) is not None:
            self._reply(reply, answer)

    def _request(self, message: Message) -> int:
        self._requests += 1
        self._replies[self._requests] = message.reply
        return self._requests

    async def _read_log(self, reply: str, request: ReadLog) -> None:
        await self._publish(reply, encode(await asyncio.to_thread(self._store.read, request)))

    async def _take_upload(self, reply: str, piece: TakeUpload) -> None:
        try:
            held = await self._uploads.take(piece)
        except OSError as error:
            held = UploadHeld(upload=piece.upload, error=f"the node cannot keep it: {error.strerror}")
        await self._publish(reply, encode(held))

    def _reply(self, reply: str, answer: object) -> None:
        self._spawn(self._publish(reply, encode(answer)))

    async def _publish(self, reply: str, data: bytes) -> None:
        try:
            await self._bus.publish(reply, data)
        except BusError as error:
            # The asker hears nothing and asks again; orders are recognised by their numbers.
            _log.warning("answer not sent", why=str(error))
