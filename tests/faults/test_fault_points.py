"""The daemon dies at each place where its memory, the journal, the nodes and its disk differ: every job runs once.

Real processes. The next daemon starts from what the dead one left; the agents note whatever they should not have been
told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bench.fleet import FakeAgent

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.queries import Stats, StatsQuery
from support.daemon import DaemonProcess, Tenant, until
from support.dying_daemon import POINTS
from support.nats import NatsProcess

#: Passages after which it dies: early, and in the middle of things. Snapshots are fewer than appends.
PASSAGES = dict.fromkeys(("before-append", "append-sent", "after-append"), (1, 25))
PASSAGES["between-command-and-reply"] = (1, 10)


@pytest.fixture
async def bus(nats_process: NatsProcess) -> AsyncIterator[Bus]:
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_T", reconnect_jitter_s=(0.01, 0.05))
    yield bus
    await bus.close()


class Load:
    """Jobs one after another, each again until it is durable, until told to stop."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self.acknowledged = 0
        self._is_stopped = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self._is_stopped.is_set():
            request = {"command": ["/bin/true"], "gpus": 1, "submission_id": f"job-{self.acknowledged}"}
            with contextlib.suppress(BusError):
                await self._tenant.submit(request)
                self.acknowledged += 1
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._is_stopped.set()
        await self._task


@pytest.mark.parametrize("point", POINTS)
async def test_a_daemon_that_dies_there_is_replaced_and_every_job_runs_once(
    point: str, bus: Bus, nats_process: NatsProcess, tmp_path: Path
) -> None:
    daemon = DaemonProcess(tmp_path / "daemon", nats_process.url)
    tenant = Tenant(bus)
    agents = [FakeAgent(bus, f"node-{number}", runs_for_s=0.03) for number in range(2)]
    try:
        await asyncio.to_thread(daemon.start)
        for agent in agents:
            await agent.join()
        await asyncio.to_thread(daemon.stop)
        load = Load(tenant)
        for passage in PASSAGES.get(point, (1, 2)):
            daemon.entry = ("support.dying_daemon", point, str(passage))
            daemon.spawn()
            assert await asyncio.to_thread(daemon.wait) == -9, daemon.log
        await load.stop()
        daemon.entry = ("gpuyard_daemon",)
        await asyncio.to_thread(daemon.start)

        async def finished() -> bool:
            return (await tenant.ask("stats", StatsQuery(), Stats)).finished >= load.acknowledged

        await until(finished, "every job finished")
        assert [agent.faults for agent in agents] == [[], []]
        started = [key for agent in agents for key in agent.started]
        assert len(started) == len(set(started)) == load.acknowledged
        assert {key.attempt for key in started} == {1}
    finally:
        for agent in agents:
            await agent.leave()
        daemon.kill()
