"""The ledger: what is durable is found again, and nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpuyard_agent.core import AgentCore
from gpuyard_agent.core.actions import Turn
from gpuyard_agent.core.events import (
    Event,
    OrdersReceived,
    PartitionReady,
    PartitionUndone,
    ProcessesListed,
    ProcessExited,
    ProcessStarted,
    ReportsDelivered,
    SyncReceived,
)
from gpuyard_agent.ledger import Ledger, LedgerContent, LedgerUnusable
from gpuyard_protocol.codec import encode
from gpuyard_protocol.nodes import Order, OrderBatch, Sync
from support.agents import start_order

NODE = "node-1"
START = start_order(17, "true")


class Keeper:
    """A core whose turns are committed, as the runtime does it."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path, NODE)
        content = self.ledger.load(0)
        self.core = AgentCore(NODE, "i", "boot", counters=content.counters, live=content.live, closed=content.closed)

    async def tell(self, *events: Event) -> Turn:
        turn = self.core.handle(events, 1_000, 2_000)
        if turn.must_commit:
            reports = [(number, encode(report)) for number, report in turn.reports]
            await self.ledger.commit(turn, reports, self.core.counters)
        else:
            self.ledger.postpone(turn, self.core.counters)
        return turn

    async def order(self, first: int, *orders: Order) -> Turn:
        batch = OrderBatch(node=NODE, instance="i", epoch=3, first=first, orders=orders)
        return await self.tell(OrdersReceived(1, batch))


def reopened(path: Path) -> LedgerContent:
    ledger = Ledger(path, NODE)
    content = ledger.load(0)
    ledger.close()
    return content


def table(path: Path, name: str) -> Sequence[tuple[object, ...]]:
    with sqlite3.connect(path) as db:
        rows = db.execute(f"SELECT * FROM {name}").fetchall()
    db.close()
    return rows


async def test_an_assignment_is_found_as_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    keeper = Keeper(path)
    await keeper.order(1, START)
    await keeper.tell(PartitionReady(START.key))
    await keeper.tell(ProcessStarted(START.key, 321, 5_000))
    keeper.ledger.close()
    content = reopened(path)
    (assignment,) = content.live
    assert (assignment.key, assignment.state, assignment.pid) == (START.key, "running", 321)
    assert assignment.start == START
    assert (content.counters.epoch, content.counters.applied, content.counters.reported) == (3, 1, 1)
    assert [number for number, _ in content.outbox] == [1]


async def test_an_end_leaves_its_key_and_its_report(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    keeper = Keeper(path)
    await keeper.order(1, START)
    await keeper.tell(PartitionReady(START.key), ProcessStarted(START.key, 321, 5_000))
    await keeper.tell(ProcessExited(START.key), PartitionUndone(START.key))
    keeper.ledger.close()
    content = reopened(path)
    assert content.live == []
    assert content.closed[START.key].report == 2
    assert content.closed[START.key].delivered_ms is None
    assert [number for number, _ in content.outbox] == [1, 2]


async def test_delivered_reports_go_with_the_next_sweep_and_numbers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    keeper = Keeper(path)
    await keeper.order(1, START)
    await keeper.tell(PartitionReady(START.key), ProcessStarted(START.key, 321, 5_000))
    await keeper.tell(ReportsDelivered(1))
    assert keeper.ledger.has_postponed
    await keeper.ledger.sweep()
    assert not keeper.ledger.has_postponed
    keeper.ledger.close()
    content = reopened(path)
    assert content.outbox == []
    assert (content.counters.reported, content.counters.delivered) == (1, 1)


async def test_a_key_that_may_be_forgotten_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    keeper = Keeper(path)
    await keeper.order(1, START)
    await keeper.tell(PartitionReady(START.key), ProcessExited(START.key, started_ms=1), PartitionUndone(START.key))
    await keeper.tell(ReportsDelivered(2))
    await keeper.tell(SyncReceived(1, Sync(node=NODE, instance="i", epoch=3, n=1, desired=())))
    await keeper.ledger.sweep()
    keeper.ledger.close()
    assert table(path, "ended") == []


async def test_what_was_decided_but_not_committed_is_not_there(tmp_path: Path) -> None:
    """Killed before the commit: nobody was answered, and the order comes again."""
    path = tmp_path / "ledger.sqlite"
    keeper = Keeper(path)
    batch = OrderBatch(node=NODE, instance="i", epoch=3, first=1, orders=(START,))
    keeper.core.handle([OrdersReceived(1, batch)], 1_000, 2_000)
    keeper.ledger.close()
    content = reopened(path)
    assert (content.live, content.counters.applied) == ([], 0)


async def test_a_commit_is_synchronous_and_in_wal_mode(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    keeper = Keeper(path)
    await keeper.tell(ProcessesListed((), at_start=True))
    db = keeper.ledger._db
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    keeper.ledger.close()


def test_a_ledger_of_another_node_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path, NODE).close()
    with pytest.raises(LedgerUnusable, match="belongs to node 'node-1', not to 'node-2'"):
        Ledger(path, "node-2")


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(LedgerUnusable, match=r"ledger\.sqlite"):
        Ledger(path, NODE)


def test_a_ledger_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path, NODE).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(LedgerUnusable, match="written by a later agent"):
        Ledger(path, NODE)


async def test_a_ledger_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "ledger.sqlite")
    keeper.ledger._db.execute("PRAGMA query_only=1")
    with pytest.raises(LedgerUnusable, match="readonly"):
        await keeper.order(1, START)
    keeper.ledger.close()
