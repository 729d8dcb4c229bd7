"""What the agent asks of a node's cards.

A `DeviceBackend` reads the cards and carries out the changes that the driver itself performs: MIG mode, MIG instances,
compute mode. It knows nothing of jobs, accounts or environments; which partitions may exist side by side is decided by
`gpuyard_agent.partitions`. All methods are coroutines with a deadline of their own, so that a driver that hangs delays
one answer and not the agent.

Two exceptions of the rule "reads only": `hold` and `drop` tell the backend which partitions exist. A real card needs
neither (the driver knows); the simulated one models the card's memory and modes with them, checks them a second time
on its own books, and refuses what a real card could not do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import msgspec

from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.resources import Device, Partition


class NoDriver(Exception):
    """There is no usable GPU driver here; the text says what is missing. The agent then offers its CPUs alone."""


class DeviceTrouble(Exception):
    """The driver refused, failed or did not answer in time. The node goes on; this one request did not succeed."""


class NoAnswer(DeviceTrouble):
    """The driver did not answer in time. What was asked may still happen."""


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
    #: Share of the card's multiprocessors, most of what was seen since this was last asked; None: the driver does not
    #: tell it by process (in MIG mode, under MPS).
    utilization_pct: int | None = None


class MigInstanceFound(msgspec.Struct, frozen=True, kw_only=True):
    """A MIG instance that exists on a card."""

    device: DeviceUuid
    #: What CUDA_VISIBLE_DEVICES takes: `MIG-…`. Neither stable nor fresh over re-creation: read it, never derive it.
    #: "": half an instance, which holds its slices and cannot be used (its making or destroying was cut short).
    mig_uuid: str
    profile: str
    #: First memory slice, and how many.
    start: int
    size: int
    memory_mib: int
    #: Ids of its two halves, for counters and device files; -1: not known. The driver uses them again: no identity.
    gpu_instance: int = -1
    compute_instance: int = -1


class DeviceFault(msgspec.Struct, frozen=True, kw_only=True):
    """A card (or one MIG instance of it) broke under whatever runs there. It takes nothing new until `DeviceRecovered`.

    `lost`: the driver cannot reach it. `xid`: the driver reported an error that no program causes. `ecc`: its memory
    gave an uncorrectable error. `hang`: it does not answer.
    """

    device: DeviceUuid
    kind: Literal["lost", "xid", "ecc", "hang"]
    #: For people.
    detail: str
    #: The one instance that it is about, "" for the whole card.
    mig_uuid: str = ""


class DeviceRecovered(msgspec.Struct, frozen=True, kw_only=True):
    """The card answers again, needs no reset and was quiet for a while: it may be used."""

    device: DeviceUuid


class ApplicationFault(msgspec.Struct, frozen=True, kw_only=True):
    """A program broke its own context on the card. The card is well; under MPS its neighbours have died with it."""

    device: DeviceUuid
    xid: int
    mig_uuid: str = ""


class DevicesChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The inventory is worth reading again: somebody changed a card's MIG instances."""

    device: DeviceUuid


DeviceNews: TypeAlias = DeviceFault | DeviceRecovered | ApplicationFault | DevicesChanged


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

    def listen(self, tell: Callable[[DeviceNews], None]) -> None:
        """From now on `tell` is called, in the loop of `open`, with whatever happens to a card. One listener."""
        ...

    async def driver(self) -> str:
        """The driver's version for people, such as `580.95.05`; `simulated` for modelled cards."""
        ...

    async def limits(self) -> dict[DeviceUuid, tuple[str, ...]]:
        """What is not possible on a card here though it is on others of its kind, each with the reason; for people.
        After `inventory`. Cards without any are left out."""
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
        """Make one instance at an explicit place, switching the card's MIG mode on if it is off and the card empty.
        Raises `PartitionRefused` if it cannot be there, `DeviceTrouble`; then nothing is left of it."""
        ...

    async def destroy_mig(self, device: DeviceUuid, mig_uuid: str) -> None:
        """Undo it; one that is not there is no error. Raises `DeviceTrouble` while a process holds it."""
        ...

    async def destroy_mig_remains(self, device: DeviceUuid, start: int) -> None:
        """Undo half an instance (one without `mig_uuid`) that starts there; nothing there is no error."""
        ...

    async def leave_mig(self, device: DeviceUuid) -> None:
        """MIG mode off, for any other use. No error where it is off. Raises `PartitionRefused` if it must stay on."""
        ...

    async def set_exclusive(self, device: DeviceUuid, on: bool) -> Literal["done", "already", "denied"]:
        """Admit one process alone (under MPS: its server), or anybody again. `already`: it was so before; `denied`:
        this agent may not say so. Raises `DeviceTrouble`."""
        ...

    async def device_files(self, device: DeviceUuid, mig_uuid: str = "") -> tuple[str, ...] | None:
        """What a process must be able to open to use the card, or one MIG instance of it; None: nothing, it is
        modelled. Raises `DeviceTrouble`."""
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
