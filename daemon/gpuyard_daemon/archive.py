"""The journal's past: what pruning takes out of the stream, kept compressed for a while.

Each segment file holds the records of a range of sequences, one JSON object a line, as they stood in the stream:
enough to replay last week with other settings. A snapshot a day is kept beside them as a place to begin. After
`keep_days` both go, and the oldest before that where all of them take more than `most_bytes`.

Segments are read back from the stream itself rather than collected on the way, so that a daemon that was killed
leaves no gap.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gpuyard_daemon.journal import Journal
from gpuyard_daemon.snapshots import sync_directory
from gpuyard_protocol.bus.base import StoredMessage

_SEGMENT = re.compile(r"^journal-(\d{16})-(\d{16})\.jsonl\.gz$")
#: Records of one segment file at most, and about how many bytes: what is held in memory while it is read.
SEGMENT_RECORDS_MAX = 20_000
SEGMENT_BYTES_MAX = 64 * 2**20
_DAY_S = 86_400


class ArchivedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a segment."""

    sequence: int
    stored_ms: int
    #: The record as it stood in the journal.
    record: msgspec.Raw


class Archive:
    def __init__(self, directory: Path, keep_days: int, most_bytes: int = 2**62) -> None:
        self.directory = directory
        self._keep_days = keep_days
        self._most_bytes = most_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def end(self) -> int:
        """The last sequence archived, 0 for none."""
        return max((int(m[2]) for path in self.directory.iterdir() if (m := _SEGMENT.match(path.name))), default=0)

    async def keep(self, journal: Journal, first: int, up_to: int) -> None:
        """Archive the records from `first` to `up_to` that are not archived yet."""
        start = max(first, self.end() + 1)
        while start <= up_to:
            last = min(up_to, start + SEGMENT_RECORDS_MAX - 1)
            segment = _Segment(last)
            await journal.replay(start, last, segment.take)
            if segment.lines:
                await asyncio.to_thread(self._write, start, segment.last, segment.lines)
            start = segment.last + 1

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
        found = sorted((status.st_mtime, status.st_size, path) for path, status in self._files())
        left = sum([size for _, size, _ in found])
        for changed_at, size, path in found:
            if changed_at < horizon or left > self._most_bytes:
                path.unlink(missing_ok=True)
                left -= size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.directory.iterdir():
            yield path, path.stat()


class _Segment:
    """What is read of the journal for one file, until there is enough of it."""

    def __init__(self, last: int) -> None:
        #: The last sequence that it covers.
        self.last = last
        self.lines: list[bytes] = []
        self._size = 0

    def take(self, message: StoredMessage) -> None:
        if self._size < SEGMENT_BYTES_MAX and message.subject == "jrn.e":
            self.lines.append(line := _line(message))
            self._size += len(line)
            if self._size >= SEGMENT_BYTES_MAX:
                self.last = message.sequence


def _line(message: StoredMessage) -> bytes:
    record = ArchivedRecord(sequence=message.sequence, stored_ms=message.stored_ms, record=msgspec.Raw(message.data))
    return msgspec.json.encode(record) + b"\n"
