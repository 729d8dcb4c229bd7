"""The fence and the unknown outcome, on a real server: who may append, and what an append became."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from gpuyard_daemon.journal import Journal, LeadershipLost, SnapshotPointer
from gpuyard_protocol.bus.base import Bus, PubAck, PublishRefused, StoredMessage, Unanswered
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.subjects import JOURNAL_ENTRY, streams
from support.nats import NatsProcess


async def open_bus(server: NatsProcess) -> Bus:
    return await connect(server.url, name="test", inbox_prefix="_INBOX_D", reconnect_jitter_s=(0.01, 0.05))


@pytest.fixture
async def bus(nats_process: NatsProcess) -> AsyncIterator[Bus]:
    bus = await open_bus(nats_process)
    await bus.ensure_stream(streams("main", 2**28).journal)
    yield bus
    await bus.close()


async def lead(bus: Bus, holder: str) -> Journal:
    journal = Journal(bus, "main", holder)
    await journal.claim("host", 1)
    return journal


async def entries(bus: Bus) -> list[bytes]:
    """Everything on `jrn.e`, in order."""
    reader = Journal(bus, "main", "reader")
    found: list[bytes] = []

    def take(message: StoredMessage) -> None:
        if message.subject == JOURNAL_ENTRY:
            found.append(message.data)

    await reader.replay(1, await reader.end(), take)
    return found


class Flaky:
    """A bus whose next journal appends go wrong as told; everything else passes through."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        #: `ack-lost`: stored, and nobody hears of it. `never-sent`: neither.
        self.faults: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def stream_publish(
        self, subject: str, data: bytes, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> PubAck:
        fault = self.faults.pop(0) if self.faults and subject == JOURNAL_ENTRY else ""
        if fault == "never-sent":
            raise Unanswered("the request was lost")
        ack = await self._bus.stream_publish(subject, data, timeout=timeout, headers=headers)
        if fault == "ack-lost":
            raise Unanswered("the answer was lost")
        return ack


async def test_records_are_stored_in_order_and_read_again(bus: Bus) -> None:
    journal = await lead(bus, "a")
    sequences = [await journal.append(b"%d" % number, f"1-{number}") for number in range(5)]
    assert sequences == [journal.epoch + 1 + number for number in range(5)]
    assert await entries(bus) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_deposed_leader_appends_nothing_more(bus: Bus) -> None:
    """The old leader does not know that it was deposed: the fence tells it, with its first append."""
    old = await lead(bus, "old")
    await old.append(b"1", "1-1")
    reasons: list[str] = []
    old.on_lost(reasons.append)
    new = await lead(bus, "new")
    with pytest.raises(LeadershipLost):
        await old.append(b"2", "1-2")
    with pytest.raises(LeadershipLost):
        await old.append(b"3", "1-3")
    await new.append(b"4", "2-1")
    assert await entries(bus) == [b"1", b"4"]
    assert len(reasons) == 1


async def test_of_two_claims_at_the_same_moment_one_wins(bus: Bus) -> None:
    results = await asyncio.gather(*(lead(bus, name) for name in "abc"), return_exceptions=True)
    leaders = [result for result in results if isinstance(result, Journal)]
    assert sum(isinstance(result, LeadershipLost) for result in results) == 3 - len(leaders)
    newest = max(leaders, key=lambda journal: journal.epoch)
    await newest.append(b"mine", "x-1")
    for other in leaders:
        if other is not newest:
            with pytest.raises(LeadershipLost):
                await other.append(b"not mine", "y-1")
    assert await entries(bus) == [b"mine"]


async def test_a_leader_hears_of_another_claim_between_two_appends(bus: Bus) -> None:
    old = await lead(bus, "old")
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    old.on_lost(lost.set_result)
    await lead(bus, "new")
    assert "claimed it" in await asyncio.wait_for(lost, 5)


@pytest.mark.parametrize("faults", [["ack-lost"], ["never-sent"], ["never-sent", "ack-lost", "never-sent"]])
async def test_an_append_of_unknown_outcome_is_stored_once(bus: Bus, faults: list[str]) -> None:
    flaky = Flaky(bus)
    journal = await lead(flaky, "a")  # type: ignore[arg-type]  # it passes everything on
    await journal.append(b"1", "1-1")
    flaky.faults = list(faults)
    assert await journal.append(b"2", "1-2") == journal.epoch + 2
    assert await journal.append(b"3", "1-3") == journal.epoch + 3
    assert await entries(bus) == [b"1", b"2", b"3"]


async def test_an_unknown_outcome_and_another_leader_end_this_one(bus: Bus) -> None:
    flaky = Flaky(bus)
    journal = await lead(flaky, "a")  # type: ignore[arg-type]  # it passes everything on
    await lead(bus, "b")
    flaky.faults = ["never-sent"]
    with pytest.raises(LeadershipLost):
        await journal.append(b"1", "1-1")
    assert await entries(bus) == []


async def test_a_foreign_message_in_the_stream_ends_the_leader(bus: Bus) -> None:
    journal = await lead(bus, "a")
    await bus.stream_publish(JOURNAL_ENTRY, b"forged")
    with pytest.raises(LeadershipLost, match="it ends at"):
        await journal.append(b"1", "1-1")


async def test_appends_go_on_over_kills_of_the_server(bus: Bus, nats_process: NatsProcess) -> None:
    """Killed before, during and after appends: each record is stored once, in order."""
    journal = await lead(bus, "a")
    loop = asyncio.get_running_loop()

    async def append_all() -> None:
        for number in range(300):
            await journal.append(b"%d" % number, f"1-{number}")

    appending = loop.create_task(append_all())
    for mark in (50, 150, 220):
        while journal.appended_records < mark:
            await asyncio.sleep(0)
        await asyncio.to_thread(nats_process.kill)
        await asyncio.to_thread(nats_process.start)
    await asyncio.wait_for(appending, 20)
    assert await entries(bus) == [b"%d" % number for number in range(300)]


async def test_after_a_reconnect_the_tail_is_verified_before_anything_is_stored(nats_process: NatsProcess) -> None:
    first, second = await open_bus(nats_process), await open_bus(nats_process)
    await first.ensure_stream(streams("main", 2**28).journal)
    old = await lead(first, "old")
    await old.append(b"1", "1-1")
    await lead(second, "new")
    back = asyncio.Event()
    first.on_reconnect(back.set)
    await asyncio.to_thread(nats_process.kill)
    await asyncio.to_thread(nats_process.start)
    await asyncio.wait_for(back.wait(), 10)
    with pytest.raises(LeadershipLost):
        await old.append(b"2", "1-2")
    await first.close()
    await second.close()


async def test_pruning_keeps_the_claim_and_so_the_fence(bus: Bus) -> None:
    journal = await lead(bus, "a")
    for number in range(10):
        await journal.append(b"%d" % number, f"1-{number}")
    pointer = SnapshotPointer(sequence=journal.last_sequence, turn=10, file="f", sha256="", size=0)
    await journal.point_to_snapshot(pointer)
    await journal.prune(journal.epoch + 8)
    await journal.append(b"10", "1-10")
    assert await entries(bus) == [b"8", b"9", b"10"]
    await lead(bus, "b")
    with pytest.raises(LeadershipLost):
        await journal.append(b"11", "1-11")


async def test_a_claim_alone_is_refused_by_whoever_is_behind(bus: Bus) -> None:
    """The claim is a compare-and-set on the claim before: a stale one is refused by the server itself."""
    journal = await lead(bus, "a")
    with pytest.raises(PublishRefused):
        await bus.stream_publish(
            "jrn.leader", b"{}", headers={"Nats-Expected-Last-Subject-Sequence": str(journal.epoch - 1)}
        )
