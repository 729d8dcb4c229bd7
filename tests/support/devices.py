"""What every device backend must do, as coroutines that take an open one; and the fake driver in this process.

The checks ask nothing that a borrowed card must not do: no mode is switched and nothing is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pynvml
import pytest

from fake_driver.control import FakeDriver
from gpuyard_agent.devices.base import DeviceBackend, DeviceNews, DeviceTrouble, PartitionRefused
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.devices.nvml_topology import PCIE_LEVELS
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import MODES, WholeCards

#: For something to come of an event.
SOON_S = 10.0


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
        others = {other.uuid for other in devices} - {device.uuid}
        assert {peer for peer, _ in device.nvlinks} <= others
        assert {peer for peer, _ in device.pcie_peers} <= others
        for peer, level in device.pcie_peers:
            assert level in PCIE_LEVELS.values()
            back = next(other for other in devices if other.uuid == peer)
            assert (device.uuid, level) in back.pcie_peers
    assert await backend.inventory() == devices


async def check_profiles_lie_inside_their_card(backend: DeviceBackend) -> None:
    for device in await backend.inventory():
        assert bool(device.mig_profiles) == ("mig" in device.modes)
        for facts in device.mig_profiles:
            assert facts.starts
            assert all(0 <= start <= device.mig_slices - facts.size for start in facts.starts)
            assert 0 < facts.compute_slices <= device.mig_compute_slices
            assert 0 < facts.count_max <= len(facts.starts)
            assert 0 < facts.memory_mib <= device.memory_mib


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
        assert sample.energy_mj is None or sample.energy_mj >= 0
        assert sample.ecc_uncorrected in (None, 0)
        assert sample.instances == ()


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
    await backend.destroy_mig_remains(device.uuid, 0)
    await backend.leave_mig(device.uuid)


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


class News:
    """What a backend tells, to be waited for."""

    def __init__(self, backend: DeviceBackend) -> None:
        self.heard: list[DeviceNews] = []
        self._more = asyncio.Event()
        backend.listen(self._hear)

    def _hear(self, news: DeviceNews) -> None:
        self.heard.append(news)
        self._more.set()

    async def wait(self, wanted: Callable[[DeviceNews], bool]) -> DeviceNews:
        """The first that is so, also one heard before; what came up to it is forgotten."""
        async with asyncio.timeout(SOON_S):
            while True:
                for number, news in enumerate(self.heard):
                    if wanted(news):
                        del self.heard[: number + 1]
                        return news
                self._more.clear()
                await self._more.wait()


@contextlib.asynccontextmanager
async def fake_cards(
    directory: Path,
    model: str | Sequence[str] = "H100-80GB",
    count: int = 1,
    *,
    without: tuple[str, ...] = (),
    topology: str | None = None,
    may_switch_mig: bool = True,
    **knobs: int,
) -> AsyncIterator[tuple[FakeDriver, NvmlBackend]]:
    """The real backend over NVIDIA's own binding and a fake driver, open, with short quarantines."""
    driver = FakeDriver.create(directory / "driver", model, count, without=without, topology=topology, **knobs)
    with driver.in_process(pynvml):
        backend = NvmlBackend(may_switch_mig=may_switch_mig, quarantine_s=0.1, probe_s=0.05)
        await backend.open()
        try:
            yield driver, backend
        finally:
            driver.clear_faults()
            await backend.close()
            driver.close()
