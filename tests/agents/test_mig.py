"""MIG on cards of a fake driver: made, found again, healed and destroyed, and what belongs to others left alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from ctypes import byref
from pathlib import Path
from typing import NamedTuple

import pynvml
import pytest

from fake_driver.control import Error, FakeDriver
from gpuyard_agent.devices import device_files, nvml, nvml_events
from gpuyard_agent.devices.base import DeviceTrouble, PartitionRefused
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Device, MigInstance, NoGpu, WholeCards
from support.devices import fake_cards

ALICE = Account(name="alice", uid=1001, gid=1001)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml_events, "WAIT_MS", 20)
    monkeypatch.setattr(nvml, "DESTROY_S", 0.5)


class Yard(NamedTuple):
    driver: FakeDriver
    backend: NvmlBackend
    directory: Path

    async def partitions(self) -> CardPartitions:
        """Those of a new agent."""
        made = CardPartitions(self.backend, self.directory)
        await made.refresh()
        return made

    async def card(self) -> Device:
        return (await self.backend.inventory())[0]

    async def layout(self) -> list[tuple[str, int]]:
        device = await self.card()
        return [(one.profile, one.start) for one in await self.backend.mig_instances(device.uuid)]

    def mode(self) -> tuple[int, int]:
        now, later = self.driver.gpu().facts()["mig"]
        return now, later


@pytest.fixture
async def hopper(tmp_path: Path) -> AsyncIterator[Yard]:
    async with fake_cards(tmp_path) as (driver, backend):
        yield Yard(driver, backend, tmp_path / "run")


@pytest.fixture
async def ampere(tmp_path: Path) -> AsyncIterator[Yard]:
    async with fake_cards(tmp_path, "A100-40GB") as (driver, backend):
        yield Yard(driver, backend, tmp_path / "run")


def key(job: int) -> AssignmentKey:
    return AssignmentKey(job, 1, 0)


def instance(device: Device, profile: str, start: int) -> MigInstance:
    facts = next(facts for facts in device.mig_profiles if facts.name == profile)
    return MigInstance(device.uuid, profile, start, facts.size, facts.memory_mib, facts.compute_slices)


def make_by_hand(profile: int, start: int, size: int, compute: int | None = 0) -> None:
    """As an administrator does, past the agent. `compute` None: half an instance."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    pynvml.nvmlDeviceSetMigMode(handle, 1)
    place = pynvml.c_nvmlGpuInstancePlacement_t(start=start, size=size)
    gpu = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(handle, profile, byref(place))
    if compute is not None:
        pynvml.nvmlGpuInstanceCreateComputeInstance(gpu, compute)


# --- making and destroying ---


async def test_every_layout_of_the_card_can_be_made_at_its_places(hopper: Yard) -> None:
    layouts: list[list[tuple[str, int]]] = [
        [("7g.80gb", 0)],
        [("4g.40gb", 0), ("2g.20gb", 4), ("1g.10gb", 6)],
        [("3g.40gb", 4), *(("1g.10gb", start) for start in range(4))],
        [("1g.10gb+me", 0), *(("1g.10gb", start) for start in range(1, 7))],
        [("1g.20gb", start) for start in (6, 4, 2, 0)],
    ]
    device = await hopper.card()
    for layout in layouts:
        made = [await hopper.backend.create_mig(device.uuid, profile, start) for profile, start in layout]
        assert len({one.mig_uuid for one in made}) == len(layout)
        assert all(one.mig_uuid.startswith("MIG-") for one in made)
        assert await hopper.layout() == sorted(layout, key=lambda placed: placed[1])
        for one in made:
            await hopper.backend.destroy_mig(device.uuid, one.mig_uuid)
            await hopper.backend.destroy_mig(device.uuid, one.mig_uuid)
        assert await hopper.layout() == []
        assert hopper.mode() == (1, 1), "the next instance finds it in the mode that it needs"


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        ([], ("5g.60gb", 0), "has no MIG profile '5g.60gb'"),
        ([], ("4g.40gb", 4), "can have 4g.40gb at 0, not at 4"),
        ([("3g.40gb", 0)], ("1g.10gb", 3), "has 3g.40gb at 0, which 1g.10gb at 3 meets"),
        ([("1g.10gb+me", 0)], ("1g.10gb+me", 1), "has no room for"),
    ],
)
async def test_an_instance_that_cannot_be_is_refused(
    hopper: Yard, present: list[tuple[str, int]], wanted: tuple[str, int], expected: str
) -> None:
    device = await hopper.card()
    for profile, start in present:
        await hopper.backend.create_mig(device.uuid, profile, start)
    with pytest.raises(PartitionRefused, match=expected.replace("+", r"\+")):
        await hopper.backend.create_mig(device.uuid, *wanted)
    assert await hopper.layout() == present


