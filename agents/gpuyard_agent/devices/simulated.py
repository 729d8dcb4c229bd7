"""Modelled cards: what a node without GPUs offers, refusing whatever a real card would refuse.

The model keeps books of its own, apart from those of `gpuyard_agent.partitions.room`: instances at their placement,
holds with their memory, one mode per card. Whatever could not exist on a real card raises `PartitionRefused`, so that a
planner's error shows here and not only on hardware. Figures of use follow from the partitions that have a live process;
no memory is really taken.

State: none on disk. Cards get their UUIDs from the node's name and their index, MIG instances from the card and their
placement, so a restarted agent finds the same cards; the partitions come back because the agent adopts every assignment
of its ledger (`hold` and `create_mig` again). A file of its own could only disagree with the ledger.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from typing import Literal

import msgspec

from gpuyard_agent.devices.base import (
    DeviceFault,
    DeviceNews,
    DeviceProcess,
    DeviceRecovered,
    DeviceTrouble,
    MigInstanceFound,
    PartitionRefused,
)
from gpuyard_agent.devices.simulated_models import CardModel, find_model
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.resources import (
    Device,
    MigInstance,
    MigProfileFacts,
    Mode,
    MpsShare,
    NoGpu,
    Partition,
    TimeSliceShare,
    WholeCards,
    devices_of,
    mode_of,
)
from gpuyard_protocol.units import MILLI

_CARDS = re.compile(r"^(?:(\d{1,3})x)?([A-Za-z][A-Za-z0-9-]*)$")
_CARDS_MAX = 64
#: So that UUIDs of modelled cards never meet others made from names.
_NAMESPACE = uuid.UUID("6f1cb0f4-4a8c-5a0e-9d0e-52f1b6a6f0aa")
#: What a busy process takes of the memory it was granted, in hundredths.
_MEMORY_USE_PCT = 85
#: The least a card of a node comes with.
_CPU_MILLI_PER_CARD = 16_000
_MEMORY_MIB_PER_CARD = 128 * 1024


def parse_cards(text: str) -> tuple[CardModel, ...]:
    """`8xH100-80GB` or `4xH100-80GB,4xA100-40GB`, one entry per card. `ValueError` says what is allowed."""
    cards: list[CardModel] = []
    for part in text.split(","):
        match = _CARDS.match(part.strip())
        if match is None:
            raise ValueError(f"found {part.strip()!r}; expected cards such as '8xH100-80GB' or '4xA100-40GB,2xA30'")
        count = int(match[1] or 1)
        if count < 1:
            raise ValueError(f"found {part.strip()!r}; expected at least one card")
        cards.extend([find_model(match[2])] * count)
    if len(cards) > _CARDS_MAX:
        raise ValueError(f"found {len(cards)} cards in {text!r}; expected at most {_CARDS_MAX} on a node")
    return tuple(cards)


class SimulatedHost(msgspec.Struct, frozen=True, kw_only=True):
    """CPUs and memory that a node with modelled cards claims to have."""

    cpu_milli: int
    memory_mib: int


def simulated_host(cards: tuple[CardModel, ...]) -> SimulatedHost:
    """16 cores and 128 GiB for each card, as hosts of this kind are usually bought."""
    return SimulatedHost(cpu_milli=_CPU_MILLI_PER_CARD * len(cards), memory_mib=_MEMORY_MIB_PER_CARD * len(cards))


class _Card:
    """One modelled card. Its mode follows from what is on it: instances make it a MIG card, else its first hold."""

    def __init__(self, index: int, model: CardModel, device: Device) -> None:
        self.index = index
        self.model = model
        self.device = device
        #: Instances that exist, by start. While there are any, nothing but MIG holds may be here.
        self.instances: dict[int, MigInstanceFound] = {}
        #: Partitions that lie here, at most one for each assignment.
        self.holds: dict[AssignmentKey, Partition] = {}
        #: Why the card is not usable, "" while it is.
        self.fault = ""
        #: Admits one process alone.
        self.is_exclusive = False

    @property
    def mode(self) -> Mode:
        if self.instances:
            return "mig"
        return next((mode_of(hold) for hold in self.holds.values()), "idle")

    def refuse(self, problem: str) -> PartitionRefused:
        return PartitionRefused(f"card {self.index} ({self.device.uuid}): {problem}")


class SimulatedBackend:
    """Cards that exist in this object alone."""

    def __init__(self, cards: tuple[CardModel, ...], node: str) -> None:
        """`node`: what the cards' UUIDs are made from, with their index."""
        uuids = [f"GPU-{uuid.uuid5(_NAMESPACE, f'{node}/{index}')}" for index in range(len(cards))]
        self._cards: dict[DeviceUuid, _Card] = {
            name: _Card(index, model, _describe(index, cards, uuids))
            for index, (name, model) in enumerate(zip(uuids, cards, strict=True))
        }
        #: The process of each assignment that runs.
        self._pids: dict[AssignmentKey, int] = {}
        self._tell: Callable[[DeviceNews], None] = lambda news: None

    @property
    def simulated(self) -> bool:
        return True

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None

    def listen(self, tell: Callable[[DeviceNews], None]) -> None:
        self._tell = tell

    async def driver(self) -> str:
        return "simulated"

    async def limits(self) -> dict[DeviceUuid, tuple[str, ...]]:
        return {}

    async def inventory(self) -> tuple[Device, ...]:
        return tuple(
            msgspec.structs.replace(card.device, healthy=not card.fault, fault=card.fault)
            for card in self._cards.values()
        )

    async def samples(self) -> tuple[DeviceSample, ...]:
        return tuple(self._sample(card) for card in self._cards.values())

    async def processes(self, device: DeviceUuid) -> tuple[DeviceProcess, ...]:
        card = self._cards.get(device)
        if card is None:
            raise DeviceTrouble(f"there is no card {device} on this node")
        if card.fault:
            raise DeviceTrouble(f"card {card.index} ({device}): {card.fault}")
        found = []
        for key, hold in sorted(card.holds.items()):
            if (pid := self._live(key)) is not None:
                instance = card.instances.get(hold.start) if isinstance(hold, MigInstance) else None
                found.append(
                    DeviceProcess(
                        device=device,
                        pid=pid,
                        memory_mib=_memory_on(card, hold) * _MEMORY_USE_PCT // 100,
                        mig_uuid=instance.mig_uuid if instance else "",
                        utilization_pct=_use_pct(card, hold) if isinstance(hold, WholeCards | TimeSliceShare) else None,
                    )
                )
        return tuple(found)

    # --- MIG ---

    async def mig_instances(self, device: DeviceUuid) -> tuple[MigInstanceFound, ...]:
        return tuple(instance for _, instance in sorted(self._card(device).instances.items()))

    async def create_mig(self, device: DeviceUuid, profile: str, start: int) -> MigInstanceFound:
        card = self._card(device)
        if card.fault:
            raise card.refuse(card.fault)
        facts = next((known for known in card.device.mig_profiles if known.name == profile), None)
        if facts is None:
            offered = ", ".join(known.name for known in card.device.mig_profiles) or "none: it has no MIG"
            raise card.refuse(f"has no MIG profile {profile!r}; its profiles: {offered}")
        if card.mode not in ("idle", "mig"):
            raise card.refuse(f"is in mode {card.mode}; MIG needs it empty")
        self._check_placement(card, facts, start)
        instance = MigInstanceFound(
            device=device,
            mig_uuid=f"MIG-{uuid.uuid5(_NAMESPACE, f'{device}/{profile}/{start}')}",
            profile=profile,
            start=start,
            size=facts.size,
            memory_mib=facts.memory_mib,
        )
        card.instances[start] = instance
        return instance

    def _check_placement(self, card: _Card, facts: MigProfileFacts, start: int) -> None:
        if start not in facts.starts:
            raise card.refuse(f"{facts.name} may start at {', '.join(map(str, facts.starts))}, not at {start}")
        for other in card.instances.values():
            if start < other.start + other.size and other.start < start + facts.size:
                raise card.refuse(f"{facts.name} at {start} overlaps {other.profile} at {other.start}")
        alike = sum(other.profile == facts.name for other in card.instances.values())
        if alike >= facts.count_max:
            raise card.refuse(f"has {alike} of {facts.name} already, no more are possible")
        if "+me" in facts.name and any("+me" in other.profile for other in card.instances.values()):
            raise card.refuse("its media engines belong to another instance already")

    async def destroy_mig(self, device: DeviceUuid, mig_uuid: str) -> None:
        card = self._card(device)
        for start, instance in list(card.instances.items()):
            if instance.mig_uuid != mig_uuid:
                continue
            for key, hold in card.holds.items():
                if isinstance(hold, MigInstance) and hold.start == start and self._live(key) is not None:
                    raise DeviceTrouble(f"card {card.index} ({device}): {mig_uuid} is in use by assignment {key}")
            del card.instances[start]

    async def destroy_mig_remains(self, device: DeviceUuid, start: int) -> None:
        self._card(device)  # a modelled instance has no halves

    async def leave_mig(self, device: DeviceUuid) -> None:
        card = self._card(device)
        if card.instances:
            first = next(iter(card.instances.values()))
            raise card.refuse(f"its MIG mode is on and stays so: it has {first.profile} at {first.start}")

    async def set_exclusive(self, device: DeviceUuid, on: bool) -> Literal["done", "already", "denied"]:
        card = self._card(device)
        was, card.is_exclusive = card.is_exclusive, on
        return "already" if was == on else "done"

    async def device_files(self, device: DeviceUuid, mig_uuid: str = "") -> tuple[str, ...] | None:
        return None

    # --- what exists ---

    def hold(self, key: AssignmentKey, partition: Partition) -> None:
        cards = [self._card(device) for device in devices_of(partition)]
        for card in cards:
            if key not in card.holds:
                self._check(card, partition)
        for card in cards:
            card.holds[key] = partition

    def _check(self, card: _Card, partition: Partition) -> None:
        mode = mode_of(partition)
        if mode not in card.device.modes:
            raise card.refuse(f"cannot be used in mode {mode}")
        if card.mode not in ("idle", mode) or (mode == "whole" and card.holds):
            raise card.refuse(f"is in mode {card.mode} already")
        if isinstance(partition, MigInstance):
            instance = card.instances.get(partition.start)
            if instance is None or instance.profile != partition.profile:
                raise card.refuse(f"there is no instance {partition.profile} at {partition.start}")
            if any(isinstance(other, MigInstance) and other.start == partition.start for other in card.holds.values()):
                raise card.refuse(f"the instance at {partition.start} is taken")
            return
        taken = sum(_memory_on(card, hold) for hold in card.holds.values())
        if taken + _memory_on(card, partition) > card.device.memory_mib:
            raise card.refuse(f"has {card.device.memory_mib - taken} MiB left, not {_memory_on(card, partition)}")
        if isinstance(partition, MpsShare):
            shares = [hold for hold in card.holds.values() if isinstance(hold, MpsShare)]
            if sum(share.share_milli for share in shares) + partition.share_milli > MILLI:
                raise card.refuse("its shares would be more than the whole card")
            if sum(share.processes for share in shares) + partition.processes > card.device.mps_clients_max:
                raise card.refuse(f"MPS serves at most {card.device.mps_clients_max} processes on it")

    def running(self, key: AssignmentKey, pid: int) -> None:
        if pid:
            self._pids[key] = pid
        else:
            self._pids.pop(key, None)

    def drop(self, key: AssignmentKey) -> None:
        self._pids.pop(key, None)
        for card in self._cards.values():
            card.holds.pop(key, None)

    def set_fault(self, device: DeviceUuid, fault: str, kind: Literal["lost", "xid", "ecc", "hang"] = "xid") -> None:
        """Break a card, or with "" mend it: a lost card keeps what it held, as a real one does until its jobs end."""
        card = self._card(device)
        was, card.fault = card.fault, fault
        if fault and not was:
            self._tell(DeviceFault(device=device, kind=kind, detail=fault))
        elif was and not fault:
            self._tell(DeviceRecovered(device=device))

    # --- reading ---

    def _card(self, device: DeviceUuid) -> _Card:
        card = self._cards.get(device)
        if card is None:
            raise PartitionRefused(f"there is no card {device} on this node")
        return card

    def _live(self, key: AssignmentKey) -> int | None:
        pid = self._pids.get(key)
        return pid if pid is not None and os.path.exists(f"/proc/{pid}") else None

    def _sample(self, card: _Card) -> DeviceSample:
        if card.fault:
            return DeviceSample(uuid=card.device.uuid, memory_total_mib=card.device.memory_mib)
        busy = [hold for key, hold in card.holds.items() if self._live(key) is not None]
        use_pct = min(100, sum(_use_pct(card, hold) for hold in busy))
        memory = sum(_memory_on(card, hold) * _MEMORY_USE_PCT // 100 for hold in busy)
        span_mw = card.model.full_mw - card.model.idle_mw
        return DeviceSample(
            uuid=card.device.uuid,
            utilization_pct=use_pct,
            memory_used_mib=memory,
            memory_total_mib=card.device.memory_mib,
            power_mw=card.model.idle_mw + span_mw * use_pct // 100,
            temperature_c=30 + use_pct * 45 // 100,
        )


def _describe(index: int, cards: tuple[CardModel, ...], uuids: list[str]) -> Device:
    model = cards[index]
    peers = tuple(
        (uuids[other], model.nvlinks)
        for other, their_model in enumerate(cards)
        if model.nvlinks and other != index and their_model is model
    )
    return Device(
        uuid=uuids[index],
        index=index,
        model=model.driver_name,
        memory_mib=model.memory_mib,
        modes=model.modes,
        mig_slices=model.mig_slices,
        mig_compute_slices=model.mig_compute_slices,
        mig_profiles=model.mig_profiles,
        mps_clients_max=model.mps_clients_max,
        pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
        numa_node=_numa_of(index, len(cards)),
        nvlinks=peers,
        pcie_peers=tuple(
            (uuids[other], _between(index, other, len(cards))) for other in range(len(cards)) if other != index
        ),
    )


def _numa_of(index: int, count: int) -> int:
    return index * 2 // count


def _between(one: int, other: int, count: int) -> str:
    """As on most boards: two cards behind each switch, half of them at each socket."""
    if _numa_of(one, count) != _numa_of(other, count):
        return "system"
    return "same-switch" if one // 2 == other // 2 else "numa-node"


def _memory_on(card: _Card, partition: Partition) -> int:
    match partition:
        case NoGpu():
            return 0
        case WholeCards():
            return card.device.memory_mib
        case _:
            return partition.memory_mib


def _use_pct(card: _Card, partition: Partition) -> int:
    """Compute that a busy process of this partition takes. On a time-sliced card one alone may take all of it."""
    match partition:
        case NoGpu():
            return 0
        case WholeCards() | TimeSliceShare():
            return 98
        case MpsShare(share_milli=share):
            return share * 98 // MILLI
        case MigInstance(compute_slices=slices):
            return slices * 98 // max(1, card.device.mig_compute_slices)
