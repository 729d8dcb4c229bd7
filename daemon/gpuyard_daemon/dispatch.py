"""Orders to nodes: numbered, in order, confirmed; or else the whole desired set again.

Each node has a channel of its own, so that a slow or silent one delays nobody. A channel sends one message at a time
and waits for the agent's word that it is durable; orders that come meanwhile leave together in the next. Whenever it
is not certain what the node has, a `Sync` follows, which supersedes every order up to its number: at the start, after
a reconnect, for a new agent process, after a gap, a refusal or a missing answer.

Write-ahead: orders reach this file only after their record is durable, and a `Sync` is built only while nothing is
decided that the journal does not have yet (`is_settled`).

A daemon that was suspended or cut off may have been deposed meanwhile: unless the server has lately checked our claim,
it is asked before anything is said (`may_command`).

Bounds: `PENDING_MAX` orders wait in a channel; more are dropped for a `Sync`, which says the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import msgspec
import structlog

from gpuyard_daemon.core.state.turn import NodeOrders
from gpuyard_daemon.syncs import sync_messages
from gpuyard_protocol.bus.base import Bus, BusError, Disconnected, NoResponders
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.nodes import Desired, Order, OrderAnswer, Start
from gpuyard_protocol.subjects import commands

log = structlog.get_logger("dispatch")

ANSWER_TIMEOUT_S = 5.0
#: Pause before a node is spoken to again that did not take what it was sent.
RETRY_S = 1.0
#: … or sent back something that no repetition will change soon.
LONG_RETRY_S = 10.0
PENDING_MAX = 2000
#: Of one message; the server takes 8 MB.
BATCH_ORDERS_MAX = 200
BATCH_BYTES_MAX = 2 * 1024 * 1024
#: Nodes that are sent their desired set at the same time.
SYNCS_AT_ONCE = 32


class DesiredSets(Protocol):
    """What this file reads of the core."""

    def desired(self, node: NodeId) -> tuple[int, tuple[Desired, ...]]: ...
    def known_nodes(self) -> tuple[NodeId, ...]: ...
    def node_instance(self, node: NodeId) -> str: ...


class _Batch(msgspec.Struct, frozen=True, tag="orders", kw_only=True):
    """`gpuyard_protocol.nodes.OrderBatch` with orders that are encoded already, so that their size is known."""

    node: NodeId
    instance: str
    epoch: int
    first: int
    orders: tuple[msgspec.Raw, ...]
    v: int = 1
    clock_ms: int = 0


class Channel:
    """What is to be said to one node."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        #: Of the agent process that the orders are for; "" while none has joined.
        self.instance = ""
        self.pending: deque[bytes] = deque()
        #: Number of `pending[0]`, or of the next order to come.
        self.first = 1
        #: Number up to which the agent said its ledger has everything.
        self.confirmed = 0
        #: What the node has is not certain: send the desired set before anything else.
        self.wants_sync = True
        self.is_busy = False
        #: Not to be spoken to before this (loop time).
        self.not_before = 0.0
        #: Heartbeats in a row that showed less than was confirmed.
        self.regressions = 0


