"""Suspending real processes on the fake driver: the order of steps, and the way back from each."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from fake_driver.control import Checkpoint, CheckpointRefused, FakeDriver, Request
from gpuyard_agent.checkpoint import (
    CannotResume,
    CannotSuspend,
    CheckpointTrouble,
    JobBroken,
    ProcessStanding,
    RamLedger,
    Suspender,
)
from gpuyard_agent.cuda_checkpoint import Answer, CudaCalls
from gpuyard_agent.cuda_checkpoint import Request as Call
from gpuyard_protocol.names import AssignmentKey

KEY = AssignmentKey(1, 1, 0)
STANDINGS: dict[Checkpoint | None, ProcessStanding] = {
    None: "none",
    Checkpoint.RUNNING: "running",
    Checkpoint.LOCKED: "locked",
    Checkpoint.CHECKPOINTED: "checkpointed",
    Checkpoint.FAILED: "failed",
}


class DriverCheckpoint:
    """The four steps as the driver offers them, without NVIDIA's bindings in between."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self.steps: list[str] = []

    async def problem(self) -> str:
        return ""

    async def close(self) -> None:
        return None

    async def standing(self, pid: int) -> ProcessStanding:
        return STANDINGS[self._driver.checkpoint_state(pid)]

    async def _ask(self, pid: int, request: Request, timeout_s: float | None = None) -> None:
        self.steps.append(request.name.lower())
        try:
            await asyncio.to_thread(self._driver.checkpoint, pid, request, timeout_s=timeout_s)
        except CheckpointRefused as refusal:
            raise CheckpointTrouble(str(refusal)) from None

    async def lock(self, pid: int, timeout_ms: int) -> None:
        await self._ask(pid, Request.LOCK, timeout_ms / 1000)

    async def checkpoint(self, pid: int, deadline_s: float) -> None:
        await self._ask(pid, Request.CHECKPOINT)

    async def restore(self, pid: int, deadline_s: float) -> None:
        await self._ask(pid, Request.RESTORE)

    async def unlock(self, pid: int) -> None:
        await self._ask(pid, Request.UNLOCK)


