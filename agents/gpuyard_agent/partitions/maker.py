"""`CardPartitions`: books first, then the making, and back again when the making fails.

The order of steps is the point. Taking: the books (which refuse what breaks a rule), the mode's maker (driver, daemon),
the backend's own notion of what exists. Undoing: the maker, the backend, the books last, so that a card that would not
let go is never given to another. Work on one card goes one at a time; different cards do not wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import msgspec

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, PartitionRefused
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import ModeMaker, NeighbourFault, PartitionGrant
from gpuyard_agent.partitions.mig import MigMaker
from gpuyard_agent.partitions.mps import CONTROL_PROGRAM, MpsMaker
from gpuyard_agent.partitions.room import CardLedger
from gpuyard_agent.partitions.timeslice import TimeSliceMaker
from gpuyard_agent.partitions.whole import NothingMaker, WholeMaker
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import Device, MigInstance, Mode, Partition, devices_of, mode_of


class CardPartitions:
    """The partitions of one node's cards, over any backend."""

    def __init__(
        self,
        backend: DeviceBackend,
        run_dir: Path,
        *,
        mps_control: str | None = None,
        mps_exclusive: bool = True,
        time_slice: ModeMaker | None = None,
    ) -> None:
        """`run_dir`: for what MPS daemons keep while they run, and for records of what was made. `mps_control`: path of
        their program; found on PATH if left out. `mps_exclusive`: while MPS serves a card, nobody else may use it.
        `time_slice`: who gives turns; if left out, the driver divides cards by itself."""
        control = mps_control if mps_control is not None else shutil.which(CONTROL_PROGRAM) or ""
        self._backend = backend
        self._ledger = CardLedger(())
        self._mps = MpsMaker(backend, run_dir / "mps", control, is_exclusive=mps_exclusive)
        self._mig = MigMaker(backend, run_dir / "mig.json", self._mps)
        self._makers: dict[Mode, ModeMaker] = {
            "idle": NothingMaker(),
            "whole": WholeMaker(),
            # Before MIG: a daemon that was left over is to go before its instance.
            "mps": self._mps,
            "mig": self._mig,
            "timeslice": time_slice or TimeSliceMaker(),
        }
        #: What was given, by assignment: `prepare` answers again with the same.
        self._grants: dict[AssignmentKey, PartitionGrant] = {}
        #: Cards as the driver shows them, before what others hold is taken out.
        self._devices: dict[DeviceUuid, Device] = {}
        #: One for each card, taken in the order of UUIDs.
        self._locks: dict[str, asyncio.Lock] = {}

    async def refresh(self) -> tuple[Device, ...]:
        """Read the inventory anew: to be called before the first `prepare`, and when the cards changed."""
        devices = await self._backend.inventory()
        self._devices = {device.uuid: device for device in devices}
        await self._mig.look(devices)
        offered = tuple(self._mig.offered(device) for device in devices)
        self._ledger.update(offered)
        return offered

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
            if adopting and isinstance(partition, MigInstance):
                self._claim(partition)
            fresh = self._ledger.take(key, partition, uid=account.uid, share_domain=share_domain, adopting=adopting)
            if not fresh:
                return self._grants[key]
            maker = self._makers[mode_of(partition)]
            made = False
            try:
                if not adopting:
                    await self._leave_mig(partition)
                grant = await maker.make(key, partition, account)
                made = True
                grant = msgspec.structs.replace(grant, devices=await self._device_files(partition, grant))
                self._backend.hold(key, partition)
            except (PartitionRefused, DeviceTrouble, asyncio.CancelledError):
                if made:
                    await maker.unmake(key, partition, account.uid)
                self._ledger.release(key)
                raise
            self._grants[key] = grant
            return grant

    async def _device_files(self, partition: Partition, grant: PartitionGrant) -> tuple[str, ...] | None:
        """Each once, in the order of the cards. A replica without cards may open none, on a node that has real ones."""
        found: dict[str, None] = {}
        for uuid in devices_of(partition):
            files = await self._backend.device_files(uuid, grant.mig_uuid)
            if files is None:
                return None
            found.update(dict.fromkeys(files))
        return None if self._backend.simulated else tuple(found)

    def _claim(self, partition: MigInstance) -> None:
        """The agent's ledger knows whose it is, also where the records were lost."""
        self._mig.claim(partition)
        device = self._devices.get(partition.device)
        if device is not None:
            self._ledger.update((self._mig.offered(device),))

    async def _leave_mig(self, partition: Partition) -> None:
        """Any other use needs MIG mode off, and it may still be on from before."""
        if isinstance(partition, MigInstance):
            return
        for uuid in devices_of(partition):
            if "mig" in self._devices[uuid].modes and self._ledger.holders(uuid) == 1:
                await self._backend.leave_mig(uuid)

    def running(self, key: AssignmentKey, pid: int) -> None:
        self._backend.running(key, pid)

    async def before_kill(self, key: AssignmentKey, pids: Collection[int]) -> None:
        await self._mps.before_kill(key, pids)

    def listen(self, tell: Callable[[NeighbourFault], None]) -> None:
        self._mps.listen(tell)

    async def watch(self) -> None:
        await self._mps.watch()

    def look_now(self) -> None:
        """A program faulted on a card: `watch` looks at once whether its neighbours are hit."""
        self._mps.look_now()

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

    def note(self, device: DeviceUuid) -> str:
        return self._mig.note(device)

    def index(self, device: DeviceUuid) -> int:
        known = self._devices.get(device)
        return known.index if known is not None else -1

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