class Dispatcher:
    def __init__(
        self,
        bus: Bus,
        core: DesiredSets,
        epoch: int,
        *,
        is_settled: Callable[[], bool],
        on_stale: Callable[[NodeId, str], None],
        may_command: Callable[[], Awaitable[bool]] | None = None,
        clock_of: Callable[[NodeId], tuple[str, int]] | None = None,
        on_starts: Callable[[NodeId, list[Start]], None] | None = None,
    ) -> None:
        self._bus = bus
        self._core = core
        self._epoch = epoch
        self._is_settled = is_settled
        #: Called when a node has taken orders of a newer leader.
        self._on_stale = on_stale
        #: Whether we lead for certain; None: nobody else can.
        self._may_command = may_command
        #: The agent process heard last for a node, and its clock then: orders renew leases (`leases`). None: nobody
        #: listens.
        self._clock_of = clock_of
        #: Told what a node is to start, beside the orders themselves.
        self._on_starts = on_starts
        self._channels: dict[NodeId, Channel] = {}
        #: Channels that want to send a `Sync` and wait for the journal.
        self._unsettled: set[NodeId] = set()
        self._sync_places = asyncio.Semaphore(SYNCS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopped = False
        self.batches_sent = 0
        self.orders_sent = 0
        self.syncs_sent = 0
        self.failures = 0
        bus.on_reconnect(self.sync_all)

    # -- what happened ------------------------------------------------------------------------------------------------

    def sync_all(self) -> None:
        """Nothing is certain any more: every node gets its desired set."""
        for node in self._core.known_nodes():
            channel = self._channel(node)
            channel.wants_sync = True
            channel.not_before = 0.0
            self._pump(channel)

    def settled(self, orders: Iterable[NodeOrders]) -> None:
        """A record became durable: send its orders, and the desired sets that waited for it."""
        for batch in orders:
            channel = self._channel(batch.node)
            _queue(channel, batch.first, batch.orders)
            if self._on_starts is not None:
                self._on_starts(batch.node, [order for order in batch.orders if isinstance(order, Start)])
            self._pump(channel)
        if self._unsettled:
            waiting, self._unsettled = self._unsettled, set()
            for node in sorted(waiting):
                self._pump(self._channel(node))

    def node_joined(self, node: NodeId, instance: str) -> None:
        """An agent process reported in (durably)."""
        channel = self._channel(node)
        if channel.instance != instance:
            channel.instance = instance
            channel.wants_sync = True
            channel.confirmed = channel.regressions = 0
        if channel.wants_sync:
            channel.not_before = 0.0
            self._pump(channel)

    def heard(self, node: NodeId, instance: str, applied: int) -> None:
        """A heartbeat: the node lives, and its ledger is at `applied`."""
        channel = self._channels.get(node)
        if channel is None or instance != channel.instance:
            return
        if applied < channel.confirmed:
            # One heartbeat may have been written before the last order was; two in a row were not.
            channel.regressions += 1
            if channel.regressions >= 2:
                log.warning("node.ledger-behind", node=node, applied=applied, confirmed=channel.confirmed)
                channel.wants_sync = True
                channel.confirmed = applied
                channel.regressions = 0
        else:
            channel.regressions = 0
        if channel.wants_sync or channel.pending:
            self._pump(channel)

    def forget_removed(self) -> None:
        """Nodes that the yard no longer knows; to be called now and then."""
        for node in self._channels.keys() - set(self._core.known_nodes()):
            if not self._channels[node].is_busy:
                del self._channels[node]

    def stop(self) -> None:
        """Send nothing more."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()

    @property
    def unconfirmed(self) -> int:
        """Nodes whose desired set is not known to be theirs."""
        return sum(1 for channel in self._channels.values() if channel.wants_sync and channel.instance)

    # -- one channel --------------------------------------------------------------------------------------------------

    def _channel(self, node: NodeId) -> Channel:
        channel = self._channels.get(node)
        if channel is None:
            channel = self._channels[node] = Channel(node)
            channel.instance = self._core.node_instance(node)
        return channel

    def _pump(self, channel: Channel) -> None:
        if channel.is_busy or self._is_stopped or not channel.instance or not self._bus.is_connected:
            return
        if not channel.wants_sync and not channel.pending:
            return
        loop = asyncio.get_running_loop()
        if channel.not_before > loop.time():
            return
        channel.is_busy = True
        task = loop.create_task(self._talk(channel), name=f"orders for {channel.node}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _talk(self, channel: Channel) -> None:
        """Send until there is nothing left to say, or until the node does not take it."""
        try:
            goes_on = True
            while goes_on and not self._is_stopped:
                if self._may_command is not None and not await self._may_command():
                    # The next heartbeat of the node asks again, if we are still there then.
                    goes_on = False
                elif channel.wants_sync:
                    goes_on = await self._send_sync(channel)
                elif channel.pending:
                    goes_on = await self._send_batch(channel)
                else:
                    goes_on = False
        finally:
            channel.is_busy = False

    async def _send_sync(self, channel: Channel) -> bool:
        async with self._sync_places:
            if not self._is_settled():
                self._unsettled.add(channel.node)
                return False
            number, desired = self._core.desired(channel.node)
            if self._is_unheard(channel) and any(entry.start.launch.lease_ms for entry in desired):
                # It could not start what is under a lease: its first heartbeat brings its clock, and this back.
                return False
            if self._on_starts is not None:
                self._on_starts(channel.node, [entry.start for entry in desired if entry.stop is None])
            channel.pending.clear()
            channel.first = number + 1
            channel.wants_sync = False
            self.syncs_sent += 1
            messages = sync_messages(
                channel.node,
                channel.instance,
                self._epoch,
                number,
                desired,
                self._clock_ms(channel),
                serial=self.syncs_sent,
            )
            log.info("node.sync", node=channel.node, n=number, desired=len(desired), messages=len(messages))
            for message in messages:
                if not await self._exchange(channel, message):
                    return False
                if channel.wants_sync:
                    break
            return True

    async def _send_batch(self, channel: Channel) -> bool:
        first, size = channel.first, 0
        orders: list[msgspec.Raw] = []
        while channel.pending and len(orders) < BATCH_ORDERS_MAX and size < BATCH_BYTES_MAX:
            order = channel.pending.popleft()
            orders.append(msgspec.Raw(order))
            size += len(order)
        channel.first += len(orders)
        self.batches_sent += 1
        self.orders_sent += len(orders)
        batch = _Batch(
            node=channel.node,
            instance=channel.instance,
            epoch=self._epoch,
            first=first,
            orders=tuple(orders),
            clock_ms=self._clock_ms(channel),
        )
        return await self._exchange(channel, msgspec.json.encode(batch))

    def _is_unheard(self, channel: Channel) -> bool:
        """This process has had no heartbeat of that agent yet."""
        return self._clock_of is not None and self._clock_of(channel.node)[0] != channel.instance

    def _clock_ms(self, channel: Channel) -> int:
        if self._clock_of is None or self._is_unheard(channel):
            return 0
        return self._clock_of(channel.node)[1]

    async def _exchange(self, channel: Channel, data: bytes) -> bool:
        """One message and its answer; whether the channel may go on at once."""
        instance = channel.instance
        try:
            reply = await self._bus.request(commands(channel.node), data, timeout=ANSWER_TIMEOUT_S)
            answer = decode(OrderAnswer, reply.data)
        except (BusError, Malformed) as error:
            if instance == channel.instance:
                self._failed(channel, error)
                return False
            return True
        if instance != channel.instance:
            # Another process of that node reported in meanwhile; this answer is the old one's.
            return True
        return self._answered(channel, answer)

    def _failed(self, channel: Channel, error: Exception) -> None:
        self.failures += 1
        channel.wants_sync = True
        if isinstance(error, Disconnected | NoResponders):
            # Nothing was sent, and its next heartbeat says that it is there.
            return
        channel.not_before = asyncio.get_running_loop().time() + RETRY_S
        log.warning("orders.unconfirmed", node=channel.node, error=str(error))

    def _answered(self, channel: Channel, answer: OrderAnswer) -> bool:
        if answer.status == "ok":
            channel.confirmed = max(channel.confirmed, answer.applied)
            return True
        self.failures += 1
        channel.wants_sync = True
        log.warning("orders.refused", node=channel.node, status=answer.status, detail=answer.detail)
        if answer.status == "gap":
            return True
        channel.not_before = asyncio.get_running_loop().time() + (
            RETRY_S if answer.status == "wrong-instance" else LONG_RETRY_S
        )
        if answer.status == "stale":
            self._on_stale(channel.node, answer.detail)
        return False


def _queue(channel: Channel, first: int, orders: tuple[Order, ...]) -> None:
    """Append orders to a channel; where that is impossible, or there is a number missing, it wants a `Sync`."""
    if channel.wants_sync:
        return
    if first != channel.first + len(channel.pending) or len(channel.pending) + len(orders) > PENDING_MAX:
        channel.wants_sync = True
        channel.pending.clear()
        return
    channel.pending.extend(encode(order) for order in orders)
