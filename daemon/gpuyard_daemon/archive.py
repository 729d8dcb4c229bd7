"""The journal's past: what pruning takes out of the stream, kept compressed for a while.

Each segment file holds the records of a range of sequences, one JSON object a line, as they stood in the stream:
enough to replay last week with other settings. A snapshot a day is kept beside them as a place to begin. After
`keep_days` both go.

Segments are read back from the stream itself rather than collected on the way, so that a daemon that was killed
leaves no gap.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import time
from pathlib import Path

import msgspec

from gpuyard_daemon.journal import Journal
from gpuyard_daemon.snapshots import sync_directory
from gpuyard_protocol.bus.base import StoredMessage

_SEGMENT = re.compile(r"^journal-(\d{16})-(\d{16})\.jsonl\.gz$")
#: Records of one segment file at most; bounds what is held in memory while it is read.
SEGMENT_RECORDS_MAX = 20_000
_DAY_S = 86_400


class ArchivedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a segment."""

    sequence: int
    stored_ms: int
    #: The record as it stood in the journal.
    record: msgspec.Raw


class Archive:
    def __init__(self, directory: Path, keep_days: int) -> None:
        self.directory = directory
        self._keep_days = keep_days
        directory.mkdir(parents=True, exist_ok=True)

    def end(self) -> int:
        """The last sequence archived, 0 for none."""
        return max((int(m[2]) for path in self.directory.iterdir() if (m := _SEGMENT.match(path.name))), default=0)

    async def keep(self, journal: Journal, first: int, up_to: int) -> None:
        """Archive the records from `first` to `up_to` that are not archived yet."""
        start = max(first, self.end() + 1)
        while start <= up_to:
            last = min(up_to, start + SEGMENT_RECORDS_MAX - 1)
            lines: list[bytes] = []

            def take(message: StoredMessage, lines: list[bytes] = lines) -> None:
                if message.subject == "jrn.e":
                    lines.append(_line(message))

            await journal.replay(start, last, take)
            if lines:
                await asyncio.to_thread(self._write, start, last, lines)
            start = last + 1

    def _write(self, first: int, last: int, lines: list[bytes]) -> None:
        temporary = self.directory / f"writing-{first:016d}"
        with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=3, mtime=0) as packed:
            for line in lines:
                packed.write(line)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, self.directory / f"journal-{first:016d}-{last:016d}.jsonl.gz")
        sync_directory(self.directory)

    def take_snapshot(self, path: Path) -> None:
        """Take over a snapshot that is no longer needed for restarts, if it is the day's first; otherwise remove it."""
        day = time.strftime("%Y%m%d", time.gmtime(path.stat().st_mtime))
        if path.name.startswith("snapshot-") and not any(self.directory.glob(f"{day}-*.snap")):
            os.replace(path, self.directory / f"{day}-{path.name}")
        else:
            path.unlink(missing_ok=True)

    def forget_old(self) -> None:
        horizon = time.time() - self._keep_days * _DAY_S
        for path in self.directory.iterdir():
            if path.stat().st_mtime < horizon:
                path.unlink(missing_ok=True)


def _line(message: StoredMessage) -> bytes:
    record = ArchivedRecord(sequence=message.sequence, stored_ms=message.stored_ms, record=msgspec.Raw(message.data))
    return msgspec.json.encode(record) + b"\n"
