"""`gpuyard logs`: what a replica wrote, up to now or as it comes; for programs a JSON object for each line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.jobs import JobNumber
from gpuyard.cli.output import remark
from gpuyard.cli.session import session_of
from gpuyard.cli.values import count

if TYPE_CHECKING:
    from gpuyard.client import Client
    from gpuyard.job import Job, LogStream
    from gpuyard_protocol.nodes import LogChunk

#: --tail counts lines and looks for them in so much of the end.
TAIL_BYTES = 262_144


def register(app: typer.Typer) -> None:
    app.command("logs")(logs)


def logs(
    ctx: typer.Context,
    job: JobNumber,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the job writes, until it ends.")] = False,
    err: Annotated[bool, typer.Option("--err", help="Its standard error instead of its standard output.")] = False,
    replica: Annotated[int, typer.Option("--replica", "-r", metavar="N", parser=count(0), help="Which replica.")] = 0,
    attempt: Annotated[
        int, typer.Option("--attempt", metavar="N", parser=count(0), help="Which attempt, 0: the newest.")
    ] = 0,
    tail: Annotated[
        int | None,
        typer.Option("--tail", "-n", metavar="LINES", parser=count(0), help="Only the last so many lines."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each line.")] = False,
) -> None:
    """Print a job's output."""
    stream: LogStream = "err" if err else "out"

    async def work(yard: Client) -> None:
        handle = yard.handle(job)
        if as_json:
            await _print_lines(handle, stream, replica, attempt, tail, follow=follow)
            return
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


async def _print_lines(
    handle: Job, stream: LogStream, replica: int, attempt: int, tail: int | None, *, follow: bool
) -> None:
    """Each line as an object with where it stands; what is no UTF-8 in it is replaced."""
    size = None if tail is None else TAIL_BYTES
    if follow:
        chunks = handle.follow(streams=(stream,), replica=replica, attempt=attempt, tail_bytes=size)
    else:
        chunks = handle.ranges(stream=stream, replica=replica, attempt=attempt, tail_bytes=size)
    lines = LineCutter()
    kept: list[dict[str, object]] = []
    async for chunk in chunks:
        found = lines.take(chunk)
        if follow and tail is not None:
            found, tail = found[max(0, len(found) - tail) :], None
        if follow or tail is None:
            _print_objects(found)
        else:
            kept = (kept + found)[-tail:] if tail else []
    kept += lines.rest()
    _print_objects(kept if tail is None or follow else kept[max(0, len(kept) - tail) :])


def _print_objects(objects: list[dict[str, object]]) -> None:
    import orjson

    sys.stdout.buffer.write(b"".join(orjson.dumps(each) + b"\n" for each in objects))
    sys.stdout.buffer.flush()


class LineCutter:
    """Cuts pieces of output into lines. An attempt's last line may lack its end; what came before it is told then."""

    def __init__(self) -> None:
        self._begun: dict[str, object] | None = None
        self._data = b""

    def take(self, chunk: LogChunk) -> list[dict[str, object]]:
        """The lines that are whole now."""
        found = []
        if self._begun is not None and self._begun["attempt"] != chunk.attempt:
            found += self.rest()
        if self._begun is None:
            self._begin(chunk, chunk.offset)
        *whole, last = (self._data + chunk.data).split(b"\n")
        offset = chunk.offset - len(self._data)
        for line in whole:
            found.append(self._object(line))
            offset += len(line) + 1
            self._begin(chunk, offset)
        self._data = last
        return found

    def rest(self) -> list[dict[str, object]]:
        """What has begun and not ended."""
        found = [self._object(self._data)] if self._data else []
        self._begun, self._data = None, b""
        return found

    def _begin(self, chunk: LogChunk, offset: int) -> None:
        where = {"job": chunk.job, "attempt": chunk.attempt, "replica": chunk.replica, "stream": chunk.stream}
        self._begun = {**where, "offset": offset}

    def _object(self, line: bytes) -> dict[str, object]:
        return {**(self._begun or {}), "line": line.decode(errors="replace")}


def last_lines(data: bytes, count: int) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join(lines[-count:]) if count else b""


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
