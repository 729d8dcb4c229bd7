"""Real cards, read through NVIDIA's management library (NVML) by its own Python binding.

This module knows which cards there are, keeps their handles by UUID (the driver's index order is not stable), and
carries their faults: what is wrong with a card, from whatever side it shows (an event, a call that finds it lost, calls
that do not come back), fences it, is told once, and is probed until the card may come back. How a card is read, sampled
and cut stands in the modules beside it, `nvml_*`; whatever a card, a driver version or a missing privilege does not
give is None or left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Final, Literal, TypeVar

import msgspec
import pynvml

from gpuyard_agent.devices import nvml_events as events
from gpuyard_agent.devices import nvml_mig as mig
from gpuyard_agent.devices.base import (
    ApplicationFault,
    DeviceFault,
    DeviceNews,
    DeviceProcess,
    DeviceRecovered,
    DevicesChanged,
    DeviceTrouble,
    MigInstanceFound,
    NoAnswer,
)
from gpuyard_agent.devices.device_files import files_of
from gpuyard_agent.devices.faults import PROBE_S, QUARANTINE_S, FaultBook
from gpuyard_agent.devices.nvml_calls import Lost, checked, code_of, optional
from gpuyard_agent.devices.nvml_cards import Card, find_problem, mig_mode, read_device, read_facts, read_limits, unread
from gpuyard_agent.devices.nvml_samples import Sampler, read_processes
from gpuyard_agent.devices.nvml_session import NvmlSession
from gpuyard_agent.devices.nvml_topology import peers_of, read_links, read_pcie
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.resources import Device, Partition

T = TypeVar("T")

INVENTORY_S = 30.0
SAMPLE_S = 5.0
#: Making an instance; switching MIG mode resets older cards.
CREATE_S = 60.0
#: From the first try to destroy an instance to the last, and the pauses between them.
DESTROY_S = 10.0
#: A card stays in MIG mode for so long after its last instance, seconds: the next one would have it switched back.
LEAVE_AFTER_S = 20.0
_PAUSE_S, _PAUSE_S_MAX = 0.05, 1.0
#: From the first event of a change until it is told.
CHANGE_S = 0.2
#: Calls in a row that a card did not answer in time: then it counts as hanging.
_SILENT_MAX = 3
#: Xids that a program causes by its own errors. The card is well.
APPLICATION_XIDS: Final = frozenset({13, 31, 43, 45, 68, 109})
_XID_OFF_THE_BUS = 79
_DENIED = (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED)


class NvmlBackend:
    """The cards that NVIDIA's driver knows."""

    def __init__(
        self, *, may_switch_mig: bool = True, quarantine_s: float = QUARANTINE_S, probe_s: float = PROBE_S
    ) -> None:
        """`may_switch_mig`: cards may change between MIG and other uses; False keeps each as it was found. The times
        are those of `faults`."""
        self._may_switch = may_switch_mig
        self._session = NvmlSession(self._on_event)
        self._faults = FaultBook(quarantine_s, probe_s)
        self._probe_s = probe_s
        self._tell: Callable[[DeviceNews], None] = lambda news: None
        #: Every card seen since `open`, gone ones included.
        self._cards: dict[DeviceUuid, Card] = {}
        self._samplers: dict[DeviceUuid, Sampler] = {}
        #: Calls in a row without an answer.
        self._silent: dict[DeviceUuid, int] = {}
        self._watch: asyncio.Task[None] | None = None
        #: Cards whose change is about to be told.
        self._changing: set[DeviceUuid] = set()
        #: Readings that an event asked for.
        self._tasks: set[asyncio.Task[None]] = set()
        #: What lies between each two cards on PCIe, and for which cards that was asked.
        self._pcie: tuple[tuple[DeviceUuid, ...], dict[DeviceUuid, tuple[tuple[DeviceUuid, str], ...]]] | None = None
        #: Held while cards are looked up and while the session is begun anew.
        self._looking = asyncio.Lock()

    @property
    def simulated(self) -> bool:
        return False

    async def open(self) -> None:
        await self._session.open()
        self._watch = asyncio.create_task(self._keep_watch())

    async def close(self) -> None:
        for task in (*self._tasks, *((self._watch,) if self._watch is not None else ())):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._watch = None
        await self._session.close()
        self._cards.clear()
        self._samplers.clear()
        self._silent.clear()

    def listen(self, tell: Callable[[DeviceNews], None]) -> None:
        self._tell = tell

    async def driver(self) -> str:
        version = await self._session.call(
            "driver version", lambda: optional(pynvml.nvmlSystemGetDriverVersion), SAMPLE_S
        )
        return str(version or "unknown")

    # --- reading ---

    async def inventory(self) -> tuple[Device, ...]:
        async with self._looking:
            await self._look_up()
        await asyncio.gather(*(self._read(card) for card in self._cards.values()))
        present = [card for card in self._cards.values() if card.handle is not None]
        pcie = await self._read_pcie(present)
        for uuid, peers in peers_of(present).items():
            card = self._cards[uuid]
            card.device = msgspec.structs.replace(card.device, nvlinks=peers, pcie_peers=pcie.get(uuid, ()))
        return tuple(self._shown(card) for card in self._ordered())

    async def samples(self) -> tuple[DeviceSample, ...]:
        return tuple(await asyncio.gather(*(self._sample(card) for card in self._ordered())))

    async def processes(self, device: DeviceUuid) -> tuple[DeviceProcess, ...]:
        card = self._card(device)
        return await self._ask(card, "processes", lambda: read_processes(card), SAMPLE_S)

    async def _read_pcie(self, present: list[Card]) -> dict[DeviceUuid, tuple[tuple[DeviceUuid, str], ...]]:
        """Asked once for the same cards: it takes a call for each two, and never changes."""
        uuids = tuple(sorted(card.facts.uuid for card in present))
        if self._pcie is None or self._pcie[0] != uuids:
            try:
                found = await self._session.call("topology", lambda: read_pcie(present), INVENTORY_S)
            except DeviceTrouble:
                return {}
            self._pcie = uuids, found
        return self._pcie[1]

    async def limits(self) -> dict[DeviceUuid, tuple[str, ...]]:
        silent = self._session.events.silent
        found: dict[DeviceUuid, tuple[str, ...]] = {}
        for card in self._ordered():
            uuid = card.facts.uuid
            told = [f"it tells nothing of its own accord: {silent[uuid]}"] if uuid in silent else []
            with contextlib.suppress(DeviceTrouble):
                told += await self._ask(card, "limits", partial(read_limits, card, self._may_switch), SAMPLE_S)
            if told:
                found[uuid] = tuple(told)
        return found

    # --- MIG ---

    async def mig_instances(self, device: DeviceUuid) -> tuple[MigInstanceFound, ...]:
        card = self._card(device)
        return await self._ask(card, "MIG instances", lambda: mig.find_instances(card), SAMPLE_S)

    async def create_mig(self, device: DeviceUuid, profile: str, start: int) -> MigInstanceFound:
        card = self._card(device)
        was_on = bool(card.instances)
        made = await self._ask(
            card, "create MIG instance", lambda: mig.create(card, profile, start, self._may_switch), CREATE_S
        )
        if not was_on:
            self._watch_events()  # a card that was reset for MIG has forgotten who listens
        return made

    async def destroy_mig(self, device: DeviceUuid, mig_uuid: str) -> None:
        card = self._card(device)
        await self._destroy(card, lambda: mig.find(card, mig_uuid=mig_uuid))

    async def destroy_mig_remains(self, device: DeviceUuid, start: int) -> None:
        card = self._card(device)
        await self._destroy(card, lambda: mig.find(card, start=start))

    async def leave_mig(self, device: DeviceUuid) -> None:
        card = self._card(device)
        await self._ask(card, "leave MIG mode", lambda: mig.switch(card, False, self._may_switch), CREATE_S)

    async def _destroy(self, card: Card, find: Callable[[], MigInstanceFound | None]) -> None:
        """The driver lets go some time after the last process has ended, and its tools hold on for moments too."""
        found = await self._ask(card, "MIG instances", find, SAMPLE_S)
        if found is None:
            return
        deadline_s, pause_s = time.monotonic() + DESTROY_S, _PAUSE_S
        while True:
            try:
                await self._ask(card, "destroy MIG instance", partial(mig.destroy, card, found), CREATE_S)
                break
            except mig.InUse as held:
                if time.monotonic() + pause_s > deadline_s:
                    raise DeviceTrouble(str(held)) from None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)
        card.emptied_s = time.monotonic()

    # --- compute mode ---

    async def set_exclusive(self, device: DeviceUuid, on: bool) -> Literal["done", "already", "denied"]:
        card = self._card(device)
        answer = await self._ask(card, "compute mode", lambda: _set_exclusive(card, on), SAMPLE_S)
        if answer != "denied":
            card.is_exclusive = on and (answer == "done" or card.is_exclusive)
        return answer

    async def device_files(self, device: DeviceUuid, mig_uuid: str = "") -> tuple[str, ...] | None:
        card = self._card(device)
        # Read each time: the number can move when MIG mode is switched.
        minor = await self._ask(
            card, "device file", lambda: int(checked(pynvml.nvmlDeviceGetMinorNumber, card.handle)), SAMPLE_S
        )
        if not mig_uuid:
            return files_of(minor)
        one = next((one for one in card.instances if one.mig_uuid == mig_uuid), None)
        if one is None:
            raise DeviceTrouble(f"card {card.device.index} ({device}) has no MIG instance {mig_uuid}")
        return files_of(minor, (one.gpu_instance, one.compute_instance))

    # --- what exists: the driver knows ---

    def hold(self, key: AssignmentKey, partition: Partition) -> None:
        return None

    def running(self, key: AssignmentKey, pid: int) -> None:
        return None

    def drop(self, key: AssignmentKey) -> None:
        return None

    # --- cards ---

    def _card(self, device: DeviceUuid) -> Card:
        card = self._cards.get(device)
        if card is None:
            raise DeviceTrouble(f"there is no card {device} on this node")
        return card

    def _ordered(self) -> list[Card]:
        return sorted(self._cards.values(), key=lambda card: card.device.index)

    def _shown(self, card: Card) -> Device:
        fault = self._faults.fault(card.facts.uuid) or card.device.fault
        return msgspec.structs.replace(card.device, healthy=not fault, fault=fault)

    async def _look_up(self) -> None:
        """Handles for the cards of this session that have none yet."""
        known = {card.device.index: card for card in self._cards.values() if card.handle is not None}
        count = await self._session.call("count cards", _count, INVENTORY_S)
        is_changed = False
        for index in range(count):
            if index in known:
                continue
            try:
                found = await self._session.call(f"look up card {index}", partial(_look_up, index), INVENTORY_S)
            except (Lost, DeviceTrouble, pynvml.NVMLError):
                continue
            card = self._cards.get(found.facts.uuid)
            if card is None:
                self._cards[found.facts.uuid] = found
            else:
                card.handle, card.facts = found.handle, found.facts
                card.device = msgspec.structs.replace(card.device, index=index)
            is_changed = True
        if is_changed:
            self._watch_events()

    def _watch_events(self) -> None:
        self._session.events.watch({uuid: card.handle for uuid, card in self._cards.items() if card.handle is not None})

    async def _read(self, card: Card) -> None:
        index = card.device.index

        def read() -> Device:
            device = read_device(card, index, self._may_switch)
            if mig.find_instances(card):
                card.emptied_s = None
            elif card.emptied_s is not None and time.monotonic() - card.emptied_s >= LEAVE_AFTER_S:
                card.emptied_s = None
                mig.leave_if_empty(card, self._may_switch)
            if not mig_mode(card.handle)[0]:
                card.links = read_links(card.handle)
            return device

        with contextlib.suppress(DeviceTrouble):
            card.device = await self._ask(card, "inventory", read, INVENTORY_S)

    async def _sample(self, card: Card) -> DeviceSample:
        sampler = self._samplers.setdefault(card.facts.uuid, Sampler())
        try:
            return await self._ask(card, "samples", lambda: sampler.sample(card), SAMPLE_S)
        except DeviceTrouble:
            return DeviceSample(uuid=card.facts.uuid, memory_total_mib=card.device.memory_mib)

    async def _ask(self, card: Card, name: str, function: Callable[[], T], deadline_s: float) -> T:
        """In the card's thread. What shows that the card is gone or hangs is a fault of it, and `DeviceTrouble`."""
        uuid = card.facts.uuid
        if card.handle is None:
            raise DeviceTrouble(f"card {card.device.index} ({uuid}): {self._shown(card).fault}")
        try:
            answer = await self._session.call(name, function, deadline_s, uuid)
        except Lost as lost:
            card.handle = None
            self._fault(DeviceFault(device=uuid, kind="lost", detail=str(lost)))
            raise DeviceTrouble(f"card {card.device.index} ({uuid}): {lost}") from None
        except pynvml.NVMLError as error:
            raise DeviceTrouble(f"card {card.device.index} ({uuid}): {name}: {error}") from None
        except NoAnswer as silence:
            self._silent[uuid] = self._silent.get(uuid, 0) + 1
            if self._silent[uuid] >= _SILENT_MAX:
                self._fault(DeviceFault(device=uuid, kind="hang", detail=str(silence)))
            raise
        self._silent.pop(uuid, None)
        return answer

    # --- faults ---

    def _fault(self, fault: DeviceFault) -> None:
        if self._faults.report(fault, time.monotonic()):
            self._tell(fault)

    def _on_event(self, event: events.CardEvent) -> None:
        if event.device is None:
            # Which card it is shows when they are asked.
            for card in self._cards.values():
                self._later(self._read(card))
            return
        uuid = event.device
        if uuid not in self._cards:
            return
        card = self._cards[uuid]
        mig_uuid = next(
            (one.mig_uuid for one in card.instances if (one.gpu_instance, one.compute_instance) == event.instance), ""
        )
        match event.kind:
            case events.XID if event.number in APPLICATION_XIDS:
                self._tell(ApplicationFault(device=uuid, xid=event.number, mig_uuid=mig_uuid))
            case events.XID:
                kind: Literal["lost", "xid"] = "lost" if event.number == _XID_OFF_THE_BUS else "xid"
                detail = f"the driver reported Xid {event.number}"
                self._fault(DeviceFault(device=uuid, kind=kind, detail=detail, mig_uuid=mig_uuid))
            case events.ECC_DOUBLE | events.POISON_FATAL:
                detail = "its memory gave an error that cannot be corrected"
                self._fault(DeviceFault(device=uuid, kind="ecc", detail=detail, mig_uuid=mig_uuid))
            case events.UNAVAILABLE:
                self._fault(DeviceFault(device=uuid, kind="lost", detail="the driver says that it is unavailable"))
            case events.RECOVERY_ACTION:
                self._later(self._check(card))
            case _:
                self._changed(uuid)

    def _changed(self, device: DeviceUuid) -> None:
        """One word for the several events of one change."""
        if device not in self._changing:
            self._changing.add(device)
            asyncio.get_running_loop().call_later(CHANGE_S, self._tell_changed, device)

    def _tell_changed(self, device: DeviceUuid) -> None:
        self._changing.discard(device)
        if self._watch is not None:
            self._tell(DevicesChanged(device=device))

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, card: Card) -> None:
        """The driver wants something done about the card, or no longer does."""
        with contextlib.suppress(DeviceTrouble):
            problem = await self._ask(card, "health", lambda: find_problem(card.handle), SAMPLE_S)
            if problem:
                self._fault(DeviceFault(device=card.facts.uuid, kind="xid", detail=problem))

    async def _keep_watch(self) -> None:
        """Probes fenced cards, for ever."""
        while True:
            await asyncio.sleep(self._probe_s)
            due = [self._cards[uuid] for uuid in self._faults.due(time.monotonic()) if uuid in self._cards]
            if any(card.handle is None for card in due):
                await self._begin_anew()
            await asyncio.gather(*(self._probe(card) for card in due))

    async def _begin_anew(self) -> None:
        """Lost cards come back to a new session alone."""
        async with self._looking:
            try:
                await self._session.restart()
            except DeviceTrouble:
                return
            for card in self._cards.values():
                card.handle, card.mig_handles = None, {}
            for sampler in self._samplers.values():
                sampler.forget()
            with contextlib.suppress(DeviceTrouble):
                await self._look_up()
            for uuid, card in self._cards.items():
                if card.handle is None:
                    self._fault(DeviceFault(device=uuid, kind="lost", detail="the driver no longer lists the card"))

    async def _probe(self, card: Card) -> None:
        uuid = card.facts.uuid
        try:
            problem = await self._ask(card, "probe", lambda: find_problem(card.handle), SAMPLE_S)
        except DeviceTrouble as trouble:
            problem = str(trouble) if card.handle is not None else self._faults.fault(uuid)
        if self._faults.probed(uuid, problem, time.monotonic()):
            await self._read(card)
            self._tell(DeviceRecovered(device=uuid))


# --- in the driver's threads -----------------------------------------------------------------------------------------


def _count() -> int:
    try:
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        raise DeviceTrouble(f"the driver cannot count its cards: {error}") from None


def _look_up(index: int) -> Card:
    handle = checked(pynvml.nvmlDeviceGetHandleByIndex, index)
    facts = read_facts(handle)
    return Card(handle=handle, facts=facts, device=unread(facts.uuid, index))


def _set_exclusive(card: Card, on: bool) -> Literal["done", "already", "denied"]:
    wanted = pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS if on else pynvml.NVML_COMPUTEMODE_DEFAULT
    if optional(pynvml.nvmlDeviceGetComputeMode, card.handle) == wanted:
        return "already"
    try:
        checked(pynvml.nvmlDeviceSetComputeMode, card.handle, wanted)
    except pynvml.NVMLError as error:
        if code_of(error) in _DENIED:
            return "denied"
        raise
    return "done"
