"""The agent dies in each state that its ledger knows: the job runs once and ends once.

A real agent, its supervisor, a real process on a modelled card; the test is the daemon, which says everything again
until it is taken. The job is one of a gang of one, so that it goes through every state there is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psutil
import pytest

from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.nodes import Go, Prepared, Resume, Start, Stop, Suspend
from gpuyard_protocol.resources import WholeCards
from support.agents import AgentRoom, Commander, agent_room, order_surely, start_order, until_file
from support.dying_agent import STATES

CARDS = "1xH100-80GB"


@pytest.fixture
async def room() -> AsyncIterator[AgentRoom]:
    async with agent_room() as made:
        yield made


class Node:
    """One agent that dies once, and is started again as a supervisor would."""

    def __init__(self, room: AgentRoom) -> None:
        self._room = room
        self._arguments = ("--config", str(room.root / "agent.toml"))
        (room.root / "agent.toml").write_text('suspend_memory = "100Gi"\n')
        self.deaths: list[int] = []
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, *entry: str) -> None:
        agent = await self._room.start_agent(*self._arguments, simulate=CARDS, entry=entry)
        self._keeping = asyncio.create_task(self._keep(agent.process))

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        self.deaths.append(await process.wait())
        await self._room.start_agent(*self._arguments, simulate=CARDS)

    async def stop(self) -> None:
        assert self._keeping is not None
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)


async def through_every_state(commander: Commander, start: Start) -> None:
    """Prepare, go, suspend, resume, stop: each said until it is taken, and waited for."""
    await order_surely(commander, start)
    await commander.prepared(start.key)
    await order_surely(commander, Go(key=start.key, master_address="127.0.0.1", master_port=29500))
    await commander.started(start.key)
    await order_surely(commander, Suspend(key=start.key, step=1))
    await commander.answer(start.key, 1)
    await order_surely(commander, Resume(key=start.key, step=2))
    await commander.answer(start.key, 2)
    await order_surely(commander, Stop(key=start.key, grace_ms=1000))


@pytest.mark.parametrize(
    ("state", "moment"), [*((state, "after") for state in STATES), ("intended", "before"), ("closed", "before")]
)
async def test_an_agent_that_dies_there_is_replaced_and_its_job_runs_and_ends_once(
    state: str, moment: str, room: AgentRoom
) -> None:
    commander, node = await room.commander(), Node(room)
    await node.start("support.dying_agent", state, moment)
    uuid = (await commander.joined()).inventory.devices[0].uuid
    await commander.sync()
    runs = room.scratch / "runs"
    start = start_order(
        1, f"echo $$ >> {runs}; exec sleep 1000", partition=WholeCards((uuid,)), hold=True, suspendable=True
    )
    await through_every_state(commander, start)
    ended = await commander.ended(start.key)
    await commander.until(lambda: bool(node.deaths))
    await commander.joined(2)
    other = start_order(2, f"echo other >> {room.scratch}/other", partition=WholeCards((uuid,)))
    await order_surely(commander, other)
    assert (await commander.ended(other.key)).exit_code == 0
    await until_file(room.scratch / "other")

    assert node.deaths == [-9]
    assert ended.outcome == "stopped"
    (pid,) = runs.read_text().split()
    assert not psutil.pid_exists(int(pid))
    with contextlib.suppress(BusError):
        await commander.sync()
    assert len(commander.of(Prepared, start.key)) == 1
    await node.stop()
