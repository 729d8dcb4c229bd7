"""`gpuyard handover`: let a standby daemon lead, for whoever is about to stop or upgrade the leader's host."""

from __future__ import annotations

import asyncio

import typer

from gpuyard.cli.output import remark
from gpuyard.cli.session import session_of


def register(app: typer.Typer) -> None:
    app.command("handover")(handover)


def handover(ctx: typer.Context) -> None:
    """Let a standby daemon lead, without a gap (operators only)."""
    from gpuyard.context import load_context
    from gpuyard.operator import Operator

    async def work() -> str:
        async with Operator(load_context(session_of(ctx).context)) as operator:
            return (await operator.hand_over()).text

    remark(asyncio.run(work()))
