"""Everything that can happen to the agent's core: facts in the past tense, a closed union.

`request` is the mark of a message that waits for an answer; the core hands it back and reads nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from gpuyard_agent.core.model import Verdict
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import Inventory, OrderBatch, Renew, Sync


@dataclass(frozen=True, slots=True)
class OrdersReceived:
    request: int
    batch: OrderBatch


@dataclass(frozen=True, slots=True)
class SyncReceived:
    request: int
    sync: Sync


@dataclass(frozen=True, slots=True)
class RenewalReceived:
    request: int
    renew: Renew


@dataclass(frozen=True, slots=True)
class PartitionReady:
    key: AssignmentKey


@dataclass(frozen=True, slots=True)
class PartitionFailed:
    """Nothing is left of the attempt to make it."""

    key: AssignmentKey
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class PartitionUndone:
    key: AssignmentKey


@dataclass(frozen=True, slots=True)
class UndoFailed:
    """The card would not let go: the partition stays held, and is to be undone again."""

    key: AssignmentKey
    detail: str


@dataclass(frozen=True, slots=True)
class PortFree:
    """The port proposed by `HoldPort` can be bound."""

    key: AssignmentKey
    port: int


@dataclass(frozen=True, slots=True)
class PortTaken:
    """Somebody outside the yard listens there."""

    key: AssignmentKey
    port: int


@dataclass(frozen=True, slots=True)
class ProcessStarted:
    key: AssignmentKey
    pid: int
    #: Wall time.
    at_ms: int


@dataclass(frozen=True, slots=True)
class ProcessRefused:
    """Nothing was started."""

    key: AssignmentKey
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """The process and its whole tree are gone. With `lost`: nobody saw how."""

    key: AssignmentKey
    exit_code: int = 0
    signal: int = 0
    lost: bool = False
    #: Wall times; 0: not known.
    at_ms: int = 0
    started_ms: int = 0
    detail: str = ""
    #: Its lease had run out.
    expired: bool = False


@dataclass(frozen=True, slots=True)
class ProcessSuspended:
    """Its work lies in the host's memory, its processes are halted, its partition is undone."""

    key: AssignmentKey
    gpu_pids: tuple[int, ...]
    image_mib: int
    took_ms: int


@dataclass(frozen=True, slots=True)
class SuspendRefused:
    """It runs on its card as before."""

    key: AssignmentKey
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class ProcessResumed:
    key: AssignmentKey
    took_ms: int


@dataclass(frozen=True, slots=True)
class ResumeRefused:
    """It is suspended as before."""

    key: AssignmentKey
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class ProcessBroken:
    """It can neither run nor be suspended."""

    key: AssignmentKey
    detail: str


@dataclass(frozen=True, slots=True)
class ProcessFound:
    """One key that the launcher knows."""

    key: AssignmentKey
    pid: int
    at_ms: int
    #: It has ended: its exit is told as an event of its own.
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class ProcessesListed:
    """What the launcher knows, complete: told when the agent starts, and after the launcher was out of reach."""

    found: tuple[ProcessFound, ...]
    #: The agent has just started: what its ledger says is older than what the launcher says.
    at_start: bool = False


@dataclass(frozen=True, slots=True)
class InventoryRead:
    inventory: Inventory


@dataclass(frozen=True, slots=True)
class CardBroke:
    """The card takes nothing new, and what runs there is lost, until `CardReturned`."""

    device: DeviceUuid
    #: For people: what the driver said.
    detail: str
    #: The only assignments that it concerns (one MIG instance broke); None: all that lie on the card.
    only: frozenset[AssignmentKey] | None = None


@dataclass(frozen=True, slots=True)
class CardReturned:
    """It was probed and nothing is wrong with it. An `InventoryRead` follows."""

    device: DeviceUuid


@dataclass(frozen=True, slots=True)
class MustEnd:
    """The shell found a reason why this assignment may not go on, such as memory beyond its partition's."""

    key: AssignmentKey
    verdict: Verdict
    grace_ms: int = 0


@dataclass(frozen=True, slots=True)
class SeenIdle:
    """It has computed nothing on its cards for so long: to be told."""

    key: AssignmentKey
    idle_ms: int
    stage: Literal["warn", "suspend"]
    #: After so long it will be ended; 0: never.
    release_ms: int = 0


@dataclass(frozen=True, slots=True)
class TimeHalted:
    """The replica has been halted for the sake of others on its card: in all for so long, which is not its own time."""

    key: AssignmentKey
    total_ms: int


@dataclass(frozen=True, slots=True)
class ReportsDelivered:
    """Every report up to this number is stored in the reports' stream."""

    up_to: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """A deadline of the core may have come."""


#: About one assignment, of which the key is told.
AssignmentEvent: TypeAlias = (
    PartitionReady
    | PartitionFailed
    | PartitionUndone
    | UndoFailed
    | PortFree
    | PortTaken
    | ProcessStarted
    | ProcessRefused
    | ProcessExited
    | ProcessSuspended
    | SuspendRefused
    | ProcessResumed
    | ResumeRefused
    | ProcessBroken
    | MustEnd
    | SeenIdle
    | TimeHalted
)
Event: TypeAlias = (
    AssignmentEvent
    | OrdersReceived
    | SyncReceived
    | RenewalReceived
    | ProcessesListed
    | InventoryRead
    | CardBroke
    | CardReturned
    | ReportsDelivered
    | TimePassed
)
