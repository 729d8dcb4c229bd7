"""The journal of a real yard, read for a replay: from archived segments, snapshots, plain files, or the running yard.

Records must be without a gap, and begin with the yard's first or follow a snapshot. Nothing is written: a yard that
runs is only read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from gpuyard_daemon.archive import ArchivedRecord
from gpuyard_daemon.config import default_state_directory
from gpuyard_daemon.core.state.turn import Record
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.sim.trace_files import TraceError, open_text
from gpuyard_daemon.snapshots import SnapshotHeader
from gpuyard_daemon.yard.home import RUNNING_FILE, Home
from gpuyard_protocol.bus.base import BusError, StoredMessage
from gpuyard_protocol.bus.nats import connect

_SUBJECT = "jrn.e"
_HEADER_BYTES_MAX = 4096


class Recording(msgspec.Struct, frozen=True):
    """What a yard decided, from some moment on."""

    #: The core's state before the first record; None: the yard's beginning.
    begin: bytes | None
    records: tuple[Record, ...]


class _Found:
    """Records by turn, and snapshots by the turn that they stand after."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.snapshots: dict[int, Path] = {}
        self._line = msgspec.json.Decoder(ArchivedRecord)
        self._record = msgspec.json.Decoder(Record)

    def take_record(self, data: bytes) -> None:
        record = self._record.decode(data)
        self.records[record.turn] = record

    def take_file(self, path: Path) -> None:
        if path.suffix == ".snap":
            self._take_snapshot(path)
            return
        line = 1
        try:
            with open_text(path) as file:
                for text in file:
                    self._take_line(text)
                    line += 1
        except (OSError, EOFError, UnicodeDecodeError, msgspec.DecodeError) as problem:
            raise TraceError(f"{path}, line {line}: not a record of a journal: {problem}") from None

    def _take_line(self, text: str) -> None:
        data = text.encode()
        if data.startswith(b'{"sequence"'):
            self.take_record(bytes(self._line.decode(data).record))
        else:
            self.take_record(data)

    def _take_snapshot(self, path: Path) -> None:
        with path.open("rb") as file:
            line = file.read(_HEADER_BYTES_MAX).partition(b"\n")[0]
        try:
            header = msgspec.json.decode(line, type=SnapshotHeader)
        except msgspec.DecodeError as problem:
            raise TraceError(f"{path}: not a snapshot: {problem}") from None
        self.snapshots[header.turn] = path

    def recording(self) -> Recording:
        turns = sorted(self.records)
        if not turns:
            raise TraceError("no record of a journal was found")
        first = turns[0]
        begin: bytes | None = None
        if first != 1:
            usable = [turn for turn in sorted(self.snapshots) if turn >= first - 1 and turn < turns[-1]]
            if not usable:
                raise TraceError(
                    f"the records begin with turn {first}, and there is no snapshot from then on to begin with"
                )
            data = self.snapshots[usable[0]].read_bytes()
            begin, first = data[data.index(b"\n") + 1 :], usable[0] + 1
        for turn in range(first, turns[-1] + 1):
            if turn not in self.records:
                raise TraceError(f"the record of turn {turn} is missing; found turns {turns[0]} to {turns[-1]}")
        return Recording(begin, tuple([self.records[turn] for turn in range(first, turns[-1] + 1)]))


def read_recording(sources: Sequence[Path], live: str = "", yard: str = "main", seed: Path | None = None) -> Recording:
    """From files and folders of segments and snapshots; `live`: also from the journal at that NATS address."""
    found = _Found()
    for path in _files(sources):
        found.take_file(path)
    if live:
        try:
            asyncio.run(_read_live(found, live, yard, seed))
        except BusError as problem:
            raise TraceError(f"the journal at {live} cannot be read: {problem}") from None
    return found.recording()


def recording_of(sources: Sequence[Path]) -> Recording:
    """Of what a person named: files, folders, or state directories; nothing: this machine's yard.

    Of a yard that runs the journal itself is read as well, since the newest part is in no file yet.
    """
    paths = list(sources) or [default_state_directory(os.environ, os.geteuid())]
    home = next((Home(path) for path in paths if (path / RUNNING_FILE).is_file()), None)
    running = home.read_running() if home is not None and home.is_held() else None
    if home is None or running is None:
        return read_recording(paths)
    seed = home.keys_dir / "daemon.seed"
    return read_recording(paths, running.url, "main", seed if seed.is_file() else None)


def _files(sources: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            parts = [source, source / "archive", source / "snapshots", source / "daemon" / "archive"]
            parts.append(source / "daemon" / "snapshots")
            for part in parts:
                if part.is_dir():
                    files += sorted([*part.glob("journal-*.jsonl*"), *part.glob("*.snap")])
        elif source.is_file():
            files.append(source)
        else:
            raise TraceError(f"there is no file or folder {source}")
    return files


async def _read_live(found: _Found, url: str, yard: str, seed: Path | None) -> None:
    bus = await connect(url, name="replay", inbox_prefix="_INBOX_D", seed=str(seed) if seed else None)
    try:
        journal = Journal(bus, yard, "replay")
        state = await bus.stream_state(journal.stream)

        def take(message: StoredMessage) -> None:
            if message.subject == _SUBJECT:
                found.take_record(message.data)

        await journal.replay(state.first_sequence, state.last_sequence, take)
    finally:
        await bus.close()
