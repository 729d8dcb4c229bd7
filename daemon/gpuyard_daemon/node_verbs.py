"""What operators say of nodes: `adm.<user>.declare-dead`, `remove-node`, `cordon` and `uncordon`.

The first two are refused for a node that is not lost: what lives must be drained or stopped, not declared away. The
answer comes when the decision is in the journal. A removed node's key is taken out of the server's configuration too,
where the yard keeps its keys here; it is then a stranger, and joins with a token like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from gpuyard_daemon.core.state.inputs import (
    Input,
    NodeCordonAsked,
    NodeDeclaredDead,
    NodeRemoved,
    NodeUncordonAsked,
)
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.codec import decode
from gpuyard_protocol.names import NodeId, User, nearest
from gpuyard_protocol.queries import CordonRequest, NodeRequest, Ok, QueryError

log = structlog.get_logger("nodes")

REQUEST_BYTES_MAX = 4096
TAKEN_TIMEOUT_S = 10.0


class NodeStates(Protocol):
    """What this file reads of the core."""

    def known_nodes(self) -> tuple[NodeId, ...]: ...
    def node_state(self, node: NodeId) -> str: ...
    def held_on(self, node: NodeId) -> int: ...


class NodeVerbs:
    """`forget_key` takes a node's key away; None: the keys are not kept here."""

    def __init__(
        self,
        core: NodeStates,
        add_fact: Callable[[Input], None],
        *,
        is_settled: Callable[[], bool],
        heard_ms_ago: Callable[[NodeId], int],
        forget_key: Callable[[NodeId], Awaitable[None]] | None,
    ) -> None:
        self._core = core
        self._add_fact = add_fact
        self._is_settled = is_settled
        self._heard_ms_ago = heard_ms_ago
        self._forget_key = forget_key
        #: Those who wait until what they said is in the journal, with the turns that must end before it is.
        self._waiting: list[tuple[asyncio.Future[None], int]] = []
        self.verbs: dict[str, Callable[[User, bytes], Awaitable[object]]] = {
            "declare-dead": self._declare_dead,
            "remove-node": self._remove,
            "cordon": self._cordon,
            "uncordon": self._uncordon,
        }

    def settled(self) -> None:
        """A turn has ended, and is in the journal."""
        waiting, self._waiting = self._waiting, []
        for taken, turns in waiting:
            if turns > 1:
                self._waiting.append((taken, turns - 1))
            elif not taken.done():
                taken.set_result(None)

    async def _declare_dead(self, user: User, data: bytes) -> object:
        node = decode(NodeRequest, data, max_bytes=REQUEST_BYTES_MAX).node
        if (refusal := self._refusal(node, "declared dead")) is not None:
            return refusal
        held = self._core.held_on(node)
        log.warning("node.declared-dead", node=node, by=user, replicas=held)
        await self._take(NodeDeclaredDead(node=node, by=user))
        if self._core.held_on(node):
            return QueryError(code="NotLost", text=f"node {node} came back meanwhile")
        return Ok(f"{node} is dead; {held} replicas there were given up, and their jobs may start elsewhere")

    async def _remove(self, user: User, data: bytes) -> object:
        node = decode(NodeRequest, data, max_bytes=REQUEST_BYTES_MAX).node
        if (refusal := self._refusal(node, "removed")) is not None:
            return refusal
        if held := self._core.held_on(node):
            text = (
                f"{held} replicas may still run on {node}: wait for it, or say that they do not with "
                f"`gpuyard node declare-dead {node}`"
            )
            return QueryError(code="NotEmpty", text=text)
        log.warning("node.removed", node=node, by=user)
        await self._take(NodeRemoved(node=node, by=user))
        if node in self._core.known_nodes():
            return QueryError(code="NotLost", text=f"node {node} came back meanwhile")
        if self._forget_key is None:
            return Ok(f"{node} is out; its key is not kept here: take it out of the server's configuration")
        await self._forget_key(node)
        return Ok(f"{node} is out, and its key with it")

    async def _cordon(self, user: User, data: bytes) -> object:
        asked = decode(CordonRequest, data, max_bytes=REQUEST_BYTES_MAX)
        node = asked.node
        if (refusal := self._unknown(node)) is not None:
            return refusal
        log.info("node.cordoned", node=node, by=user, reason=asked.reason, requeue=asked.requeue)
        await self._take(NodeCordonAsked(node=node, by=user, reason=asked.reason, requeue=asked.requeue))
        held = self._core.held_on(node)
        return Ok(f"{node} takes nothing new; {held} replicas are there")

    async def _uncordon(self, user: User, data: bytes) -> object:
        node = decode(NodeRequest, data, max_bytes=REQUEST_BYTES_MAX).node
        if (refusal := self._unknown(node)) is not None:
            return refusal
        log.info("node.uncordoned", node=node, by=user)
        await self._take(NodeUncordonAsked(node=node, by=user))
        return Ok(f"{node} takes work again")

    def _unknown(self, node: NodeId) -> QueryError | None:
        known = self._core.known_nodes()
        if node in known:
            return None
        return QueryError(code="UnknownNode", text=f"there is no node {node!r}", nearest=nearest(node, known))

    def _refusal(self, node: NodeId, what: str) -> QueryError | None:
        if (refusal := self._unknown(node)) is not None:
            return refusal
        state = self._core.node_state(node)
        if state == "lost":
            return None
        heard_ms = self._heard_ms_ago(node)
        heard = f", and was heard {heard_ms / 1000:.1f} s ago" if heard_ms >= 0 else ""
        text = f"node {node} is {state}{heard}: only a lost node can be {what}"
        return QueryError(code="NotLost", text=text)

    async def _take(self, said: Input) -> None:
        # The turn that takes it in is the next one: a turn under way now ends before it.
        turns = 1 if self._is_settled() else 2
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((taken, turns))
        self._add_fact(said)
        try:
            async with asyncio.timeout(TAKEN_TIMEOUT_S):
                await taken
        except TimeoutError:
            raise BusError("the journal does not take it now; ask again, or look with `gpuyard nodes`") from None
