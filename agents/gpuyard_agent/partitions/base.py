"""What the agent asks of partitions: make one for an assignment, say how its process finds it, undo it.

A `PartitionMaker` takes the planner's `Partition` as it is and never chooses anything itself. It keeps the rules that
no path may break (one mode per card, memory never over-committed, MPS shares of one card at most 100 %, one share
domain and one account under MPS, MIG placements disjoint), and refuses what breaks them, so that a planner's error is
a refusal and never two jobs on one card.

Its books are in memory. After a restart the agent calls `adopt` for every assignment of its ledger that has not ended,
then `sweep` once: what exists on the cards and belongs to no assignment is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from gpuyard_agent.devices.base import PartitionRefused
from gpuyard_agent.launch.base import Account
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import Device, Mode, Partition

__all__ = ["NeighbourFault", "PartitionGrant", "PartitionMaker", "PartitionRefused"]


class PartitionGrant(msgspec.Struct, frozen=True, kw_only=True):
    """A partition that is ready to be used."""

    #: What its process needs in its environment: CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER, under MPS CUDA_MPS_*.
    env: dict[str, str]
    #: `none` for CPU only; goes into GPUYARD_PARTITION.
    mode: str
    #: Cards it lies on.
    cards: int = 0
    #: The MIG instance, "" for none.
    mig_uuid: str = ""
    #: Device files that its processes must be able to open, and no others of the driver's; None: modelled cards.
    devices: tuple[str, ...] | None = None


class NeighbourFault(msgspec.Struct, frozen=True, kw_only=True):
    """What an assignment shares with others has failed under it, by a fault of one of them or of nobody: it cannot go
    on, and it is not to blame. Its processes are to be ended at once, as those of all its neighbours are."""

    key: AssignmentKey
    #: For people.
    detail: str


class PartitionMaker(Protocol):
    """Makes and undoes partitions on one node's cards. All methods are idempotent by key."""

    async def refresh(self) -> tuple[Device, ...]:
        """Read the inventory anew and return it: once before the first `adopt` or `prepare`, and when it may have
        changed."""
        ...

    async def prepare(
        self, key: AssignmentKey, partition: Partition, account: Account, share_domain: str
    ) -> PartitionGrant:
        """Make it. Again with the same key and partition: the same grant. Raises `PartitionRefused` (the books say no,
        or the key holds another partition) and `DeviceTrouble`; then nothing is left of it.

        `share_domain`: the job's, normally its tenant; shares under MPS meet on a card only inside one.
        """
        ...

    async def adopt(
        self, key: AssignmentKey, partition: Partition, account: Account, share_domain: str
    ) -> PartitionGrant:
        """After an agent restart: take over one that was made before, making again what has vanished meanwhile."""
        ...

    def running(self, key: AssignmentKey, pid: int) -> None:
        """The replica's process runs (pid 0: has ended)."""
        ...

    async def before_kill(self, key: AssignmentKey, pids: Collection[int]) -> None:
        """To be called before a SIGKILL of these processes (the replica's first, or all of them; what they started
        counts too). Under MPS their work on the card is ended in an orderly way: killed amid it, they can take the
        server with them. Takes a few seconds at most and never raises: the SIGKILL comes in any case."""
        ...

    def look_now(self) -> None:
        """Something may have failed under several: `watch` looks at once, not when it is next due."""
        ...

    def listen(self, tell: Callable[[NeighbourFault], None]) -> None:
        """From now on `tell` is called, in the loop, when what assignments share has failed. One listener."""
        ...

    async def watch(self) -> None:
        """Look after what assignments share, for ever; a task for the agent's life."""
        ...

    async def undo(self, key: AssignmentKey) -> None:
        """Free it; to be called when nothing of the process is left. Unknown keys are no error. Raises `DeviceTrouble`
        when the card would not let go: the partition then stays held, and `undo` may be called again."""
        ...

    async def sweep(self) -> tuple[str, ...]:
        """Remove what exists on the cards and nobody holds; returns it in words, for the log."""
        ...

    def held(self) -> tuple[AssignmentKey, ...]:
        """Assignments that hold a partition, sorted."""
        ...

    def note(self, device: DeviceUuid) -> str:
        """What is special about a card and no fault, in words: what others have on it; "" for nothing."""
        ...

    def index(self, device: DeviceUuid) -> int:
        """The card's number as the driver counts now; -1 for a card that is not known."""
        ...

    def modes(self) -> dict[str, Mode]:
        """The mode each card is in now, by device UUID; `idle` for one that nobody holds."""
        ...

    async def close(self) -> None:
        """Let go without undoing anything."""
        ...


class ModeMaker(Protocol):
    """Makes partitions of one mode. Called only with what the books allow, and never for one card twice at a time."""

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        """Make it, or take over what is there already; on an exception nothing of it is left."""
        ...

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        """Undo it; what is not there is no error. Raises `DeviceTrouble` when it would not go."""
        ...

    async def sweep(self) -> tuple[str, ...]:
        """Remove what exists and was not made or taken over by this object; says what, in words."""
        ...
