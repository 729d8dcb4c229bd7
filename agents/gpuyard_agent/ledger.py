"""The ledger: what the agent must still know after it, or its node, was killed at any moment.

One SQLite file in WAL mode with `synchronous=FULL`: when `commit` returns, the turn is on the disk. One commit carries
everything that came in while the one before it was under way, so the price of the fsync is shared under load. It runs
in a thread of its own, and the loop goes on meanwhile.

    meta          node id, and the counters that must never go back
    assignments   one row for each that has not ended, as JSON; the other columns are for people
    ended         keys that will never start again, with the number of their `Ended` report
    outbox        reports not yet known to be delivered

The path of a start costs one fsync, the intent; the row `running` rides with the `Started` report, since after a crash
in between the launcher still says that the process runs. What was delivered is deleted with the next commit, or a
second later: forgetting that costs one repeated report, which the daemon skips.

What the outbox may hold on disk is bounded by the node itself: reports come from orders, and orders need the same
connection; at most three for each assignment held, one `Joined`, and one more for each card that broke under a job.

A ledger that cannot be written (a full disk) ends the agent: its state in memory is then ahead of what is durable. The
order or report it was writing is then as if it had never been: no order was answered, nothing was started for it, and
nothing was reported. Jobs go on; the next agent that can write takes them over and hears of their ends.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gpuyard_agent.core.actions import Turn
from gpuyard_agent.core.book import Counters
from gpuyard_agent.core.model import Assignment, Closed
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import AssignmentKey, NodeId

#: Of the tables; a ledger written by a later agent is refused.
FORMAT = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS assignments (
    key TEXT PRIMARY KEY, state TEXT, pid INTEGER, port INTEGER, boot_id TEXT, body BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ended (key TEXT PRIMARY KEY, report INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (n INTEGER PRIMARY KEY, body BLOB);
"""
_PUT_META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
_PUT_ASSIGNMENT = "INSERT OR REPLACE INTO assignments VALUES (?, ?, ?, ?, ?, ?)"
_DROP_ASSIGNMENT = "DELETE FROM assignments WHERE key = ?"
_PUT_ENDED = "INSERT OR REPLACE INTO ended VALUES (?, ?)"
_DROP_ENDED = "DELETE FROM ended WHERE key = ?"
_PUT_REPORT = "INSERT INTO outbox VALUES (?, ?)"
_DROP_REPORTS = "DELETE FROM outbox WHERE n <= ?"

_ASSIGNMENT = msgspec.json.Decoder(Assignment)


class LedgerUnusable(Exception):
    """The ledger cannot be read or written; the text says which file and why."""


@dataclass(slots=True)
class LedgerContent:
    """What an agent starts from."""

    counters: Counters
    live: list[Assignment]
    closed: dict[AssignmentKey, Closed]
    #: Undelivered reports: (number, encoded report), in order.
    outbox: list[tuple[int, bytes]]


