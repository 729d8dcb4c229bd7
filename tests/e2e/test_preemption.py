"""Giving way on a real yard, rung by rung: told to save, started anew, suspended by the owner; and a place kept.

Who works at night (a scavenger's queue) gives way at once to who has cards of its own. What happened is read from what
the jobs themselves wrote, from their events, and from what the command line shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpuyard.client import Client
from gpuyard.job import Job
from gpuyard_protocol.jobs import JobEvent
from support.night_yard import night_yard
from support.yard import Yard, eventually


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with night_yard() as yard:
        yield yard


@pytest.fixture
async def client(yard: Yard) -> AsyncIterator[Client]:
    """One card is never to be had; the other is what the tests are about. Nothing is left behind."""
    async with yard.connect() as client:
        firm = await client.submit(command=["sleep", "1000"], gpus=1, preemption="never")
        await state_is(firm, "running")
        yield client
        async for view in client.jobs():
            await client.cancel(view.job)

        async def is_empty() -> bool:
            return (await client.stats()).jobs.get("running", 0) == 0

        await eventually(is_empty, "everybody has left")


async def state_is(job: Job, state: str) -> None:
    async def is_it() -> bool:
        return (await job.view()).state == state

    await eventually(is_it, f"job {job.number} is {state}", timeout=60)


async def lines_of(path: Path, least: int) -> list[str]:
    async def enough() -> bool:
        return path.exists() and len(path.read_text().splitlines()) >= least

    await eventually(enough, f"{least} lines in {path}", timeout=60)
    return path.read_text().splitlines()


async def test_a_job_is_told_to_save_and_goes_on_from_there(yard: Yard, client: Client) -> None:
    saved, steps = yard.scratch / "saved", yard.scratch / "steps"
    script = f"""
    at=$(cat {saved} 2>/dev/null || echo 0)
    trap 'echo $at > {saved}; echo saved $at >> {steps}; exit 143' TERM
    while :; do at=$((at + 1)); echo $GPUYARD_ATTEMPT $at >> {steps}; sleep 0.1; done
    """
    heard: list[JobEvent] = []
    await client.listen(heard.append)
    night = await client.submit(command=script, gpus=1, preemption="checkpoint", stop_grace="20s", queue="night")
    await lines_of(steps, 5)
    day = await client.submit(command=["sleep", "2"], gpus=1)
    await state_is(day, "running")
    view = await night.view()
    assert view.state == "pending"
    assert view.reason is not None
    assert view.reason.code == "Preempted"
    assert f"job {day.number}" in view.reason.text
    shown = await asyncio.to_thread(yard.cli, "why", str(night.number))
    assert f"preempted by job {day.number}" in shown.stdout
    assert (await day.wait()).state == "succeeded"
    await state_is(night, "running")
    before = saved.read_text().strip()

    async def goes_on() -> bool:
        return any(line.startswith("2 ") for line in steps.read_text().splitlines())

    await eventually(goes_on, "the second attempt works")
    lines = steps.read_text().splitlines()
    assert lines.count(f"saved {before}") == 1
    second = [line for line in lines if line.startswith("2 ")]
    assert second[0] == f"2 {int(before) + 1}", "it went on where it was"
    states = [event.state for event in heard if event.job == night.number]
    came = states.index("starting")
    assert states[came:] == ["starting", "running", "stopping", "pending", "starting", "running"]
    assert (await night.view()).retries_left == 0


async def test_a_job_that_does_not_listen_is_ended_after_its_grace_and_starts_anew(yard: Yard, client: Client) -> None:
    starts = yard.scratch / "starts"
    script = f"trap '' TERM; echo $GPUYARD_ATTEMPT >> {starts}; while :; do sleep 0.1; done"
    night = await client.submit(command=script, gpus=1, stop_grace="1s", queue="night")
    await lines_of(starts, 1)
    day = await client.submit(command=["sleep", "1"], gpus=1)
    assert (await day.wait()).state == "succeeded"
    assert await lines_of(starts, 2) == ["1", "2"]
    await state_is(night, "running")


async def test_an_owner_takes_a_job_off_its_card_until_it_is_resumed(yard: Yard, client: Client) -> None:
    ticks = yard.scratch / "owned"
    script = f"while :; do echo $$ >> {ticks}; sleep 0.02; done"
    mine = await client.submit(command=script, gpus=1, preemption="suspend")
    await lines_of(ticks, 3)
    done = await asyncio.to_thread(yard.cli, "suspend", str(mine.number))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Suspending job {mine.number}")

    async def is_off() -> bool:
        return (await mine.view()).placed[0].state == "suspended"

    await eventually(is_off, "it is off its card")
    halted = len(ticks.read_text().splitlines())
    other = await client.submit(command=["sleep", "1"], gpus=1)
    assert (await other.wait()).state == "succeeded", "the card was free for it"
    assert (await mine.view()).state == "suspended"
    shown = await asyncio.to_thread(yard.cli, "why", str(mine.number))
    assert f"held by {client.context.user}" in shown.stdout
    assert len(ticks.read_text().splitlines()) == halted
    done = await asyncio.to_thread(yard.cli, "resume", str(mine.number))
    assert done.returncode == 0, done.stderr
    await lines_of(ticks, halted + 5)
    view = await mine.view()
    assert (view.state, view.attempt) == ("running", 1)
    assert len(set(ticks.read_text().split())) == 1, "one process from the beginning to the end"
    again = await asyncio.to_thread(yard.cli, "resume", str(mine.number))
    assert again.returncode == 1
    assert "is running" in again.stderr


async def test_what_cannot_be_suspended_is_refused_with_the_reason(yard: Yard, client: Client) -> None:
    plain = await client.submit(command=["sleep", "1000"], gpus=1)
    await state_is(plain, "running")
    done = await asyncio.to_thread(yard.cli, "suspend", str(plain.number))
    assert done.returncode == 1
    assert "preemption 'requeue'" in done.stderr
    assert (await plain.view()).state == "running"


async def test_a_place_is_kept_for_what_a_service_is_never_to_be_without(yard: Yard, client: Client) -> None:
    """Nobody may be told to go for its floor: its next card is kept for it, past whoever else waits."""
    holds = await client.submit(command=["sleep", "4"], gpus=1, preemption="never")
    await state_is(holds, "running")
    await client.apply(
        name="chat",
        command=["sleep", "1000"],
        replica={"gpus": 1},
        min_replicas=1,
        max_replicas=1,
        target_concurrency=4,
    )

    async def is_kept() -> bool:
        replicas = [view async for view in client.jobs() if view.service == "chat"]
        return bool(replicas) and "kept for it" in (await client.why(replicas[0].job)).summary

    await eventually(is_kept, "a place is kept for the replica")
    eager = await client.submit(command=["sleep", "1"], gpus=1, priority=2)
    assert (await holds.wait()).state == "succeeded"

    async def is_up() -> bool:
        return any([view.state == "running" async for view in client.jobs() if view.service == "chat"])

    await eventually(is_up, "the replica runs")
    assert (await eager.view()).state == "pending"
    await client.delete("chat")
    assert (await eager.wait()).state == "succeeded"
