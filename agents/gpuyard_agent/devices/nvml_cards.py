"""What a card is: its facts, and the modes in which this agent can use it.

Facts that cannot change are read once for each session with the driver; the rest at every inventory. Modes offered are
those this agent can really carry out:

- `whole` always;
- `mps` where NVIDIA's control daemon is installed and the card is of Volta or later, which MPS can limit;
- `timeslice`, unless somebody else set the card to admit one process only;
- `mig` where the card has it and the driver lets this agent read placements, which needs the same privilege as making
  instances. A card whose MIG mode the agent may not switch is offered in its present mode alone.
"""

from __future__ import annotations

import shutil
from typing import Any

import msgspec
import pynvml

from gpuyard_agent.devices.base import MigInstanceFound
from gpuyard_agent.devices.nvml_calls import MIB, Lost, checked, code_of, field, optional
from gpuyard_agent.devices.nvml_profiles import MigProfile, read_profiles
from gpuyard_protocol.names import DeviceUuid
from gpuyard_protocol.resources import Device, Mode

MPS_CONTROL = "nvidia-cuda-mps-control"
#: CUDA compute capability from which MPS can limit compute and memory (Volta).
_LIMITS_UNDER_MPS = (7, 0)
#: Drivers from 590 on serve more, if every process takes fewer connections.
MPS_CLIENTS_MAX = 48
#: From this architecture on (Hopper) MIG mode is switched at once; before, by a reset of the card.
_SWITCHES_AT_ONCE = 9
#: What a switch of MIG mode takes, ms, for whoever weighs it: with a reset of the card, and without. Until a card of
#: each kind was measured: the driver initialises the card anew in either case, and a reset takes seconds more.
SWITCH_BY_RESET_MS, SWITCH_AT_ONCE_MS = 10_000, 2_000
_PROHIBITED = pynvml.NVML_COMPUTEMODE_PROHIBITED
_EXCLUSIVE = pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS
#: What the driver wants done about a card (field 230).
_RECOVERY = {
    1: "a reset",
    2: "a reboot of the node",
    3: "its peers drained",
    4: "to be drained and reset",
    5: "a reset",
}


class CardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the session lasts."""

    uuid: DeviceUuid
    name: str
    pci_bus_id: str
    numa_node: int
    #: CUDA compute capability, (0, 0) where the driver does not say.
    capability: tuple[int, int]
    #: NVML's number of the architecture, 0 where it does not say.
    architecture: int
    #: Empty: no MIG, or none that this agent may make.
    profiles: tuple[MigProfile, ...]
    #: Why `profiles` is empty on a card that has MIG.
    mig_trouble: str = ""
    #: MIG mode takes effect at once and needs no reset.
    switches_at_once: bool = False


class Card(msgspec.Struct, kw_only=True):
    """One card that was seen since `open`."""

    #: The driver's, valid for the session; None while the card is gone.
    handle: Any
    facts: CardFacts
    device: Device
    #: This agent set the card to admit one process alone, for MPS.
    is_exclusive: bool = False
    #: Why MIG mode stays as it is, "" as far as is known: a switch that was refused for good.
    mig_refused: str = ""
    #: When its last instance went, on the monotonic clock; None: it has some, or is out of MIG mode.
    emptied_s: float | None = None
    #: MIG instances when they were last looked for, and the handles of those that have a UUID.
    instances: tuple[MigInstanceFound, ...] = ()
    mig_handles: dict[str, Any] = {}
    #: Active NVLinks, as (type of the other end, its PCI bus id in lower case). In MIG mode a card is off NVLink, and
    #: what it had before is kept: any use that needs the links has MIG mode off.
    links: tuple[tuple[int, str], ...] = ()
    #: The driver's time of the newest sample of processes' load that was read; what the last reading gave, and when
    #: (monotonic clock).
    load_seen_us: int = 0
    loads: dict[int, int] | None = None
    loads_read_s: float = 0.0


def read_facts(handle: Any) -> CardFacts:
    """Raises `Lost` for a card that cannot be told from others."""
    try:
        uuid = str(checked(pynvml.nvmlDeviceGetUUID, handle))
        name = str(checked(pynvml.nvmlDeviceGetName, handle))
    except pynvml.NVMLError as error:
        raise Lost(f"the driver does not name the card ({error})") from None
    pci = optional(pynvml.nvmlDeviceGetPciInfo, handle)
    bus_id = str(pci.busId) if pci is not None else ""
    capability = optional(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    architecture = int(optional(pynvml.nvmlDeviceGetArchitecture, handle) or 0)
    profiles, trouble = read_profiles(handle) if has_mig(handle) else ((), "")
    at_once = field(handle, pynvml.NVML_FI_DEV_IS_RESETLESS_MIG_SUPPORTED)
    return CardFacts(
        uuid=uuid,
        name=name,
        pci_bus_id=bus_id,
        numa_node=_numa_node(bus_id),
        capability=(int(capability[0]), int(capability[1])) if capability is not None else (0, 0),
        architecture=architecture,
        profiles=profiles,
        mig_trouble=trouble,
        switches_at_once=bool(at_once) if at_once is not None else architecture >= _SWITCHES_AT_ONCE,
    )


def has_mig(handle: Any) -> bool:
    return optional(pynvml.nvmlDeviceGetMigMode, handle) is not None


def mig_mode(handle: Any) -> tuple[bool, bool]:
    """(on now, on after the next reset); off where there is none."""
    mode = optional(pynvml.nvmlDeviceGetMigMode, handle)
    return (bool(mode[0]), bool(mode[1])) if mode is not None else (False, False)


def read_device(card: Card, index: int, may_switch: bool) -> Device:
    """The card now. `may_switch`: this agent is allowed to switch MIG mode. Raises `Lost`."""
    facts = card.facts
    try:
        checked(pynvml.nvmlDeviceGetUUID, card.handle)
    except pynvml.NVMLError as error:
        if code_of(error) == pynvml.NVML_ERROR_INVALID_ARGUMENT:
            raise Lost("the driver no longer knows the card") from None
    fault, modes = _read_modes(card, may_switch)
    memory_mib = read_memory(card.handle)[0] or card.device.memory_mib
    if not fault and not modes:
        fault = "it can be used in no mode"
    elif not fault and not memory_mib:
        fault = "the driver does not tell its memory"
    has_profiles = "mig" in modes
    return Device(
        uuid=facts.uuid,
        index=index,
        model=facts.name,
        memory_mib=memory_mib,
        modes=modes,
        mig_slices=max((start + p.size for p in facts.profiles for start in p.starts), default=0) * has_profiles,
        mig_compute_slices=max((p.compute_slices for p in facts.profiles), default=0) * has_profiles,
        mig_profiles=tuple(profile.as_offered() for profile in facts.profiles) if has_profiles else (),
        pci_bus_id=facts.pci_bus_id,
        numa_node=facts.numa_node,
        nvlinks=card.device.nvlinks,
        mps_clients_max=MPS_CLIENTS_MAX if _has_mps(card) else 0,
        healthy=not fault,
        fault=fault,
        mig_switch_ms=_switch_ms(card) if has_profiles and "whole" in modes else 0,
    )


def _switch_ms(card: Card) -> int:
    return SWITCH_AT_ONCE_MS if card.facts.switches_at_once else SWITCH_BY_RESET_MS


def read_limits(card: Card, may_switch: bool) -> list[str]:
    """What the card could do and cannot do here, and why. Raises `Lost`."""
    found = []
    if has_mig(card.handle):
        on = mig_mode(card.handle)[0]
        refused = card.mig_refused or ("" if may_switch else "this agent is told not to switch it")
        if not card.facts.profiles:
            found.append(f"no MIG: {card.facts.mig_trouble}")
        elif refused:
            found.append(f"MIG mode stays {'on' if on else 'off'}: {refused}")
        elif not card.facts.switches_at_once:
            found.append("MIG mode is switched by a reset of the card, which needs it to be used by nobody at all")
    if card.facts.capability >= _LIMITS_UNDER_MPS and not shutil.which(MPS_CONTROL):
        found.append(f"no MPS: {MPS_CONTROL} is not installed")
    elif card.facts.capability < _LIMITS_UNDER_MPS:
        found.append("no MPS: it limits neither compute nor memory on cards before Volta")
    if optional(pynvml.nvmlDeviceGetPersistenceMode, card.handle) == pynvml.NVML_FEATURE_DISABLED:
        found.append("persistence mode is off: the first use after a pause takes seconds")
    return found


def unread(uuid: DeviceUuid, index: int) -> Device:
    """A card before its first reading."""
    return Device(uuid=uuid, index=index, model="", memory_mib=0, modes=(), healthy=False, fault="not read yet")


def _read_modes(card: Card, may_switch: bool) -> tuple[str, tuple[Mode, ...]]:
    """(why the card cannot be used, "" if it can; the modes it can be used in)."""
    now, later = mig_mode(card.handle)
    if now != later:
        return "its MIG mode is changing, which a reset or reboot will complete", ()
    compute_mode = optional(pynvml.nvmlDeviceGetComputeMode, card.handle)
    if compute_mode == _PROHIBITED:
        return "its compute mode is `prohibited`", ()
    can_make, can_switch = bool(card.facts.profiles), may_switch and not card.mig_refused
    if now and not can_make:
        return f"its MIG mode is on, and this agent makes no instances: {card.facts.mig_trouble}", ()
    modes: list[Mode] = []
    if not now or (can_make and can_switch):
        modes.append("whole")
        if _has_mps(card):
            modes.append("mps")
        if compute_mode != _EXCLUSIVE or card.is_exclusive:
            modes.append("timeslice")
    if can_make and (now or can_switch):
        modes.insert(1, "mig")
    return "", tuple(modes)


def _has_mps(card: Card) -> bool:
    return card.facts.capability >= _LIMITS_UNDER_MPS and bool(shutil.which(MPS_CONTROL))


def read_memory(handle: Any) -> tuple[int, int | None]:
    """(MiB that jobs may use, MiB they use now). What the driver reserves counts to neither, where it tells."""
    memory = optional(pynvml.nvmlDeviceGetMemoryInfo, handle, version=pynvml.nvmlMemory_v2)
    if memory is not None:
        return int(memory.total - memory.reserved) // MIB, int(memory.used) // MIB
    memory = optional(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (int(memory.total) // MIB, int(memory.used) // MIB) if memory is not None else (0, None)


def find_problem(handle: Any) -> str:
    """Why a card that failed is not to be used yet, "" if nothing speaks against it. Raises `Lost`."""
    try:
        checked(pynvml.nvmlDeviceGetUUID, handle)
    except pynvml.NVMLError as error:
        return f"the driver no longer knows the card ({error})"
    action = field(handle, pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)
    if action:
        return f"the driver asks for {_RECOVERY.get(action, 'something to be done')}"
    rows = optional(pynvml.nvmlDeviceGetRemappedRows, handle)
    if rows is not None and rows[3]:
        return "its memory has worn out: a row could not be remapped"
    if rows is not None and rows[2]:
        return "a row of its memory is to be remapped, which a reset completes"
    return ""


def _numa_node(bus_id: str) -> int:
    """The host's node that the card is plugged into; -1 where the kernel does not know. (NVML's own call of that name
    is about cards that are memory nodes themselves.) The kernel writes bus ids shorter and in lower case."""
    short = bus_id.lower()[-12:]
    try:
        with open(f"/sys/bus/pci/devices/{short}/numa_node") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1
