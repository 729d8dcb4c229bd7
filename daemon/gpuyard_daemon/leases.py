"""Leases are renewed: nodes that were heard are told so, in their own time.

A replica under a lease ends by itself when its node has heard nothing of the yard for so long. What renews it is the
node's own clock, sent back (`Renew`): however late the message arrives, the lease counts from before it was granted.

Nothing is renewed by a daemon that does not lead for certain, nor for a node whose loss the journal knows: so the
core, which waits from that record on, waits long enough whatever was under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import structlog

from gpuyard_protocol.bus.base import Bus, BusError, Disconnected, NoResponders
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.nodes import OrderAnswer, Renew
from gpuyard_protocol.subjects import commands

log = structlog.get_logger("leases")

TICK_S = 1.0
ANSWER_TIMEOUT_S = 2.0
#: Renewals that a lease gets in its time, so that one or two may be lost; and the longest pause between two.
RENEWALS = 6
PAUSE_MAX_S = 30.0
#: States of a node in which its replicas may run on.
_HELD_STATES = ("ready", "suspected", "joining", "incompatible")


class LeasedNodes(Protocol):
    """What this file reads of the core."""

    def leased_nodes(self) -> tuple[NodeId, ...]: ...
    def leased(self, node: NodeId) -> Collection[int]: ...
    def node_state(self, node: NodeId) -> str: ...
    def node_instance(self, node: NodeId) -> str: ...


class Leases:
    """`clock_of`: the agent process heard last for a node, and its node's clock in that heartbeat."""

    def __init__(
        self,
        bus: Bus,
        core: LeasedNodes,
        epoch: int,
        *,
        clock_of: Callable[[NodeId], tuple[str, int]],
        is_settled: Callable[[], bool],
        is_ours: Callable[[], Awaitable[bool]],
    ) -> None:
        self._bus = bus
        self._core = core
        self._epoch = epoch
        self._clock_of = clock_of
        self._is_settled = is_settled
        self._is_ours = is_ours
        #: By node: the clock that was sent back last, and when (loop time).
        self._sent: dict[NodeId, tuple[int, float]] = {}
        #: Questions under way, in their order.
        self._asked: dict[asyncio.Task[None], None] = {}
        self.renewed = 0
        #: Renewals that the node did not confirm.
        self.unconfirmed = 0

    async def tick(self) -> None:
        """Renew what is due; to be called every `TICK_S`."""
        nodes = self._core.leased_nodes()
        for gone in self._sent.keys() - set(nodes):
            del self._sent[gone]
        # While a turn is under way the core may show what the journal does not have yet.
        if not nodes or not self._bus.is_connected or not self._is_settled():
            return
        due = [(node, *self._clock_of(node)) for node in nodes if self._is_due(node)]
        if not due or not await self._is_ours() or not self._is_settled():
            return
        now = asyncio.get_running_loop().time()
        for node, instance, clock_ms in due:
            if self._core.node_state(node) in _HELD_STATES and self._core.node_instance(node) == instance:
                self._sent[node] = (clock_ms, now)
                self._send(Renew(node=node, instance=instance, epoch=self._epoch, clock_ms=clock_ms))

    def _is_due(self, node: NodeId) -> bool:
        instance, clock_ms = self._clock_of(node)
        sent_ms, sent_at = self._sent.get(node, (0, float("-inf")))
        if not clock_ms or clock_ms == sent_ms or instance != self._core.node_instance(node):
            return False
        pause_s = min(PAUSE_MAX_S, min(self._core.leased(node)) / 1000 / RENEWALS)
        return asyncio.get_running_loop().time() - sent_at >= pause_s

    def _send(self, renewal: Renew) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(renewal))
        self._asked[task] = None
        task.add_done_callback(self._asked.pop)

    async def _ask(self, renewal: Renew) -> None:
        try:
            reply = await self._bus.request(commands(renewal.node), encode(renewal), timeout=ANSWER_TIMEOUT_S)
            status = decode(OrderAnswer, reply.data).status
        except (Disconnected, NoResponders):
            self.unconfirmed += 1
            return
        except (BusError, Malformed) as error:
            self.unconfirmed += 1
            log.warning("lease.unconfirmed", node=renewal.node, error=str(error))
            return
        if status == "ok":
            self.renewed += 1
        else:
            self.unconfirmed += 1
            log.warning("lease.refused", node=renewal.node, status=status)

    def close(self) -> None:
        for task in list(self._asked):
            task.cancel()
