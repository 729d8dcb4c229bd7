"""`CardPartitions`: books first, then the making, and back again when the making fails.

The order of steps is the point. Taking: the books (which refuse what breaks a rule), the mode's maker (driver, daemon),
the backend's own notion of what exists. Undoing: the maker, the backend, the books last, so that a card that would not
let go is never given to another. Work on one card goes one at a time; different cards do not wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, PartitionRefused
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import ModeMaker, PartitionGrant
from gpuyard_agent.partitions.mig import MigMaker
from gpuyard_agent.partitions.mps import CONTROL_PROGRAM, MpsMaker
from gpuyard_agent.partitions.room import CardLedger, mode_of
from gpuyard_agent.partitions.timeslice import TimeSliceMaker
from gpuyard_agent.partitions.whole import NothingMaker, WholeMaker
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Device, Mode, Partition, devices_of


class CardPartitions:
    """The partitions of one node's cards, over any backend."""

    def __init__(self, backend: DeviceBackend, run_dir: Path, *, mps_control: str | None = None) -> None:
        """`run_dir`: for what MPS daemons keep while they run. `mps_control`: path of their program; found on PATH if
        left out."""
        control = mps_control if mps_control is not None else shutil.which(CONTROL_PROGRAM) or ""
        self._backend = backend
        self._ledger = CardLedger(())
        self._mps = MpsMaker(backend, run_dir / "mps", control)
        self._makers: dict[Mode, ModeMaker] = {
            "idle": NothingMaker(),
            "whole": WholeMaker(),
            "mig": MigMaker(backend),
            "mps": self._mps,
            "timeslice": TimeSliceMaker(),
        }
        #: What was given, by assignment: `prepare` answers again with the same.
        self._grants: dict[AssignmentKey, PartitionGrant] = {}
        #: One for each card, taken in the order of UUIDs.
        self._locks: dict[str, asyncio.Lock] = {}

    async def refresh(self) -> tuple[Device, ...]:
        """Read the inventory anew: to be called before the first `prepare`, and when the cards changed."""
        devices = await self._backend.inventory()
        self._ledger.update(devices)
        return devices

    async def prepare(
        self, key: AssignmentKey, partition: Partition, account: Account, share_domain: str
    ) -> PartitionGrant:
        return await self._take(key, partition, account, share_domain, adopting=False)

    async def adopt(
        self, key: AssignmentKey, partition: Partition, account: Account, share_domain: str
    ) -> PartitionGrant:
        return await self._take(key, partition, account, share_domain, adopting=True)

    async def _take(
        self, key: AssignmentKey, partition: Partition, account: Account, share_domain: str, *, adopting: bool
    ) -> PartitionGrant:
        async with self._cards(partition):
            fresh = self._ledger.take(key, partition, uid=account.uid, share_domain=share_domain, adopting=adopting)
            if not fresh:
                return self._grants[key]
            maker = self._makers[mode_of(partition)]
            made = False
            try:
                grant = await maker.make(key, partition, account)
                made = True
                self._backend.hold(key, partition)
            except (PartitionRefused, DeviceTrouble, asyncio.CancelledError):
                if made:
                    await maker.unmake(key, partition, account.uid)
                self._ledger.release(key)
                raise
            self._grants[key] = grant
            return grant

    def running(self, key: AssignmentKey, pid: int) -> None:
        self._backend.running(key, pid)

    async def undo(self, key: AssignmentKey) -> None:
        holding = self._ledger.get(key)
        if holding is None:
            return
        async with self._cards(holding.partition):
            if self._ledger.get(key) is None:
                return  # undone while this call waited for the card
            self._backend.running(key, 0)
            await self._makers[mode_of(holding.partition)].unmake(key, holding.partition, holding.uid)
            self._backend.drop(key)
            self._ledger.release(key)
            self._grants.pop(key, None)

    async def sweep(self) -> tuple[str, ...]:
        removed: list[str] = []
        for maker in self._makers.values():
            removed.extend(await maker.sweep())
        return tuple(removed)

    def held(self) -> tuple[AssignmentKey, ...]:
        return self._ledger.keys()

    def modes(self) -> dict[str, Mode]:
        return self._ledger.modes()

    async def close(self) -> None:
        self._mps.abandon()

    @contextlib.asynccontextmanager
    async def _cards(self, partition: Partition) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for device in sorted(set(devices_of(partition))):
                await stack.enter_async_context(self._locks.setdefault(device, asyncio.Lock()))
            yield