async def test_half_an_instance_does_not_stay_when_the_other_half_fails(hopper: Yard) -> None:
    device = await hopper.card()
    hopper.driver.inject("nvmlGpuInstanceCreateComputeInstance", error=Error.UNKNOWN, times=1)
    with pytest.raises(DeviceTrouble, match="got no compute instance"):
        await hopper.backend.create_mig(device.uuid, "2g.20gb", 0)
    assert await hopper.layout() == []


async def test_destroying_waits_until_the_driver_lets_go(hopper: Yard) -> None:
    device = await hopper.card()
    made = await hopper.backend.create_mig(device.uuid, "1g.10gb", 0)
    hopper.driver.inject("nvmlComputeInstanceDestroy", error=Error.IN_USE, times=2)
    hopper.driver.inject("nvmlGpuInstanceDestroy", error=Error.IN_USE, times=1)
    await hopper.backend.destroy_mig(device.uuid, made.mig_uuid)
    assert await hopper.layout() == []


async def test_an_instance_in_use_is_not_destroyed_under_its_process(hopper: Yard) -> None:
    device = await hopper.card()
    partitions = await hopper.partitions()
    grant = await partitions.prepare(key(1), instance(device, "1g.10gb", 0), ALICE, "acme")
    gpu, gi, ci = hopper.driver.find(grant.mig_uuid)
    hopper.driver.gpu(gpu).allocate(os.getpid(), 100, gi=gi, ci=ci)
    with pytest.raises(DeviceTrouble, match=r"1g\.10gb at 0 is not let go"):
        await partitions.undo(key(1))
    assert partitions.held() == (key(1),)
    hopper.driver.release(os.getpid())
    await partitions.undo(key(1))
    assert await hopper.layout() == []


async def test_half_of_an_instance_that_the_driver_kept_goes_with_the_next_try(hopper: Yard) -> None:
    device = await hopper.card()
    partitions = await hopper.partitions()
    await partitions.prepare(key(1), instance(device, "1g.10gb", 0), ALICE, "acme")
    hopper.driver.inject("nvmlGpuInstanceDestroy", error=Error.IN_USE)
    with pytest.raises(DeviceTrouble, match="is not let go"):
        await partitions.undo(key(1))
    hopper.driver.clear_faults()
    await partitions.undo(key(1))
    assert await hopper.layout() == []


# --- the mode ---


async def test_only_an_empty_card_changes_its_mode(hopper: Yard) -> None:
    device = await hopper.card()
    hopper.driver.gpu().allocate(os.getpid(), 100)
    with pytest.raises(PartitionRefused, match="1 processes use the card, and it must be empty"):
        await hopper.backend.create_mig(device.uuid, "1g.10gb", 0)
    hopper.driver.release(os.getpid())
    await hopper.backend.create_mig(device.uuid, "1g.10gb", 0)
    with pytest.raises(PartitionRefused, match=r"it has 1g\.10gb at 0"):
        await hopper.backend.leave_mig(device.uuid)


async def test_a_card_that_stays_empty_is_a_whole_card_again(hopper: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    device = await hopper.card()
    made = await hopper.backend.create_mig(device.uuid, "1g.10gb", 0)
    await hopper.card()
    await hopper.backend.destroy_mig(device.uuid, made.mig_uuid)
    await hopper.card()
    assert hopper.mode() == (1, 1)
    monkeypatch.setattr("gpuyard_agent.devices.nvml.LEAVE_AFTER_S", 0.0)
    await hopper.card()
    assert hopper.mode() == (0, 0)


async def test_a_card_says_what_a_switch_of_its_mode_takes(hopper: Yard) -> None:
    assert (await hopper.card()).mig_switch_ms == 2_000


async def test_an_older_card_says_that_its_reset_takes_longer(ampere: Yard) -> None:
    assert (await ampere.card()).mig_switch_ms == 10_000


async def test_a_card_left_in_mig_mode_is_made_whole_for_whole_use(hopper: Yard) -> None:
    pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(0), 1)
    device = await hopper.card()
    assert set(device.modes) == {"whole", "mig", "timeslice"} | ({"mps"} & set(device.modes))
    partitions = await hopper.partitions()
    await partitions.prepare(key(1), WholeCards((device.uuid,)), ALICE, "acme")
    assert hopper.mode() == (0, 0)


async def test_an_older_card_is_reset_for_it_and_keeps_its_mode(ampere: Yard) -> None:
    device = await ampere.card()
    made = await ampere.backend.create_mig(device.uuid, "3g.20gb", 4)
    await ampere.backend.destroy_mig(device.uuid, made.mig_uuid)
    assert ampere.mode() == (1, 1), "switching costs a reset: not without need"
    await ampere.backend.leave_mig(device.uuid)
    assert ampere.mode() == (0, 0)


