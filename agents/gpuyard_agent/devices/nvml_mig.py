"""MIG on one card: its mode, and instances made, found and destroyed. Called in the card's own thread.

An instance has two halves: a GPU instance, which holds memory slices, and a compute instance in it, which is what a
program is given. Made in that order, destroyed in the other. A half that is left over (the making was cut short, or
somebody destroyed the other half) has no UUID and still holds its slices, so it is listed like any instance.

Always with an explicit placement, handed over by reference: the binding passes a bare structure by value, and the
driver then reads where there is nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pynvml

from gpuyard_agent.devices.base import DeviceTrouble, MigInstanceFound, PartitionRefused
from gpuyard_agent.devices.nvml_calls import Lost, checked, code_of, optional
from gpuyard_agent.devices.nvml_cards import Card, mig_mode
from gpuyard_agent.devices.nvml_profiles import MigProfile

#: A GPU instance has at most so many compute instances, with ids below.
_COMPUTE_IDS = 8
#: Far beyond what any driver has; only a stop for one that never says that there is no more.
_NUMBERS_MAX = 32
_GONE = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT)
_NO_MODE = (pynvml.NVML_ERROR_IN_USE, pynvml.NVML_ERROR_RESET_REQUIRED)


class InUse(Exception):
    """The driver would not let go yet; to be tried again."""


# --- finding ---------------------------------------------------------------------------------------------------------


def find_instances(card: Card) -> tuple[MigInstanceFound, ...]:
    """By start. Empty where MIG mode is off. Raises `Lost`, `DeviceTrouble`."""
    if not mig_mode(card.handle)[0]:
        card.instances, card.mig_handles = (), {}
        return ()
    try:
        found = [_describe(card, profile, gpu) for profile in card.facts.profiles for gpu in _of_profile(card, profile)]
    except pynvml.NVMLError as error:
        raise DeviceTrouble(f"{_name(card)}: its MIG instances cannot be listed: {error}") from None
    card.instances = tuple(sorted(found, key=lambda one: one.start))
    known = {one.mig_uuid for one in found}
    card.mig_handles = {uuid: handle for uuid, handle in card.mig_handles.items() if uuid in known}
    return card.instances


def _of_profile(card: Card, profile: MigProfile) -> Iterator[Any]:
    """Handles of its GPU instances, of the type that the binding takes. The array is ours, the count only an answer."""
    handles = (pynvml.c_nvmlGpuInstance_t * max(1, profile.count_max))()
    count = ctypes.c_uint(0)
    checked(pynvml.nvmlDeviceGetGpuInstances, card.handle, profile.id, handles, ctypes.byref(count))
    yield from handles[: count.value]


def _describe(card: Card, profile: MigProfile, gpu: Any) -> MigInstanceFound:
    info = checked(pynvml.nvmlGpuInstanceGetInfo, gpu)
    mig_uuid, number = "", -1
    for compute in _computes(gpu):
        # The handle in its description is the MIG device's own, not the card's.
        half = checked(pynvml.nvmlComputeInstanceGetInfo_v2, compute)
        mig_uuid, number = str(checked(pynvml.nvmlDeviceGetUUID, half.device)), int(half.id)
        card.mig_handles[mig_uuid] = half.device
        break
    return MigInstanceFound(
        device=card.facts.uuid,
        mig_uuid=mig_uuid,
        profile=profile.name,
        start=int(info.placement.start),
        size=int(info.placement.size),
        memory_mib=profile.memory_mib,
        gpu_instance=int(info.id),
        compute_instance=number,
    )


def _computes(gpu: Any) -> Iterator[Any]:
    for number in range(_COMPUTE_IDS):
        try:
            yield checked(pynvml.nvmlGpuInstanceGetComputeInstanceById, gpu, number)
        except pynvml.NVMLError as error:
            if code_of(error) not in _GONE:
                raise


# --- making ----------------------------------------------------------------------------------------------------------


def create(card: Card, name: str, start: int, may_switch: bool) -> MigInstanceFound:
    """Raises `PartitionRefused`, `DeviceTrouble`, `Lost`; then nothing is left of it."""
    profile = next((known for known in card.facts.profiles if known.name == name), None)
    if profile is None:
        offered = ", ".join(known.name for known in card.facts.profiles) or f"none: {card.facts.mig_trouble}"
        raise PartitionRefused(f"{_name(card)} has no MIG profile {name!r}; its profiles: {offered}")
    if start not in profile.starts:
        allowed = ", ".join(map(str, profile.starts))
        raise PartitionRefused(f"{_name(card)} can have {name} at {allowed}, not at {start}")
    switch(card, True, may_switch)
    for other in find_instances(card):
        if start < other.start + other.size and other.start < start + profile.size:
            raise PartitionRefused(f"{_name(card)} has {other.profile} at {other.start}, which {name} at {start} meets")
    placement = pynvml.c_nvmlGpuInstancePlacement_t(start=start, size=profile.size)
    try:
        gpu = checked(pynvml.nvmlDeviceCreateGpuInstanceWithPlacement, card.handle, profile.id, ctypes.byref(placement))
    except pynvml.NVMLError as error:
        if code_of(error) == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES:
            raise PartitionRefused(f"{_name(card)} has no room for {name} at {start} ({error})") from None
        raise DeviceTrouble(f"{_name(card)}: {name} at {start} was not made: {error}") from None
    try:
        checked(pynvml.nvmlGpuInstanceCreateComputeInstance, gpu, _whole_compute(gpu, profile))
        made = _describe(card, profile, gpu)
    except (pynvml.NVMLError, Lost) as error:
        _roll_back(gpu)
        raise DeviceTrouble(f"{_name(card)}: {name} at {start} got no compute instance: {error}") from None
    card.instances = tuple(sorted((*card.instances, made), key=lambda one: one.start))
    return made


def _whole_compute(gpu: Any, profile: MigProfile) -> int:
    """The id of the compute profile that spans the instance. Raises `NVMLError` where there is none."""
    shared = pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
    for number in range(_NUMBERS_MAX):
        try:
            info = checked(pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo, gpu, number, shared)
        except pynvml.NVMLError as error:
            if code_of(error) == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                break
            if code_of(error) == pynvml.NVML_ERROR_NOT_SUPPORTED:
                continue
            raise
        if int(info.sliceCount) == profile.compute_slices:
            return int(info.id)
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def _roll_back(gpu: Any) -> None:
    """As far as the driver lets us; what stays is half an instance, which the next sweep finds."""
    try:
        for compute in list(_computes(gpu)):
            optional(pynvml.nvmlComputeInstanceDestroy, compute)
        optional(pynvml.nvmlGpuInstanceDestroy, gpu)
    except (pynvml.NVMLError, Lost):
        return


# --- destroying ------------------------------------------------------------------------------------------------------


def find(card: Card, *, mig_uuid: str = "", start: int = -1) -> MigInstanceFound | None:
    """By UUID, or the half instance that starts there."""
    for found in find_instances(card):
        if (found.mig_uuid == mig_uuid) if mig_uuid else (found.start == start and not found.mig_uuid):
            return found
    return None


def destroy(card: Card, found: MigInstanceFound) -> None:
    """One try, of both halves or of the one that is left by now. What is not there is no error. Raises `InUse`."""
    what = f"{found.profile} at {found.start}"
    try:
        gpu = checked(pynvml.nvmlDeviceGetGpuInstanceById, card.handle, found.gpu_instance)
        if int(checked(pynvml.nvmlGpuInstanceGetInfo, gpu).placement.start) != found.start:
            return  # the number belongs to another by now
        for compute in list(_computes(gpu)):
            checked(pynvml.nvmlComputeInstanceDestroy, compute)
        checked(pynvml.nvmlGpuInstanceDestroy, gpu)
    except pynvml.NVMLError as error:
        if code_of(error) in _GONE:
            return
        if code_of(error) == pynvml.NVML_ERROR_IN_USE:
            raise InUse(f"{_name(card)}: {what} is not let go: {error}") from None
        raise DeviceTrouble(f"{_name(card)}: {what} was not destroyed: {error}") from None


# --- the mode --------------------------------------------------------------------------------------------------------


def switch(card: Card, on: bool, may_switch: bool) -> None:
    """MIG mode as wanted after this; no error where it is so already. Raises `PartitionRefused`, `DeviceTrouble`."""
    now, later = mig_mode(card.handle)
    if now == later == on:
        return
    wanted, present = ("on", "off") if on else ("off", "on")
    refuse = f"{_name(card)}: its MIG mode is {present} and stays so: "
    if now != later:
        raise PartitionRefused(f"{_name(card)}: its MIG mode is changing, which a reset or reboot will complete")
    if not may_switch or card.mig_refused:
        raise PartitionRefused(refuse + (card.mig_refused or "this agent is told not to switch it"))
    if not on and (left := find_instances(card)):
        raise PartitionRefused(refuse + f"it has {left[0].profile} at {left[0].start}")
    users = _users(card)
    if users:
        raise PartitionRefused(refuse + f"{users} processes use the card, and it must be empty")
    try:
        activation = int(checked(pynvml.nvmlDeviceSetMigMode, card.handle, int(on)))
    except pynvml.NVMLError as error:
        if code_of(error) in (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED):
            card.mig_refused = f"the driver does not let this agent switch it {wanted} ({error})"
            raise PartitionRefused(refuse + card.mig_refused) from None
        if code_of(error) in _NO_MODE:
            raise PartitionRefused(refuse + f"the card is in use ({error})") from None
        raise DeviceTrouble(f"{_name(card)}: its MIG mode was not switched {wanted}: {error}") from None
    if mig_mode(card.handle) == (on, on):
        return
    # Before Hopper the card must be reset for it, which the driver does only if nobody else has it open. Pending, the
    # card would be useless until somebody comes: the wish is taken back.
    optional(pynvml.nvmlDeviceSetMigMode, card.handle, int(not on))
    why = "it needs a reset of the card"
    if activation == pynvml.NVML_ERROR_IN_USE:
        why += ", which the driver refuses while another program (monitoring, display) has it open"
    if not card.facts.switches_at_once:
        card.mig_refused = why
    raise PartitionRefused(refuse + why)


def leave_if_empty(card: Card, may_switch: bool) -> None:
    """MIG mode off where that costs nothing and no instance is left: without it the card has NVLink and figures of its
    load. What speaks against it is no error: the next use that needs it off will say so."""
    if not card.facts.switches_at_once or card.mig_refused or not may_switch or find_instances(card):
        return
    try:
        switch(card, False, may_switch)
    except (PartitionRefused, DeviceTrouble):
        return


def _users(card: Card) -> int:
    listed = (
        optional(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, card.handle) or (),
        optional(pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, card.handle) or (),
        optional(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, card.handle) or (),
    )
    return len({int(process.pid) for processes in listed for process in processes})


def _name(card: Card) -> str:
    return f"card {card.device.index} ({card.facts.uuid})"
