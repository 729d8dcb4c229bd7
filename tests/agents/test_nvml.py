"""The backend for real cards, through NVIDIA's own binding and a fake driver: what it shows, how it bears faults."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fake_driver.control import Error, FakeDriver
from gpuyard_agent.devices import nvml, nvml_events
from gpuyard_agent.devices.base import (
    ApplicationFault,
    DeviceFault,
    DeviceRecovered,
    DevicesChanged,
    DeviceTrouble,
    NoDriver,
)
from gpuyard_agent.devices.nvml import NvmlBackend
from support.devices import SOON_S, News, fake_cards

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml_events, "WAIT_MS", 20)
    monkeypatch.setattr(nvml_events, "PAUSE_S", 0.02)


@pytest.fixture
async def cards(tmp_path: Path) -> AsyncIterator[tuple[FakeDriver, NvmlBackend]]:
    async with fake_cards(tmp_path, count=2) as made:
        yield made


Cards = tuple[FakeDriver, NvmlBackend]


async def listens(driver: FakeDriver) -> None:
    """What happened before the cards were registered is told to nobody."""
    async with asyncio.timeout(SOON_S):
        while not driver.calls("nvmlEventSetWait_v2"):
            await asyncio.sleep(0.005)


# --- what it shows ---


async def test_inventory_says_what_the_driver_says(cards: Cards) -> None:
    driver, backend = cards
    first, second = await backend.inventory()
    assert await backend.driver() == "580.95.05"
    assert [first.uuid, second.uuid] == [gpu.uuid for gpu in driver.gpus]
    assert first.model == "NVIDIA H100 80GB HBM3"
    assert first.memory_mib == 81152, "what the driver reserves is not for jobs"
    assert first.pci_bus_id == driver.gpu().pci_bus_id
    assert (first.mig_slices, first.mig_compute_slices) == (8, 7)
    shown = {facts.name: (facts.size, facts.starts, facts.compute_slices) for facts in first.mig_profiles}
    assert shown["1g.10gb+me"] == (1, (0, 1, 2, 3, 4, 5, 6), 1)
    assert shown["3g.40gb"] == (4, (0, 4), 3)


async def test_mps_is_offered_only_where_its_daemon_is_installed(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, backend = cards
    monkeypatch.setenv("PATH", "/nowhere")
    assert (await backend.inventory())[0].modes == ("whole", "mig", "timeslice")
    monkeypatch.setenv("PATH", driver.bin)
    assert (await backend.inventory())[0].modes == ("whole", "mig", "mps", "timeslice")


async def test_one_process_at_a_time_admits_no_time_slicing_unless_the_agent_wanted_it(cards: Cards) -> None:
    driver, backend = cards
    first, second = await backend.inventory()
    driver.gpu(0).set(compute_mode=3)
    assert await backend.set_exclusive(first.uuid, True) == "already"
    assert await backend.set_exclusive(second.uuid, True) == "done"
    shown = [device.modes for device in await backend.inventory()]
    assert ["timeslice" in modes for modes in shown] == [False, True]
    assert await backend.set_exclusive(second.uuid, False) == "done"
    assert driver.gpu(1).get("compute_mode") == 0
    driver.set_knob("privileged", 0)
    assert await backend.set_exclusive(second.uuid, True) == "denied"


async def test_a_prohibited_card_is_unhealthy_and_says_why(cards: Cards) -> None:
    driver, backend = cards
    driver.gpu(1).set(compute_mode=2)
    _, second = await backend.inventory()
    assert (second.healthy, second.fault, second.modes) == (False, "its compute mode is `prohibited`", ())


@pytest.mark.parametrize(("topology", "links"), [("nvswitch", 18), ("pairs", 18), ("none", 0)])
async def test_links_are_counted_also_while_mig_hides_them(tmp_path: Path, topology: str, links: int) -> None:
    async with fake_cards(tmp_path, count=2, topology=topology) as (_, backend):
        first, second = await backend.inventory()
        wanted = ((second.uuid, links),) if links else ()
        assert first.nvlinks == wanted
        await backend.create_mig(first.uuid, "7g.80gb", 0)
        assert (await backend.inventory())[0].nvlinks == wanted
        assert first.pcie_peers == ((second.uuid, "same-switch"),)


async def test_samples_tell_what_a_working_card_shows(cards: Cards) -> None:
    driver, backend = cards
    await backend.inventory()
    driver.gpu(0).allocate(os.getpid(), 1000)
    driver.load(os.getpid(), 60)
    driver.gpu(0).ecc(corrected=2)
    driver.gpu(0).set(clocks_event_reasons=0x4 | 0x20, temperature_c=88)
    first, _ = await backend.samples()
    assert (first.memory_used_mib, first.utilization_pct, first.temperature_c) == (1000, 60, 88)
    assert (first.ecc_corrected, first.ecc_uncorrected) == (2, 0)
    assert first.slowed_by == ("power-cap", "thermal")
    assert first.power_limit_mw == 700_000
    (process,) = await backend.processes(first.uuid)
    assert (process.pid, process.memory_mib, process.mig_uuid) == (os.getpid(), 1000, "")
    driver.release(os.getpid())


async def test_samples_of_instances_have_their_own_load_and_memory(cards: Cards) -> None:
    driver, backend = cards
    device, _ = await backend.inventory()
    busy = await backend.create_mig(device.uuid, "3g.40gb", 4)
    idle = await backend.create_mig(device.uuid, "1g.10gb", 0)
    gpu, gi, ci = driver.find(busy.mig_uuid)
    driver.gpu(gpu).allocate(os.getpid(), 2000, gi=gi, ci=ci)
    driver.load(os.getpid(), 80)
    await backend.samples()
    await asyncio.sleep(0.11)  # the least time between two readings of the driver's counters
    sample, _ = await backend.samples()
    assert sample.utilization_pct is None, "a card in MIG mode has no load of its own"
    shown = {one.mig_uuid: (one.utilization_pct, one.memory_used_mib) for one in sample.instances}
    assert shown == {idle.mig_uuid: (0, 0), busy.mig_uuid: (80, 2000)}
    (process,) = await backend.processes(device.uuid)
    assert process.mig_uuid == busy.mig_uuid
    driver.release(os.getpid())


async def test_an_old_driver_is_tolerated(tmp_path: Path) -> None:
    gone = ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetGpuInstanceProfileInfoV")
    async with fake_cards(tmp_path, without=gone) as (_, backend):
        (device,) = await backend.inventory()
        assert device.memory_mib == 81559
        assert (await backend.samples())[0].utilization_pct is None
        assert {facts.name for facts in device.mig_profiles} >= {"1g.10gb", "1g.10gb+me", "3g.40gb", "7g.80gb"}


def test_without_a_driver_it_says_what_is_missing() -> None:
    program = (
        "import asyncio\n"
        "from gpuyard_agent.devices.nvml import NvmlBackend\n"
        "try:\n    asyncio.run(NvmlBackend().open())\nexcept Exception as problem:\n    print(problem)\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("protocol", "agents"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "there is no NVIDIA driver on this node: libnvidia-ml.so.1 cannot be loaded\n"


async def test_a_driver_that_does_not_open_is_told(tmp_path: Path) -> None:
    async with fake_cards(tmp_path) as (driver, backend):
        await backend.close()
        driver.inject("nvmlInit", error=Error.LIB_RM_VERSION_MISMATCH)
        with pytest.raises(NoDriver, match="does not work here"):
            await backend.open()
        driver.clear_faults()
        await backend.open()


# --- faults ---


async def test_a_lost_card_is_fenced_once_and_returns_by_its_uuid(cards: Cards) -> None:
    driver, backend = cards
    first, second = await backend.inventory()
    news = News(backend)
    driver.gpu(1).lose(xid=None)
    fault = await news.wait(lambda one: isinstance(one, DeviceFault))
    assert fault == DeviceFault(device=second.uuid, kind="lost", detail="the driver lost the card (GPU is lost)")
    healthy, broken = await backend.inventory()
    assert healthy.healthy
    assert (broken.uuid, broken.healthy) == (second.uuid, False)
    assert (await backend.samples())[1].utilization_pct is None
    with pytest.raises(DeviceTrouble, match=second.uuid):
        await backend.processes(second.uuid)
    driver.gpu(1).restore()
    await news.wait(lambda one: one == DeviceRecovered(device=second.uuid))
    assert await backend.inventory() == (first, second)
    assert not any(isinstance(one, DeviceFault) for one in news.heard)


async def test_a_card_taken_from_the_driver_is_lost_and_the_rest_keep_their_names(cards: Cards) -> None:
    driver, backend = cards
    first, second = await backend.inventory()
    news = News(backend)
    driver.gpu(0).remove()
    await backend.inventory()
    await news.wait(lambda one: isinstance(one, DeviceFault) and one.device == first.uuid)
    shown = {device.uuid: device.healthy for device in await backend.inventory()}
    assert shown == {first.uuid: False, second.uuid: True}
    driver.gpu(0).add()
    await news.wait(lambda one: one == DeviceRecovered(device=first.uuid))
    assert all(device.healthy for device in await backend.inventory())


@pytest.mark.parametrize("xid", sorted(nvml.APPLICATION_XIDS))
async def test_what_a_program_does_to_itself_is_no_fault_of_the_card(cards: Cards, xid: int) -> None:
    driver, backend = cards
    first, _ = await backend.inventory()
    await listens(driver)
    news = News(backend)
    driver.gpu(0).xid(xid)
    assert await news.wait(lambda one: True) == ApplicationFault(device=first.uuid, xid=xid)
    assert all(device.healthy for device in await backend.inventory())


async def test_an_error_of_the_card_fences_it_until_it_was_quiet(cards: Cards) -> None:
    driver, backend = cards
    first, _ = await backend.inventory()
    await listens(driver)
    news = News(backend)
    driver.gpu(0).set(recovery_action=1)
    driver.gpu(0).xid(95)
    driver.gpu(0).xid(95)
    fault = await news.wait(lambda one: isinstance(one, DeviceFault))
    assert fault == DeviceFault(device=first.uuid, kind="xid", detail="the driver reported Xid 95")
    while (await backend.inventory())[0].fault != "the driver asks for a reset":
        await asyncio.sleep(0.01)
    driver.gpu(0).set(recovery_action=0)
    await news.wait(lambda one: one == DeviceRecovered(device=first.uuid))
    assert not any(isinstance(one, DeviceFault) for one in news.heard), "one fault, told once"


async def test_memory_errors_fence_and_a_worn_out_row_keeps_it_so(cards: Cards) -> None:
    driver, backend = cards
    _, second = await backend.inventory()
    await listens(driver)
    news = News(backend)
    driver.gpu(1).set(remap_failure=1)
    driver.gpu(1).ecc(uncorrected=1)
    fault = await news.wait(lambda one: isinstance(one, DeviceFault))
    assert isinstance(fault, DeviceFault)
    assert (fault.device, fault.kind) == (second.uuid, "ecc")
    while "could not be remapped" not in (await backend.inventory())[1].fault:
        await asyncio.sleep(0.01)


async def test_a_fault_of_an_instance_names_it(cards: Cards) -> None:
    driver, backend = cards
    first, _ = await backend.inventory()
    await listens(driver)
    made = await backend.create_mig(first.uuid, "2g.20gb", 2)
    news = News(backend)
    await news.wait(lambda one: one == DevicesChanged(device=first.uuid))
    driver.gpu(0).xid(94, gi=made.gpu_instance, ci=made.compute_instance)
    fault = await news.wait(lambda one: isinstance(one, DeviceFault))
    assert isinstance(fault, DeviceFault)
    assert fault.mig_uuid == made.mig_uuid


async def test_what_a_card_cannot_do_here_is_told_with_the_reason(tmp_path: Path) -> None:
    models = ["A100-40GB", "H100-80GB", "L4-24GB"]
    gone = ("nvmlDeviceRegisterEvents",)
    async with fake_cards(tmp_path, models, without=gone, privileged=0, mig_config=0) as (_, backend):
        ampere, hopper, ada = [device.uuid for device in await backend.inventory()]
        # Whether a card tells of itself shows once the thread that listens has asked it.
        while len(told := await backend.limits()) < 3 or "of its own accord" not in told[ada][0]:
            await asyncio.sleep(0.01)
    for uuid in (ampere, hopper):
        assert any(one.startswith("no MIG: the driver does not let it read placements") for one in told[uuid])
    assert not any("MIG" in one for one in told[ada])
    assert all(any("tells nothing of its own accord" in one for one in told[uuid]) for uuid in told)


async def test_a_card_that_hangs_delays_itself_alone(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, backend = cards
    first, _ = await backend.inventory()
    monkeypatch.setattr(nvml, "SAMPLE_S", 0.05)
    news = News(backend)
    driver.hang("nvmlDeviceGetUtilizationRates", gpu=0)
    for _ in range(3):
        one, other = await backend.samples()
        assert one.utilization_pct is None
        assert other.utilization_pct == 0
    fault = await news.wait(lambda one: isinstance(one, DeviceFault))
    assert isinstance(fault, DeviceFault)
    assert (fault.device, fault.kind) == (first.uuid, "hang")
    assert await backend.driver() == "580.95.05"
    driver.clear_faults()
    await news.wait(lambda one: one == DeviceRecovered(device=first.uuid))
    assert (await backend.samples())[0].utilization_pct == 0
