"""What only a real card can show (`-m gpu`): a process suspended and resumed, and limits of MPS that the driver keeps.

Nothing of the card's settings is changed: no mode is switched, no instance made, the compute mode stays as it is. What
was measured is printed as JSON (`-s` shows it) and belongs into docs/hardware.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from gpuyard_agent.checkpoint import RamLedger, Suspender
from gpuyard_agent.checkpoint_worker import CheckpointWorker
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import MpsShare

pytestmark = pytest.mark.gpu

KEY = AssignmentKey(1, 1, 0)
PROGRAM = Path(__file__).parents[1] / "support" / "cuda_program.py"
HELD_MIB = 8_192
SOON_S = 60.0
US = Account(name="us", uid=os.getuid(), gid=os.getgid())


@pytest.fixture
async def backend() -> AsyncIterator[NvmlBackend]:
    made = NvmlBackend(may_switch_mig=False)
    await made.open()
    yield made
    await made.close()


async def start(mib: int, environment: Mapping[str, str] = os.environ) -> Process:
    return await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), str(mib), stdout=PIPE, env=environment)


async def said(process: Process) -> dict[str, object]:
    assert process.stdout is not None
    async with asyncio.timeout(SOON_S):
        line = await process.stdout.readline()
    facts: dict[str, object] = json.loads(line or b"{}")
    return facts


async def held_mib(backend: NvmlBackend, pid: int) -> int:
    device = (await backend.inventory())[0]
    return sum(one.memory_mib or 0 for one in await backend.processes(device.uuid) if one.pid == pid)


async def test_a_real_process_leaves_its_card_and_comes_back(backend: NvmlBackend) -> None:
    worker = CheckpointWorker()
    assert await worker.problem() == ""
    process = await start(HELD_MIB)

    async def freeze(key: AssignmentKey, frozen: bool) -> None:
        process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    suspender = Suspender(worker, RamLedger(4 * HELD_MIB), freeze)
    try:
        assert (await said(process))["rounds"] == 1
        before_mib = await held_mib(backend, process.pid)
        began_s = time.perf_counter()
        await suspender.suspend(KEY, [process.pid], before_mib or HELD_MIB)
        down_s = time.perf_counter() - began_s
        assert await worker.standing(process.pid) == "checkpointed"
        assert await held_mib(backend, process.pid) < HELD_MIB // 4
        began_s = time.perf_counter()
        await suspender.resume(KEY, [process.pid], before_mib or HELD_MIB)
        up_s = time.perf_counter() - began_s
        assert await worker.standing(process.pid) == "running"
        for _ in range(3):
            assert "rounds" in await said(process)
        gib = HELD_MIB / 1024
        print(json.dumps({"suspend_gib_per_s": round(gib / down_s, 2), "resume_gib_per_s": round(gib / up_s, 2)}))
    finally:
        process.kill()
        await process.wait()
        await worker.close()


async def test_the_driver_keeps_a_share_under_mps_within_its_memory(backend: NvmlBackend, tmp_path: Path) -> None:
    partitions = CardPartitions(backend, tmp_path, mps_exclusive=False)
    device = (await partitions.refresh())[0]
    grant = await partitions.prepare(KEY, MpsShare(device.uuid, 300, 4_096), US, "test")
    environment = {**os.environ, **grant.env}
    try:
        greedy = await start(6_000, environment)
        assert await said(greedy) == {"error": "CUDA_ERROR_OUT_OF_MEMORY"}
        assert await greedy.wait() == 2
        modest = await start(2_000, environment)
        assert "rounds" in await said(modest)
        await partitions.before_kill(KEY, [modest.pid])
        modest.kill()
        await modest.wait()
    finally:
        await partitions.undo(KEY)
        await partitions.close()
