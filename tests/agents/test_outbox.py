"""Reports on their way: in order, batched, each until it is stored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gpuyard_agent.outbox import BATCH_REPORTS_MAX, Outbox
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import ReportBatch, Started

NODE = "node-1"


def report(number: int) -> tuple[int, bytes]:
    return number, encode(Started(key=AssignmentKey(number, 1, 0), at_ms=number))


class Desk:
    """An outbox on a bus in memory, and the stream it fills."""

    def __init__(self, waiting: list[tuple[int, bytes]]) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.delivered = 0
        self.batches: list[ReportBatch] = []
        self.outbox = Outbox(NODE, "instance", "boot", waiting, self._on_delivered)
        self._news = asyncio.Event()

    def _on_delivered(self, up_to: int) -> None:
        self.delivered = up_to
        self._news.set()

    def _on_batch(self, messages: list[StoredMessage]) -> None:
        for message in messages:
            batch = decode(ReportBatch, message.data)
            assert message.headers == {}, "what another node could guess and send first"
            self.batches.append(batch)

    async def open_stream(self) -> None:
        await self.bus.ensure_stream(subjects.streams("test", 1024**3).reports)
        await self.bus.read_stream("REP_test", self._on_batch)

    async def until_delivered(self, number: int) -> None:
        async with asyncio.timeout(5):
            while self.delivered < number:
                self._news.clear()
                await self._news.wait()
            await asyncio.sleep(0)

    @property
    def numbers(self) -> list[int]:
        return [batch.first + index for batch in self.batches for index in range(len(batch.reports))]


@contextlib.asynccontextmanager
async def desk(waiting: list[tuple[int, bytes]] | None = None, *, has_stream: bool = True) -> AsyncIterator[Desk]:
    made = Desk(waiting or [])
    if has_stream:
        await made.open_stream()
    task = asyncio.create_task(made.outbox.run(made.bus))
    try:
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await made.bus.close()


async def test_reports_of_one_moment_go_as_one_batch() -> None:
    async with desk() as made:
        made.outbox.add([report(1), report(2)])
        await made.until_delivered(2)
        assert [(batch.first, len(batch.reports)) for batch in made.batches] == [(1, 2)]
        assert (made.batches[0].node, made.batches[0].instance, made.batches[0].boot_id) == (NODE, "instance", "boot")
        assert made.batches[0].reports[1] == Started(key=AssignmentKey(2, 1, 0), at_ms=2)
        assert made.outbox.depth == 0


async def test_what_an_earlier_process_left_goes_first() -> None:
    async with desk([report(5), report(6)]) as made:
        made.outbox.add([report(7)])
        await made.until_delivered(7)
        assert made.numbers == [5, 6, 7]


async def test_many_reports_go_in_batches_of_bounded_size() -> None:
    count = BATCH_REPORTS_MAX * 2 + 1
    async with desk([report(number) for number in range(1, count + 1)]) as made:
        await made.until_delivered(count)
        assert made.numbers == list(range(1, count + 1))
        assert max(len(batch.reports) for batch in made.batches) == BATCH_REPORTS_MAX


async def test_without_a_stream_reports_wait_and_are_not_lost() -> None:
    """The daemon has not made its streams yet: nobody takes the subject."""
    async with desk([report(1)], has_stream=False) as made:
        await asyncio.sleep(0)
        assert made.outbox.depth == 1
        await made.open_stream()
        await made.until_delivered(1)
        assert made.numbers == [1]


async def test_reports_made_while_the_server_is_away_go_after_it_is_back() -> None:
    async with desk() as made:
        made.outbox.add([report(1)])
        await made.until_delivered(1)
        made.broker.stop()
        made.outbox.add([report(2)])
        made.outbox.add([report(3)])
        await asyncio.sleep(0)
        assert made.outbox.depth == 2
        made.broker.start()
        await made.until_delivered(3)
        assert sorted(set(made.numbers)) == [1, 2, 3]


@pytest.mark.parametrize("size", [1, 3])
async def test_numbers_are_dense_whatever_the_batches(size: int) -> None:
    async with desk() as made:
        for first in range(1, 31, size):
            made.outbox.add([report(number) for number in range(first, first + size)])
            await asyncio.sleep(0)
        await made.until_delivered(30)
        assert made.numbers == list(range(1, 31))
