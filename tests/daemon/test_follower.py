"""A standby's core is the leader's twin at every record, whatever it does meanwhile to stay ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon.config import DaemonConfig, JournalConfig
from gpuyard_daemon.health import Health
from gpuyard_daemon.history import History
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.leadership import GONE_AFTER_S, SILENT_AFTER_S, Presence, Vigil, newest_claim
from gpuyard_daemon.recovery import PartMissing
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_daemon.standby import Follower, Ground
from gpuyard_protocol.bus.base import Bus, StoredMessage
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import encode
from gpuyard_protocol.service.sd_notify import Notifier
from gpuyard_protocol.subjects import streams
from support.builders import CoreHarness, job, node
from support.daemon import until
from support.nats import NatsProcess


@pytest.fixture
async def bus(nats_process: NatsProcess) -> AsyncIterator[Bus]:
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_D")
    await bus.ensure_stream(streams("main", 2**28).journal)
    yield bus
    await bus.close()


@pytest.fixture
async def ground(bus: Bus, tmp_path: Path) -> AsyncIterator[Ground]:
    history = History(tmp_path / "history.sqlite", 400)
    await history.open()
    store = SnapshotStore(tmp_path / "snapshots", "main")
    config = DaemonConfig(state=str(tmp_path), journal=JournalConfig(snapshot_records=20))
    yield Ground(config, Health(), bus, history, store, Presence(bus, "standby"), Notifier({}))
    await history.close()


class Leader:
    """A core whose turns go into the journal."""

    def __init__(self, bus: Bus) -> None:
        self.harness = CoreHarness()
        self.journal = Journal(bus, "main", "leader")
        self._stored = 0

    async def work(self, jobs: int) -> None:
        """Jobs that run and end, jobs that wait."""
        for _ in range(jobs):
            number = self.harness.submit()
            self.harness.run(number)
            self.harness.ended(number)
            self.harness.submit(job(gpus=8))
        for record in self.harness.records[self._stored :]:
            await self.journal.append(encode(record), f"1-{record.turn}")
        self._stored = len(self.harness.records)


@pytest.fixture
async def leader(bus: Bus) -> Leader:
    leader = Leader(bus)
    await leader.journal.claim("host", 1)
    leader.harness.join(node("n-1"))
    return leader


async def test_a_follower_is_the_leaders_twin_and_starts_again_from_its_own_disk(
    leader: Leader, ground: Ground
) -> None:
    follower = Follower(ground)
    await follower.open()
    for _ in range(6):
        await leader.work(4)
        await follower.reach(leader.journal.last_sequence)
        assert follower.core.digest() == leader.harness.core.digest()
        follower.look_after()
        assert follower.core.digest() == leader.harness.core.digest()

    async def has_snapshots() -> bool:
        return follower.snapshots_made > 0 and follower.kept > 0

    await until(has_snapshots, "a snapshot of its own")
    await follower.close()
    # What both decide next is the same, byte for byte; how much was looked at for it need not be.
    core, twin = leader.harness.core, follower.core
    now_ms = core.now_ms + 1000
    decided, repeated = [
        encode(msgspec.structs.replace(each.handle([], now_ms, each.cursors), decisions=0)) for each in (core, twin)
    ]
    assert decided == repeated
    again = Follower(ground)
    assert again.core.turn > 0
    await again.open()
    await again.reach(leader.journal.last_sequence)
    await again.close()
    assert again.core.turn == core.turn or again.core.turn == core.turn - 1


async def test_a_follower_that_reads_old_claims_goes_on_watching_the_newest(
    leader: Leader, ground: Ground, bus: Bus
) -> None:
    await leader.work(2)
    newer = Journal(bus, "main", "newer")
    await newer.claim("other", 2)
    newest = await newest_claim(bus, newer.stream)
    follower = Follower(ground)
    follower.claim = newest
    seen: list[int] = []
    take = follower._take

    def noting(messages: list[StoredMessage]) -> None:
        take(messages)
        assert follower.claim is not None
        seen.append(follower.claim.sequence)

    follower._take = noting  # type: ignore[method-assign]
    await follower.open()
    await follower.reach(newer.epoch)
    await follower.close()
    assert set(seen) == {newer.epoch}


async def test_a_follower_that_lacks_a_part_says_so(leader: Leader, ground: Ground) -> None:
    await leader.work(5)
    await leader.journal.prune(leader.journal.last_sequence - 3)
    follower = Follower(ground)
    await follower.open()
    with pytest.raises(PartMissing):
        await follower.reach(leader.journal.last_sequence)
    await follower.close()


def test_what_a_standby_did_not_see_does_not_count() -> None:
    vigil = Vigil()
    vigil.absent(3600.0)
    assert vigil.verdict == ""
    vigil.silent(3600.0)
    assert vigil.verdict == ""
    while not vigil.verdict:
        vigil.absent(0.1)
    assert vigil.gone_s >= GONE_AFTER_S
    vigil.answered()
    while not vigil.verdict:
        vigil.silent(0.1)
    assert vigil.silent_s >= SILENT_AFTER_S
    vigil.answered()
    assert vigil.verdict == ""
    vigil.answered("a turn has been under way for 21.0 s")
    assert "decides nothing: a turn" in vigil.verdict
