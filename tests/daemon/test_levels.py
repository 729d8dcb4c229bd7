"""Streams and disks that fill are noticed before they refuse anything, and nobody waits for what cannot be stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_daemon import levels
from gpuyard_daemon.levels import CLOSE_FREE_BYTES, Disk, StreamLevels, disk_at
from gpuyard_protocol.bus.base import Bus, PublishRefused
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.subjects import JOURNAL_ENTRY, Streams, streams
from support.nats import NatsProcess

GIB = 1024**3
FULL = 10077


async def test_a_journal_that_fills_is_said_and_asks_for_a_snapshot() -> None:
    bus = MemoryBus(MemoryBroker())
    names = streams("main", 10_000)
    for spec in names:
        await bus.ensure_stream(spec)
    calls: list[str] = []
    watched = StreamLevels(bus, names, lambda: calls.append("snapshot"))
    await watched.look()
    assert (watched.used_part["JRN_main"], calls, watched.alarms) == (0.0, [], ())
    await bus.stream_publish(JOURNAL_ENTRY, b"x" * 5_200)
    for _ in range(levels.LOOKS_PER_ASKING):
        await watched.look()
    assert 0.8 < watched.used_part["JRN_main"] < 0.95
    assert watched.messages["JRN_main"] == 1
    assert calls == ["snapshot"]
    assert watched.alarms == (f"stream JRN_main is {watched.used_part['JRN_main']:.0%} full",)
    await bus.close()
    await watched.look()
    assert watched.used_part["JRN_main"] > 0.8


class Room:
    """The streams of a yard on a real server, and a disk that the test fills."""

    def __init__(self, bus: Bus, names: Streams) -> None:
        self.bus = bus
        self.disk = Disk(100 * GIB, 200 * GIB)
        self.levels = StreamLevels(bus, names, lambda: None, disk=lambda: self.disk)

    async def submit(self) -> int:
        return (await self.bus.stream_publish("sub.acme.alice.submit", b"{}" * 100, timeout=5)).sequence


@pytest.fixture
async def room(nats_process: NatsProcess) -> AsyncIterator[Room]:
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_T")
    names = streams("main", 256 * 1024**2)
    for spec in names:
        await bus.ensure_stream(spec)
    yield Room(bus, names)
    await bus.close()


async def test_a_disk_that_fills_is_said_until_it_is_over(room: Room) -> None:
    await room.levels.look()
    assert room.levels.alarms == ()
    room.disk = Disk(30 * GIB, 200 * GIB)
    await room.levels.look()
    assert room.levels.alarms == ("the disk of the NATS server is 85% full (30Gi free)",)
    await room.submit()
    room.disk = Disk(100 * GIB, 200 * GIB)
    await room.levels.look()
    assert room.levels.alarms == ()


async def test_with_hardly_any_room_submissions_are_refused_at_once_and_nothing_is_lost(room: Room) -> None:
    stored = [await room.submit() for _ in range(10)]
    room.disk = Disk(CLOSE_FREE_BYTES - 1, 200 * GIB)
    await room.levels.look()
    with pytest.raises(PublishRefused) as refused:
        await room.submit()
    assert refused.value.code == FULL
    assert "submissions are refused until there is room" in room.levels.alarms
    assert (await room.bus.stream_state("SUB_main")).messages == len(stored)
    # What leaves the stream makes no room in it.
    await room.bus.purge_stream("SUB_main", up_to=stored[-1])
    with pytest.raises(PublishRefused):
        await room.submit()
    room.disk = Disk(CLOSE_FREE_BYTES + 1, 200 * GIB)
    await room.levels.look()
    assert room.levels.is_closed
    room.disk = Disk(CLOSE_FREE_BYTES * 3, 200 * GIB)
    await room.levels.look()
    assert await room.submit() == stored[-1] + 1


async def test_a_journal_without_room_closes_submissions_too(room: Room) -> None:
    room.levels.used_part["JRN_main"] = 0.96
    room.levels._looks = 1
    await room.levels.look()
    with pytest.raises(PublishRefused):
        await room.submit()
    room.levels._looks = 0
    await room.levels.look()
    assert await room.submit()


def test_a_small_disk_is_closed_at_a_tenth(tmp_path: Path) -> None:
    assert Disk(0, 100).close_bytes == 10
    found = disk_at(tmp_path)
    assert 0 < found.free_bytes <= found.total_bytes
    assert 0 <= found.used_part <= 1