async def test_a_mode_that_would_stay_pending_is_taken_back_and_not_offered_again(ampere: Yard) -> None:
    ampere.driver.gpu().set(mig_clients=1)
    device = await ampere.card()
    assert "mig" in device.modes
    with pytest.raises(PartitionRefused, match=r"needs a reset of the card, which the driver refuses while another"):
        await ampere.backend.create_mig(device.uuid, "1g.5gb", 0)
    assert ampere.mode() == (0, 0)
    after = await ampere.card()
    assert after.healthy
    assert "mig" not in after.modes


async def test_a_pending_mode_of_somebody_else_makes_the_card_unusable(ampere: Yard) -> None:
    ampere.driver.gpu().set(mig_pending=1)
    device = await ampere.card()
    assert (device.healthy, device.modes) == (False, ())
    assert "a reset or reboot will complete" in device.fault


async def test_mig_is_offered_only_to_those_who_may_make_instances(tmp_path: Path) -> None:
    async with fake_cards(tmp_path / "none", privileged=0, mig_config=0) as (_, backend):
        assert "mig" not in (await backend.inventory())[0].modes
    async with fake_cards(tmp_path / "instances", privileged=0, mig_config=1) as (_, backend):
        device = (await backend.inventory())[0]
        with pytest.raises(PartitionRefused, match="does not let this agent switch it on"):
            await backend.create_mig(device.uuid, "1g.10gb", 0)
        assert "mig" not in (await backend.inventory())[0].modes
    async with fake_cards(tmp_path / "told", may_switch_mig=False) as (_, backend):
        device = (await backend.inventory())[0]
        assert "mig" not in device.modes
        with pytest.raises(PartitionRefused, match="is told not to switch it"):
            await backend.create_mig(device.uuid, "1g.10gb", 0)


# --- restarts, leftovers, others ---


async def test_a_restarted_agent_finds_its_instance_and_removes_what_nobody_holds(hopper: Yard) -> None:
    first = await hopper.partitions()
    device = await hopper.card()
    kept = await first.prepare(key(1), instance(device, "2g.20gb", 0), ALICE, "acme")
    await first.prepare(key(2), instance(device, "1g.10gb", 6), ALICE, "acme")

    second = await hopper.partitions()
    assert await second.adopt(key(1), instance(device, "2g.20gb", 0), ALICE, "acme") == kept
    assert await second.sweep() == (f"MIG instance 1g.10gb at 6 of card 0 ({device.uuid})",)
    assert await hopper.layout() == [("2g.20gb", 0)]


async def test_after_a_reboot_the_instance_of_an_assignment_is_made_again(hopper: Yard) -> None:
    first = await hopper.partitions()
    device = await hopper.card()
    before = await first.prepare(key(1), instance(device, "2g.20gb", 0), ALICE, "acme")
    hopper.driver.gpu().reset()
    await hopper.backend.close()
    await hopper.backend.open()
    second = await hopper.partitions()
    after = await second.adopt(key(1), instance(device, "2g.20gb", 0), ALICE, "acme")
    assert after.mig_uuid != before.mig_uuid
    assert await hopper.layout() == [("2g.20gb", 0)]


async def test_instances_of_others_are_left_alone_and_their_places_not_offered(hopper: Yard) -> None:
    make_by_hand(9, 4, 4, 2)
    partitions = await hopper.partitions()
    (device,) = await partitions.refresh()
    assert device.healthy
    assert device.modes == ("mig",)
    assert {facts.name: (facts.starts, facts.count_max) for facts in device.mig_profiles} == {
        "1g.10gb": ((0, 1, 2, 3), 7),
        "1g.10gb+me": ((0, 1, 2, 3), 1),
        "1g.20gb": ((0, 2), 4),
        "2g.20gb": ((0, 2), 3),
        "3g.40gb": ((0,), 1),
        "4g.40gb": ((0,), 1),
    }
    assert device.note == partitions.note(device.uuid)
    assert device.note == "MIG instances that were not made here and are left alone: 3g.40gb at 4"
    assert device.mig_taken == ((4, 4),)
    assert await partitions.sweep() == ()
    await partitions.prepare(key(1), instance(device, "1g.10gb", 3), ALICE, "acme")
    with pytest.raises(PartitionRefused):
        await partitions.prepare(key(2), MigInstance(device.uuid, "3g.40gb", 4, 4, 40_448, 3), ALICE, "acme")
    await partitions.undo(key(1))
    assert await hopper.layout() == [("3g.40gb", 4)]
    assert hopper.mode() == (1, 1)


