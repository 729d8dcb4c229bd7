"""A place on a time-sliced card: turns that the agent gives by weight, or the driver's own slices.

By itself the driver divides a card's time evenly between processes that have work, every few milliseconds, without
weights and without limits of memory. With `Places` (the launcher that takes turns) the agent halts all but one, for
seconds, by weight. With a `DriverSlices` it leaves the dividing to the driver and only sets how long its slices are.
Either way memory is counted when placing and not limited: that is what isolation `none` promises, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal, Protocol, TypeAlias

from gpuyard_agent.devices.base import DeviceTrouble
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant, PartitionRefused
from gpuyard_agent.partitions.whole import visible
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import Partition, TimeSliceShare, devices_of

#: As nvidia-smi numbers them.
Slice: TypeAlias = Literal["default", "short", "medium", "long"]
SLICES: tuple[Slice, ...] = ("default", "short", "medium", "long")
_SMI_S = 20.0


class Places(Protocol):
    """Who is told of places on cards."""

    def admit(self, key: AssignmentKey, card: DeviceUuid, weight: int) -> None: ...

    def dismiss(self, key: AssignmentKey) -> None: ...


class DriverSlices:
    """How long the driver's own slices are, by nvidia-smi: no library call does it. Needs root; forgotten when the
    driver is unloaded; not every card can."""

    def __init__(self, length: Slice, program: str = "nvidia-smi") -> None:
        self._length = SLICES.index(length)
        self._program = program
        #: Cards on which it is set.
        self._set: set[DeviceUuid] = set()

    async def ensure(self, card: DeviceUuid) -> None:
        if card in self._set:
            return
        command = (self._program, "compute-policy", "-i", card, f"--set-timeslice={self._length}")
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            raise DeviceTrouble(f"cannot set the slices of {card}: {self._program}: {error.strerror}") from None
        try:
            async with asyncio.timeout(_SMI_S):
                output, _ = await process.communicate()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise DeviceTrouble(f"{self._program} did not answer within {_SMI_S:.0f} s") from None
        if process.returncode != 0:
            said = output.decode(errors="replace").strip().splitlines()
            raise DeviceTrouble(f"cannot set the slices of {card}: {said[-1] if said else process.returncode}")
        self._set.add(card)


class TimeSliceMaker:
    """A place in the turns of one card."""

    def __init__(self, places: Places | None = None, slices: DriverSlices | None = None) -> None:
        """Neither: the driver divides as it was left."""
        self._places = places
        self._slices = slices

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        if not isinstance(partition, TimeSliceShare):
            raise PartitionRefused(f"{key}: not a share of a card's time")
        if self._slices is not None:
            await self._slices.ensure(partition.device)
        if self._places is not None:
            self._places.admit(key, partition.device, partition.share_milli)
        return PartitionGrant(env=visible(devices_of(partition)), mode="timeslice", cards=1)

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        if self._places is not None:
            self._places.dismiss(key)

    async def sweep(self) -> tuple[str, ...]:
        return ()
