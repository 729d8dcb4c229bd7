"""What this host can enforce on its cards, as data: found by asking, never assumed.

Each capability says whether it is there, what was found, and, where it is not, how to get it. `probe` changes nothing
on the host or its cards. What `gpuyard doctor` shows and what an operator may want to alert on are these same entries;
limits on processes (cgroups, systemd) are the launcher's to tell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from gpuyard_agent.devices.base import DeviceBackend
from gpuyard_protocol.names import DeviceUuid
from gpuyard_protocol.resources import Device

State = Literal["yes", "partly", "no"]

MPS_CONTROL = "nvidia-cuda-mps-control"
#: The driver's major version from which a process can be checkpointed to the host's memory.
_CHECKPOINT_DRIVER = 570
_CAP_SYS_ADMIN = 21
#: Without these no CUDA program runs.
_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm")


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a host may be able to enforce or tell."""

    #: `driver`, `cards`, `device-nodes`, `faults`, `mig`, `mps`, `mps-exclusive`, `memory-by-process`, `checkpoint`.
    name: str
    state: State
    #: What was found, for people.
    detail: str
    #: How to get what is missing, "" where nothing is or nothing helps.
    remedy: str = ""


async def probe(backend: DeviceBackend, suspend_problem: str) -> tuple[Capability, ...]:
    """Of an open backend; `suspend_problem`: why the driver cannot suspend jobs, "" if it can. Raises `DeviceTrouble`
    when the driver does not even list its cards."""
    devices = await backend.inventory()
    driver = await backend.driver()
    if backend.simulated:
        detail = f"{len(devices)} modelled cards: everything is modelled, and nothing enforced"
        return (Capability(name="driver", state="yes", detail=detail),)
    limits = await backend.limits()
    return (
        Capability(name="driver", state="yes", detail=f"NVIDIA driver {driver}"),
        _cards(devices),
        _device_nodes(),
        _faults(devices, limits),
        _mig(devices, limits),
        _mps(devices),
        _mps_exclusive(is_admin()),
        _memory_by_process(sees_whole_host()),
        _checkpoint(suspend_problem),
    )


def is_admin() -> bool:
    """Whether the kernel counts this process as an administrator of the system, which the driver asks for settings."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0


def sees_whole_host() -> bool:
    """Whether process ids here are the host's: the kernel's own threads are seen only there."""
    try:
        return Path("/proc/2/comm").read_text().strip() == "kthreadd"
    except OSError:
        return False


def _cards(devices: tuple[Device, ...]) -> Capability:
    ill = [f"card {device.index}: {device.fault}" for device in devices if not device.healthy]
    state: State = "yes" if devices and not ill else "partly" if len(ill) < len(devices) else "no"
    detail = "; ".join([f"{len(devices) - len(ill)} of {len(devices)} can be used", *ill])
    return Capability(name="cards", state=state, detail=detail)


def _device_nodes() -> Capability:
    missing = [node for node in _NODES if not os.access(node, os.R_OK | os.W_OK)]
    if not missing:
        return Capability(name="device-nodes", state="yes", detail=", ".join(_NODES))
    return Capability(
        name="device-nodes",
        state="no",
        detail=f"missing or closed to this account: {', '.join(missing)}",
        remedy="nvidia-modprobe -u -c 0",
    )


def _faults(devices: tuple[Device, ...], limits: Mapping[DeviceUuid, tuple[str, ...]]) -> Capability:
    silent = _saying(devices, limits, "it tells nothing of its own accord")
    if not silent:
        return Capability(name="faults", state="yes", detail="cards tell of their faults at once")
    return Capability(
        name="faults",
        state="partly",
        detail=f"some faults only show when the card is read: {'; '.join(silent)}",
        remedy="run the agent as root; on cards in MIG mode that is needed to hear of faults",
    )


def _mig(devices: tuple[Device, ...], limits: Mapping[DeviceUuid, tuple[str, ...]]) -> Capability:
    able = [device for device in devices if "mig" in device.modes]
    unable = _saying(devices, limits, "no MIG", "MIG mode")
    if able and not unable:
        return Capability(name="mig", state="yes", detail=f"{len(able)} of {len(devices)} cards")
    if not able and not unable:
        return Capability(name="mig", state="no", detail="no card here has it")
    return Capability(
        name="mig",
        state="partly" if able else "no",
        detail="; ".join([f"{len(able)} of {len(devices)} cards", *unable]),
        remedy="run the agent as root, and stop what else has the cards open (monitoring, display) before MIG mode "
        "is switched",
    )


def _mps(devices: tuple[Device, ...]) -> Capability:
    program = shutil.which(MPS_CONTROL)
    if program is None:
        remedy = f"install the part of NVIDIA's driver that has {MPS_CONTROL} (nvidia-compute-utils on Ubuntu)"
        return Capability(name="mps", state="no", detail=f"{MPS_CONTROL} is not installed", remedy=remedy)
    able = sum("mps" in device.modes for device in devices)
    state: State = "yes" if able == len(devices) else "partly" if able else "no"
    return Capability(name="mps", state=state, detail=f"{able} of {len(devices)} cards, by {program}")


def _mps_exclusive(admin: bool) -> Capability:
    if admin:
        detail = "a card under MPS admits the server alone: a job that drops MPS fails instead of passing its limits"
        return Capability(name="mps-exclusive", state="yes", detail=detail)
    return Capability(
        name="mps-exclusive",
        state="no",
        detail="the driver does not let this account set the compute mode: a job that drops MPS is held by no limit",
        remedy="run the agent as root",
    )


def _memory_by_process(host: bool) -> Capability:
    if host:
        detail = "the driver tells memory by process"
        return Capability(name="memory-by-process", state="yes", detail=detail)
    return Capability(
        name="memory-by-process",
        state="no",
        detail="this is a process namespace of its own, in which the driver's process ids mean nothing",
        remedy="run the agent on the host, or its container with the host's process namespace",
    )


def _checkpoint(problem: str) -> Capability:
    if not problem:
        detail = "jobs of one process on one card can be suspended to the host's memory"
        return Capability(name="checkpoint", state="yes", detail=detail)
    remedy = f"a driver from {_CHECKPOINT_DRIVER} on, and pip install 'gpuyard[suspend]'"
    return Capability(name="checkpoint", state="no", detail=problem, remedy=remedy)


def _saying(devices: tuple[Device, ...], limits: Mapping[DeviceUuid, tuple[str, ...]], *beginnings: str) -> list[str]:
    return [
        f"card {device.index}: {one}"
        for device in devices
        for one in limits.get(device.uuid, ())
        if one.startswith(beginnings)
    ]
