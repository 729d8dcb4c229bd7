"""A yard on three servers with every stream on all of them: one dies, two die and come back, each is upgraded in turn.

Real nats-servers, two real daemons, agents that run nothing. What was acknowledged runs once, whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from bench.fleet import FakeAgent

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.queries import Stats, StatsQuery
from support.cluster import Cluster, is_whole, leader_of
from support.daemon import DaemonProcess, Tenant, until

SETTINGS = 'replicas = 3\n[journal]\nbudget = "256Mi"\nsnapshot_records = 60\n'
STREAMS = ["SUB_main", "REP_main", "JRN_main", "EVT_main", "AUD_main"]
JOB = {"command": ["/bin/true"], "gpus": 1}
#: An election after a death takes up to six seconds.
HEALED_S = 40.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "nats")
    cluster.start()
    yield cluster
    cluster.kill()


@pytest.fixture
async def bus(cluster: Cluster) -> AsyncIterator[Bus]:
    bus = await connect(
        cluster.url, name="test", inbox_prefix="_INBOX_T", reconnect_jitter_s=(0.01, 0.05), connect_timeout_s=20
    )
    yield bus
    await bus.close()


@pytest.fixture
async def daemons(cluster: Cluster, bus: Bus, tmp_path: Path) -> AsyncIterator[list[DaemonProcess]]:
    async def jetstream() -> bool:
        return b'"error"' not in (await bus.request("$JS.API.INFO", b"", timeout=1.0)).data

    await until(jetstream, "a cluster with a leader", HEALED_S)
    processes = [DaemonProcess(tmp_path / name, cluster.url, settings=SETTINGS) for name in ("first", "second")]
    try:
        await asyncio.to_thread(processes[0].start)
        await asyncio.to_thread(processes[1].start_standby)
        yield processes
    finally:
        for process in processes:
            process.kill()


class Load:
    """Jobs submitted one after another until told to stop; those that were acknowledged are counted."""

    def __init__(self, bus: Bus) -> None:
        self.tenant = Tenant(bus)
        self.acknowledged: list[str] = []
        #: Longest time without an acknowledgement, seconds.
        self.gap_s = 0.0
        self._is_stopped = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        number, acknowledged_at = 0, time.monotonic()
        while not self._is_stopped.is_set():
            try:
                name = f"job-{number}"
                await self.tenant.submit({**JOB, "submission_id": name})
            except BusError:
                await asyncio.sleep(0.05)
                continue
            self.gap_s = max(self.gap_s, time.monotonic() - acknowledged_at)
            acknowledged_at = time.monotonic()
            self.acknowledged.append(name)
            number += 1
            await asyncio.sleep(0.02)

    async def some_more(self, count: int) -> None:
        wanted = len(self.acknowledged) + count

        async def enough() -> bool:
            return len(self.acknowledged) >= wanted

        await until(enough, f"{count} more acknowledgements", HEALED_S)

    async def stop(self) -> None:
        self._is_stopped.set()
        await self._task


async def fleet_of(bus: Bus) -> list[FakeAgent]:
    agents = [FakeAgent(bus, f"node-{number}", runs_for_s=0.05) for number in range(3)]
    for agent in agents:
        await agent.join()
    return agents


async def check_once(load: Load, agents: list[FakeAgent]) -> None:
    """Each acknowledged job has run, once, and nothing else has."""
    count = len(load.acknowledged)

    async def finished() -> bool:
        return (await load.tenant.ask("stats", StatsQuery(), Stats)).finished >= count

    await until(finished, f"{count} finished jobs", HEALED_S)
    for agent in agents:
        await agent.leave()
        assert agent.faults == []
    started = [key for agent in agents for key in agent.started]
    assert len(started) == len(set(started))
    assert len({key.job for key in started}) == count


async def whole(bus: Bus) -> None:
    async def every_copy() -> bool:
        return await is_whole(bus, STREAMS)

    await until(every_copy, "three current copies of each stream", HEALED_S)


async def test_every_stream_is_on_three_servers(bus: Bus, daemons: list[DaemonProcess]) -> None:
    await whole(bus)


async def test_the_server_that_leads_the_journal_is_killed(
    bus: Bus, cluster: Cluster, daemons: list[DaemonProcess]
) -> None:
    agents = await fleet_of(bus)
    load = Load(bus)
    await load.some_more(30)
    victim = cluster.servers[int((await leader_of(bus, "JRN_main"))[1:])]
    await asyncio.to_thread(victim.kill)
    await load.some_more(30)
    await asyncio.to_thread(victim.start)
    await load.some_more(10)
    await load.stop()
    await check_once(load, agents)
    await whole(bus)


async def test_without_a_majority_nothing_is_acknowledged_and_all_goes_on_with_it(
    bus: Bus, cluster: Cluster, daemons: list[DaemonProcess]
) -> None:
    agents = await fleet_of(bus)
    load = Load(bus)
    await load.some_more(30)
    for server in cluster.servers[:2]:
        await asyncio.to_thread(server.kill)
    await asyncio.sleep(0)
    lonely = await connect(cluster.servers[2].url, name="lonely", inbox_prefix="_INBOX_T", connect_timeout_s=20)
    with pytest.raises(BusError):
        await lonely.stream_publish("sub.acme.alice.submit", b"{}", timeout=3.0)
    await lonely.close()
    for server in cluster.servers[:2]:
        await asyncio.to_thread(server.start)
    await load.some_more(30)
    await load.stop()
    await check_once(load, agents)
    await whole(bus)


async def test_servers_are_upgraded_one_after_another_and_nobody_waits_long(
    bus: Bus, cluster: Cluster, daemons: list[DaemonProcess]
) -> None:
    agents = await fleet_of(bus)
    load = Load(bus)
    await load.some_more(30)
    for server in cluster.servers:
        await asyncio.to_thread(server.stop)
        await load.some_more(10)
        await asyncio.to_thread(server.start)
        await whole(bus)
    await load.some_more(10)
    await load.stop()
    await check_once(load, agents)
