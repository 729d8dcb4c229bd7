"""A whole agent on the fake driver: NVIDIA's own bindings, real processes, and a daemon that is the test."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from fake_driver.control import Checkpoint, FakeDriver
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import (
    Ended,
    Resume,
    Resumed,
    ResumeFailed,
    Start,
    Stop,
    Suspend,
    Suspended,
    SuspendFailed,
)
from gpuyard_protocol.resources import MpsShare, WholeCards
from support.agents import AgentRoom, Commander, start_order, until_file


@pytest.fixture
def driver(room: AgentRoom) -> FakeDriver:
    return FakeDriver.create(room.root / "driver", "H100-80GB", 2)


@pytest.fixture
async def commander(room: AgentRoom, driver: FakeDriver) -> Commander:
    commander = await room.commander()
    await start_agent(room, driver)
    await commander.joined()
    assert (await commander.sync()).status == "ok"
    return commander


async def start_agent(room: AgentRoom, driver: FakeDriver) -> None:
    config = room.root / "agent.toml"
    config.write_text('suspend_memory = "100Gi"\n')
    await room.start_agent("--config", str(config), simulate="", environment=driver.env())


async def cards(commander: Commander) -> list[str]:
    return [device.uuid for device in (await commander.joined()).inventory.devices]


def training(driver: FakeDriver, job: int, card: str, *options: str, memory_mib: int = 40_000) -> Start:
    program = (driver.program("fake-cuda"), "--memory", str(memory_mib), "--context", "500")
    more = ("--sleep", "--step-ms", "5", "--report", "0.05", *options)
    return start_order(job, *program, *more, partition=WholeCards((card,)), suspendable=True)


class Output:
    """What one of these programs says."""

    def __init__(self, room: AgentRoom, key: AssignmentKey) -> None:
        self._path: Path = room.state / "jobs" / str(key.job) / str(key.attempt) / f"{key.replica}.out"

    def steps(self) -> int:
        """As last told."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return max((json.loads(line).get("steps", 0) for line in lines), default=0)

    async def works(self) -> int:
        """Its pid, once it does more than it has done."""
        before = self.steps()
        await until_file(self._path, lambda _: self.steps() > before + 10)
        return int(json.loads(self._path.read_text().splitlines()[0])["pid"])


def held_mib(driver: FakeDriver, pid: int) -> int:
    return sum(process["mib"] for process in driver.processes() if process["pid"] == pid)


async def test_a_job_leaves_a_real_drivers_card_and_comes_back(
    room: AgentRoom, driver: FakeDriver, commander: Commander
) -> None:
    first, _ = await cards(commander)
    job, other = training(driver, 1, first), training(driver, 2, first, memory_mib=60_000)
    await commander.order(job)
    output = Output(room, job.key)
    pid = await output.works()
    await commander.order(Suspend(key=job.key, step=1))
    answer = await commander.answer(job.key, 1)
    assert isinstance(answer, Suspended)
    assert answer.image_mib == 40_500
    assert driver.checkpoint_state(pid) is Checkpoint.CHECKPOINTED
    assert held_mib(driver, pid) == 0

    await commander.order(other)
    assert held_mib(driver, await Output(room, other.key).works()) == 60_500
    await commander.order(Resume(key=job.key, step=2))
    refused = await commander.answer(job.key, 2)
    assert isinstance(refused, ResumeFailed)
    assert refused.code == "PartitionUnavailable"
    await commander.order(Stop(key=other.key, grace_ms=0))
    await commander.ended(other.key)
    await commander.order(Resume(key=job.key, step=3))
    assert isinstance(await commander.answer(job.key, 3), Resumed)
    assert await output.works() == pid
    assert held_mib(driver, pid) == 40_500
    assert driver.checkpoint_state(pid) is Checkpoint.RUNNING


async def test_a_job_that_the_driver_cannot_suspend_runs_on(
    room: AgentRoom, driver: FakeDriver, commander: Commander
) -> None:
    first, second = await cards(commander)
    shared = start_order(2, driver.program("fake-cuda"), partition=MpsShare(second, 300, 8_000), suspendable=True)
    job = training(driver, 1, first, "--unsuspendable")
    await commander.order(job, shared)
    output = Output(room, job.key)
    pid = await output.works()
    await commander.started(shared.key)
    await commander.order(Suspend(key=job.key, step=1), Suspend(key=shared.key, step=1))
    refused = await commander.answer(job.key, 1)
    assert isinstance(refused, SuspendFailed)
    assert refused.code == "DriverRefused"
    assert await output.works() == pid
    refused = await commander.answer(shared.key, 1)
    assert isinstance(refused, SuspendFailed)
    assert refused.code == "NotSuspendable"


async def test_a_checkpoint_that_breaks_the_job_ends_it_as_lost(
    room: AgentRoom, driver: FakeDriver, commander: Commander
) -> None:
    """The driver fails half way and then finds no way back: the last rung, and not the job's fault."""
    first, _ = await cards(commander)
    job = training(driver, 1, first)
    await commander.order(job)
    await Output(room, job.key).works()
    driver.inject("cuCheckpointProcessCheckpoint", error=999, times=1)
    await commander.order(Suspend(key=job.key, step=1))
    ended = await commander.ended(job.key)
    assert (ended.outcome, ended.code) == ("lost", "SuspendBroken")
    again = training(driver, 2, first)
    await commander.order(again)
    await commander.started(again.key)


async def test_an_agent_killed_amid_a_suspension_finishes_it(
    room: AgentRoom, driver: FakeDriver, commander: Commander
) -> None:
    first, _ = await cards(commander)
    job = training(driver, 1, first)
    await commander.order(job)
    output = Output(room, job.key)
    pid = await output.works()
    driver.set_knob("checkpoint_mib_per_s", 40_000)  # a second
    await commander.order(Suspend(key=job.key, step=1))
    async with asyncio.timeout(10):
        while driver.checkpoint_state(pid) is not Checkpoint.LOCKED:
            await asyncio.sleep(0.005)
    await room.agents[-1].kill()
    await start_agent(room, driver)
    answer = await commander.answer(job.key, 1)
    assert isinstance(answer, Suspended)
    assert driver.checkpoint_state(pid) is Checkpoint.CHECKPOINTED
    await commander.joined(2)
    await commander.order(Resume(key=job.key, step=2))
    assert isinstance(await commander.answer(job.key, 2), Resumed)
    assert await output.works() == pid
    assert commander.count(Ended) == 0
