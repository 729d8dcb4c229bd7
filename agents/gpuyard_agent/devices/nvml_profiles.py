"""The MIG profiles that a card offers, as its driver tells them: nothing is taken from a table here.

Profiles are counted up until the driver knows no further number, so one that a newer driver adds is found without
knowing it. A profile has two numbers that must not be mixed up: the one it is asked by, and the `id` that everything
else takes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec
import pynvml

from gpuyard_agent.devices.nvml_calls import checked, code_of
from gpuyard_protocol.resources import MigProfileFacts

#: Far beyond what any driver has; only a stop for one that never says that there is no more.
_NUMBERS_MAX = 64
#: What a name ends in where the driver gives no names, by the number that a profile is asked by.
_SUFFIXES = {7: "+me", 8: "+me", 10: "+gfx", 11: "+gfx", 12: "+gfx", 13: "-me", 14: "-me", 15: "+me.all", 16: "+me.all"}
_OLD_DRIVER = (
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
)


class MigProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One profile of one card."""

    #: `1g.10gb`, as people and orders name it.
    name: str
    #: What creation takes.
    id: int
    memory_mib: int
    #: Memory slices, and where it may start.
    size: int
    starts: tuple[int, ...]
    compute_slices: int
    multiprocessors: int
    #: Most of them on one card.
    count_max: int

    def as_offered(self) -> MigProfileFacts:
        return MigProfileFacts(
            name=self.name,
            memory_mib=self.memory_mib,
            size=self.size,
            starts=self.starts,
            compute_slices=self.compute_slices,
            count_max=self.count_max,
        )


def read_profiles(handle: Any) -> tuple[tuple[MigProfile, ...], str]:
    """(profiles by name, or none; why none). Raises `Lost`."""
    found: dict[str, MigProfile] = {}
    trouble = "the driver offers no profile"
    for number in range(_NUMBERS_MAX):
        try:
            info = _read_info(handle, number)
        except pynvml.NVMLError as error:
            if code_of(error) == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                break
            continue
        try:
            starts, size = _read_placements(handle, int(info.id))
        except pynvml.NVMLError as error:
            trouble = f"the driver does not let it read placements ({error})"
            continue
        name = _name(handle, number, info)
        found.setdefault(
            name,
            MigProfile(
                name=name,
                id=int(info.id),
                memory_mib=int(info.memorySizeMB),
                size=size,
                starts=starts,
                compute_slices=int(info.sliceCount),
                multiprocessors=int(info.multiprocessorCount),
                count_max=int(info.instanceCount),
            ),
        )
    return tuple(found.values()), "" if found else trouble


def _read_info(handle: Any, number: int) -> Any:
    try:
        return checked(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number)
    except pynvml.NVMLError as error:
        if code_of(error) not in _OLD_DRIVER:
            raise
    return checked(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number, version=1)


def _read_placements(handle: Any, profile: int) -> tuple[tuple[int, ...], int]:
    """(starts, size)."""
    count = ctypes.c_uint(0)
    checked(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile, None, ctypes.byref(count))
    places = (pynvml.c_nvmlGpuInstancePlacement_t * max(1, count.value))()
    checked(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile, places, ctypes.byref(count))
    found = places[: count.value]
    if not found:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return tuple(sorted(int(place.start) for place in found)), int(found[0].size)


def _name(handle: Any, number: int, info: Any) -> str:
    """The driver's name without its "MIG ". One that gives none: memory in eighths of the card, as its tools round."""
    told = getattr(info, "name", "")
    if told:
        return str(told.decode() if isinstance(told, bytes) else told).removeprefix("MIG ").strip()
    total_mib = int(checked(pynvml.nvmlDeviceGetMemoryInfo, handle).total) >> 20
    eighths = -(-8 * int(info.memorySizeMB) // total_mib)
    gigabytes = round(eighths * -(-total_mib // 1024) / 8)
    return f"{info.sliceCount}g.{gigabytes}gb{_SUFFIXES.get(number, '')}"
