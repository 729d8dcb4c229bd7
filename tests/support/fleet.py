"""Agents without processes, joined to a daemon for the length of a test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from bench.fleet import FakeAgent

from gpuyard_protocol.bus.base import Bus
from support.daemon import until


@contextlib.asynccontextmanager
async def fleet(
    bus: Bus, nodes: int, *, runs_for_s: float = 0.0, is_delayed: bool = False
) -> AsyncIterator[list[FakeAgent]]:
    """Agents that have joined; none of them was told anything twice, or by two leaders at a time.

    Where messages are delayed, what an old leader sent in its own time may arrive in the next one's; it is refused.
    """
    agents = [FakeAgent(bus, f"node-{number}", runs_for_s=runs_for_s) for number in range(nodes)]
    for agent in agents:
        await agent.join()

    async def synced() -> bool:
        return all(agent.syncs for agent in agents)

    await until(synced, "a first sync for every agent")
    yield agents
    for agent in agents:
        await agent.leave()
        assert agent.faults == []
        assert agent.stale == 0 or is_delayed
