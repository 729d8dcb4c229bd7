"""MIG: geometry, the driver's own placement, instances and their life, and the mode's rules by architecture."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pynvml
import pytest

from fake_driver import geometry
from fake_driver.control import Error, FakeDriver
from fake_driver.geometry import Profile

Placed = tuple[Profile, int]


def code_of(call: Any, *arguments: Any) -> int:
    with pytest.raises(pynvml.NVMLError) as failure:
        call(*arguments)
    return int(failure.value.value)


def maximal_layouts(profiles: tuple[Profile, ...]) -> Iterator[tuple[Placed, ...]]:
    """Every set of placements that nothing can be added to."""
    places = [(profile, start) for profile in profiles for start in profile.starts]
    masks = [((1 << profile.size) - 1) << start for profile, start in places]

    def fits(chosen: tuple[int, ...], taken: int, more: int) -> bool:
        if masks[more] & taken:
            return False
        profile = places[more][0]
        same = sum(places[index][0] is profile for index in chosen)
        return same < profile.most and not (profile.media and any(places[index][0].media for index in chosen))

    def grow(chosen: tuple[int, ...], taken: int, first: int) -> Iterator[tuple[int, ...]]:
        later = [index for index in range(first, len(places)) if fits(chosen, taken, index)]
        for index in later:
            yield from grow((*chosen, index), taken | masks[index], index + 1)
        if not later and not any(fits(chosen, taken, index) for index in range(first)):
            yield chosen

    return (tuple(places[index] for index in chosen) for chosen in grow((), 0, 0))


def shapes(layouts: list[tuple[Placed, ...]]) -> set[tuple[str, ...]]:
    return {tuple(sorted(profile.name for profile, _ in layout)) for layout in layouts}


def place(nvml: Any, card: Any, profile_id: int, start: int, size: int) -> Any:
    placement = nvml.c_nvmlGpuInstancePlacement_t(start, size)
    return nvml.nvmlDeviceCreateGpuInstanceWithPlacement(card, profile_id, ctypes.byref(placement))


def whole_compute(nvml: Any, gi: Any) -> Any:
    """The CI that spans the GI, found as forward-compatible callers do: by counting up."""
    best = None
    for enumerator in range(nvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            info = nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, enumerator, 0)
        except nvml.NVMLError_NotSupported:
            continue
        if best is None or info.sliceCount > best.sliceCount:
            best = info
    assert best is not None
    return nvml.nvmlGpuInstanceCreateComputeInstance(gi, best.id)


def switch_on(nvml: Any, card: Any) -> None:
    assert nvml.nvmlDeviceSetMigMode(card, 1) == nvml.NVML_SUCCESS
    assert nvml.nvmlDeviceGetMigMode(card) == [1, 1]


def test_the_table_allows_the_published_geometries() -> None:
    """14 shapes in 19 placements of the base profiles on a 7/8 card, 38/78 with double memory, 64/239 with media."""
    profiles = geometry.models()["H100-80GB"].profiles
    no_media = tuple(profile for profile in profiles if not profile.media)
    base = tuple(profile for profile in no_media if (profile.compute, profile.size) != (1, 2))
    counts = [
        (len(shapes(layouts)), len(layouts))
        for layouts in (list(maximal_layouts(some)) for some in (base, no_media, profiles))
    ]
    assert counts == [(14, 19), (38, 78), (64, 239)]
    quarters = tuple(profile for profile in geometry.models()["A30-24GB"].profiles if not profile.media)
    layouts = list(maximal_layouts(quarters))
    assert (len(shapes(layouts)), len(layouts)) == (4, 5)


@pytest.mark.parametrize("model", [name for name, model in geometry.models().items() if model.profiles])
def test_every_maximal_geometry_is_made_by_explicit_placement(make_driver: Any, model: str) -> None:
    driver: FakeDriver = make_driver(model)
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        switch_on(nvml, card)
        for layout in maximal_layouts(geometry.models()[model].profiles):
            made = [place(nvml, card, profile.id, start, profile.size) for profile, start in layout]
            computes = [whole_compute(nvml, gi) for gi in made]
            instances = driver.gpu(0).facts()["instances"]
            assert sorted((entry["profile"], entry["start"]) for entry in instances) == sorted(
                (profile.name, start) for profile, start in layout
            )
            for profile in geometry.models()[model].profiles:
                assert nvml.nvmlDeviceGetGpuInstanceRemainingCapacity(card, profile.id) == 0
            for compute, gi in zip(computes, made, strict=True):
                nvml.nvmlComputeInstanceDestroy(compute)
                nvml.nvmlGpuInstanceDestroy(gi)


def test_profiles_are_enumerated_by_counting_up(nvml: Any, card: Any) -> None:
    found = {}
    for enumerator in itertools.count():
        try:
            info = nvml.nvmlDeviceGetGpuInstanceProfileInfo(card, enumerator)
        except nvml.NVMLError_NotSupported:
            continue
        except nvml.NVMLError_InvalidArgument:
            break
        found[info.name] = (info.id, info.sliceCount, info.multiprocessorCount, info.memorySizeMB)
    assert found == {
        "MIG 1g.10gb": (19, 1, 16, 9984),
        "MIG 1g.10gb+me": (20, 1, 16, 9984),
        "MIG 1g.20gb": (15, 1, 26, 20096),
        "MIG 2g.20gb": (14, 2, 32, 20096),
        "MIG 3g.40gb": (9, 3, 60, 40448),
        "MIG 4g.40gb": (5, 4, 64, 40448),
        "MIG 7g.80gb": (0, 7, 132, 81152),
    }
    by_id = nvml.nvmlDeviceGetGpuInstanceProfileInfoById(card, 9)
    assert by_id.name == "MIG 3g.40gb"
    assert nvml.nvmlDeviceGetGpuInstanceProfileInfo(card, 0, version=1).memorySizeMB == 9984


def test_placements_are_probed_for_their_number_first(nvml: Any, card: Any) -> None:
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetGpuInstancePossiblePlacements(card, 14, None, ctypes.byref(count))
    assert count.value == 3
    placements = (nvml.c_nvmlGpuInstancePlacement_t * 3)()
    nvml.nvmlDeviceGetGpuInstancePossiblePlacements(card, 14, placements, ctypes.byref(count))
    assert [(placement.start, placement.size) for placement in placements] == [(0, 2), (2, 2), (4, 2)]
    count.value = 2
    too_small = (card, 14, placements, ctypes.byref(count))
    assert code_of(nvml.nvmlDeviceGetGpuInstancePossiblePlacements, *too_small) == nvml.NVML_ERROR_INSUFFICIENT_SIZE


def test_the_driver_places_seven_small_ones_in_its_own_order(nvml: Any, card: Any) -> None:
    switch_on(nvml, card)
    made = [nvml.nvmlDeviceCreateGpuInstance(card, 19) for _ in range(7)]
    assert [nvml.nvmlGpuInstanceGetInfo(gi).id for gi in made] == [13, 11, 12, 7, 8, 9, 10]
    assert code_of(nvml.nvmlDeviceCreateGpuInstance, card, 19) == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES


def test_the_drivers_own_placement_depends_on_the_order(nvml: Any, card: Any) -> None:
    switch_on(nvml, card)
    small_first = [nvml.nvmlDeviceCreateGpuInstance(card, profile) for profile in (19, 19, 14)]
    assert code_of(nvml.nvmlDeviceCreateGpuInstance, card, 9) == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    for gi in small_first:
        nvml.nvmlGpuInstanceDestroy(gi)
    large_first = [nvml.nvmlDeviceCreateGpuInstance(card, profile) for profile in (9, 19, 14, 19)]
    assert nvml.nvmlGpuInstanceGetInfo(large_first[0]).id == 2


def test_refusals_of_a_placement(nvml: Any, card: Any) -> None:
    assert code_of(place, nvml, card, 19, 0, 1) == nvml.NVML_ERROR_NOT_SUPPORTED  # mode is off
    switch_on(nvml, card)
    place(nvml, card, 14, 4, 2)
    assert code_of(place, nvml, card, 9, 4, 4) == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES  # taken
    assert code_of(place, nvml, card, 14, 1, 2) == nvml.NVML_ERROR_INVALID_ARGUMENT  # never a start
    assert code_of(place, nvml, card, 14, 0, 4) == nvml.NVML_ERROR_INVALID_ARGUMENT  # wrong size
    assert code_of(place, nvml, card, 2, 0, 4) == nvml.NVML_ERROR_INVALID_ARGUMENT  # enumerator given for an id
    place(nvml, card, 20, 0, 1)
    assert code_of(place, nvml, card, 20, 1, 1) == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES  # one +me at most


def test_an_instance_has_a_device_once_it_has_compute(nvml: Any, card: Any, driver: FakeDriver) -> None:
    switch_on(nvml, card)
    gi = place(nvml, card, 9, 4, 4)
    assert nvml.nvmlDeviceGetMaxMigDeviceCount(card) == 7
    assert code_of(nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, 0) == nvml.NVML_ERROR_NOT_FOUND

    info = nvml.nvmlComputeInstanceGetInfo(whole_compute(nvml, gi))
    mig = info.device
    uuid = nvml.nvmlDeviceGetUUID(mig)
    assert uuid.startswith("MIG-")
    assert nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, 0)) == uuid
    assert nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByUUID(uuid)) == uuid
    assert nvml.nvmlDeviceIsMigDeviceHandle(mig).value == 1
    assert nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)) == driver.gpu(0).uuid
    assert (nvml.nvmlDeviceGetGpuInstanceId(mig), nvml.nvmlDeviceGetComputeInstanceId(mig)) == (2, 0)
    assert nvml.nvmlDeviceGetName(mig) == "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    assert nvml.nvmlDeviceGetMemoryInfo(mig).total == 40448 << 20
    attributes = nvml.nvmlDeviceGetAttributes(mig)
    assert (attributes.multiprocessorCount, attributes.gpuInstanceSliceCount, attributes.memorySizeMB) == (60, 3, 40448)
    assert code_of(nvml.nvmlDeviceGetPowerUsage, mig) == nvml.NVML_ERROR_NOT_SUPPORTED


def test_compute_instances_share_a_gpu_instance(nvml: Any, card: Any) -> None:
    switch_on(nvml, card)
    gi = place(nvml, card, 9, 0, 4)
    one, two = (nvml.nvmlGpuInstanceCreateComputeInstance(gi, profile) for profile in (0, 0))
    names = [nvml.nvmlDeviceGetName(nvml.nvmlComputeInstanceGetInfo(ci).device) for ci in (one, two)]
    assert names == ["NVIDIA H100 80GB HBM3 MIG 1c.3g.40gb"] * 2
    assert nvml.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(gi, 0) == 1
    assert nvml.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(gi, 2) == 0
    assert code_of(nvml.nvmlGpuInstanceCreateComputeInstance, gi, 1) == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    assert code_of(nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo, gi, 3, 0) == nvml.NVML_ERROR_NOT_SUPPORTED
    # The media revision of 1c looks like a 1c, and cannot be made here.
    assert nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 7, 0).sliceCount == 1
    assert code_of(nvml.nvmlGpuInstanceCreateComputeInstance, gi, 7) == nvml.NVML_ERROR_NOT_SUPPORTED
    assert nvml.nvmlGpuInstanceGetComputeInstanceById(gi, 1).contents is not None


def test_destruction_goes_from_inside_out_and_waits_for_users(
    nvml: Any, card: Any, driver: FakeDriver, bystander: Any
) -> None:
    switch_on(nvml, card)
    gi = place(nvml, card, 14, 2, 2)
    ci = whole_compute(nvml, gi)
    driver.gpu(0).allocate(bystander.pid, 100, gi=nvml.nvmlGpuInstanceGetInfo(gi).id, ci=0)
    in_use = nvml.NVML_ERROR_IN_USE
    assert code_of(nvml.nvmlGpuInstanceDestroy, gi) == in_use
    assert code_of(nvml.nvmlComputeInstanceDestroy, ci) == in_use
    assert code_of(nvml.nvmlDeviceSetMigMode, card, 0) == in_use

    # Dead is enough: nobody has to have waited for the process.
    bystander.kill()
    os.waitid(os.P_PID, bystander.pid, os.WEXITED | os.WNOWAIT)
    nvml.nvmlComputeInstanceDestroy(ci)

    # Half destroyed: no device any more, but its slices are still taken, and a second process finds it by id.
    assert code_of(nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, 0) == nvml.NVML_ERROR_NOT_FOUND
    assert code_of(place, nvml, card, 14, 2, 2) == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    found = (nvml.c_nvmlGpuInstance_t * 3)()
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetGpuInstances(card, 14, found, ctypes.byref(count))
    assert count.value == 1
    nvml.nvmlGpuInstanceDestroy(found[0])
    assert code_of(nvml.nvmlGpuInstanceGetInfo, gi) == nvml.NVML_ERROR_INVALID_ARGUMENT  # stale
    assert driver.gpu(0).facts()["instances"] == []


def test_ids_are_used_again_and_uuids_are_not(nvml: Any, card: Any, driver: FakeDriver) -> None:
    switch_on(nvml, card)
    seen = []
    for _ in range(2):
        gi = place(nvml, card, 19, 3, 1)
        ci = whole_compute(nvml, gi)
        seen.append(
            (nvml.nvmlGpuInstanceGetInfo(gi).id, nvml.nvmlDeviceGetUUID(nvml.nvmlComputeInstanceGetInfo(ci).device))
        )
        nvml.nvmlComputeInstanceDestroy(ci)
        nvml.nvmlGpuInstanceDestroy(gi)
    assert seen[0][0] == seen[1][0] == 10
    assert seen[0][1] != seen[1][1]


def test_uuids_can_also_be_stable(make_driver: Any) -> None:
    driver = make_driver(stable_mig_uuids=1)
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        switch_on(nvml, card)
        uuids = set()
        for _ in range(2):
            gi = place(nvml, card, 19, 3, 1)
            ci = whole_compute(nvml, gi)
            uuids.add(nvml.nvmlDeviceGetUUID(nvml.nvmlComputeInstanceGetInfo(ci).device))
            nvml.nvmlComputeInstanceDestroy(ci)
            nvml.nvmlGpuInstanceDestroy(gi)
        assert len(uuids) == 1


def test_mig_indexes_have_holes(nvml: Any, card: Any) -> None:
    switch_on(nvml, card)
    made = [(gi := place(nvml, card, 19, start, 1), whole_compute(nvml, gi)) for start in range(3)]
    nvml.nvmlComputeInstanceDestroy(made[1][1])
    assert code_of(nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, 1) == nvml.NVML_ERROR_NOT_FOUND
    assert nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, 2)) == 2


def test_a_card_in_mig_mode_tells_less(nvml: Any, card: Any) -> None:
    switch_on(nvml, card)
    for call in (nvml.nvmlDeviceGetUtilizationRates, nvml.nvmlDeviceGetEncoderUtilization):
        assert code_of(call, card) == nvml.NVML_ERROR_NOT_SUPPORTED
    assert code_of(nvml.nvmlDeviceGetProcessUtilization, card, 0) == nvml.NVML_ERROR_NOT_SUPPORTED
    assert nvml.nvmlDeviceGetPowerUsage(card) == 70_000
    assert nvml.nvmlDeviceGetNvLinkState(card, 0) == 0


def test_a_card_without_mig_says_so(make_driver: Any) -> None:
    with make_driver("L4-24GB").in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        assert code_of(nvml.nvmlDeviceGetMigMode, card) == nvml.NVML_ERROR_NOT_SUPPORTED
        assert code_of(nvml.nvmlDeviceSetMigMode, card, 1) == nvml.NVML_ERROR_NOT_SUPPORTED
        assert nvml.nvmlDeviceGetMaxMigDeviceCount(card) == 0


def test_hopper_switches_at_once_and_forgets_over_a_reboot(nvml: Any, card: Any, driver: FakeDriver) -> None:
    driver.gpu(0).set(mig_clients=1)
    switch_on(nvml, card)
    place(nvml, card, 0, 0, 8)
    nvml.nvmlDeviceSetComputeMode(card, nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)
    driver.reboot()
    facts = driver.gpu(0).facts()
    assert (facts["mig"], facts["instances"], facts["compute_mode"]) == ([0, 0], [], 0)


def test_ampere_waits_for_its_clients_and_keeps_the_mode_over_a_reboot(make_driver: Any) -> None:
    driver: FakeDriver = make_driver("A100-80GB")
    gpu = driver.gpu(0)
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        gpu.set(mig_clients=1)
        assert nvml.nvmlDeviceSetMigMode(card, 1) == nvml.NVML_ERROR_IN_USE
        assert nvml.nvmlDeviceGetMigMode(card) == [0, 1]
        gpu.set(mig_clients=0)
        switch_on(nvml, card)
        place(nvml, card, 5, 0, 4)
    driver.reboot()
    assert gpu.facts()["mig"] == [1, 1]
    assert gpu.facts()["instances"] == []


def test_a_running_job_holds_the_mode(nvml: Any, card: Any, driver: FakeDriver, bystander: Any) -> None:
    driver.gpu(0).allocate(bystander.pid, 10)
    assert nvml.nvmlDeviceSetMigMode(card, 1) == nvml.NVML_ERROR_IN_USE
    assert nvml.nvmlDeviceGetMigMode(card)[0] == 0


def test_a_passthrough_guest_needs_a_reset(nvml: Any, card: Any, driver: FakeDriver) -> None:
    driver.gpu(0).set(mig_needs_reset=1)
    assert nvml.nvmlDeviceSetMigMode(card, 1) == nvml.NVML_ERROR_RESET_REQUIRED
    assert nvml.nvmlDeviceGetMigMode(card) == [0, 1]
    driver.gpu(0).reset()
    assert driver.gpu(0).facts()["mig"] == [1, 1]


def test_the_minor_number_can_move_with_the_mode(make_driver: Any) -> None:
    driver = make_driver(minor_moves_with_mig=1)
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        before = nvml.nvmlDeviceGetMinorNumber(card)
        switch_on(nvml, card)
        assert nvml.nvmlDeviceGetMinorNumber(card) != before


def test_privileges(make_driver: Any) -> None:
    driver: FakeDriver = make_driver(privileged=0, mig_config=0, mig_monitor=0)
    denied = Error.NO_PERMISSION
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        assert code_of(nvml.nvmlDeviceSetMigMode, card, 1) == denied
        assert code_of(nvml.nvmlDeviceSetComputeMode, card, 3) == denied
        assert nvml.nvmlDeviceGetGpuInstanceProfileInfo(card, 0).id == 19
        assert nvml.nvmlDeviceGetMemoryInfo(card).total > 0

        driver.set_knob("mig_current", 1, gpu=0)
        assert code_of(place, nvml, card, 19, 0, 1) == denied
        assert code_of(nvml.nvmlDeviceGetMemoryInfo, card) == denied
        assert code_of(nvml.nvmlDeviceGetComputeRunningProcesses, card) == denied
        driver.set_knob("mig_monitor", 1)
        driver.set_knob("mig_config", 1)
        assert nvml.nvmlDeviceGetComputeRunningProcesses(card) == []
        place(nvml, card, 19, 0, 1)
        assert code_of(nvml.nvmlDeviceSetMigMode, card, 0) == denied
