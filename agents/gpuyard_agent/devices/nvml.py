"""Real cards, read through NVIDIA's management library (NVML) by its own Python binding.

One session for the agent's life, opened once and never per question; all calls in one thread with deadlines. Handles
are kept by UUID: the driver's index order is not stable. Whatever a card, a driver version or a missing privilege does
not give is None or left out. A card that the driver calls lost stays in the inventory as unhealthy, with the words.

Modes offered are those this agent can really carry out: `whole` always; `mps` where NVIDIA's control daemon is
installed and the card is of Volta or later, which MPS can limit; `timeslice` as the driver does it by itself (compute
in turns, memory counted and not enforced), unless the card admits one process only. MIG instances are not made on real
cards yet: a card whose MIG mode is on is shown as unhealthy and says so.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pynvml

from gpuyard_agent.devices.base import DeviceProcess, DeviceTrouble, MigInstanceFound, NoDriver, PartitionRefused
from gpuyard_agent.devices.driver_thread import DriverThread
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.resources import Device, Mode, Partition

T = TypeVar("T")

MPS_CONTROL = "nvidia-cuda-mps-control"
#: The first call wakes cards that nobody keeps awake, seconds each.
OPEN_S = 60.0
INVENTORY_S = 30.0
SAMPLE_S = 5.0

_MIB = 2**20
#: NVML's codes that mean, whatever was asked: this card is gone until somebody does something about it.
_LOST: dict[int, str] = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "the driver lost the card",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the card must be reset",
}
#: CUDA compute capability from which MPS can limit compute and memory (Volta).
_LIMITS_UNDER_MPS = (7, 0)
_PROHIBITED = pynvml.NVML_COMPUTEMODE_PROHIBITED
_EXCLUSIVE = pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS


class _Lost(Exception):
    """A call found its card gone; the text says why."""


class _Card(msgspec.Struct, kw_only=True):
    """One card that was seen since `open`."""

    #: The driver's, valid for the session.
    handle: Any
    device: Device


class NvmlBackend:
    """The cards that NVIDIA's driver knows."""

    def __init__(self) -> None:
        self._thread: DriverThread | None = None
        #: Every card seen since `open`, gone ones included.
        self._cards: dict[DeviceUuid, _Card] = {}

    @property
    def simulated(self) -> bool:
        return False

    async def open(self) -> None:
        self._thread = DriverThread()
        try:
            await self._call("initialise", _initialise, OPEN_S)
        except (NoDriver, DeviceTrouble) as problem:
            self._thread.end()
            self._thread = None
            raise NoDriver(str(problem)) from None

    async def close(self) -> None:
        if self._thread is not None:
            thread, self._thread = self._thread, None
            with contextlib.suppress(DeviceTrouble):
                await thread.call("shut down", lambda: _optional(pynvml.nvmlShutdown), SAMPLE_S)
            thread.end()
            self._cards.clear()

    async def driver(self) -> str:
        version = await self._call("driver version", lambda: _optional(pynvml.nvmlSystemGetDriverVersion), SAMPLE_S)
        return str(version or "unknown")

    async def inventory(self) -> tuple[Device, ...]:
        return await self._call("inventory", self._read_inventory, INVENTORY_S)

    async def samples(self) -> tuple[DeviceSample, ...]:
        return await self._call("samples", self._read_samples, SAMPLE_S)

    async def processes(self, device: DeviceUuid) -> tuple[DeviceProcess, ...]:
        card = self._card(device)
        return await self._call("processes", lambda: _read_processes(card), SAMPLE_S)

    async def mig_instances(self, device: DeviceUuid) -> tuple[MigInstanceFound, ...]:
        return ()

    async def create_mig(self, device: DeviceUuid, profile: str, start: int) -> MigInstanceFound:
        raise PartitionRefused(f"MIG instances are not made on real cards yet ({device})")

    async def destroy_mig(self, device: DeviceUuid, mig_uuid: str) -> None:
        return None

    def hold(self, key: AssignmentKey, partition: Partition) -> None:
        return None

    def running(self, key: AssignmentKey, pid: int) -> None:
        return None

    def drop(self, key: AssignmentKey) -> None:
        return None

    # --- in the driver's thread ---

    async def _call(self, name: str, function: Callable[[], T], deadline_s: float) -> T:
        if self._thread is None:
            raise DeviceTrouble("the driver is not open")
        return await self._thread.call(name, function, deadline_s)

    def _card(self, device: DeviceUuid) -> _Card:
        card = self._cards.get(device)
        if card is None:
            raise DeviceTrouble(f"there is no card {device} on this node")
        return card

    def _read_inventory(self) -> tuple[Device, ...]:
        seen: set[DeviceUuid] = set()
        unreadable: list[str] = []
        for index in range(_count()):
            try:
                handle = _checked(pynvml.nvmlDeviceGetHandleByIndex, index)
                device = _read_device(handle, index)
            except (_Lost, pynvml.NVMLError) as error:
                unreadable.append(str(error))
                continue
            seen.add(device.uuid)
            self._cards[device.uuid] = _Card(handle=handle, device=device)
        for uuid, card in self._cards.items():
            if uuid not in seen:
                fault = unreadable[0] if unreadable else "the driver no longer lists the card"
                card.device = msgspec.structs.replace(card.device, healthy=False, fault=fault)
        links = _read_links([card for uuid, card in self._cards.items() if uuid in seen])
        for uuid, nvlinks in links.items():
            self._cards[uuid].device = msgspec.structs.replace(self._cards[uuid].device, nvlinks=nvlinks)
        return tuple(sorted((card.device for card in self._cards.values()), key=lambda device: device.index))

    def _read_samples(self) -> tuple[DeviceSample, ...]:
        ordered = sorted(self._cards.values(), key=lambda card: card.device.index)
        return tuple(_read_sample(card) for card in ordered)


