"""Orders reach their nodes in order and once, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from bench.fleet import FakeAgent

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.facts import NodeJoined
from gpuyard_daemon.core.state.inputs import Cursors, Input, JobSubmitted
from gpuyard_daemon.dispatch import PENDING_MAX, Dispatcher
from gpuyard_daemon.ingress import decode_report
from gpuyard_protocol.bus.base import Message, StoredMessage
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import decode
from gpuyard_protocol.nodes import Heartbeat
from gpuyard_protocol.subjects import streams
from support.builders import job


class Room:
    """A core, its dispatcher, and agents that run nothing; every turn is durable at once."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker, name="daemon")
        self.core = Scheduler()
        self.is_settled = True
        self.stale: list[str] = []
        self.dispatcher = Dispatcher(
            self.bus,
            self.core,
            7,
            is_settled=lambda: self.is_settled,
            on_stale=lambda node, detail: self.stale.append(node),
        )
        self.agents: dict[str, FakeAgent] = {}
        self._now_ms = 1_000
        self._jobs = 0

    async def open(self) -> None:
        reports = streams("main", 2**30).reports
        await self.bus.ensure_stream(reports)
        await self.bus.read_stream(reports.name, self._take_reports)
        await self.bus.subscribe("hb.*", self._take_heartbeat)

    async def agent(self, node: str, *, runs_for_s: float = 0.0) -> FakeAgent:
        agent = self.agents[node] = FakeAgent(MemoryBus(self.broker, name=node), node, runs_for_s=runs_for_s)
        await agent.join()
        await self.until(lambda: agent.syncs == 1, f"the first sync of {node}")
        return agent

    def _take_heartbeat(self, message: Message) -> None:
        beat = decode(Heartbeat, message.data)
        self.dispatcher.heard(beat.node, beat.instance, beat.applied)

    def _take_reports(self, messages: list[StoredMessage]) -> None:
        for message in messages:
            report = decode_report(message, Counter())
            assert report is not None
            self.turn(report)

    def turn(self, *inputs: Input) -> None:
        self._now_ms += 1
        turn = self.core.handle(inputs, self._now_ms, Cursors())
        if turn.record is not None:
            for fact in turn.record.facts:
                if isinstance(fact, NodeJoined):
                    self.dispatcher.node_joined(fact.node, fact.instance)
        self.dispatcher.settled(turn.orders)

    def submit(self, count: int = 1, *, lease: bool = False, **fields: object) -> None:
        spec = job(**fields)
        if lease:
            spec = msgspec.structs.replace(spec, on_node_lost="restart", lease_ms=60_000)
        for _ in range(count):
            self._jobs += 1
            submission_id = f"s{self._jobs}"
            self.turn(JobSubmitted(tenant="acme", user="alice", submission_id=submission_id, spec=spec))

    def finished(self) -> int:
        return self.core.metrics().finished

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)
        assert condition(), what

    def close(self) -> None:
        self.dispatcher.stop()
        for agent in self.agents.values():
            assert agent.faults == []


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    room = Room()
    await room.open()
    yield room
    room.close()
    for agent in room.agents.values():
        await agent.leave()


async def test_orders_come_in_order_and_every_job_ends(room: Room) -> None:
    for node in ("n-1", "n-2", "n-3"):
        await room.agent(node)
    room.submit(200, gpus=1)
    await room.until(lambda: room.finished() == 200, "200 jobs ended")
    assert [agent.syncs for agent in room.agents.values()] == [1, 1, 1]
    assert room.dispatcher.batches_sent < room.dispatcher.orders_sent


async def test_a_gang_goes_through_both_phases(room: Room) -> None:
    for node in ("n-1", "n-2"):
        await room.agent(node)
    room.submit(replicas=2, gpus=8)
    await room.until(lambda: room.finished() == 1, "the gang ended")


async def test_a_new_agent_process_gets_the_desired_set_and_starts_nothing_twice(room: Room) -> None:
    agent = await room.agent("n-1", runs_for_s=-1)
    room.submit(3, gpus=1)
    await room.until(lambda: len(agent.live) == 3, "three jobs run")
    await agent.restart()
    await room.until(lambda: agent.syncs == 2, "a sync for the new process")
    room.submit(1, gpus=1)
    await room.until(lambda: len(agent.live) == 4, "a fourth job runs")


