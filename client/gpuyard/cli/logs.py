"""`gpuyard logs`: what a replica wrote, up to now or as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.jobs import JobNumber
from gpuyard.cli.output import remark
from gpuyard.cli.session import session_of

if TYPE_CHECKING:
    from gpuyard.client import Client
    from gpuyard.job import LogStream

#: --tail counts lines and looks for them in so much of the end.
TAIL_BYTES = 262_144


def register(app: typer.Typer) -> None:
    app.command("logs")(logs)


def logs(
    ctx: typer.Context,
    job: JobNumber,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the job writes, until it ends.")] = False,
    err: Annotated[bool, typer.Option("--err", help="Its standard error instead of its standard output.")] = False,
    replica: Annotated[int, typer.Option("--replica", "-r", min=0, help="Which replica.")] = 0,
    attempt: Annotated[int, typer.Option("--attempt", min=0, help="Which attempt, 0: the newest.")] = 0,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", min=0, metavar="LINES", help="Only the last so many lines.")
    ] = None,
) -> None:
    """Print a job's output."""
    stream: LogStream = "err" if err else "out"

    async def work(yard: Client) -> None:
        handle = yard.handle(job)
        if not follow:
            size = None if tail is None else TAIL_BYTES
            data = await handle.logs(stream=stream, replica=replica, attempt=attempt, tail_bytes=size)
            _write(data if tail is None else last_lines(data, tail))
            return
        is_first = True
        size = None if tail is None else TAIL_BYTES
        async for chunk in handle.follow(streams=(stream,), replica=replica, attempt=attempt, tail_bytes=size):
            _write(last_lines(chunk.data, tail) if is_first and tail is not None else chunk.data)
            is_first = False

    try:
        session_of(ctx).run(work)
    except KeyboardInterrupt:
        remark(f"\nno longer following; job {job} goes on (end it: gpuyard cancel {job})")
        raise typer.Exit(130) from None


def last_lines(data: bytes, count: int) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join(lines[-count:]) if count else b""


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
