"""`gpuyard cordon`, `drain`, `uncordon`: nodes that are to be left alone, for operators.

A drain waits until nothing is on the node any more and says what it waits for. Ctrl-C ends the waiting and nothing
else: the node stays cordoned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.nodes import is_used
from gpuyard.cli.output import remark, say
from gpuyard.cli.session import session_of
from gpuyard.cli.values import length_s
from gpuyard.errors import GpuyardError

if TYPE_CHECKING:
    from gpuyard.operator import Operator
    from gpuyard_protocol.queries import NodeView

LOOK_EVERY_S = 1.0

_Nodes = Annotated[list[str], typer.Argument(metavar="NODE...", help="As `gpuyard nodes` lists them.")]
_Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="For everybody who looks.")]
_REQUEUE = typer.Option("--requeue", help="Stop jobs there that may be preempted; they wait again, uncharged.")
_NO_WAIT = typer.Option("--no-wait", help="Do not wait until the nodes are empty.")
_TIMEOUT = typer.Option(
    "--timeout",
    metavar="TIME",
    parser=length_s,
    help="Wait so long at most: 90s, 5m (default: as long as it takes).",
)


def register(app: typer.Typer) -> None:
    app.command("cordon")(cordon)
    app.command("drain")(drain)
    app.command("uncordon")(uncordon)


def cordon(ctx: typer.Context, nodes: _Nodes, reason: _Reason = "") -> None:
    """Keep new work away from nodes; what runs there goes on (operators)."""

    async def work(operator: Operator) -> None:
        for node in nodes:
            say(await operator.cordon(node, reason=reason))

    _as_operator(ctx, work)


def uncordon(ctx: typer.Context, nodes: _Nodes) -> None:
    """Let work go to nodes again (operators)."""

    async def work(operator: Operator) -> None:
        for node in nodes:
            say(await operator.uncordon(node))

    _as_operator(ctx, work)


def drain(
    ctx: typer.Context,
    nodes: _Nodes,
    reason: _Reason = "",
    requeue: Annotated[bool, _REQUEUE] = False,
    no_wait: Annotated[bool, _NO_WAIT] = False,
    timeout: Annotated[float, _TIMEOUT] = 0.0,
) -> None:
    """Cordon nodes and wait until nothing is there any more (operators)."""

    async def work(operator: Operator) -> None:
        for node in nodes:
            say(await operator.cordon(node, reason=reason, requeue=requeue))
        if not no_wait:
            await _until_empty(operator, set(nodes), timeout)

    try:
        _as_operator(ctx, work)
    except KeyboardInterrupt:
        remark(f"\nNot waiting any more; {', '.join(nodes)} stays cordoned (undo: gpuyard uncordon)")
        raise typer.Exit(130) from None


async def _until_empty(operator: Operator, nodes: set[str], timeout_s: float) -> None:
    """Say what is there whenever that changes, until nothing is."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s if timeout_s else None
    said = ""
    while True:
        used = [view for view in await operator.nodes() if view.node in nodes and is_used(view)]
        if not used:
            say(f"{', '.join(sorted(nodes))}: empty")
            return
        if (text := "; ".join(_what_is_there(view) for view in used)) != said:
            remark(f"waits for {text}")
            said = text
        if deadline is not None and loop.time() > deadline:
            raise GpuyardError(f"not empty after {timeout_s:g} s: {text}")
        await asyncio.sleep(LOOK_EVERY_S)


def _what_is_there(view: NodeView) -> str:
    jobs = sorted({job for card in view.cards for job in card.jobs})
    return f"{view.node}: " + (f"jobs {', '.join(map(str, jobs))}" if jobs else "jobs without GPUs")


def _as_operator(ctx: typer.Context, work: Callable[[Operator], Awaitable[None]]) -> None:
    from gpuyard.context import load_context
    from gpuyard.operator import Operator

    async def connected() -> None:
        async with Operator(load_context(session_of(ctx).context)) as operator:
            await work(operator)

    asyncio.run(connected())