async def test_a_gap_is_closed_by_the_desired_set(room: Room) -> None:
    agent = await room.agent("n-1", runs_for_s=-1)
    room.submit(2, gpus=1)
    await room.until(lambda: len(agent.live) == 2, "two jobs run")
    agent.applied = 0
    room.submit(1, gpus=1)
    await room.until(lambda: len(agent.live) == 3, "a third job runs")
    assert (agent.syncs, agent.faults) == (2, ["gap: 3 after 0"])
    agent.faults.clear()


async def test_a_node_that_does_not_answer_delays_nobody(room: Room) -> None:
    silent = await room.agent("n-1", runs_for_s=-1)
    silent.is_mute = True
    await room.agent("n-2")
    room.submit(16, gpus=1)
    await room.until(lambda: room.finished() >= 8, "the other node's jobs ended")
    assert silent.live == set()


async def test_a_node_that_was_away_gets_its_set_with_its_next_heartbeat(room: Room) -> None:
    agent = await room.agent("n-1", runs_for_s=-1)
    await agent.leave()
    room.submit(2, gpus=1)
    await room.until(lambda: room.dispatcher.failures == 1, "an order that nobody took")
    await agent.join()
    await room.until(lambda: len(agent.live) == 2, "both jobs run")


async def test_the_desired_set_waits_until_it_is_durable(room: Room) -> None:
    """Between decision and journal nothing may leave, a `Sync` least of all: it shows the whole state."""
    agent = await room.agent("n-1", runs_for_s=-1)
    room.is_settled = False
    room.dispatcher.sync_all()
    for _ in range(50):
        await asyncio.sleep(0)
    assert agent.syncs == 1
    room.is_settled = True
    room.dispatcher.settled(())
    await room.until(lambda: agent.syncs == 2, "the sync came after all")


async def test_after_a_reconnect_every_node_gets_its_set(room: Room) -> None:
    agents = [await room.agent(node) for node in ("n-1", "n-2")]
    room.broker.stop()
    room.broker.start()
    await room.until(lambda: [agent.syncs for agent in agents] == [2, 2], "a sync for each")


async def test_a_ledger_that_fell_behind_is_noticed_by_its_heartbeats(room: Room) -> None:
    agent = await room.agent("n-1", runs_for_s=-1)
    room.submit(1, gpus=1)
    await room.until(lambda: room.dispatcher._channel("n-1").confirmed == 1, "the order is confirmed")
    room.dispatcher.heard("n-1", agent.instance, 0)
    assert agent.syncs == 1
    room.dispatcher.heard("n-1", agent.instance, 0)
    await room.until(lambda: agent.syncs == 2, "a sync")


async def test_more_than_a_channel_holds_becomes_a_desired_set(room: Room) -> None:
    agent = await room.agent("n-1", runs_for_s=-1)
    agent.is_mute = True
    room.submit(1, gpus=1)
    channel = room.dispatcher._channel("n-1")
    await room.until(lambda: channel.is_busy, "an exchange that is not answered")
    for first in range(2, PENDING_MAX + 10):
        channel.pending.extend([b"{}"] if len(channel.pending) < PENDING_MAX else [])
        channel.first = first - len(channel.pending)
    room.submit(1, gpus=1)
    assert channel.wants_sync
    assert not channel.pending


async def test_a_desired_set_with_leases_waits_for_the_first_heartbeat_and_for_nothing_else() -> None:
    """Without the node's clock, nothing under a lease may start there; an agent that tells none keeps no leases."""
    room = Room()
    await room.open()
    agent = await room.agent("n-1", runs_for_s=-1)
    room.submit(lease=True)
    await room.until(lambda: len(agent.live) == 1, "a job under a lease")
    heard: dict[str, tuple[str, int]] = {}
    room.dispatcher._clock_of = lambda node: heard.get(node, ("", 0))
    syncs = agent.syncs
    room.dispatcher.sync_all()
    for _ in range(20):
        await asyncio.sleep(0)
    assert agent.syncs == syncs
    heard["n-1"] = (agent.instance, 0)
    room.dispatcher.heard("n-1", agent.instance, agent.applied)
    await room.until(lambda: agent.syncs == syncs + 1, "the sync")
    await agent.leave()
