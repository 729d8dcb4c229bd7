"""What facts are made of: their common base, the words they choose from, and where a replica goes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import JobId, NodeId
from gpuyard_protocol.resources import Partition

#: `ready`: takes work. `joining`: known, but its agent has not (yet) joined since the yard started.
NodeState: TypeAlias = Literal["joining", "ready", "suspected", "lost", "incompatible"]
#: What becomes of a job when the last replica of the attempt has ended, whatever ended it.
#: `cancel`: cancelled. `fail`: a failure of its own, which a retry may follow. `abort`: failed, without retry.
#: `requeue`: it waits again, uncharged.
VerdictKind: TypeAlias = Literal["cancel", "fail", "abort", "requeue"]
#: `preempt`: the place is being freed for the job. `reserve`: it is kept until those who hold it have ended.
#: `resize`: an elastic job goes back to these once its attempt, which has another size, has ended.
#: `drain`: kept like `reserve`, on cards of which small instances hold a part only.
ClaimKind: TypeAlias = Literal["preempt", "reserve", "resize", "drain"]
#: Claims to places that nobody was told to leave.
PATIENT_CLAIMS: tuple[ClaimKind, ...] = ("reserve", "drain")
#: `shrink`: an elastic job goes on with fewer replicas.
EvictionKind: TypeAlias = Literal["requeue", "checkpoint", "suspend", "shrink"]


class FactBase(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all facts."""


class Placement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where one replica goes."""

    node: NodeId
    partition: Partition


class Eviction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One who gives way to a claim, and what that costs."""

    job: JobId
    #: How: it is stopped and starts anew, or it is told to save its state first.
    kind: EvictionKind
    #: Run time that it will have to spend again, ms.
    overhead_ms: int
    #: The same over its GPUs, thousandths of a card × ms.
    lost_milli_ms: int
    why: Why
    #: There is room for it elsewhere.
    moved: bool = False
    #: Of one that shrinks: the places that it keeps.
    keeps: tuple[Placement, ...] = ()
