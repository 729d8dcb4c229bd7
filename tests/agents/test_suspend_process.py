"""Jobs on modelled cards suspended and resumed by a real agent: halted, off the books, back again, whoever dies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuyard_protocol.nodes import (
    Desired,
    Resume,
    Resumed,
    ResumeFailed,
    Start,
    Stop,
    Suspend,
    Suspended,
    SuspendFailed,
)
from gpuyard_protocol.resources import TimeSliceShare, WholeCards
from support.agents import AgentRoom, Commander, start_order, until_file

#: Modelled programs hold so much of their card.
USED_PCT = 85


@pytest.fixture
async def commander(room: AgentRoom) -> Commander:
    commander = await room.commander()
    await start_agent(room)
    await commander.joined()
    assert (await commander.sync()).status == "ok"
    return commander


async def start_agent(room: AgentRoom, suspend_memory: str = "100Gi") -> None:
    """With room for what one card holds, and no more."""
    config = room.root / "agent.toml"
    config.write_text(f'suspend_memory = "{suspend_memory}"\n')
    await room.start_agent("--config", str(config), simulate="1xH100-80GB")


async def card(commander: Commander) -> tuple[str, int]:
    device = (await commander.joined()).inventory.devices[0]
    return device.uuid, device.memory_mib


def ticking(job: int, room: AgentRoom, partition: object, **launch: object) -> Start:
    """Writes a line every now and then, for ever."""
    text = f"while :; do echo x >> {room.scratch}/{job}; sleep 0.02; done"
    return start_order(job, text, partition=partition, suspendable=True, **launch)  # type: ignore[arg-type]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


async def goes_on(path: Path) -> None:
    before = lines(path)
    await until_file(path, lambda text: len(text.splitlines()) > before + 2)


async def is_halted(path: Path) -> None:
    """Nothing comes while ten times as long as between two lines passes."""
    await asyncio.sleep(0.1)  # a line that was on its way
    before = lines(path)
    await asyncio.sleep(0.3)
    assert lines(path) == before


async def test_a_suspended_job_leaves_its_card_to_another_and_comes_back(room: AgentRoom, commander: Commander) -> None:
    uuid, memory_mib = await card(commander)
    inventory = (await commander.joined()).inventory
    assert (inventory.suspend_mib, inventory.suspend_problem) == (100 * 1024, "")
    first, second = ticking(1, room, WholeCards((uuid,))), ticking(2, room, WholeCards((uuid,)))
    await commander.order(first)
    await commander.started(first.key)
    await goes_on(room.scratch / "1")
    await commander.order(Suspend(key=first.key, step=1))
    answer = await commander.answer(first.key, 1)
    assert isinstance(answer, Suspended)
    assert answer.image_mib == memory_mib * USED_PCT // 100
    await is_halted(room.scratch / "1")

    await commander.order(second)
    await commander.started(second.key)
    await commander.order(Resume(key=first.key, step=2))
    refused = await commander.answer(first.key, 2)
    assert isinstance(refused, ResumeFailed)
    assert refused.code == "PartitionUnavailable"
    await is_halted(room.scratch / "1")

    await commander.order(Stop(key=second.key, grace_ms=0))
    await commander.ended(second.key)
    await commander.order(Resume(key=first.key, step=3))
    assert isinstance(await commander.answer(first.key, 3), Resumed)
    await goes_on(room.scratch / "1")
    third = ticking(3, room, WholeCards((uuid,)))
    await commander.order(third)
    assert (await commander.ended(third.key)).code == "PartitionUnavailable"


async def test_a_suspended_job_stays_so_over_the_death_of_its_agent(room: AgentRoom, commander: Commander) -> None:
    uuid, _ = await card(commander)
    job = ticking(1, room, WholeCards((uuid,)))
    await commander.order(job)
    await commander.started(job.key)
    await commander.order(Suspend(key=job.key, step=1))
    assert isinstance(await commander.answer(job.key, 1), Suspended)
    await room.agents[-1].kill()
    await start_agent(room)
    await commander.joined(2)
    assert (await commander.sync(Desired(start=job, standing=Suspend(key=job.key, step=1)))).status == "ok"
    await is_halted(room.scratch / "1")
    other = ticking(2, room, WholeCards((uuid,)))
    await commander.order(other)  # the card is free: nothing was adopted on it
    await commander.started(other.key)
    await commander.order(Stop(key=other.key, grace_ms=0))
    await commander.ended(other.key)
    await commander.order(Resume(key=job.key, step=2))
    assert isinstance(await commander.answer(job.key, 2), Resumed)
    await goes_on(room.scratch / "1")


async def test_a_suspended_job_can_be_stopped(room: AgentRoom, commander: Commander) -> None:
    uuid, _ = await card(commander)
    job = ticking(1, room, WholeCards((uuid,)))
    await commander.order(job)
    await commander.started(job.key)
    await commander.order(Suspend(key=job.key, step=1), Stop(key=job.key, grace_ms=60_000))
    ended = await commander.ended(job.key)
    assert (ended.outcome, ended.signal) == ("stopped", 9)


async def test_what_takes_turns_is_suspended_out_of_its_turns(room: AgentRoom, commander: Commander) -> None:
    """Halted in turns or not when the order comes: the other one then has the card for itself."""
    uuid, _ = await card(commander)
    jobs = [ticking(number, room, TimeSliceShare(uuid, 500, 10_000)) for number in (1, 2)]
    await commander.order(*jobs)
    for job in jobs:
        await commander.started(job.key)
        await until_file(room.scratch / str(job.key.job))
    await commander.order(Suspend(key=jobs[0].key, step=1))
    answer = await commander.answer(jobs[0].key, 1)
    assert isinstance(answer, Suspended)
    assert answer.image_mib == 10_000 * USED_PCT // 100
    await is_halted(room.scratch / "1")
    await goes_on(room.scratch / "2")
    await commander.order(Stop(key=jobs[1].key, grace_ms=0), Resume(key=jobs[0].key, step=2))
    assert isinstance(await commander.answer(jobs[0].key, 2), Resumed)
    await goes_on(room.scratch / "1")


async def test_a_node_that_gives_no_memory_suspends_nothing(room: AgentRoom) -> None:
    commander = await room.commander()
    await start_agent(room, suspend_memory="0Mi")
    joined = await commander.joined()
    assert joined.inventory.suspend_mib == 0
    assert "suspend_memory" in joined.inventory.suspend_problem
    await commander.sync()
    job = ticking(1, room, WholeCards((joined.inventory.devices[0].uuid,)))
    await commander.order(job)
    await commander.started(job.key)
    await commander.order(Suspend(key=job.key, step=1))
    answer = await commander.answer(job.key, 1)
    assert isinstance(answer, SuspendFailed)
    assert (answer.code, answer.detail) == ("Unsupported", joined.inventory.suspend_problem)
    await goes_on(room.scratch / "1")
