"""A daemon that dies at a chosen place: `python -m support.dying_daemon POINT PASSAGE daemon's arguments…`.

The production code has no such places. Here its functions are wrapped before it starts; at the given passage the
process ends as a power cut would end it, by SIGKILL, in the middle of what it was doing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from gpuyard_daemon import health, process, upkeep
from gpuyard_daemon.archive import Archive
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_protocol.bus.nats import NatsBus

#: Each wraps one function; the argument dies at the passage that was asked for, and returns at the others.
POINTS: dict[str, Callable[[Callable[[], None]], None]] = {}


def _point(wrap: Callable[[Callable[[], None]], None]) -> Callable[[Callable[[], None]], None]:
    POINTS[wrap.__name__.strip("_").replace("_", "-")] = wrap
    return wrap


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@_point
def _before_append(die: Callable[[], None]) -> None:
    """Decided, and nobody knows."""
    append = Journal.append

    async def wrapped(self: Journal, data: bytes, message_id: str) -> int:
        die()
        return await append(self, data, message_id)

    Journal.append = wrapped  # type: ignore[method-assign]


@_point
def _append_sent(die: Callable[[], None]) -> None:
    """The record is on its way, and its acknowledgement will find nobody."""
    _die_after_sending("stream_publish", "jrn.e", die)


@_point
def _after_append(die: Callable[[], None]) -> None:
    """The journal has it, and no node was told."""
    append = Journal.append

    async def wrapped(self: Journal, data: bytes, message_id: str) -> int:
        sequence = await append(self, data, message_id)
        die()
        return sequence

    Journal.append = wrapped  # type: ignore[method-assign]


@_point
def _between_command_and_reply(die: Callable[[], None]) -> None:
    """The node has its orders, and its word about them finds nobody."""
    _die_after_sending("request", "cmd.", die)


def _die_after_sending(method: str, subject: str, die: Callable[[], None]) -> None:
    original: Callable[..., Awaitable[Any]] = getattr(NatsBus, method)

    async def wrapped(self: NatsBus, to: str, data: bytes, **options: Any) -> Any:
        if not to.startswith(subject):
            return await original(self, to, data, **options)
        sent = asyncio.ensure_future(original(self, to, data, **options))
        await asyncio.sleep(0)
        await self.flush()
        die()
        return await sent

    setattr(NatsBus, method, wrapped)


@_point
def _in_snapshot(die: Callable[[], None]) -> None:
    """The child is writing; it goes on as an orphan."""
    start = upkeep.start_child

    def wrapped(*arguments: Any) -> int:
        child = start(*arguments)
        die()
        return child

    upkeep.start_child = wrapped


@_point
def _before_reveal(die: Callable[[], None]) -> None:
    """The snapshot is written and does not count yet."""
    reveal = SnapshotStore.reveal

    def wrapped(self: SnapshotStore, sequence: int) -> Any:
        die()
        return reveal(self, sequence)

    SnapshotStore.reveal = wrapped  # type: ignore[method-assign]


@_point
def _before_pointer(die: Callable[[], None]) -> None:
    """The snapshot counts, and the journal does not know of it."""
    point = Journal.point_to_snapshot

    async def wrapped(self: Journal, pointer: Any) -> None:
        die()
        await point(self, pointer)

    Journal.point_to_snapshot = wrapped  # type: ignore[method-assign]


@_point
def _in_archive(die: Callable[[], None]) -> None:
    """What is to be pruned is half archived."""
    write = Archive._write

    def wrapped(self: Archive, first: int, last: int, lines: list[bytes]) -> None:
        (self.directory / f"writing-{first:016d}").write_bytes(b"\x1f\x8b half")
        die()
        write(self, first, last, lines)

    Archive._write = wrapped  # type: ignore[method-assign]


@_point
def _in_pruning(die: Callable[[], None]) -> None:
    """Some of the journal's subjects are purged, the others are not."""
    purge = NatsBus.purge_stream

    async def wrapped(self: NatsBus, stream: str, *, up_to: int, subject: str = "") -> None:
        await purge(self, stream, up_to=up_to, subject=subject)
        if subject == "jrn.e":
            die()

    NatsBus.purge_stream = wrapped  # type: ignore[method-assign]


def _stand_still(die: Callable[[], None]) -> None:
    """Not a death: a turn that never ends, in a loop that runs. What counts as too long is shortened."""
    health.STALLED_AFTER_S = 1.0
    append = Journal.append

    async def wrapped(self: Journal, data: bytes, message_id: str) -> int:
        if b"stand-still" in data:
            await asyncio.Event().wait()
        return await append(self, data, message_id)

    Journal.append = wrapped  # type: ignore[method-assign]


def main() -> None:
    point, passage = sys.argv[1], int(sys.argv[2])
    passages = 0

    def die_in_time() -> None:
        nonlocal passages
        passages += 1
        if passages == passage:
            _die()

    {**POINTS, "stand-still": _stand_still}[point](die_in_time)
    process.main(sys.argv[3:])


if __name__ == "__main__":
    main()
