"""Events: told in order, once each, and never in anybody's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gpuyard_daemon import announce
from gpuyard_daemon.announce import Announcer
from gpuyard_daemon.core.state.turn import JobNotice
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.jobs import JobEvent
from gpuyard_protocol.subjects import streams

STREAM = streams("main", 2**30).events


class Stage:
    """An announcer, and an audience that notes which events it hears."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.announcer = Announcer(self.bus)
        self.heard: list[int] = []

    async def open(self) -> None:
        await self.bus.ensure_stream(STREAM)
        await self.bus.read_stream(STREAM.name, self._hear)

    def _hear(self, messages: list[StoredMessage]) -> None:
        self.heard += [int(message.subject.rpartition(".")[2]) for message in messages]

    async def until_heard(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.heard) < count:
                await asyncio.sleep(0)

    def tell(self, *jobs: int, sequence: int) -> None:
        self.announcer.announce(notices(*jobs), sequence)


def notices(*jobs: int) -> list[JobNotice]:
    return [JobNotice("acme", JobEvent(job=job, state="running", at_ms=1)) for job in jobs]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    await stage.open()
    yield stage
    await stage.bus.close()


async def test_events_are_told_in_order(stage: Stage) -> None:
    for sequence in range(1, 101):
        stage.tell(sequence * 10, sequence * 10 + 1, sequence=sequence)
    await stage.announcer.drain(5)
    await stage.until_heard(200)
    assert stage.heard == sorted(stage.heard)
    assert (stage.announcer.published, stage.announcer.waiting) == (200, 0)


async def test_what_was_under_way_when_the_connection_broke_is_told_once_and_in_order(stage: Stage) -> None:
    for sequence in range(1, 301):
        stage.tell(sequence, sequence=sequence)
    stage.broker.stop()
    stage.tell(301, sequence=301)
    stage.broker.start()
    await stage.announcer.drain(5)
    await stage.until_heard(301)
    assert stage.heard == list(range(1, 302))
    assert stage.announcer.lost == 0


async def test_a_full_queue_drops_the_oldest(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "WAITING_MAX", 10)
    stage.broker.stop()
    for sequence in range(1, 31):
        stage.tell(sequence, sequence=sequence)
    assert stage.announcer.lost == 20
    stage.broker.start()
    await stage.announcer.drain(5)
    await stage.until_heard(10)
    assert stage.heard == list(range(21, 31))


async def test_after_a_start_only_what_was_not_told_is_told(stage: Stage) -> None:
    stage.tell(1, 2, sequence=5)
    stage.tell(3, sequence=6)
    await stage.announcer.drain(5)
    successor = Announcer(stage.bus)
    await successor.retell(STREAM.name, [(5, notices(1, 2)), (6, notices(3, 4)), (7, notices(5))])
    await successor.drain(5)
    await stage.until_heard(5)
    assert stage.heard == [1, 2, 3, 4, 5]


async def test_it_says_when_everything_up_to_a_record_is_told(stage: Stage) -> None:
    await stage.announcer.until_told(99, 5)
    stage.broker.stop()
    stage.tell(1, sequence=1)
    stage.tell(2, sequence=2)
    waiting = asyncio.create_task(stage.announcer.until_told(1, 5))
    await asyncio.sleep(0)
    assert not waiting.done()
    stage.broker.start()
    await waiting
    stage.broker.stop()
    stage.tell(3, sequence=3)
    await stage.announcer.until_told(3, 0.01)
    assert stage.announcer.waiting == 1
