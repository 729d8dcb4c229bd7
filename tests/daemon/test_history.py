"""The history: derived, so writing twice changes nothing, and it says up to where it is whole."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon import history_copy
from gpuyard_daemon.history import History, HistoryFilter
from gpuyard_daemon.history_copy import HistoryCopy
from gpuyard_daemon.leadership import Presence
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.jobs import JobView

DAY_MS = 86_400_000


def view(job: int, *, tenant: str = "acme", state: str = "succeeded", ended_ms: int = 500 * DAY_MS) -> JobView:
    plain = JobView(
        job=job, tenant=tenant, user="alice", name="n", state="failed", submission_id=f"s{job}", priority=0,
        replicas=1, wants="1×GPU", submitted_ms=1, ended_ms=ended_ms,
    )  # fmt: skip
    return msgspec.structs.replace(plain, state=state)


@pytest.fixture
async def history(tmp_path: Path) -> AsyncIterator[History]:
    history = History(tmp_path / "history.sqlite", 400)
    await history.open()
    yield history
    await history.close()


async def numbers(history: History, wanted: HistoryFilter) -> list[int]:
    return [found.job for found in await history.jobs(wanted)]


async def test_jobs_are_found_by_number_and_listed_newest_first(history: History) -> None:
    history.take([view(1), view(2, tenant="globex"), view(3, state="failed")], 10)
    assert await history.job(2) == view(2, tenant="globex")
    assert await history.job(9) is None
    assert await numbers(history, HistoryFilter()) == [3, 2, 1]
    assert await numbers(history, HistoryFilter(tenant="acme")) == [3, 1]
    assert await numbers(history, HistoryFilter(states=("failed",))) == [3]
    assert await numbers(history, HistoryFilter(below=3, limit=1)) == [2]


async def test_what_was_taken_before_is_taken_once(history: History) -> None:
    history.take([view(1)], 10)
    history.take([view(1, state="failed")], 10)
    await history.flush()
    assert await history.job(1) == view(1)
    assert history.through == 10


async def test_it_knows_after_a_restart_how_far_it_came(tmp_path: Path) -> None:
    for first in (1, 101):
        history = History(tmp_path / "history.sqlite", 400)
        await history.open()
        assert history.through == first - 1
        history.take([view(first)], first)
        history.take([], first + 99)
        await history.close()
    history = History(tmp_path / "history.sqlite", 400)
    await history.open()
    assert await numbers(history, HistoryFilter()) == [101, 1]
    await history.close()


async def test_old_jobs_are_forgotten(history: History) -> None:
    history.take([view(1, ended_ms=DAY_MS), view(2, ended_ms=500 * DAY_MS)], 1)
    await history.flush()
    await history.forget_old(500 * DAY_MS)
    assert await numbers(history, HistoryFilter()) == [2]


async def test_what_could_not_be_written_is_written_later_and_no_row_is_passed_over(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, fails = History._write, [True]

    def full(self: History, views: list[JobView], through: int) -> None:
        if fails:
            raise sqlite3.OperationalError("database or disk is full")
        write(self, views, through)

    monkeypatch.setattr(History, "_write", full)
    history.take([view(1)], 10)
    await history.flush()
    assert history.through == 0
    fails.clear()
    history.take([view(2)], 20)
    await history.flush()
    assert history.through == 20
    assert await numbers(history, HistoryFilter()) == [2, 1]


async def test_while_the_disk_takes_nothing_so_many_rows_are_kept_and_the_journal_keeps_the_rest(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: History, views: list[JobView], through: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(History, "_write", full)
        patched.setattr("gpuyard_daemon.history.WAITING_ROWS_MAX", 3)
        for number in range(1, 10):
            history.take([view(number)], number)
        await history.flush()
    await history.flush()
    # What the journal may be pruned to: the rows up to there are on disk, and no others are claimed to be.
    assert history.through == 3
    assert await numbers(history, HistoryFilter()) == [3, 2, 1]


# --- another daemon's -------------------------------------------------------------------------------------------------


async def two_daemons(tmp_path: Path) -> AsyncIterator[tuple[History, HistoryCopy]]:
    broker = MemoryBroker()
    for name in ("here", "there"):
        history = History(tmp_path / name / "history.sqlite", 400)
        await history.open()
        presence = Presence(MemoryBus(broker), name)
        await presence.open()
        yield history, HistoryCopy(history, presence)


async def test_what_another_daemon_knows_is_taken_over_whatever_is_missing_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_copy, "ANSWER_BYTES", 2000)
    monkeypatch.setattr(history_copy, "PAUSE_S", 0.0)
    today_ms = time.time_ns() // 1_000_000
    (here, copy_here), (there, copy_there) = [pair async for pair in two_daemons(tmp_path)]
    jobs = [*range(9_990, 10_010), *range(30_000, 30_005)]
    here.take([view(job, ended_ms=today_ms) for job in jobs if job != 9_995], 500)
    there.take([view(job, ended_ms=today_ms) for job in jobs if job % 2], 700)
    too_old = view(40_000, ended_ms=DAY_MS)
    here.take([too_old], 501)
    await here.flush()
    await there.flush()

    assert await copy_there.copy_from("here")
    assert await copy_here.copy_from("there")
    for history in (here, there):
        assert await numbers(history, HistoryFilter(below=40_000)) == sorted(jobs, reverse=True)
    assert await there.job(40_000) is None
    assert (here.through, there.through) == (501, 700)
    await here.close()
    await there.close()


async def test_a_daemon_that_knows_of_no_such_question_is_asked_again_later(tmp_path: Path) -> None:
    (_, copy), _ = [pair async for pair in two_daemons(tmp_path)]
    assert not await copy.copy_from("nobody")


async def test_the_oldest_jobs_go_before_their_time_where_they_take_too_much_room(tmp_path: Path) -> None:
    history = History(tmp_path / "history.sqlite", 400, 2**20)
    await history.open()
    for first in range(1, 2001, 100):
        history.take([msgspec.structs.replace(view(job), name="n" * 4000) for job in range(first, first + 100)], first)
        await history.flush()
    kept = await numbers(history, HistoryFilter(limit=5000))
    assert 100 < len(kept) < 300
    assert kept == list(range(2000, 2000 - len(kept), -1))
    assert history.through == 1901
    await history.close()
    assert (tmp_path / "history.sqlite").stat().st_size < 4 * 2**20