class Room:
    """A suspender over `driver`, and what it did."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.backend = DriverCheckpoint(driver)
        self.ram = RamLedger(60_000)
        self.suspender = Suspender(self.backend, self.ram, self._freeze)

    async def _freeze(self, key: AssignmentKey, frozen: bool) -> None:
        self.backend.steps.append("freeze" if frozen else "thaw")


@pytest.fixture
def room(driver: FakeDriver) -> Room:
    return Room(driver)


async def test_a_job_leaves_its_card_and_comes_back(room: Room, start_job: Any) -> None:
    job = start_job("--memory", "1000", "--context", "0", "--sleep", "--step-ms", "1")
    job.until("ready")
    await room.suspender.suspend(KEY, [job.pid], 1_000)
    assert room.driver.checkpoint_state(job.pid) is Checkpoint.CHECKPOINTED
    assert room.ram.held_mib == 1_000
    await room.suspender.resume(KEY, [job.pid], 1_000)
    assert room.driver.checkpoint_state(job.pid) is Checkpoint.RUNNING
    assert room.backend.steps == ["lock", "checkpoint", "freeze", "thaw", "restore", "unlock"]
    assert room.ram.held_mib == 0
    assert job.until("progress")


async def test_every_process_is_locked_before_any_is_taken(room: Room, start_job: Any) -> None:
    jobs = [start_job("--sleep", "--step-ms", "1") for _ in range(2)]
    for job in jobs:
        job.until("ready")
    pids = [job.pid for job in jobs]
    await room.suspender.suspend(KEY, pids, 1_000)
    await room.suspender.resume(KEY, pids, 1_000)
    down, up = ["lock"] * 2 + ["checkpoint"] * 2 + ["freeze"], ["thaw"] + ["restore"] * 2 + ["unlock"] * 2
    assert room.backend.steps == down + up


async def test_a_job_that_cannot_be_suspended_runs_on(room: Room, start_job: Any) -> None:
    """One of two refuses: the other is unlocked again."""
    willing, unwilling = start_job("--sleep", "--step-ms", "1"), start_job("--unsuspendable", "--sleep")
    for job in (willing, unwilling):
        job.until("ready")
    with pytest.raises(CannotSuspend, match="LOCK"):
        await room.suspender.suspend(KEY, [willing.pid, unwilling.pid], 1_000)
    assert room.driver.checkpoint_state(willing.pid) is Checkpoint.RUNNING
    assert room.ram.held_mib == 0
    assert willing.until("progress")
    assert "freeze" not in room.backend.steps


async def test_a_checkpoint_that_fails_half_way_means_a_broken_job(room: Room, bystander: Any) -> None:
    room.driver.gpu(0).allocate(bystander.pid, 10)
    room.driver.inject("cuCheckpointProcessCheckpoint", error=999, times=1)
    with pytest.raises(JobBroken, match="no way back"):
        await room.suspender.suspend(KEY, [bystander.pid], 10)
    assert room.ram.held_mib == 0


async def test_a_card_without_room_leaves_the_job_suspended(room: Room, bystander: Any) -> None:
    room.driver.gpu(0).allocate(bystander.pid, 50_000)
    await room.suspender.suspend(KEY, [bystander.pid], 50_000)
    room.driver.gpu(0).allocate(os.getpid(), 40_000)
    with pytest.raises(CannotResume):
        await room.suspender.resume(KEY, [bystander.pid], 50_000)
    assert room.driver.checkpoint_state(bystander.pid) is Checkpoint.CHECKPOINTED
    assert room.backend.steps[-1] == "freeze"
    assert room.ram.held_mib == 50_000
    room.driver.release(os.getpid())
    await room.suspender.resume(KEY, [bystander.pid], 50_000)
    assert room.driver.checkpoint_state(bystander.pid) is Checkpoint.RUNNING


async def test_what_the_host_cannot_hold_is_not_touched(room: Room, bystander: Any) -> None:
    room.driver.gpu(0).allocate(bystander.pid, 70_000)
    with pytest.raises(CannotSuspend, match="70000 MiB are more than the 60000 MiB left"):
        await room.suspender.suspend(KEY, [bystander.pid], 70_000)
    assert room.backend.steps == []


def test_the_ledger_of_memory_counts_each_job_once() -> None:
    ram, other = RamLedger(100), AssignmentKey(2, 1, 0)
    assert ram.reserve(KEY, 60)
    assert not ram.reserve(other, 50)
    assert ram.reserve(KEY, 80)
    assert ram.free_mib == 20
    ram.release(KEY)
    ram.release(KEY)
    assert ram.free_mib == 100


# --- NVIDIA's bindings ---


class Code(int):
    """An error as the bindings give it: a number with a name."""

    name = "CUDA_ERROR"


class Bindings:
    """As `cuda.bindings.driver`, in the shape of its answers: tuples that begin with an error."""

    class CUcheckpointLockArgs:
        timeoutMs = 0  # noqa: N815  the driver's name

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver

    def cuInit(self, flags: int) -> tuple[Code]:  # noqa: N802
        return (Code(0),)

    def cuCheckpointProcessGetState(self, pid: int) -> tuple[Code, int]:  # noqa: N802
        state = self._driver.checkpoint_state(pid)
        return (Code(1), 0) if state is None else (Code(0), int(state))

    def _ask(self, pid: int, request: Request) -> tuple[Code]:
        try:
            self._driver.checkpoint(pid, request, timeout_s=5)
        except CheckpointRefused as refusal:
            return (Code(refusal.code),)
        return (Code(0),)

    def cuCheckpointProcessLock(self, pid: int, arguments: Any) -> tuple[Code]:  # noqa: N802
        assert arguments.timeoutMs
        return self._ask(pid, Request.LOCK)

    def cuCheckpointProcessCheckpoint(self, pid: int, arguments: None) -> tuple[Code]:  # noqa: N802
        return self._ask(pid, Request.CHECKPOINT)

    def cuCheckpointProcessRestore(self, pid: int, arguments: None) -> tuple[Code]:  # noqa: N802
        return self._ask(pid, Request.RESTORE)

    def cuCheckpointProcessUnlock(self, pid: int, arguments: None) -> tuple[Code]:  # noqa: N802
        return self._ask(pid, Request.UNLOCK)


def test_the_bindings_take_a_process_through_all_its_states(driver: FakeDriver, bystander: Any) -> None:
    driver.gpu(0).allocate(bystander.pid, 500)
    cuda, pid = CudaCalls(Bindings(driver)), bystander.pid
    assert cuda.problem() == ""
    seen = [cuda.standing(pid)]
    cuda.lock(pid, 1_000)
    seen.append(cuda.standing(pid))
    cuda.checkpoint(pid)
    seen.append(cuda.standing(pid))
    cuda.restore(pid)
    cuda.unlock(pid)
    assert [*seen, cuda.standing(pid)] == ["running", "locked", "checkpointed", "running"]
    assert cuda.standing(os.getpid()) == "none"
    with pytest.raises(CheckpointTrouble, match=f"restore process {pid}"):
        cuda.restore(pid)
    assert cuda.answer(Call(do="restore", pid=pid)).trouble.startswith(f"restore process {pid}")
    assert cuda.answer(Call(do="standing", pid=pid)) == Answer(said="running")


# --- after an agent that died on the way ---


async def test_what_was_done_before_is_not_done_twice(room: Room, start_job: Any) -> None:
    """Both ways are asked for again at every point at which an agent can have died."""
    job = start_job("--memory", "1000", "--context", "0", "--sleep", "--step-ms", "1")
    job.until("ready")
    await room.backend.lock(job.pid, 1_000)
    room.backend.steps.clear()
    await room.suspender.suspend(KEY, [job.pid], 1_000)
    await room.suspender.suspend(KEY, [job.pid], 1_000)
    assert room.backend.steps == ["checkpoint", "freeze", "freeze"]
    await room.backend.restore(job.pid, 5)
    room.backend.steps.clear()
    await room.suspender.resume(KEY, [job.pid], 1_000)
    await room.suspender.resume(KEY, [job.pid], 1_000)
    assert room.backend.steps == ["thaw", "unlock", "thaw"]
    assert room.driver.checkpoint_state(job.pid) is Checkpoint.RUNNING
