"""Watches the node's cards: tells the core at once when one breaks, and when it has returned.

News come from the backend (`listen`) and, for modelled cards, from a drill. A fault goes to the core at once, before
anything is asked of the card: it may not answer. The return of a card takes more: whatever could not be undone on it
while it was lost is undone first, so that the card comes back empty in the books of both sides.

The inventory is read anew after each piece of news, and every half minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

import msgspec
import structlog

from gpuyard_agent.core.events import CardBroke, CardReturned, Event, InventoryRead, MustEnd
from gpuyard_agent.core.model import Assignment, Verdict
from gpuyard_agent.devices.base import (
    ApplicationFault,
    DeviceBackend,
    DeviceFault,
    DeviceNews,
    DeviceRecovered,
    DevicesChanged,
    DeviceTrouble,
)
from gpuyard_agent.drill import FaultDrill
from gpuyard_agent.partitions.base import NeighbourFault
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device

#: Between two looks at the drill, and two tries to empty a card that is to return.
LOOK_S = 2.0
INVENTORY_S = 30.0
NEIGHBOUR_FAULT = "NeighbourFault"

_log = structlog.get_logger("gpuyard_agent.cards")


class CardWatch:
    """`inventory`: what the node has besides its cards. `on_mig`: who holds that instance."""

    def __init__(
        self,
        inventory: Inventory,
        backend: DeviceBackend,
        partitions: CardPartitions,
        drill: FaultDrill | None,
        *,
        emit: Callable[[Event], None],
        live: Callable[[], Mapping[AssignmentKey, Assignment]],
        on_mig: Callable[[str], frozenset[AssignmentKey]],
    ) -> None:
        self._inventory = inventory
        self._backend = backend
        self._partitions = partitions
        self._drill = drill
        self._emit = emit
        self._live = live
        self._on_mig = on_mig
        #: Cards that broke and were not given back, with what is wrong.
        self._broken: dict[DeviceUuid, str] = {}
        #: Of these, the ones that are well again and are not empty yet.
        self._returning: set[DeviceUuid] = set()
        self._is_stale = False
        self._wake = asyncio.Event()

    async def open(self) -> tuple[Device, ...]:
        """The first look, before anything is taken over."""
        self._backend.listen(self.tell)
        self._partitions.listen(self._on_neighbour_fault)
        await self._look_at_drill()
        return await self._partitions.refresh()

    async def run(self) -> None:
        read_at_s = time.monotonic() + INVENTORY_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()
            self._wake.clear()
            await self._look_at_drill()
            for device in sorted(self._returning):
                await self._give_back(device)
            if self._is_stale or time.monotonic() >= read_at_s:
                self._is_stale = False
                read_at_s = time.monotonic() + INVENTORY_S
                await self._read()

    def tell(self, news: DeviceNews) -> None:
        """Something happened to a card."""
        match news:
            case DeviceFault(device=device, detail=detail, mig_uuid=""):
                self._returning.discard(device)
                if device not in self._broken:
                    self._broken[device] = detail
                    _log.error("card broke", device=device, kind=news.kind, detail=detail)
                    self._emit(CardBroke(device, detail))
            case DeviceFault(device=device, detail=detail, mig_uuid=mig_uuid):
                _log.error("MIG instance broke", device=device, instance=mig_uuid, kind=news.kind, detail=detail)
                self._emit(CardBroke(device, detail, self._on_mig(mig_uuid)))
            case DeviceRecovered(device=device):
                if device in self._broken:
                    self._returning.add(device)
            case ApplicationFault(device=device, xid=xid):
                _log.warning("program faulted on a card", device=device, xid=xid)
                self._partitions.look_now()  # under MPS its neighbours may have been hit
            case DevicesChanged():
                pass
        self._is_stale = True
        self._wake.set()

    def _on_neighbour_fault(self, fault: NeighbourFault) -> None:
        """What it shares with others has failed under it: nobody can say by whom, so nobody pays."""
        verdict = Verdict(outcome="lost", code=NEIGHBOUR_FAULT, detail=fault.detail)
        self._emit(MustEnd(fault.key, verdict))

    async def _look_at_drill(self) -> None:
        if self._drill is not None:
            await self._drill.read()

    async def _give_back(self, device: DeviceUuid) -> None:
        """Undo what outlived its assignment, then say that the card is back."""
        for key in self._partitions.held():
            if key not in self._live():
                try:
                    await self._partitions.undo(key)
                except DeviceTrouble as error:
                    _log.warning("card not given back", device=device, assignment=str(key), why=str(error))
                    return
        if device in self._returning:  # it may have broken again meanwhile
            self._returning.discard(device)
            self._broken.pop(device, None)
            self._is_stale = True
            _log.info("card returned", device=device)
            self._emit(CardReturned(device))

    async def _read(self) -> None:
        try:
            devices = await self._partitions.refresh()
        except DeviceTrouble as error:
            _log.warning("cards not read", why=str(error))
            return
        self._emit(InventoryRead(msgspec.structs.replace(self._inventory, devices=devices)))
