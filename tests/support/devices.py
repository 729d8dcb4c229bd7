"""What every device backend must do, as coroutines that take an open one; and how to run them on NVIDIA's binding.

The binding finds its library by the loader's path at the start of a process, so checks of the real backend run in a
process of their own: `python -m support.devices CHECK`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, PartitionRefused
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import MODES, WholeCards

ROOT = Path(__file__).parents[2]
ROOTS = ("protocol", "client", "daemon", "agents", "tests")


async def check_inventory_is_ordered_and_repeats_itself(backend: DeviceBackend) -> None:
    devices = await backend.inventory()
    assert devices
    assert [device.index for device in devices] == list(range(len(devices)))
    assert len({device.uuid for device in devices}) == len(devices)
    for device in devices:
        assert device.uuid.startswith("GPU-")
        assert device.memory_mib > 0
        assert device.healthy
        assert device.fault == ""
        assert device.modes
        assert set(device.modes) <= set(MODES)
        assert {peer for peer, _ in device.nvlinks} <= {other.uuid for other in devices} - {device.uuid}
    assert await backend.inventory() == devices


async def check_samples_cover_every_card(backend: DeviceBackend) -> None:
    devices = await backend.inventory()
    samples = await backend.samples()
    assert [sample.uuid for sample in samples] == [device.uuid for device in devices]
    for device, sample in zip(devices, samples, strict=True):
        assert sample.memory_total_mib == device.memory_mib
        assert sample.memory_used_mib is not None
        assert 0 <= sample.memory_used_mib <= device.memory_mib
        assert sample.utilization_pct is None or 0 <= sample.utilization_pct <= 100
        assert sample.temperature_c is None or 0 < sample.temperature_c < 120


async def check_unknown_cards_are_told(backend: DeviceBackend) -> None:
    await backend.inventory()
    with pytest.raises(DeviceTrouble, match="no card GPU-none"):
        await backend.processes("GPU-none")


async def check_an_impossible_instance_is_refused(backend: DeviceBackend) -> None:
    device = (await backend.inventory())[0]
    with pytest.raises(PartitionRefused):
        await backend.create_mig(device.uuid, "9g.999gb", 0)
    assert await backend.mig_instances(device.uuid) == ()
    await backend.destroy_mig(device.uuid, "MIG-none")


async def check_partitions_are_noted_and_dropped(backend: DeviceBackend) -> None:
    device = (await backend.inventory())[0]
    key = AssignmentKey(1, 1, 0)
    for _ in range(2):
        backend.hold(key, WholeCards((device.uuid,)))
        backend.running(key, os.getpid())
        backend.running(key, 0)
        backend.drop(key)
    backend.drop(key)


async def check_it_opens_again_after_a_close(backend: DeviceBackend) -> None:
    before = await backend.inventory()
    await backend.close()
    await backend.open()
    assert await backend.inventory() == before
    assert await backend.driver()


CHECKS: dict[str, Callable[[DeviceBackend], Awaitable[None]]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def build_driver(directory: Path) -> Path:
    """The stand-in for NVIDIA's library, compiled; returns the directory for the loader's path."""
    library = directory / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("libnvidia-ml.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(source)], check=True
    )
    return directory


def run_with_driver(library_dir: Path | None, arguments: list[str], environment: Mapping[str, str]) -> str:
    """Standard output of a Python process that would find this library; a failure fails with what it wrote."""
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ROOTS),
        **environment,
    }
    if library_dir is not None:
        env["LD_LIBRARY_PATH"] = str(library_dir)
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def _check_nvml(name: str) -> None:
    backend = NvmlBackend()
    await backend.open()
    try:
        await CHECKS[name](backend)
    finally:
        await backend.close()


if __name__ == "__main__":
    asyncio.run(_check_nvml(sys.argv[1]))