# --- calls that tolerate what a card does not give -------------------------------------------------------------------


def _checked(function: Callable[..., T], *arguments: object) -> T:
    """Raises `_Lost` when the card is gone, `NVMLError` for anything else."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _LOST:
            raise _Lost(f"{_LOST[error.value]} ({error})") from None
        raise


def _optional(function: Callable[..., T], *arguments: object, **named: object) -> T | None:
    """None for what is not supported, not permitted, or newer than the driver. Raises `_Lost`."""
    try:
        return _checked(lambda: function(*arguments, **named))
    except pynvml.NVMLError:
        return None


def _initialise() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            raise NoDriver("there is no NVIDIA driver on this node: libnvidia-ml.so.1 cannot be loaded") from None
        raise NoDriver(f"the NVIDIA driver does not work here: {error}") from None


def _count() -> int:
    try:
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        raise DeviceTrouble(f"the driver cannot count its cards: {error}") from None


# --- reading one card ------------------------------------------------------------------------------------------------


def _read_device(handle: Any, index: int) -> Device:
    fault, modes = _read_modes(handle)
    pci = _optional(pynvml.nvmlDeviceGetPciInfo, handle)
    bus_id = str(pci.busId) if pci is not None else ""
    if not modes and not fault:
        fault = "it can be used in no mode"
    return Device(
        uuid=str(_checked(pynvml.nvmlDeviceGetUUID, handle)),
        index=index,
        model=str(_checked(pynvml.nvmlDeviceGetName, handle)),
        memory_mib=_read_memory(handle)[0],
        modes=modes,
        pci_bus_id=bus_id,
        numa_node=_numa_node(bus_id),
        healthy=not fault,
        fault=fault,
    )


def _read_modes(handle: Any) -> tuple[str, tuple[Mode, ...]]:
    """(why the card cannot be used, "" if it can; the modes it can be used in)."""
    mig = _optional(pynvml.nvmlDeviceGetMigMode, handle)
    if mig is not None and any(mig):
        state = "on" if mig[0] == mig[1] else "changing, which a reset or reboot will complete"
        return f"MIG mode is {state}, and this agent uses cards only with MIG mode off", ()
    compute_mode = _optional(pynvml.nvmlDeviceGetComputeMode, handle)
    if compute_mode == _PROHIBITED:
        return "its compute mode is `prohibited`", ()
    modes: list[Mode] = ["whole"]
    capability = _optional(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    if capability is not None and tuple(capability) >= _LIMITS_UNDER_MPS and shutil.which(MPS_CONTROL):
        modes.append("mps")
    if compute_mode != _EXCLUSIVE:
        modes.append("timeslice")
    return "", tuple(modes)


def _read_memory(handle: Any) -> tuple[int, int]:
    """(MiB that jobs may use, MiB they use now). What the driver reserves counts to neither, where it tells."""
    memory = _optional(pynvml.nvmlDeviceGetMemoryInfo, handle, version=pynvml.nvmlMemory_v2)
    if memory is not None:
        return (memory.total - memory.reserved) // _MIB, memory.used // _MIB
    memory = _optional(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (memory.total // _MIB, memory.used // _MIB) if memory is not None else (0, 0)


def _numa_node(bus_id: str) -> int:
    """The host's node that the card is plugged into; -1 where the kernel does not know. (NVML's own call of that name
    is about cards that are memory nodes themselves.) The kernel writes bus ids shorter and in lower case."""
    short = bus_id.lower()[-12:]
    try:
        with open(f"/sys/bus/pci/devices/{short}/numa_node") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1


def _read_sample(card: _Card) -> DeviceSample:
    handle, device = card.handle, card.device
    try:
        utilization = _optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
        power = _optional(pynvml.nvmlDeviceGetPowerUsage, handle)
        temperature = _optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
        _, used = _read_memory(handle)
    except _Lost as lost:
        card.device = msgspec.structs.replace(device, healthy=False, fault=str(lost))
        return DeviceSample(uuid=device.uuid, memory_total_mib=device.memory_mib)
    return DeviceSample(
        uuid=device.uuid,
        utilization_pct=int(utilization.gpu) if utilization is not None else None,
        memory_used_mib=used,
        memory_total_mib=device.memory_mib,
        power_mw=int(power) if power is not None else None,
        temperature_c=int(temperature) if temperature is not None else None,
    )


def _read_processes(card: _Card) -> tuple[DeviceProcess, ...]:
    found: dict[int, int | None] = {}
    try:
        for list_them in (
            pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
        ):
            for process in _optional(list_them, card.handle) or ():
                used = process.usedGpuMemory
                found[int(process.pid)] = int(used) // _MIB if used is not None else None
    except _Lost as lost:
        raise DeviceTrouble(f"card {card.device.index} ({card.device.uuid}): {lost}") from None
    return tuple(
        DeviceProcess(device=card.device.uuid, pid=pid, memory_mib=used) for pid, used in sorted(found.items())
    )


# --- links between cards ---------------------------------------------------------------------------------------------


def _read_links(cards: list[_Card]) -> dict[DeviceUuid, tuple[tuple[DeviceUuid, int], ...]]:
    """Peers of each card over NVLink, and how many links to each.

    A link to a switch reaches every other card with links to a switch; a direct link names its peer by PCI address.
    """
    by_bus = {card.device.pci_bus_id.lower(): card.device.uuid for card in cards}
    switched: dict[DeviceUuid, int] = {}
    direct: dict[DeviceUuid, dict[DeviceUuid, int]] = {}
    for card in cards:
        uuid = card.device.uuid
        direct[uuid] = {}
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            try:
                kind, bus_id = _read_link(card.handle, link)
            except _Lost:
                break
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switched[uuid] = switched.get(uuid, 0) + 1
            elif kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU and (peer := by_bus.get(bus_id)) is not None:
                direct[uuid][peer] = direct[uuid].get(peer, 0) + 1
    for uuid, links in switched.items():
        for peer, their_links in switched.items():
            if peer != uuid:
                direct[uuid][peer] = min(links, their_links)
    order = {card.device.uuid: card.device.index for card in cards}
    return {uuid: tuple(sorted(peers.items(), key=lambda peer: order[peer[0]])) for uuid, peers in direct.items()}


def _read_link(handle: Any, link: int) -> tuple[int | None, str]:
    """(type of the device at the other end, its PCI bus id in lower case); (None, "") where no link is active."""
    if not _optional(pynvml.nvmlDeviceGetNvLinkState, handle, link):
        return None, ""
    kind = _optional(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
    if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return kind, ""
    pci = _optional(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
    if pci is None:
        return None, ""
    # A driver that does not tell the type names peers nevertheless.
    return pynvml.NVML_NVLINK_DEVICE_TYPE_GPU if kind is None else kind, str(pci.busId).lower()