@dataclass(slots=True)
class _Write:
    """One transaction, encoded: assignments go on changing while it is written."""

    statements: list[tuple[str, Sequence[tuple[Any, ...]]]] = field(default_factory=list)

    def add(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self.statements.append((sql, rows))


class Ledger:
    """One agent's; whoever opens it holds the state directory's lock."""

    def __init__(self, path: Path, node: NodeId) -> None:
        """Made on first use. Raises `LedgerUnusable`, also for the ledger of another node."""
        self._path = path
        self._db = self._open(path)
        #: Made at random with the file: under another one, reports are numbered from 1 again.
        self.id = ""
        self._claim(node)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._written = Counters()
        #: Keys whose `ended` row may go, with the next commit.
        self._pruned: list[AssignmentKey] = []
        self._counters = Counters()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        try:
            # The one connection is used by one thread at a time: the loop's before `commit` is first called, then
            # the ledger's own.
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise LedgerUnusable(f"{path}: written by a later agent (format {version}, this one knows {FORMAT})")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={FORMAT}")
        except sqlite3.Error as error:
            raise LedgerUnusable(f"{path}: {error}") from error
        return db

    def _claim(self, node: NodeId) -> None:
        try:
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('node', ?)", (node,))
            (owner,) = self._db.execute("SELECT value FROM meta WHERE name = 'node'").fetchone()
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('ledger', ?)", (secrets.token_hex(8),))
            (self.id,) = self._db.execute("SELECT value FROM meta WHERE name = 'ledger'").fetchone()
        except sqlite3.Error as error:
            raise LedgerUnusable(f"{self._path}: {error}") from error
        if owner != node:
            raise LedgerUnusable(f"{self._path}: belongs to node {owner!r}, not to {node!r}")

    def load(self, now_ms: int) -> LedgerContent:
        """Everything in it. `now_ms`: the node's clock, from which delivered keys are kept for their time again."""
        try:
            meta = dict(self._db.execute("SELECT name, value FROM meta"))
            rows = self._db.execute("SELECT body FROM assignments").fetchall()
            ended = self._db.execute("SELECT key, report FROM ended ORDER BY report").fetchall()
            outbox = self._db.execute("SELECT n, body FROM outbox ORDER BY n").fetchall()
            live = sorted((_ASSIGNMENT.decode(body) for (body,) in rows), key=lambda assignment: assignment.key)
            counters = Counters(
                epoch=int(meta.get("epoch", 0)),
                applied=int(meta.get("applied", 0)),
                reported=int(meta.get("reported", 0)),
            )
            counters.delivered = outbox[0][0] - 1 if outbox else counters.reported
            closed = {
                AssignmentKey.parse(key): Closed(report=n, delivered_ms=now_ms if n <= counters.delivered else None)
                for key, n in ended
            }
        except (sqlite3.Error, msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise LedgerUnusable(f"{self._path}: {error}") from error
        self._counters = msgspec.structs.replace(counters)
        self._written = msgspec.structs.replace(counters)
        return LedgerContent(counters, live, closed, outbox)

    async def commit(self, turn: Turn, reports: Sequence[tuple[int, bytes]], counters: Counters) -> None:
        """Durable when it returns. `reports`: the turn's, encoded. Raises `LedgerUnusable`."""
        write = self._encode(turn, reports, counters)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._run, write)

    def postpone(self, turn: Turn, counters: Counters) -> None:
        """Take note of what may become durable some time later."""
        self._pruned.extend(turn.pruned)
        self._counters = msgspec.structs.replace(counters)

    @property
    def has_postponed(self) -> bool:
        return bool(self._pruned) or self._counters.delivered > self._written.delivered

    async def sweep(self) -> None:
        """Write what was postponed."""
        if self.has_postponed:
            await self.commit(Turn(), (), self._counters)

    def close(self) -> None:
        """After the last commit."""
        self._thread.shutdown(wait=True)
        self._db.close()

    def _encode(self, turn: Turn, reports: Sequence[tuple[int, bytes]], counters: Counters) -> _Write:
        write = _Write()
        write.add(_PUT_ASSIGNMENT, [_row(assignment) for assignment in turn.saved.values()])
        write.add(_DROP_ASSIGNMENT, [(str(key),) for key in turn.closed])
        write.add(_PUT_ENDED, [(str(key), number) for key, number in turn.closed.items()])
        write.add(_PUT_REPORT, reports)
        self.postpone(turn, counters)
        write.add(_DROP_ENDED, [(str(key),) for key in self._pruned])
        self._pruned = []
        written = self._written
        meta = [("epoch", counters.epoch), ("applied", counters.applied), ("reported", counters.reported)]
        changed = [pair for pair in meta if pair[1] != getattr(written, pair[0])]
        write.add(_PUT_META, changed)
        if counters.delivered > written.delivered:
            write.add(_DROP_REPORTS, [(counters.delivered,)])
        self._written = msgspec.structs.replace(counters)
        return write

    def _run(self, write: _Write) -> None:
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            for sql, rows in write.statements:
                if len(rows) == 1:
                    db.execute(sql, rows[0])
                else:
                    db.executemany(sql, rows)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise LedgerUnusable(f"{self._path}: {error}") from error


def _row(assignment: Assignment) -> tuple[str, str, int, int, str, bytes]:
    key = str(assignment.key)
    return key, assignment.state, assignment.pid, assignment.port, assignment.boot_id, encode(assignment)
