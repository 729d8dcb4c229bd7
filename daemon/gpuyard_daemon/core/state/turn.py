"""What one turn of the core puts out.

`Record` is what the journal keeps: facts (what came in, what was decided) in the order in which they change the state.
`orders` and `notices` follow from the facts; they are sent only after the record is durable.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gpuyard_daemon.core.state.facts import Fact
from gpuyard_daemon.core.state.inputs import Cursors
from gpuyard_protocol.jobs import JobEvent, SubmissionAnswer
from gpuyard_protocol.names import NodeId, Tenant
from gpuyard_protocol.nodes import Order

#: Format of a record; older ones stay readable.
RECORD_VERSION = 1


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One journal entry."""

    #: 1, 2, 3, …
    turn: int
    #: The core's time, Unix milliseconds; never smaller than the record's before.
    now_ms: int
    cursors: Cursors
    facts: tuple[Fact, ...]
    v: int = RECORD_VERSION


class NodeOrders(msgspec.Struct, frozen=True, kw_only=True):
    """Orders numbered `first`, `first + 1`, … for one node."""

    node: NodeId
    first: int
    orders: tuple[Order, ...]


class JobNotice(msgspec.Struct, frozen=True):
    """To `evt.<tenant>.<job>`."""

    tenant: Tenant
    event: JobEvent


class AnswerNotice(msgspec.Struct, frozen=True):
    """To `evt.<tenant>.sub.<submission_id>`."""

    tenant: Tenant
    answer: SubmissionAnswer


Notice: TypeAlias = JobNotice | AnswerNotice


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a turn decided. `record` is None when nothing happened: an idle yard appends nothing."""

    record: Record | None
    orders: tuple[NodeOrders, ...] = ()
    notices: tuple[Notice, ...] = ()
    #: The turn stopped at its bound (1,000 starts): call `handle` again at once.
    unfinished: bool = False
    #: Starts, and one more if the turn ended with the proof that nothing (more) of what waits can start. For
    #: measuring alone: a core just restored proves anew what one that went on knows.
    decisions: int = 0
