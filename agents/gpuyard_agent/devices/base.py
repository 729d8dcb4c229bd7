"""What the agent asks of a node's cards.

A `DeviceBackend` reads the cards and carries out the one change of their shape that the driver itself performs: MIG
instances. It knows nothing of jobs, accounts or environments; which partitions may exist side by side is decided by
`gpuyard_agent.partitions`. All methods are coroutines with a deadline of their own, so that a driver that hangs delays
one answer and not the agent.

Two exceptions of the rule "reads only": `hold` and `drop` tell the backend which partitions exist. A real card needs
neither (the driver knows); the simulated one models the card's memory and modes with them, checks them a second time
on its own books, and refuses what a real card could not do.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.resources import Device, Partition


class NoDriver(Exception):
    """There is no usable GPU driver here; the text says what is missing. The agent then offers its CPUs alone."""


class DeviceTrouble(Exception):
    """The driver refused, failed or did not answer in time. The node goes on; this one request did not succeed."""


class PartitionRefused(Exception):
    """This partition cannot exist now: a card is not there, is in another mode, or has too little left.

    The order that asked for it was wrong about the card, so the agent reports `Ended` with outcome `refused` and this
    class's `code`.
    """

    code = "PartitionUnavailable"


class DeviceProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process that the driver sees on a card."""

    device: DeviceUuid
    pid: int
    #: None: the driver does not say.
    memory_mib: int | None = None
    #: The MIG instance it runs in, "" for the whole card.
    mig_uuid: str = ""


class MigInstanceFound(msgspec.Struct, frozen=True, kw_only=True):
    """A MIG instance that exists on a card."""

    device: DeviceUuid
    #: What CUDA_VISIBLE_DEVICES takes: `MIG-…`. Neither stable nor fresh over re-creation: read it, never derive it.
    mig_uuid: str
    profile: str
    #: First memory slice, and how many.
    start: int
    size: int
    memory_mib: int


class DeviceBackend(Protocol):
    """The cards of one node."""

    #: Modelled cards: partitions need no real driver, control daemon or device node.
    @property
    def simulated(self) -> bool: ...

    async def open(self) -> None:
        """Connect to the driver once, for the agent's life. Raises `NoDriver`."""
        ...

    async def close(self) -> None:
        """Let go of the driver. Partitions and processes stay as they are."""
        ...

    async def driver(self) -> str:
        """The driver's version for people, such as `580.95.05`; `simulated` for modelled cards."""
        ...

    async def inventory(self) -> tuple[Device, ...]:
        """Every card known since `open`, by index. One that is gone stays listed: `healthy` false, and its fault."""
        ...

    async def samples(self) -> tuple[DeviceSample, ...]:
        """Each card now; a figure the card does not give is None. Never raises for one card's trouble."""
        ...

    async def processes(self, device: DeviceUuid) -> tuple[DeviceProcess, ...]:
        """Processes with memory on the card (also inside its MIG instances). Raises `DeviceTrouble`."""
        ...

    async def mig_instances(self, device: DeviceUuid) -> tuple[MigInstanceFound, ...]:
        """MIG instances that exist on the card, by start; empty where it is not in MIG mode."""
        ...

    async def create_mig(self, device: DeviceUuid, profile: str, start: int) -> MigInstanceFound:
        """Make one instance at an explicit place. Raises `PartitionRefused` if it cannot be there, `DeviceTrouble`."""
        ...

    async def destroy_mig(self, device: DeviceUuid, mig_uuid: str) -> None:
        """Undo it; one that is not there is no error. Raises `DeviceTrouble` while a process holds it."""
        ...

    def hold(self, key: AssignmentKey, partition: Partition) -> None:
        """This partition now exists. Modelled cards check it on their own books and raise `PartitionRefused`."""
        ...

    def running(self, key: AssignmentKey, pid: int) -> None:
        """A live process uses the partition (pid 0: no longer): what modelled utilisation and memory rest on."""
        ...

    def drop(self, key: AssignmentKey) -> None:
        """This partition no longer exists. Unknown keys are no error."""
        ...
