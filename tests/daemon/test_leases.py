"""Who is told that its leases run on, and who is not."""

from __future__ import annotations

import asyncio

import pytest

from gpuyard_daemon.leases import Leases
from gpuyard_protocol.bus.base import Message
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.nodes import Command, OrderAnswer, Renew


class Room:
    """A node with leases, what the core and the monitor say of it, and what it was told."""

    def __init__(self) -> None:
        broker = MemoryBroker()
        self.bus = MemoryBus(broker, name="daemon")
        self.node_bus = MemoryBus(broker, name="n-1")
        self.leases_ms = [60_000]
        self.state, self.instance = "ready", "a"
        self.clock = ("a", 100)
        self.is_settled = self.is_ours = True
        self.told: list[Renew] = []
        self.answer = "ok"
        self.leases = Leases(
            self.bus,
            self,
            7,
            clock_of=lambda node: self.clock,
            is_settled=lambda: self.is_settled,
            is_ours=self._is_ours,
        )

    def leased_nodes(self) -> tuple[str, ...]:
        return ("n-1",) if self.leases_ms else ()

    def leased(self, node: str) -> list[int]:
        return self.leases_ms

    def node_state(self, node: str) -> str:
        return self.state

    def node_instance(self, node: str) -> str:
        return self.instance

    async def _is_ours(self) -> bool:
        return self.is_ours

    async def open(self) -> None:
        await self.node_bus.subscribe("cmd.n-1", self._take)

    def _take(self, message: Message) -> None:
        command = decode(Command, message.data)
        assert isinstance(command, Renew)
        self.told.append(command)
        answer = OrderAnswer(status=self.answer)  # type: ignore[arg-type]  # one of the words
        asyncio.get_running_loop().create_task(self.node_bus.publish(message.reply, encode(answer)))

    async def tick(self, clock_ms: int = 0) -> None:
        if clock_ms:
            self.clock = (self.clock[0], clock_ms)
        await self.leases.tick()
        asked = set(self.leases._asked)
        if asked:
            await asyncio.wait(asked)


@pytest.fixture
async def room() -> Room:
    made = Room()
    await made.open()
    return made


async def test_a_node_that_was_heard_is_told_its_own_clock(room: Room) -> None:
    await room.tick()
    assert room.told == [Renew(node="n-1", instance="a", epoch=7, clock_ms=100)]
    assert room.leases.renewed == 1


async def test_nothing_new_was_heard_so_nothing_is_renewed(room: Room) -> None:
    room.leases_ms = [10]
    await room.tick()
    await asyncio.sleep(0.01)
    await room.tick()
    assert len(room.told) == 1
    await room.tick(clock_ms=200)
    assert [renewal.clock_ms for renewal in room.told] == [100, 200]


async def test_a_lease_is_renewed_six_times_in_its_time_and_no_more_often(room: Room) -> None:
    await room.tick()
    await room.tick(clock_ms=200)
    assert len(room.told) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"is_ours": False},
        {"is_settled": False},
        {"state": "lost"},
        {"instance": "b"},
        {"clock": ("a", 0)},
        {"leases_ms": []},
    ],
    ids=str,
)
async def test_who_is_not_renewed(room: Room, change: dict[str, object]) -> None:
    """By a daemon that may be deposed, in the middle of a turn, a node known to be lost, another process, …"""
    for name, value in change.items():
        setattr(room, name, value)
    await room.tick()
    assert room.told == []


async def test_a_refusal_is_counted(room: Room) -> None:
    room.answer = "stale"
    await room.tick()
    assert (room.leases.renewed, room.leases.unconfirmed) == (0, 1)