async def test_an_instance_that_appeared_since_the_last_look_is_not_taken(hopper: Yard) -> None:
    partitions = await hopper.partitions()
    device = await hopper.card()
    make_by_hand(19, 0, 1)
    for profile in ("1g.10gb", "2g.20gb"):
        with pytest.raises(PartitionRefused, match=r"has 1g\.10gb at 0, which was not made here"):
            await partitions.prepare(key(1), instance(device, profile, 0), ALICE, "acme")
    assert partitions.held() == ()


async def test_what_the_ledger_holds_is_ours_even_if_the_records_are_lost(hopper: Yard) -> None:
    first = await hopper.partitions()
    device = await hopper.card()
    partition = instance(device, "3g.40gb", 0)
    kept = await first.prepare(key(1), partition, ALICE, "acme")
    (hopper.directory / "mig.json").unlink()
    second = await hopper.partitions()
    assert await second.adopt(key(1), partition, ALICE, "acme") == kept
    assert (await second.refresh())[0].modes == device.modes
    await second.undo(key(1))
    assert await hopper.layout() == []


async def test_half_an_instance_of_ours_is_healed_and_one_of_others_left(hopper: Yard) -> None:
    device = await hopper.card()
    partitions = await hopper.partitions()
    hopper.driver.inject("nvmlGpuInstanceCreateComputeInstance", error=Error.UNKNOWN, times=1)
    hopper.driver.inject("nvmlGpuInstanceDestroy", error=Error.IN_USE, times=1)
    with pytest.raises(DeviceTrouble):
        await partitions.prepare(key(1), instance(device, "2g.20gb", 2), ALICE, "acme")
    (half,) = await hopper.backend.mig_instances(device.uuid)
    assert half.mig_uuid == ""
    make_by_hand(19, 6, 1, None)
    grant = await partitions.prepare(key(2), instance(device, "2g.20gb", 2), ALICE, "acme")
    assert grant.mig_uuid
    await partitions.sweep()
    await partitions.undo(key(2))
    assert await hopper.layout() == [("1g.10gb", 6)]


async def test_what_a_hanging_driver_finished_too_late_is_removed(
    hopper: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await hopper.card()
    partitions = await hopper.partitions()
    await partitions.sweep()
    monkeypatch.setattr(nvml, "CREATE_S", 0.05)
    hopper.driver.hang("nvmlGpuInstanceCreateComputeInstance")
    with pytest.raises(DeviceTrouble, match="no answer from the driver"):
        await partitions.prepare(key(1), instance(device, "2g.20gb", 2), ALICE, "acme")
    hopper.driver.clear_faults()
    monkeypatch.undo()
    async with asyncio.timeout(10):
        while await hopper.layout() != []:
            await partitions.refresh()
    assert partitions.held() == ()


async def test_a_grant_names_the_files_of_its_instance_and_no_other(
    hopper: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minors = tmp_path / "mig-minors"
    minors.write_text(
        "config 1\nmonitor 2\ngpu7/gi9/access 30\ngpu7/gi9/ci0/access 31\ngpu7/gi10/access 33\n"
        "gpu7/gi10/ci0/access 34\ngpu0/gi9/access 3\ngpu0/gi9/ci0/access 4\n"
    )
    monkeypatch.setattr(device_files, "MIG_MINORS", minors)
    hopper.driver.gpu().set(minor=7)
    partitions = await hopper.partitions()
    device = await hopper.card()
    whole = await partitions.prepare(key(1), WholeCards((device.uuid,)), ALICE, "acme")
    common = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
    assert whole.devices == ("/dev/nvidia7", *common)
    await partitions.undo(key(1))
    one = await partitions.prepare(key(2), instance(device, "1g.10gb", 2), ALICE, "acme")
    assert one.devices == (
        "/dev/nvidia7", *common, "/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31",
    )  # fmt: skip
    none = await partitions.prepare(key(3), NoGpu(), ALICE, "acme")
    assert none.devices == ()


async def test_a_job_sees_its_instance_and_no_more_memory(hopper: Yard) -> None:
    device = await hopper.card()
    partitions = await hopper.partitions()
    grant = await partitions.prepare(key(1), instance(device, "1g.10gb", 2), ALICE, "acme")

    async def run(mib: int) -> int:
        command = [hopper.driver.program("fake-cuda"), "--memory", str(mib), "--steps", "1"]
        done = await asyncio.to_thread(
            subprocess.run, command, env={"PATH": os.environ["PATH"], **grant.env}, capture_output=True, check=False
        )
        return done.returncode

    assert await run(1000) == 0
    assert await run(10_000) == 70, "out of memory"
