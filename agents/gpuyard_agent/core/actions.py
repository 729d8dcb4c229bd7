"""What the core asks of the shell, and what of its state must be durable first.

A `Turn` is carried out in this order: its changes are written to the ledger in one transaction, and only then its
actions are done, in their order. Each action may be carried out again after a crash: all are idempotent by key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from gpuyard_agent.core.model import Assignment
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Go, Launch, OrderAnswer, Report
from gpuyard_protocol.resources import Partition


@dataclass(frozen=True, slots=True)
class PreparePartition:
    """Answered by `PartitionReady` or `PartitionFailed`."""

    key: AssignmentKey
    partition: Partition
    launch: Launch


@dataclass(frozen=True, slots=True)
class HoldPort:
    """Look whether the port can be bound: `PortFree` or `PortTaken`."""

    key: AssignmentKey
    port: int


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Answered by `ProcessStarted` or `ProcessRefused`."""

    key: AssignmentKey
    launch: Launch
    #: None for a replica that is no member of a gang.
    go: Go | None
    port: int
    #: Node clock from which its lease counts, if it has one.
    renewed_ms: int = 0


@dataclass(frozen=True, slots=True)
class StopProcess:
    """SIGTERM, then SIGKILL after the grace; the end comes as `ProcessExited`."""

    key: AssignmentKey
    grace_ms: int
    #: Of its first process; 0: it is none of ours.
    pid: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class SuspendProcess:
    """Take its work off the card, halt it, and undo its partition; of one that is suspended already: halt it again.
    Answered by `ProcessSuspended`, `SuspendRefused` or `ProcessBroken`, once for each step."""

    key: AssignmentKey
    step: int
    partition: Partition
    #: Its first process.
    pid: int
    #: Of one that is suspended already; else empty and 0.
    gpu_pids: tuple[int, ...] = ()
    image_mib: int = 0
    #: What it may use of the host by itself; 0: no limit.
    memory_limit_mib: int = 0


@dataclass(frozen=True, slots=True)
class ResumeProcess:
    """Make its partition again and put its work back. Answered by `ProcessResumed`, `ResumeRefused` or
    `ProcessBroken`, once for each step."""

    key: AssignmentKey
    step: int
    partition: Partition
    launch: Launch
    pid: int
    gpu_pids: tuple[int, ...]
    image_mib: int


@dataclass(frozen=True, slots=True)
class UndoPartition:
    """Answered by `PartitionUndone` or `UndoFailed`."""

    key: AssignmentKey


@dataclass(frozen=True, slots=True)
class ForgetProcess:
    """Its end is durable in the ledger: the launcher need not remember it."""

    key: AssignmentKey


@dataclass(frozen=True, slots=True)
class RenewLeases:
    """Every lease counts from this time of the node's clock."""

    renewed_ms: int


@dataclass(frozen=True, slots=True)
class Answer:
    """To the orders or the sync with this mark."""

    request: int
    answer: OrderAnswer


Action: TypeAlias = (
    PreparePartition
    | HoldPort
    | StartProcess
    | StopProcess
    | SuspendProcess
    | ResumeProcess
    | UndoPartition
    | ForgetProcess
    | RenewLeases
    | Answer
)


@dataclass(slots=True)
class Turn:
    """The outcome of one call of `handle`."""

    actions: list[Action] = field(default_factory=list)
    #: Assignments whose row has to be written, by key, as they stand at the end of the turn.
    saved: dict[AssignmentKey, Assignment] = field(default_factory=dict)
    #: Assignments that ended: their row goes, their key stays with the number of their `Ended` report.
    closed: dict[AssignmentKey, int] = field(default_factory=dict)
    #: Keys of ended assignments that need not be remembered any more.
    pruned: list[AssignmentKey] = field(default_factory=list)
    #: New reports with their numbers.
    reports: list[tuple[int, Report]] = field(default_factory=list)
    #: Orders were taken, or a leader's epoch.
    orders_taken: bool = False

    @property
    def must_commit(self) -> bool:
        """Something has to be durable before the actions are carried out."""
        return bool(self.saved or self.closed or self.reports or self.orders_taken)
