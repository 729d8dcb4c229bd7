"""What those who run a yard may ask of its daemon, on `adm.<operator>.<verb>`.

An operator speaks in the scheduler's own account with a key of its own, so a tenant's connection cannot do any of
this whatever it sends. `gpuyard up` is the first to use it, to stop the yard in order.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self, TypeVar

from gpuyard.context import Context
from gpuyard.errors import GpuyardError
from gpuyard.link import ATTEMPT_TIMEOUT_S, Connector, ask, connect_as_operator
from gpuyard_protocol import subjects
from gpuyard_protocol.audit import AuditPage, AuditQuery
from gpuyard_protocol.bus.base import Bus
from gpuyard_protocol.queries import (
    CordonRequest,
    HandOverRequest,
    NodeRequest,
    NodesPage,
    NodesQuery,
    NodeView,
    Ok,
    Stats,
    StatsQuery,
    TenantUsage,
    UsageQuery,
    UsageReport,
)

T = TypeVar("T")

#: What an answer may take beyond the time that was asked for.
ANSWER_MARGIN_S = 5.0


class Operator:
    """A connection to a yard as one of its operators."""

    def __init__(self, context: Context, *, connector: Connector = connect_as_operator) -> None:
        self._context = context
        self._connector = connector
        self._bus: Bus | None = None

    async def __aenter__(self) -> Self:
        self._bus = await self._connector(self._context)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bus is not None:
            await self._bus.close()

    async def nodes(self, *, timeout_s: float = 5.0) -> tuple[NodeView, ...]:
        return (await self._ask("nodes", NodesQuery(), NodesPage, timeout_s)).nodes

    async def stats(self, *, timeout_s: float = 5.0) -> Stats:
        return await self._ask("stats", StatsQuery(), Stats, timeout_s)

    async def usage(self, tenant: str = "", *, timeout_s: float = 5.0) -> tuple[TenantUsage, ...]:
        """What each tenant holds, has used, and may have."""
        return (await self._ask("usage", UsageQuery(tenant=tenant), UsageReport, timeout_s)).tenants

    async def audit(self, *, limit: int = 100, cursor: int = 0, timeout_s: float = 15.0) -> AuditPage:
        """Who did what, newest first; `cursor` is the `next` of the page before."""
        return await self._ask("audit", AuditQuery(limit=limit, cursor=cursor), AuditPage, timeout_s)

    async def say_of_node(self, verb: str, node: str, *, timeout_s: float = 20.0) -> str:
        """`declare-dead` or `remove-node`; what came of it, in words."""
        return (await self._ask(verb, NodeRequest(node=node), Ok, timeout_s, timeout_s)).text

    async def cordon(self, node: str, *, reason: str = "", requeue: bool = False, timeout_s: float = 20.0) -> str:
        """Keep new work away from a node; what came of it, in words. `requeue`: and jobs that may go leave it."""
        request = CordonRequest(node=node, reason=reason, requeue=requeue)
        return (await self._ask("cordon", request, Ok, timeout_s, timeout_s)).text

    async def uncordon(self, node: str, *, timeout_s: float = 20.0) -> str:
        """Let work go to a node again."""
        return (await self._ask("uncordon", NodeRequest(node=node), Ok, timeout_s, timeout_s)).text

    async def shutdown(self, *, deadline_s: float) -> Ok:
        """End every replica with grace and put its job back in the queue, uncharged; nothing is started any more.

        Returns when nothing runs. `QueryFailed` names what still does after the deadline.
        """
        timeout_s = deadline_s + ANSWER_MARGIN_S
        return await self._ask("shutdown", {"deadline_ms": int(deadline_s * 1000)}, Ok, timeout_s, timeout_s)

    async def hand_over(self, *, timeout_s: float = 20.0) -> Ok:
        """Let a standby daemon lead; the answer says which. Asked once: asking again would hand it back."""
        return await self._ask("handover", HandOverRequest(), Ok, timeout_s, timeout_s)

    async def _ask(
        self,
        verb: str,
        query: object,
        kind: type[T],
        timeout_s: float,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
    ) -> T:
        if self._bus is None:
            raise GpuyardError("the connection is not open: use `async with Operator(context)`")
        subject = subjects.operation(self._context.operator, verb)
        return await ask(self._bus, subject, query, kind, timeout_s=timeout_s, attempt_timeout_s=attempt_timeout_s)
