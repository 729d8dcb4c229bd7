"""Measurements that only a real card can make, and the programs that they need; tried out on the fake driver.

Each measures and asserts what must hold besides. No setting of the card is changed: no mode is switched, no instance
made, the compute mode stays as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import mmap
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import psutil

from gpuyard_agent.checkpoint import RamLedger, Suspender
from gpuyard_agent.checkpoint_worker import CheckpointWorker
from gpuyard_agent.devices.base import DeviceBackend
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Device, MpsShare

PROGRAMS = {"cuda": "cuda_program.py", "torch": "torch_program.py"}
SOON_S = 120.0
#: The card is done when its counter has stood still for so long.
STILL_S = 1.0
SHARE_MILLI, SHARE_MIB = 300, 4_096
_KEY = AssignmentKey(1, 1, 0)


def programs() -> tuple[str, ...]:
    """Those whose packages are installed."""
    return ("cuda", "torch") if importlib.util.find_spec("torch") is not None else ("cuda",)


class Program:
    """One that runs on the card."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    async def said(self) -> dict[str, object]:
        """Its next line."""
        assert self._process.stdout is not None
        async with asyncio.timeout(SOON_S):
            line = await self._process.stdout.readline()
        facts: dict[str, object] = json.loads(line or b'{"error": "it ended without a word"}')
        return facts

    async def rounds(self, count: int) -> dict[str, object]:
        """It works: so many rounds from now; its first word of them."""
        first = await self.said()
        assert "rounds" in first, first
        for _ in range(count - 1):
            assert "rounds" in await self.said()
        return first

    async def end(self) -> int:
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


@contextlib.asynccontextmanager
async def program(
    name: str, device: Device, *arguments: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Program]:
    """Runs on this card, whatever others there are."""
    chosen = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": device.uuid}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(Path(__file__).with_name(PROGRAMS[name])), *arguments,
        stdout=PIPE, env={**os.environ, **chosen, **(env or {})},
    )  # fmt: skip
    try:
        yield Program(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def held_mib(backend: DeviceBackend, device: Device, pid: int) -> int:
    """By the driver's list; 0 also where it lists processes by other numbers than this host's."""
    return sum(one.memory_mib or 0 for one in await backend.processes(device.uuid) if one.pid == pid)


async def suspend_and_resume(
    backend: DeviceBackend, worker: CheckpointWorker, device: Device, name: str, mib: int
) -> dict[str, float]:
    """GiB/s down to the host's memory and up again, of what the program holds."""
    assert await worker.problem() == ""
    async with program(name, device, str(mib)) as running:

        async def freeze(key: AssignmentKey, frozen: bool) -> None:
            running.signal(signal.SIGSTOP if frozen else signal.SIGCONT)

        await running.rounds(1)
        before_mib = await held_mib(backend, device, running.pid) or mib
        suspender = Suspender(worker, RamLedger(4 * before_mib), freeze)
        began_s = time.perf_counter()
        await suspender.suspend(_KEY, [running.pid], before_mib)
        down_s = time.perf_counter() - began_s
        assert await worker.standing(running.pid) == "checkpointed"
        assert await held_mib(backend, device, running.pid) < before_mib // 4
        began_s = time.perf_counter()
        await suspender.resume(_KEY, [running.pid], before_mib)
        up_s = time.perf_counter() - began_s
        assert await worker.standing(running.pid) == "running"
        await running.rounds(3)
    gib = before_mib / 1024
    return {"held_gib": round(gib, 2), "down_gib_per_s": round(gib / down_s, 2), "up_gib_per_s": round(gib / up_s, 2)}


async def share_under_mps(backend: DeviceBackend, control: str | None = None) -> dict[str, object]:
    """A share in the default compute mode: what its programs see of the card, and that the driver keeps its limit."""
    # A short path: sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="gy-") as folder:
        partitions = CardPartitions(backend, Path(folder), mps_control=control, mps_exclusive=False)
        device = (await partitions.refresh())[0]
        async with program("cuda", device, "64") as alone:
            all_sms = (await alone.rounds(1))["sms"]
        us = Account(name="us", uid=os.getuid(), gid=os.getgid())
        grant = await partitions.prepare(_KEY, MpsShare(device.uuid, SHARE_MILLI, SHARE_MIB), us, "test")
        try:
            async with program("cuda", device, str(SHARE_MIB + 2_000), env=grant.env) as greedy:
                assert await greedy.said() == {"error": "CUDA_ERROR_OUT_OF_MEMORY"}
                assert await greedy.end() == 2
            async with program("cuda", device, str(SHARE_MIB // 2), env=grant.env) as modest:
                sms = (await modest.rounds(1))["sms"]
                await partitions.before_kill(_KEY, [modest.pid])
        finally:
            await partitions.undo(_KEY)
            await partitions.close()
    return {"share": SHARE_MILLI / 1000, "limit_mib": SHARE_MIB, "sms": sms, "sms_of_card": all_sms}


async def drain_after_freeze(device: Device, mib: int) -> dict[str, float]:
    """How long a card goes on with what was queued, once the process that queued it is halted."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as shared:
            async with program("cuda", device, str(mib), file.name) as running:
                for _ in range(4):
                    assert "queued" in await running.said()
                began, began_s = _count(shared), time.perf_counter()
                await asyncio.sleep(STILL_S)
                step_ms = (time.perf_counter() - began_s) * 1000 / max(1, _count(shared) - began)
                running.signal(signal.SIGSTOP)
                halted, halted_s = await _halted(running.pid, shared)
                last, last_s = halted, halted_s
                while time.perf_counter() - last_s < STILL_S:
                    if (count := _count(shared)) != last:
                        last, last_s = count, time.perf_counter()
                    await asyncio.sleep(0.001)
    return {
        "step_ms": round(step_ms, 3),
        "steps_after_halt": last - halted,
        "drain_ms": round((last_s - halted_s) * 1000, 1),
    }


def _count(shared: mmap.mmap) -> int:
    return int.from_bytes(shared[:4], sys.byteorder)


async def _halted(pid: int, shared: mmap.mmap) -> tuple[int, float]:
    """(what the card had done, when) as soon as the process stands still."""
    async with asyncio.timeout(SOON_S):
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.0005)
    return _count(shared), time.perf_counter()
