"""`gpuyard run`: submit a job, show its output, and end as it ends.

Ctrl-C lets go of the job and does not end it: what runs on the yard is the yard's. The exit code is the job's own;
where it has none (it was cancelled, or could not be started), it is 1, and a job killed by a signal gives 128 + that
signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuyard.cli.options import Command, JobOptions, takes_job_options
from gpuyard.cli.output import remark
from gpuyard.cli.session import Session, session_of
from gpuyard.cli.submitting import hand_in
from gpuyard.errors import GpuyardError, Rejected
from gpuyard_protocol.jobs import JobView

if TYPE_CHECKING:
    from gpuyard.client import Client
    from gpuyard.job import Job

#: A job that has not started by then gets a line that says why.
EXPLAIN_AFTER_S = 2.0
DETACHED = 130


def register(app: typer.Typer) -> None:
    app.command("run", context_settings={"allow_interspersed_args": False})(takes_job_options(run))


def run(
    ctx: typer.Context,
    options: JobOptions,
    command: Command = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the job's output and nothing else.")] = False,
) -> None:
    """Run a job attached: its output here, its exit code ours. Ctrl-C detaches."""
    requests = options.requests(command)
    if len(requests) != 1:
        raise typer.BadParameter(f"holds {len(requests)} jobs; `run` takes one, `submit` many", param_hint="--file")
    if requests[0].get("array") is not None:
        raise typer.BadParameter("is for `submit`: `run` shows one job", param_hint="--array")
    options.check(requests)
    try:
        run_request(session_of(ctx), hand_in(ctx, requests)[0], quiet=quiet)
    except Rejected as refusal:
        raise options.told(refusal) from None


def run_request(session: Session, request: dict[str, Any], *, quiet: bool) -> None:
    """Submit a job, show its output, and end as it ends."""
    attached = _Attached(request, quiet=quiet)
    try:
        view = session.run(attached.run)
    except KeyboardInterrupt:
        if attached.number:
            remark(
                f"\nDetached; job {attached.number} goes on. "
                f"Reattach: gpuyard logs -f {attached.number}   end it: gpuyard cancel {attached.number}"
            )
        raise typer.Exit(DETACHED) from None
    raise typer.Exit(_exit_code(view, quiet=quiet))


def _exit_code(view: JobView, *, quiet: bool) -> int:
    if view.state == "succeeded":
        return view.exit_code or 0
    reason = f": {view.reason.text}" if view.reason else ""
    if view.exit_code:
        if not quiet:
            remark(f"Job {view.job} {view.state} with exit code {view.exit_code}{reason}")
        return view.exit_code
    remark(f"Job {view.job} {view.state}{reason} (more: gpuyard why {view.job})")
    return 1


class _Attached:
    """One attached run. `number` is the job's once it is accepted."""

    def __init__(self, request: dict[str, object], *, quiet: bool) -> None:
        self._request = request
        self._quiet = quiet
        self.number = 0

    async def run(self, yard: Client) -> JobView:
        job = await yard.submit(self._request)
        self.number = job.number
        if not self._quiet:
            remark(f"Submitted job {job.number}" + (f": {job.note}" if job.note else ""))
        count = await self._replicas(job)
        explain = asyncio.ensure_future(self._explain(job))
        try:
            prefixes = [f"[{replica}] " if count > 1 else "" for replica in range(count)]
            await asyncio.gather(*(show_output(job, replica, prefix=text) for replica, text in enumerate(prefixes)))
        finally:
            explain.cancel()
        return await job.wait()

    async def _replicas(self, job: Job) -> int:
        """How many there are, or may be; where the yard chose it, it is asked."""
        if "total_gpus" in self._request:
            return (await job.view()).replicas
        replicas = self._request.get("replicas")
        return replicas if isinstance(replicas, int) else 1

    async def _explain(self, job: Job) -> None:
        """Say once why the job waits, if it does."""
        await asyncio.sleep(EXPLAIN_AFTER_S)
        with contextlib.suppress(GpuyardError):
            why = await job.why()
            if why.state == "pending" and not self._quiet:
                remark(f"Job {job.number} waits: {why.summary} (more: gpuyard why {job.number})")


async def show_output(job: Job, replica: int, *, prefix: str = "") -> None:
    """Pass a replica's output on, stream to stream, until the job has ended."""
    unfinished = {"out": b"", "err": b""}
    async for chunk in job.follow(replica=replica):
        target = sys.stdout.buffer if chunk.stream == "out" else sys.stderr.buffer
        data = chunk.data
        if prefix:
            data, unfinished[chunk.stream] = _whole_lines(unfinished[chunk.stream] + data, prefix.encode())
        target.write(data)
        target.flush()
    for stream, rest in unfinished.items():
        if rest:
            target = sys.stdout.buffer if stream == "out" else sys.stderr.buffer
            target.write(prefix.encode() + rest + b"\n")
            target.flush()


def _whole_lines(data: bytes, prefix: bytes) -> tuple[bytes, bytes]:
    """(the lines that are complete, each with the prefix; what is left)."""
    *lines, rest = data.split(b"\n")
    return b"".join(prefix + line + b"\n" for line in lines), rest
