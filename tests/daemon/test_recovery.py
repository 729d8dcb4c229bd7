"""From snapshot and journal to the same state; and no start on what does not fit together."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_daemon import archive, recovery
from gpuyard_daemon.announce import Announcer
from gpuyard_daemon.archive import Archive
from gpuyard_daemon.config import DaemonConfig, JournalConfig
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import Cursors
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.history import History, HistoryFilter
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.recovery import Replay, Restored, StartRefused
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_daemon.upkeep import Upkeep
from gpuyard_protocol.bus.base import Bus
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import encode
from gpuyard_protocol.subjects import streams
from gpuyard_protocol.units import Memory
from support.builders import CoreHarness, node
from support.nats import NatsProcess

SETTINGS = CoreSettings(finished_kept_max=20, retired_per_turn=10)


class Rig:
    """A state directory and a journal, and a core whose turns go into it."""

    def __init__(self, bus: Bus, directory: Path) -> None:
        self.bus = bus
        self.store = SnapshotStore(directory / "snapshots", "main")
        self.archive = Archive(directory / "archive", 30)
        self.history = History(directory / "history.sqlite", 400)
        self.harness = CoreHarness(SETTINGS)
        self.journal = Journal(bus, "main", "writer")
        self._stored = 0

    async def open(self) -> None:
        await self.bus.ensure_stream(streams("main", 2**28).journal)
        await self.history.open()
        await self.journal.claim("host", 1)
        self.harness.join(node("n-1"))

    async def work(self, jobs: int) -> None:
        """Jobs that run and end, each turn in the journal."""
        for _ in range(jobs):
            number = self.harness.submit()
            self.harness.run(number)
            self.harness.ended(number)
        self.harness.settle(most_ms=20_000)
        for record in self.harness.records[self._stored :]:
            await self.journal.append(encode(record), f"1-{record.turn}")
        self._stored = len(self.harness.records)

    def upkeep(self) -> Upkeep:
        core = self.harness.core
        upkeep = Upkeep(
            JournalConfig(snapshot_records=1), self.journal, self.store, self.archive, self.history,
            Announcer(self.bus), core.snapshot, lambda: core.turn, 0,
        )  # fmt: skip
        upkeep.record_stored(self.journal.last_sequence, 1)
        return upkeep

    async def snapshot(self) -> None:
        upkeep = self.upkeep()
        upkeep.settled()
        await upkeep.close()
        assert upkeep.snapshots_made == 1

    async def restart(self) -> Scheduler:
        """What a daemon that starts now makes of the directory and the journal."""
        return (await self.restart_told(0))[0]

    async def restart_told(self, told: int) -> tuple[Scheduler, Replay]:
        """The same, where the world knows what was decided before the record at `told`."""
        restored = recovery.restore(self.store)
        core = Scheduler(SETTINGS) if restored.state is None else Scheduler.restore(restored.state, SETTINGS)
        journal = Journal(self.bus, "main", "reader")
        return core, await recovery.replay_and_claim(journal, core, self.history, restored, told=told)


@pytest.fixture
async def rig(nats_process: NatsProcess, tmp_path: Path) -> AsyncIterator[Rig]:
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_D")
    rig = Rig(bus, tmp_path)
    await rig.open()
    yield rig
    await rig.history.close()
    await bus.close()


async def test_replay_alone_gives_the_same_state(rig: Rig) -> None:
    await rig.work(30)
    assert (await rig.restart()).digest() == rig.harness.core.digest()


async def test_what_the_world_knows_is_not_made_again(rig: Rig) -> None:
    await rig.work(10)
    _, everything = await rig.restart_told(0)
    told = rig.journal.last_sequence - 2
    core, replay = await rig.restart_told(told)
    assert core.digest() == rig.harness.core.digest()
    assert [notices for sequence, notices in replay.recent if sequence < told and notices] == []
    assert [entry for entry in replay.recent if entry[0] >= told] == [
        entry for entry in everything.recent if entry[0] >= told
    ]
    assert any(notices for sequence, notices in everything.recent if sequence >= told)


async def test_snapshot_and_replay_give_the_same_state(rig: Rig) -> None:
    await rig.work(10)
    await rig.snapshot()
    await rig.work(10)
    assert recovery.restore(rig.store).sequence > 0
    assert (await rig.restart()).digest() == rig.harness.core.digest()


async def test_a_broken_newest_snapshot_costs_a_longer_replay_and_nothing_else(rig: Rig) -> None:
    for _ in range(3):
        await rig.work(5)
        await rig.snapshot()
    await rig.work(5)
    _, newest = rig.store.paths()[0]
    newest.write_bytes(newest.read_bytes()[:-10])
    assert (await rig.restart()).digest() == rig.harness.core.digest()


async def test_pruning_keeps_what_the_older_snapshot_needs_and_archives_the_rest(rig: Rig) -> None:
    for _ in range(3):
        await rig.work(5)
        rig.history.take([], rig.journal.last_sequence)
        await rig.snapshot()
    older = rig.store.paths()[-1][0]
    state = await rig.bus.stream_state(rig.journal.stream)
    first = await rig.bus.get_message(rig.journal.stream, older)
    assert first is None
    assert await rig.bus.get_message(rig.journal.stream, older + 1) is not None
    assert state.messages < rig.journal.last_sequence
    turns = []
    for path in sorted(rig.archive.directory.glob("journal-*.gz")):
        turns += [json.loads(line)["record"]["turn"] for line in _lines(path)]
    assert turns == list(range(1, len(turns) + 1))
    assert len(turns) == rig.store.read_header(older).turn
    assert list(rig.archive.directory.glob("*.snap"))


def _lines(segment: Path) -> list[bytes]:
    return gzip.decompress(segment.read_bytes()).splitlines()


async def test_the_archive_is_bounded_in_bytes_and_read_in_pieces(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SEGMENT_BYTES_MAX", 2000)
    await rig.work(20)
    kept = Archive(rig.archive.directory, 30, 3000)
    last = rig.journal.last_sequence
    await kept.keep(rig.journal, 1, last)
    segments = sorted(kept.directory.glob("journal-*.gz"))
    turns = [json.loads(line)["record"]["turn"] for path in segments for line in _lines(path)]
    assert turns == list(range(1, len(turns) + 1))
    assert (len(segments) > 3, kept.end()) == (True, last)
    for age, path in enumerate(reversed(segments), 1):
        os.utime(path, (time.time() - age, time.time() - age))
    kept.forget_old()
    left = sorted(kept.directory.glob("journal-*.gz"))
    assert 0 < sum(path.stat().st_size for path in left) <= 3000
    assert left == segments[-len(left) :]


async def test_retired_jobs_reach_the_history_even_when_it_was_left_behind(rig: Rig) -> None:
    """The history was not written when the daemon died; the snapshot is newer than what it has."""
    await rig.work(40)
    await rig.snapshot()
    assert await rig.history.jobs(HistoryFilter()) == []
    await rig.restart()
    retired = await rig.history.jobs(HistoryFilter(limit=500))
    assert [view.job for view in retired] == list(range(len(retired), 0, -1))
    assert len(retired) >= 10


async def test_a_journal_shorter_than_the_snapshot_is_refused(rig: Rig) -> None:
    await rig.work(5)
    rig.store.write(rig.journal.last_sequence + 5, 99, rig.harness.core.snapshot())
    rig.store.reveal(rig.journal.last_sequence + 5)
    with pytest.raises(StartRefused, match="was the NATS store replaced"):
        await rig.restart()


async def test_a_missing_part_of_the_journal_is_refused(rig: Rig) -> None:
    await rig.work(20)
    await rig.journal.prune(rig.journal.last_sequence - 3)
    with pytest.raises(StartRefused, match="a part is missing"):
        await rig.restart()


async def test_a_record_that_cannot_be_read_is_refused(rig: Rig) -> None:
    await rig.work(2)
    await rig.journal.append(b'{"turn": "x"}', "1-x")
    with pytest.raises(StartRefused, match="cannot be read"):
        await rig.restart()


async def test_a_record_of_a_later_format_is_refused(rig: Rig) -> None:
    """Reading half of it would be worse than not starting."""
    await rig.work(2)
    turn = rig.harness.core.turn + 1
    later = {"turn": turn, "now_ms": 1, "cursors": [0, 0], "facts": [], "v": 99}
    await rig.journal.append(encode(later), "1-x")
    with pytest.raises(StartRefused, match="has format 99, and this version reads up to 1"):
        await rig.restart()


async def test_streams_that_were_made_anew_are_refused(rig: Rig) -> None:
    names = streams("main", 2**28)
    await rig.bus.ensure_stream(names.submissions)
    await rig.bus.ensure_stream(names.reports)
    await recovery.check_cursors(rig.bus, names, Cursors(0, 0))
    with pytest.raises(StartRefused, match="it was made anew"):
        await recovery.check_cursors(rig.bus, names, Cursors(5, 0))


async def test_a_server_without_room_for_the_streams_is_refused_with_what_to_do(rig: Rig, tmp_path: Path) -> None:
    config = DaemonConfig(state=str(tmp_path), journal=JournalConfig(budget=Memory.parse("1Ti")))
    with pytest.raises(StartRefused, match=r"1024Gi together\. Set `budget`"):
        await recovery.ensure_streams(rig.bus, config)
    fitting = DaemonConfig(state=str(tmp_path), journal=JournalConfig(budget=Memory.parse("512Mi")))
    specs = await recovery.ensure_streams(rig.bus, fitting)
    assert await recovery.ensure_streams(rig.bus, fitting) == specs
    assert sum(spec.max_bytes for spec in specs) <= 512 * 2**20


async def test_a_stream_that_was_made_lazy_stays_so_and_is_no_hindrance(rig: Rig) -> None:
    """How a stream writes to the disk cannot be changed; a yard of before has other streams like that."""
    events = streams("main", 2**28).events
    for first, then in ((False, True), (True, False)):
        spec = dataclasses.replace(events, name=f"EVT_{first}", subjects=(f"lazy.{first}.>",), is_lazy=first)
        await rig.bus.ensure_stream(spec)
        await rig.bus.ensure_stream(dataclasses.replace(spec, is_lazy=then, max_bytes=2**20))
        assert (await rig.bus.stream_state(spec.name)).max_bytes == 2**20


async def test_a_stream_that_is_none_of_the_yards_is_refused_with_its_name(rig: Rig, tmp_path: Path) -> None:
    body = {"name": "EVT_main", "subjects": ["evt.>"], "storage": "memory", "retention": "limits", "num_replicas": 1}
    await rig.bus.request("$JS.API.STREAM.CREATE.EVT_main", encode(body))
    config = DaemonConfig(state=str(tmp_path), journal=JournalConfig(budget=Memory.parse("256Mi")))
    with pytest.raises(StartRefused, match="EVT_main was made with settings that cannot be changed"):
        await recovery.ensure_streams(rig.bus, config)


def test_an_empty_directory_begins_an_empty_yard(tmp_path: Path) -> None:
    assert recovery.restore(SnapshotStore(tmp_path, "main")) == Restored(None, 0)
