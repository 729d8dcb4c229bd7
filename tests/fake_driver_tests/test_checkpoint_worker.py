"""The worker process and NVIDIA's own bindings on the fake driver: what the agent asks reaches the driver and back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from fake_driver.control import Checkpoint, FakeDriver
from gpuyard_agent.checkpoint import CheckpointTrouble
from gpuyard_agent.checkpoint_worker import CheckpointWorker


def workers() -> list[psutil.Process]:
    """Alive: children that other tests have not waited for yet are none."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "gpuyard_agent.cuda_checkpoint" in " ".join(child.cmdline())]


@pytest.fixture
async def worker(driver: FakeDriver) -> AsyncIterator[CheckpointWorker]:
    made = CheckpointWorker(driver.env())
    yield made
    await made.close()
    assert workers() == []


async def test_a_process_goes_through_all_its_states(worker: CheckpointWorker, start_job: Any) -> None:
    job = start_job("--memory", "1000", "--context", "0", "--sleep", "--step-ms", "1")
    job.until("ready")
    assert await worker.problem() == ""
    seen = [await worker.standing(job.pid)]
    for step in (
        worker.lock(job.pid, 5_000),
        worker.checkpoint(job.pid, 10),
        worker.restore(job.pid, 10),
        worker.unlock(job.pid),
    ):
        await step
        seen.append(await worker.standing(job.pid))
    assert seen == ["running", "locked", "checkpointed", "locked", "running"]
    assert await worker.standing(os.getpid()) == "none"
    assert len(workers()) == 1


async def test_what_the_driver_refuses_is_told_in_its_words(
    worker: CheckpointWorker, driver: FakeDriver, bystander: Any
) -> None:
    driver.gpu(0).allocate(bystander.pid, 10)
    with pytest.raises(CheckpointTrouble, match=f"restore process {bystander.pid}: CUDA_ERROR_ILLEGAL_STATE"):
        await worker.restore(bystander.pid, 10)
    assert await worker.standing(bystander.pid) == "running"


async def test_a_driver_that_hangs_costs_its_worker_and_not_the_agent(
    worker: CheckpointWorker, driver: FakeDriver, bystander: Any
) -> None:
    driver.gpu(0).allocate(bystander.pid, 10)
    await worker.lock(bystander.pid, 1_000)
    (first,) = workers()
    driver.hang("cuCheckpointProcessCheckpoint")
    with pytest.raises(CheckpointTrouble, match=r"no answer from the driver in 0 s"):
        await worker.checkpoint(bystander.pid, 0.3)
    driver.clear_faults()
    assert await worker.standing(bystander.pid) == "locked"
    assert first not in workers()
    await worker.checkpoint(bystander.pid, 10)
    assert driver.checkpoint_state(bystander.pid) is Checkpoint.CHECKPOINTED


async def test_a_worker_that_dies_fails_one_request(worker: CheckpointWorker, driver: FakeDriver) -> None:
    assert await worker.problem() == ""
    (process,) = workers()
    process.kill()
    with pytest.raises(CheckpointTrouble, match="the process that asks the driver ended"):
        await worker.standing(os.getpid())
    assert await worker.standing(os.getpid()) == "none"


async def test_the_cards_are_let_go_when_nothing_is_asked(driver: FakeDriver) -> None:
    worker = CheckpointWorker(driver.env(), idle_s=0.1)
    assert await worker.problem() == ""
    async with asyncio.timeout(10):
        while workers():
            await asyncio.sleep(0.02)
    assert await worker.problem() == ""
    await worker.close()


async def test_a_host_without_a_driver_says_so() -> None:
    worker = CheckpointWorker({"PATH": os.defpath})
    assert "this host's CUDA driver cannot suspend" in await worker.problem()
    with pytest.raises(CheckpointTrouble, match="cannot suspend"):
        await worker.standing(1)
    await worker.close()
