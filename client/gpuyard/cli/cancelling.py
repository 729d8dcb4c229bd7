"""`gpuyard cancel`: end jobs, or take them out of the queue."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import remark, say
from gpuyard.cli.session import session_of
from gpuyard.errors import Rejected

if TYPE_CHECKING:
    from gpuyard.client import Client


def register(app: typer.Typer) -> None:
    app.command("cancel")(cancel)


def cancel(
    ctx: typer.Context,
    jobs: Annotated[list[int], typer.Argument(metavar="JOB...", help="Numbers of jobs.", min=1)],
) -> None:
    """Cancel jobs."""

    async def work(yard: Client) -> list[Rejected | None]:
        async def one(job: int) -> Rejected | None:
            try:
                await yard.cancel(job)
            except Rejected as refusal:
                return refusal
            return None

        return await asyncio.gather(*(one(job) for job in jobs))

    outcomes = session_of(ctx).run(work)
    for job, refusal in zip(jobs, outcomes, strict=True):
        if refusal is None:
            say(f"Cancelled job {job}")
        else:
            remark(f"gpuyard: job {job}: {refusal} (see: gpuyard jobs --all)")
    if any(outcomes):
        raise typer.Exit(1)
