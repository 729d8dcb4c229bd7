"""The daemon, an agent and nats-server are killed in turn while jobs run: every job runs exactly once.

The count is taken from what the jobs themselves wrote, not from what the yard says about them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard

JOBS = 48
VICTIMS = (("gpuyard_daemon",), ("gpuyard_agent", "node-1"), ("nats-server",))


@pytest.fixture
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB") as yard:
        yield yard


def _script(yard: Yard) -> str:
    """Each job appends one line when it starts and one when it ends; a single write each, so that none is torn."""
    journal = yard.scratch / "$GPUYARD_JOB"
    return f'echo "start $GPUYARD_ATTEMPT" >> {journal}; sleep 0.8; echo "end $GPUYARD_ATTEMPT" >> {journal}'


async def test_every_job_runs_exactly_once_while_everything_is_killed_in_turn(yard: Yard) -> None:
    async with yard.connect() as client:
        outcomes = await client.submit_many(
            [{"command": _script(yard), "gpus": 1, "name": f"kill-{index}"} for index in range(JOBS)], batched=False
        )
        jobs = [outcome for outcome in outcomes if isinstance(outcome, gpuyard.Job)]
        assert len(jobs) == JOBS

        async def finished() -> int:
            try:
                return (await client.stats()).finished
            except gpuyard.GpuyardError:
                return -1  # the daemon or the server is being restarted

        for round_, words in enumerate(VICTIMS + VICTIMS):
            floor = round_ * JOBS // 8

            async def some_more_are_done(floor: int = floor) -> bool:
                return await finished() >= floor

            await eventually(some_more_are_done, f"{floor} jobs done before {words} is killed", timeout=60)
            words = words if words != ("gpuyard_agent", "node-1") else ("gpuyard_agent ", "node-1")
            killed = yard.kill(*words)
            assert killed >= 1, f"nothing to kill for {words}"

        async def all_are_done() -> bool:
            return await finished() >= JOBS

        await eventually(all_are_done, "every job done", timeout=90)
        views = [await client.job(job.number) for job in jobs]
    assert [(view.job, view.state, view.reason) for view in views if view.state != "succeeded"] == []
    for view in views:
        lines = (yard.scratch / str(view.job)).read_text().splitlines()
        assert lines == [f"start {view.attempt}", f"end {view.attempt}"], f"job {view.job} wrote {lines}"
    await asyncio.to_thread(_no_job_is_left, yard)


def _no_job_is_left(yard: Yard) -> None:
    assert not yard.processes("sleep 0.8")
