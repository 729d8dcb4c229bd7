"""What the operator grants each tenant, as data.

A policy comes from the daemon's configuration and enters the core as an input, so that the journal says which limits a
decision rested on and a standby decides as the leader would. It decides nothing itself; `tenancy` holds usage against
it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.names import Tenant
from gpuyard_protocol.nodes import IdleGpu

#: Sharing of a card; "": of either kind.
Kind: TypeAlias = Literal["", "whole", "shared"]
#: Of jobs whose tenant has no queue.
DEFAULT_QUEUE = "default"


class Grant(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a queue may hold of one class of cards, in thousandths of a card."""

    #: Short name of the model; "": any.
    model: str = ""
    kind: Kind = ""
    nominal_milli: int = 0
    #: Most beyond nominal; -1: as much as others leave.
    borrow_milli: int = -1
    #: Most of nominal that others may hold while it is unused; -1: all of it.
    lend_milli: int = -1


class QueuePolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """One queue of the tree."""

    name: str
    #: The queue above it; "": the yard.
    parent: str = ""
    #: Its part beside the queues beside it: of what others lend, and for fairness.
    weight: int = 1
    #: Takes what nobody else wants, and gives it back to whoever does.
    scavenger: bool = False
    grants: tuple[Grant, ...] = ()
    #: How long its jobs may hold cards that compute nothing; None: as the queue above says, or else each node.
    idle: IdleGpu | None = None


class TenantLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The limits of one tenant; 0 is no limit."""

    #: GPU compute held at once, in thousandths of a card. Soft: what is beyond it waits.
    gpus_max_milli: int = 0
    #: Jobs that have not ended, replicas of services included. Hard: submissions beyond it are rejected.
    jobs_max: int = 0
    #: The queue of its jobs that name none; "": the default queue.
    queue: str = ""
    #: Its part beside other tenants of its queue, for fairness.
    weight: int = 1
    #: Bytes of commands, environments and scripts in jobs that have not ended and in services, there once for each
    #: replica. Hard, like `jobs_max`.
    bytes_max: int = 0


NO_LIMITS = TenantLimits()


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits by tenant. A core that was never told one limits nobody."""

    #: Of every tenant that is not named.
    default: TenantLimits = NO_LIMITS
    #: Of those that are, sorted by name.
    tenants: tuple[tuple[Tenant, TenantLimits], ...] = ()
    #: Sorted by name.
    queues: tuple[QueuePolicy, ...] = ()
    #: How fast models of cards are beside the fastest, in thousandths, sorted by model; one not named is as fast.
    speeds: tuple[tuple[str, int], ...] = ()
