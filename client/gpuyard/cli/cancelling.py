"""`gpuyard cancel`, `hold`, `release`, `suspend`, `resume`, `requeue`: what an owner does to jobs that are there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import remark, say
from gpuyard.cli.session import session_of
from gpuyard.cli.values import job_number
from gpuyard.errors import Rejected

if TYPE_CHECKING:
    from gpuyard.client import Client

Jobs = Annotated[list[int], typer.Argument(metavar="JOB...", help="Numbers of jobs.", parser=job_number)]
Array = Annotated[bool, typer.Option("--array", help="Every element of the arrays that these jobs belong to.")]
_Hold = typer.Option("--hold", help="And hold them then.")


def register(app: typer.Typer) -> None:
    app.command("cancel")(cancel)
    app.command("hold")(hold)
    app.command("release")(release)
    app.command("suspend")(suspend)
    app.command("resume")(resume)
    app.command("requeue")(requeue)


def cancel(ctx: typer.Context, jobs: Jobs, array: Array = False) -> None:
    """Cancel jobs."""
    _each(ctx, jobs, lambda yard, job: yard.cancel(job, array=array), f"Cancelled {_what(array)}")


def hold(ctx: typer.Context, jobs: Jobs, array: Array = False) -> None:
    """Keep waiting jobs from starting until they are released."""
    _each(ctx, jobs, lambda yard, job: yard.hold(job, array=array), f"Held {_what(array)}")


def release(ctx: typer.Context, jobs: Jobs, array: Array = False) -> None:
    """Let held jobs start again."""
    _each(ctx, jobs, lambda yard, job: yard.release(job, array=array), f"Released {_what(array)}")


def suspend(ctx: typer.Context, jobs: Jobs, array: Array = False) -> None:
    """Take running jobs off their cards, into their hosts' memory, until they are resumed."""
    _each(ctx, jobs, lambda yard, job: yard.suspend(job, array=array), f"Suspending {_what(array)}")


def resume(ctx: typer.Context, jobs: Jobs, array: Array = False) -> None:
    """Let suspended jobs go back to their cards."""
    _each(ctx, jobs, lambda yard, job: yard.resume(job, array=array), f"Resuming {_what(array)}")


def requeue(ctx: typer.Context, jobs: Jobs, hold: Annotated[bool, _Hold] = False, array: Array = False) -> None:
    """Stop running jobs with grace; they wait again, uncharged."""
    _each(ctx, jobs, lambda yard, job: yard.requeue(job, hold=hold, array=array), f"Requeued {_what(array)}")


def _what(array: bool) -> str:
    return "the array of job" if array else "job"


def _each(ctx: typer.Context, jobs: list[int], act: Callable[[Client, int], Awaitable[None]], done: str) -> None:
    """The same for each job, decided alone; exit code 1 if any was refused."""

    async def work(yard: Client) -> list[Rejected | None]:
        async def one(job: int) -> Rejected | None:
            try:
                await act(yard, job)
            except Rejected as refusal:
                return refusal
            return None

        return await asyncio.gather(*(one(job) for job in jobs))

    outcomes = session_of(ctx).run(work)
    for job, refusal in zip(jobs, outcomes, strict=True):
        if refusal is None:
            say(f"{done} {job}")
        else:
            said = str(refusal)
            where = "" if f"job {job}" in said else f"job {job}: "
            hint = " (see: gpuyard jobs --all)" if refusal.reason == "UnknownJob" else f" (see: gpuyard why {job})"
            remark(f"gpuyard: {where}{said}{hint}")
    if any(outcomes):
        raise typer.Exit(1)
