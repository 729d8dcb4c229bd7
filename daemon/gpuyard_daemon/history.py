"""The jobs of the past: what left the core, in SQLite beside the daemon.

Derived from the journal (`JobRetired` carries a job's last view), so it can be behind but never wrong: rows are keyed
by job and written again without harm, and `through` says up to which journal sequence everything is in. A restart
feeds it again from there; the journal is not pruned beyond it. What the journal had lost before this host first
followed it comes from another daemon's history (`history_copy`).

All of SQLite runs in one thread of its own: a turn never waits for this disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.jobs import JobView
from gpuyard_protocol.names import JobId, Tenant

log = structlog.get_logger("history")

T = TypeVar("T")

#: Of its jobs, what goes at once when there are too many.
TRIM_PART = 50
_PAGES = ("page_count", "freelist_count", "page_size")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    service TEXT NOT NULL,
    state TEXT NOT NULL,
    ended_ms INTEGER NOT NULL,
    view BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS jobs_of_tenant ON jobs (tenant, job);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (ended_ms);
CREATE TABLE IF NOT EXISTS place (one INTEGER PRIMARY KEY CHECK (one = 1), through INTEGER NOT NULL);
"""
SCHEMA_VERSION = 1
#: Rows that wait for the thread at most before they are written in one transaction.
BATCH_ROWS = 500
#: Job numbers that are counted together where two histories are compared.
SPAN_JOBS = 10_000
#: Rows kept while the disk takes none; beyond that the journal keeps what is missing.
WAITING_ROWS_MAX = 50_000
_DAY_MS = 86_400_000


class HistoryFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows, newest first. Empty or 0: any."""

    tenant: Tenant | None = None
    user: str = ""
    service: str = ""
    states: tuple[str, ...] = ()
    #: Only jobs with a smaller number.
    below: JobId = 0
    limit: int = 100


class History:
    def __init__(self, path: Path, keep_days: int, most_bytes: int = 2**62) -> None:
        """`most_bytes`: where the file's rows take more, the oldest jobs go before their time."""
        self._path = path
        self._keep_ms = keep_days * _DAY_MS
        self._most_bytes = most_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="history")
        self._connection: sqlite3.Connection | None = None
        self._waiting: list[JobView] = []
        #: The last write failed: the next try is the next `flush`.
        self._is_failing = False
        #: The disk took nothing for so long that no more is kept here.
        self._has_given_up = False
        #: Journal sequence up to which everything was handed over, and up to which it is on disk.
        self._seen = 0
        self.through = 0
        self._writing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self.through = self._seen = await self._run(self._open)

    async def close(self) -> None:
        await self.flush()
        await self._run(self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # -- writing ---------------------------------------------------------------------------------------------------

    def take(self, views: Sequence[JobView], sequence: int) -> None:
        """Take over what the record at `sequence` retired (possibly nothing)."""
        if sequence <= self._seen:
            return
        if len(self._waiting) >= WAITING_ROWS_MAX:
            self._give_up()
        if self._has_given_up:
            return
        self._seen = sequence
        if views:
            self._waiting.extend(views)
            if len(self._waiting) >= BATCH_ROWS and self._writing is None and not self._is_failing:
                self._start_writing()

    def _give_up(self) -> None:
        """Too much waits for a disk that takes nothing: the next start feeds it from the journal, which keeps it."""
        if not self._has_given_up:
            self._has_given_up = True
            log.error("history.given-up", waiting=len(self._waiting), path=str(self._path))

    def _start_writing(self) -> None:
        self._writing = asyncio.get_running_loop().create_task(self._write_all(), name="history")

    async def _write_all(self) -> None:
        views: list[JobView] = []
        try:
            while self._waiting or self.through < self._seen:
                views, self._waiting = self._waiting, []
                seen = self._seen
                await self._run(self._write, views, seen)
                self.through, views = seen, []
                self._is_failing = False
        except sqlite3.Error as error:
            # Nothing is lost: they are tried again with the next, and `through` stays, so the journal keeps them.
            self._waiting[:0] = views
            self._is_failing = True
            log.error("history.unwritten", error=str(error), path=str(self._path), waiting=len(self._waiting))
        finally:
            self._writing = None

    async def flush(self) -> None:
        """Everything handed over so far is on disk when this returns (or an error was logged)."""
        if self._writing is None and (self._waiting or self.through < self._seen):
            self._start_writing()
        if self._writing is not None:
            await self._writing

    async def forget_old(self, now_ms: int) -> None:
        await self._run(self._forget, now_ms - self._keep_ms)

    # -- reading ---------------------------------------------------------------------------------------------------

    async def job(self, job: JobId) -> JobView | None:
        waiting = next((view for view in self._waiting if view.job == job), None)
        return waiting or await self._run(self._job, job)

    async def jobs(self, wanted: HistoryFilter) -> list[JobView]:
        await self.flush()
        return await self._run(self._jobs, wanted)

    # -- other histories --------------------------------------------------------------------------------------------

    async def counts(self) -> list[tuple[int, int, int]]:
        """Of each stretch of `SPAN_JOBS` job numbers with rows: its number, how many, and the sum of their numbers."""
        await self.flush()
        return await self._run(self._counts)

    async def stored(self, after: JobId, below: JobId, bytes_max: int) -> tuple[list[bytes], JobId]:
        """Views as they are stored, in the order of their jobs; and the last job looked at, `below` for the end."""
        return await self._run(self._stored, after, below, bytes_max)

    async def copy(self, views: Sequence[bytes], ended_after_ms: int) -> int:
        """Take over what another daemon's history has of ended jobs, without a place in the journal; how many were new.

        What is here already stays as it is, and what would be too old to be kept stays away.
        """
        return await self._run(self._copy, views, ended_after_ms)

    @property
    def keep_ms(self) -> int:
        return self._keep_ms

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        # Durable enough: what a power cut takes is fed again from the journal, because `through` goes with it.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self._connection = connection
        row = connection.execute("SELECT through FROM place").fetchone()
        return int(row[0]) if row else 0

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _require(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the history is closed")
        return self._connection

    def _write(self, views: list[JobView], through: int) -> None:
        rows = [_row(view, encode(view)) for view in views]
        connection = self._require()
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            connection.execute("INSERT OR REPLACE INTO place VALUES (1, ?)", (through,))
        except sqlite3.Error:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        self._trim()

    def _trim(self) -> None:
        """The oldest jobs go where there is too much; room that they leave in the file is used again."""
        connection = self._require()
        while True:
            pages, free, size = [int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in _PAGES]
            first, last = connection.execute("SELECT MIN(job), MAX(job) FROM jobs").fetchone()
            if (pages - free) * size <= self._most_bytes or first is None:
                return
            below = first + max(1, (last - first) // TRIM_PART)
            gone = connection.execute("DELETE FROM jobs WHERE job < ?", (below,)).rowcount
            log.warning("history.trimmed", jobs=gone, below=below, most_mib=self._most_bytes // 2**20)

    def _counts(self) -> list[tuple[int, int, int]]:
        question = "SELECT job / ?, COUNT(*), SUM(job) FROM jobs GROUP BY 1 ORDER BY 1"
        return [tuple(row) for row in self._require().execute(question, (SPAN_JOBS,))]

    def _stored(self, after: JobId, below: JobId, bytes_max: int) -> tuple[list[bytes], JobId]:
        question = "SELECT job, view FROM jobs WHERE job > ? AND job < ? ORDER BY job"
        views: list[bytes] = []
        for job, view in self._require().execute(question, (after, below)):
            views.append(view)
            bytes_max -= len(view)
            if bytes_max <= 0:
                return views, job
        return views, below

    def _copy(self, views: Sequence[bytes], ended_after_ms: int) -> int:
        rows = [_row(view, data) for data in views if (view := _view(data)) and view.ended_ms >= ended_after_ms]
        connection = self._require()
        before = connection.total_changes
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany("INSERT OR IGNORE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return connection.total_changes - before

    def _forget(self, before_ms: int) -> None:
        self._require().execute("DELETE FROM jobs WHERE ended_ms < ?", (before_ms,))

    def _job(self, job: JobId) -> JobView | None:
        row = self._require().execute("SELECT view FROM jobs WHERE job = ?", (job,)).fetchone()
        return _view(row[0]) if row else None

    def _jobs(self, wanted: HistoryFilter) -> list[JobView]:
        where, values = ["1"], list[str | int]()
        for column, value in (("tenant", wanted.tenant), ("user", wanted.user), ("service", wanted.service)):
            if value:
                where.append(f"{column} = ?")
                values.append(value)
        if wanted.below:
            where.append("job < ?")
            values.append(wanted.below)
        if wanted.states:
            where.append(f"state IN ({', '.join('?' * len(wanted.states))})")
            values.extend(wanted.states)
        rows = self._require().execute(
            f"SELECT view FROM jobs WHERE {' AND '.join(where)} ORDER BY job DESC LIMIT ?", (*values, wanted.limit)
        )
        return [view for row in rows if (view := _view(row[0])) is not None]


def _row(view: JobView, data: bytes) -> tuple[object, ...]:
    return view.job, view.tenant, view.user, view.service, view.state, view.ended_ms, data


def _view(data: bytes) -> JobView | None:
    """A stored view; None if a much later version wrote it."""
    try:
        return decode(JobView, data, max_bytes=16 * 1024 * 1024)
    except Malformed as error:
        log.error("history.unreadable", error=str(error))
        return None
