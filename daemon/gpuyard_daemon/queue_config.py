"""Queues of the quota tree in the daemon's configuration: `[queues.<name>]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from gpuyard_daemon.core.tenants.policy import Grant, Kind, QueuePolicy
from gpuyard_protocol.names import NAME_EXPECTED, is_name
from gpuyard_protocol.nodes import IdleGpu
from gpuyard_protocol.units import Duration, GpuAmount

WEIGHT_MAX = 1000
#: Every start asks all queues above its own.
DEPTH_MAX = 8
#: (key, what stood there, what is allowed)
Problem: TypeAlias = tuple[str, str, str]


class GrantConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a queue may hold of some cards: an entry of `grants`."""

    #: Short name of the model, such as H100; unset: any.
    model: str = ""
    #: `whole` cards, `shared` ones, or unset: both.
    kind: Kind = ""
    #: GPUs, fractions allowed, that are the queue's own.
    nominal: GpuAmount
    #: Most beyond that; unset: as many as others leave.
    borrow: GpuAmount | None = None
    #: Most of its own that others may hold while it does not use them; unset: all.
    lend: GpuAmount | None = None


class QueueConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A queue of the quota tree."""

    #: The queue above it; unset: the yard.
    parent: str = ""
    #: Its part beside the queues beside it, of what others lend and for fairness, 1 to 1000.
    weight: int = 1
    #: Takes what nobody else wants, and gives it back to whoever does.
    scavenger: bool = False
    grants: tuple[GrantConfig, ...] = ()
    #: How long its jobs may hold cards that compute nothing: before a warning, before they may be suspended, before
    #: they end with `IdleGpu`; "0s": never. All unset: as the queue above says, or else each node.
    idle_gpu_warn: Duration | None = None
    idle_gpu_suspend: Duration | None = None
    idle_gpu_release: Duration | None = None

    def idle(self) -> IdleGpu | None:
        times = self.idle_gpu_warn, self.idle_gpu_suspend, self.idle_gpu_release
        if all(each is None for each in times):
            return None
        warn_ms, suspend_ms, release_ms = (int(each or 0) for each in times)
        return IdleGpu(warn_ms=warn_ms, suspend_ms=suspend_ms, release_ms=release_ms)


def queue_policies(queues: Mapping[str, QueueConfig]) -> tuple[QueuePolicy, ...]:
    """The tree as the core takes it."""
    return tuple(
        [
            QueuePolicy(
                name=name,
                parent=table.parent,
                weight=table.weight,
                scavenger=table.scavenger,
                idle=table.idle(),
                grants=tuple(
                    [
                        Grant(
                            model=grant.model,
                            kind=grant.kind,
                            nominal_milli=int(grant.nominal),
                            borrow_milli=-1 if grant.borrow is None else int(grant.borrow),
                            lend_milli=-1 if grant.lend is None else int(grant.lend),
                        )
                        for grant in table.grants
                    ]
                ),
            )
            for name, table in sorted(queues.items())
        ]
    )


def problem_of(queues: Mapping[str, QueueConfig]) -> Problem | None:
    """The first thing wrong with a tree; None: nothing is."""
    for name, table in queues.items():
        if not is_name(name):
            return f"queues.{name}", name, NAME_EXPECTED
        if not 1 <= table.weight <= WEIGHT_MAX:
            return f"queues.{name}.weight", str(table.weight), f"a number between 1 and {WEIGHT_MAX}"
        if problem := _parents_problem(queues, name) or _grants_problem(name, table):
            return problem
    return None


def _parents_problem(queues: Mapping[str, QueueConfig], name: str) -> Problem | None:
    key, parent = f"queues.{name}.parent", queues[name].parent
    above = [name]
    while parent:
        if parent not in queues:
            return key, parent, f"one of {', '.join(sorted(queues))}"
        if parent in above:
            return key, queues[name].parent, "a queue that does not stand below this one"
        above.append(parent)
        parent = queues[parent].parent
    if len(above) > DEPTH_MAX:
        return key, queues[name].parent, f"at most {DEPTH_MAX} queues above each other"
    return None


def _grants_problem(name: str, table: QueueConfig) -> Problem | None:
    key = f"queues.{name}.grants"
    classes = [(grant.model, grant.kind) for grant in table.grants]
    if len(set(classes)) != len(classes):
        return key, "two for the same cards", "one for each model and kind"
    for grant in table.grants:
        if grant.lend is not None and grant.lend > grant.nominal:
            return f"{key}.lend", str(grant.lend), f"at most {grant.nominal}, what is the queue's own"
    return None
