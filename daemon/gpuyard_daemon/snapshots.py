"""Snapshots: the core's state in a file, so that a restart replays little and the journal can be pruned.

A snapshot is written by a forked child: the loop loses only the time of the fork, and the child has the state of one
moment for itself. The file counts from a rename on, after its bytes are on disk; it names the journal sequence it
stands for, and carries a checksum: a broken one is passed over for the one before, so two are kept.

What is in a snapshot is the core's business; this file sees bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from gpuyard_protocol.codec import Malformed, decode, encode

log = structlog.get_logger("snapshots")

FORMAT = "gpuyard-snapshot"
FORMAT_VERSION = 1
KEEP = 2
#: A child that has not finished by then is given up; its temporary file is removed with the next snapshot.
CHILD_TIMEOUT_S = 300.0
_NAME = re.compile(r"^snapshot-(\d{16})\.snap$")
_HEADER_BYTES_MAX = 4096


class SnapshotCorrupt(Exception):
    """The file is not a whole snapshot of this yard, for the reason given."""


class SnapshotHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The file's first line; the state follows."""

    format: str
    version: int
    yard: str
    #: Journal sequence of the last record in it, and that record's turn.
    sequence: int
    turn: int
    size: int
    sha256: str


class SnapshotStore:
    """The directory of snapshots."""

    def __init__(self, directory: Path, yard: str) -> None:
        self.directory = directory
        self._yard = yard
        directory.mkdir(parents=True, exist_ok=True)

    def paths(self) -> list[tuple[int, Path]]:
        """(sequence, file), newest first."""
        found = [(int(m[1]), path) for path in self.directory.iterdir() if (m := _NAME.match(path.name))]
        return sorted(found, reverse=True)

    def path_of(self, sequence: int) -> Path:
        return self.directory / f"snapshot-{sequence:016d}.snap"

    def write(self, sequence: int, turn: int, state: bytes) -> None:
        """Bring a snapshot to disk; it counts once it is `reveal`ed."""
        header = SnapshotHeader(
            format=FORMAT,
            version=FORMAT_VERSION,
            yard=self._yard,
            sequence=sequence,
            turn=turn,
            size=len(state),
            sha256=hashlib.sha256(state).hexdigest(),
        )
        with self._hidden(sequence).open("wb") as file:
            file.write(encode(header) + b"\n")
            file.write(state)
            file.flush()
            os.fsync(file.fileno())

    def reveal(self, sequence: int) -> SnapshotHeader:
        """From now on a restart begins with this snapshot, if it is the newest."""
        os.replace(self._hidden(sequence), self.path_of(sequence))
        sync_directory(self.directory)
        return self.read_header(sequence)

    def _hidden(self, sequence: int) -> Path:
        return self.directory / f"writing-{sequence:016d}"

    def read(self, path: Path) -> tuple[SnapshotHeader, bytes]:
        """The snapshot, or `SnapshotCorrupt` / OSError."""
        data = path.read_bytes()
        header = self._parse_header(data[:_HEADER_BYTES_MAX])
        state = data[data.index(b"\n") + 1 :]
        if len(state) != header.size:
            raise SnapshotCorrupt(f"{len(state)} bytes of {header.size}")
        if hashlib.sha256(state).hexdigest() != header.sha256:
            raise SnapshotCorrupt("its checksum does not fit its contents")
        return header, state

    def read_header(self, sequence: int) -> SnapshotHeader:
        with self.path_of(sequence).open("rb") as file:
            return self._parse_header(file.read(_HEADER_BYTES_MAX))

    def _parse_header(self, start: bytes) -> SnapshotHeader:
        line, newline, _ = start.partition(b"\n")
        try:
            header = decode(SnapshotHeader, line)
        except Malformed as error:
            raise SnapshotCorrupt(f"its header is unreadable: {error}") from None
        if not newline or header.format != FORMAT or header.version > FORMAT_VERSION:
            raise SnapshotCorrupt(f"its format is {header.format!r} version {header.version}")
        if header.yard != self._yard:
            raise SnapshotCorrupt(f"it belongs to the yard {header.yard!r}, not to {self._yard!r}")
        return header

    def forget_old(self) -> list[Path]:
        """Files beyond the two newest, and half-written ones: to be archived or removed by the caller."""
        leftovers = [path for path in self.directory.iterdir() if path.name.startswith("writing-")]
        return [path for _, path in self.paths()[KEEP:]] + leftovers


def sync_directory(directory: Path) -> None:
    """Make a rename in it durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_child(store: SnapshotStore, sequence: int, turn: int, state: Callable[[], bytes]) -> int:
    """Fork a child that writes the state of this very moment; returns its process id, for `wait_for_child`."""
    with warnings.catch_warnings():
        # Python 3.12 warns that a fork may deadlock where threads run. The child takes no lock that ours hold: it
        # computes bytes, writes one file and leaves without running anybody's clean-up.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            # Sockets and locks are the parent's: if it dies, nobody may take this child for it.
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            # Below whoever schedules: a snapshot may take its time.
            os.nice(10)
            store.write(sequence, turn, state())
            code = 0
        except BaseException as error:  # noqa: BLE001  whatever it is, this process ends here and nowhere else
            os.write(2, f"snapshot of {sequence} failed: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return child


async def wait_for_child(child: int) -> bool:
    """Whether the child wrote its snapshot."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    handle = os.pidfd_open(child)

    def on_exit() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(handle, on_exit)
    try:
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            await ended
    except TimeoutError:
        log.error("snapshot.stuck", pid=child)
    finally:
        loop.remove_reader(handle)
        if not ended.done() or ended.cancelled():
            os.kill(child, signal.SIGKILL)
        os.close(handle)
        _, status = os.waitpid(child, 0)  # noqa: ASYNC222  it has ended, or was just killed
    return os.waitstatus_to_exitcode(status) == 0
