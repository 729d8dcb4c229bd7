"""What replicas write: where it is, ranges of it, and sending it live while somebody follows.

    <jobs>/<job>/<attempt>/<replica>.out, .err    output, appended to by the process itself
    <jobs>/<job>/<attempt>/<replica>/             the replica's own directory
    <jobs>/<job>/checkpoint/                      the job's, for all its attempts (`checkpoint_dirs`)

The launcher makes both; this module only reads, rotates and removes. A file above 100 MiB is copied to `<name>.1` (it
replaces the one before) and emptied in place, since the process goes on appending to it: what it writes between the
copy and the emptying is lost, at most some milliseconds of a flood. What has not been written to for 7 days and belongs
to no assignment that lives is removed.

Output is read from the files, never held here: a slow follower makes its own reading slower and costs no memory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import structlog

from gpuyard_agent.checkpoint_dirs import LOCAL_NAME
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import AssignmentKey, JobId, Tenant
from gpuyard_protocol.nodes import FollowLog, LogChunk, ReadLog

Stream = Literal["out", "err"]
STREAMS: tuple[Stream, ...] = ("out", "err")

#: Most of one answer.
RANGE_BYTES_MAX = 256 * 1024
#: Most of one live chunk, and of one stream in one look at it: 10 MiB/s for each stream that is followed.
CHUNK_BYTES_MAX = 64 * 1024
LOOK_BYTES_MAX = 1024 * 1024
#: Between two looks at a followed file.
LOOK_S = 0.1
#: Longest that one request to follow holds; followers ask again.
FOLLOW_MS_MAX = 600_000
#: Followers of one node at once; more are refused in words.
FOLLOWERS_MAX = 256
ROTATE_BYTES = 100 * 1024 * 1024
KEPT_S = 7 * 86_400

_log = structlog.get_logger("gpuyard_agent.logs")


class OutputFiles(NamedTuple):
    """Of one assignment."""

    job_dir: Path
    out: Path
    err: Path

    def of(self, stream: Stream) -> Path:
        return self.out if stream == "out" else self.err


class LogStore:
    """The files under one directory. `is_live` says whether an assignment has not ended."""

    def __init__(self, jobs: Path, is_live: Callable[[AssignmentKey], bool]) -> None:
        self._jobs = jobs
        self.is_live = is_live

    def files(self, key: AssignmentKey) -> OutputFiles:
        attempt = self._jobs / str(key.job) / str(key.attempt)
        name = str(key.replica)
        return OutputFiles(attempt / name, attempt / f"{name}.out", attempt / f"{name}.err")

    def newest(self, job: JobId, replica: int) -> AssignmentKey | None:
        """The newest attempt of this replica that wrote here."""
        try:
            attempts = [int(entry.name) for entry in os.scandir(self._jobs / str(job)) if entry.name.isdigit()]
        except FileNotFoundError:
            return None
        for attempt in sorted(attempts, reverse=True):
            key = AssignmentKey(job, attempt, replica)
            if self.files(key).out.exists():
                return key
        return None

    def size(self, key: AssignmentKey, stream: Stream) -> int:
        try:
            return self.files(key).of(stream).lstat().st_size
        except OSError:
            return 0

    def read(self, request: ReadLog) -> LogChunk:
        """The range that was asked, cut to what there is. Blocks on the disk."""
        if request.attempt:
            key: AssignmentKey | None = AssignmentKey(request.job, request.attempt, request.replica)
        else:
            key = self.newest(request.job, request.replica)
        if key is None or not self.files(key).of(request.stream).exists():
            error = f"this node has no output of replica {request.replica} of job {request.job}"
            return LogChunk(
                job=request.job, attempt=request.attempt, replica=request.replica, stream=request.stream, error=error
            )
        was_live = self.is_live(key)
        limit = max(0, min(request.limit, RANGE_BYTES_MAX))
        return self.chunk(key, request.stream, request.offset, limit, ended=not was_live)

    def chunk(self, key: AssignmentKey, stream: Stream, offset: int, limit: int, *, ended: bool = False) -> LogChunk:
        """From `offset` on (negative: before the end). `ended` is said only of a range that reaches the end."""
        data, size, error = b"", 0, ""
        try:
            with _open_output(self.files(key).of(stream)) as file:
                size = os.fstat(file.fileno()).st_size
                offset = max(0, size + offset) if offset < 0 else min(offset, size)
                file.seek(offset)
                data = file.read(limit)
        except FileNotFoundError:
            offset = 0
        except OSError as trouble:  # a job that may write here may put anything in the place of its output
            offset, error = 0, f"output cannot be read: {trouble.strerror}"
        return LogChunk(
            job=key.job,
            attempt=key.attempt,
            replica=key.replica,
            stream=stream,
            offset=offset,
            data=data,
            size=size,
            ended=ended and offset + len(data) >= size,
            error=error,
        )

    def tidy(self, now_s: float) -> None:
        """Rotate what has grown too long, remove what is old. Blocks on the disk."""
        for job in _entries(self._jobs):
            for attempt in _entries(Path(job.path)):
                try:
                    self._tidy_attempt(job, attempt, now_s)
                except OSError as error:  # gone meanwhile, or the disk is full: the next round tries again
                    _log.warning("output not tidied", where=attempt.path, why=str(error))
            _remove_if_empty(Path(job.path))

    def _tidy_attempt(self, job: os.DirEntry[str], attempt: os.DirEntry[str], now_s: float) -> None:
        if job.name.isdigit() and attempt.name == LOCAL_NAME:
            self._tidy_checkpoint(job, attempt, now_s)
        if not (job.name.isdigit() and attempt.name.isdigit()):
            return
        newest_s = attempt.stat(follow_symlinks=False).st_mtime
        has_live = False
        for entry in _entries(Path(attempt.path)):
            status = entry.stat(follow_symlinks=False)
            newest_s = max(newest_s, status.st_mtime)
            replica, _, suffix = entry.name.partition(".")
            if replica.isdigit():
                has_live = has_live or self.is_live(AssignmentKey(int(job.name), int(attempt.name), int(replica)))
            if suffix in STREAMS and stat.S_ISREG(status.st_mode) and status.st_size > ROTATE_BYTES:
                _rotate(Path(entry.path))
        if not has_live and now_s - newest_s > KEPT_S:
            shutil.rmtree(attempt.path, ignore_errors=True)

    def _tidy_checkpoint(self, job: os.DirEntry[str], checkpoint: os.DirEntry[str], now_s: float) -> None:
        """It stays as long as any attempt's output, and longer where it was written to since."""
        newest_s = checkpoint.stat(follow_symlinks=False).st_mtime
        for entry in _entries(Path(checkpoint.path)):
            newest_s = max(newest_s, entry.stat(follow_symlinks=False).st_mtime)
        if now_s - newest_s > KEPT_S and len(_entries(Path(job.path))) == 1:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _open_output(path: Path) -> BinaryIO:
    """For reading, never through a link and never waiting for a pipe that a job may have put there."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _rotate(path: Path) -> None:
    older = path.with_name(path.name + ".1")
    status = path.stat()
    shutil.copyfile(path, older, follow_symlinks=False)
    os.chmod(older, stat.S_IMODE(status.st_mode))
    if os.geteuid() == 0:
        os.chown(older, status.st_uid, status.st_gid)
    os.truncate(path, 0)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return


@dataclass(slots=True)
class _Follow:
    """One replica that somebody follows."""

    tenant: Tenant
    job: JobId
    replica: int
    #: Loop time at which it ends unless it is asked again.
    until_s: float
    #: The attempt being sent; None before the first.
    key: AssignmentKey | None
    #: Where to go on, by stream.
    offsets: dict[Stream, int] = field(default_factory=dict)


class Followers:
    """Sends what replicas write on `log.<tenant>.<job>.<replica>` while it is asked for, from the moment it is first
    asked; the last chunk says `ended`. One who wants what came before reads it by range up to there."""

    def __init__(self, bus: Bus, store: LogStore) -> None:
        self._bus = bus
        self._store = store
        self._follows: dict[tuple[JobId, int], _Follow] = {}
        self._wake = asyncio.Event()

    def follow(self, request: FollowLog) -> LogChunk:
        """Begin, or go on for longer. The answer says where the live part of `out` begins."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + min(max(request.for_ms, 0), FOLLOW_MS_MAX) / 1000
        place = (request.job, request.replica)
        follow = self._follows.get(place)
        if follow is not None:
            follow.until_s = max(follow.until_s, until_s)
        elif len(self._follows) >= FOLLOWERS_MAX:
            error = f"{FOLLOWERS_MAX} replicas are followed on this node already"
            return LogChunk(job=request.job, attempt=0, replica=request.replica, error=error)
        else:
            follow = _Follow(request.tenant, request.job, request.replica, until_s, self._store.newest(*place))
            if follow.key is not None:
                follow.offsets = {stream: self._store.size(follow.key, stream) for stream in STREAMS}
            self._follows[place] = follow
            self._wake.set()
        offset = follow.offsets.get("out", 0)
        attempt = follow.key.attempt if follow.key is not None else 0
        return LogChunk(job=request.job, attempt=attempt, replica=request.replica, offset=offset, size=offset)

    async def run(self) -> None:
        while True:
            while not self._follows:
                self._wake.clear()
                await self._wake.wait()
            for place, follow in list(self._follows.items()):
                try:
                    is_over = await self._look(follow)
                except BusError:
                    is_over = False  # it goes on from the same place once the bus is back
                if is_over or asyncio.get_running_loop().time() > follow.until_s:
                    del self._follows[place]
            await asyncio.sleep(LOOK_S)

    async def _look(self, follow: _Follow) -> bool:
        """Send what is new; whether that was the end."""
        key = self._store.newest(follow.job, follow.replica)
        if key != follow.key:  # a new attempt of it: from its beginning
            follow.key, follow.offsets = key, {}
        if key is None:
            return False
        is_live = self._store.is_live(key)  # before reading: what it wrote last is in the file by then
        is_behind = False
        for stream in STREAMS:
            is_behind |= await self._send(follow, key, stream)
        if is_live or is_behind:
            return False
        offset = follow.offsets.get("out", 0)
        end = LogChunk(job=key.job, attempt=key.attempt, replica=key.replica, offset=offset, size=offset, ended=True)
        await self._publish(follow, end)
        return True

    async def _send(self, follow: _Follow, key: AssignmentKey, stream: Stream) -> bool:
        """Send up to `LOOK_BYTES_MAX`; whether more is left."""
        size = self._store.size(key, stream)
        offset = follow.offsets.get(stream, 0)
        if size < offset:  # emptied by rotation
            offset = 0
        sent = 0
        while offset < size and sent < LOOK_BYTES_MAX:
            chunk = self._store.chunk(key, stream, offset, CHUNK_BYTES_MAX)
            if not chunk.data:
                break
            await self._publish(follow, chunk)
            offset += len(chunk.data)
            sent += len(chunk.data)
            follow.offsets[stream] = offset
        follow.offsets[stream] = offset
        return offset < size

    async def _publish(self, follow: _Follow, chunk: LogChunk) -> None:
        await self._bus.publish(subjects.log(follow.tenant, follow.job, follow.replica), encode(chunk))
