"""The agent's core under a test: a machine without a shell around it, checked after every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpuyard_agent.core import AgentCore
from gpuyard_agent.core.actions import Action, Answer, PreparePartition, Turn
from gpuyard_agent.core.book import Counters
from gpuyard_agent.core.events import (
    Event,
    OrdersReceived,
    PartitionReady,
    PartitionUndone,
    PortFree,
    ProcessesListed,
    ProcessFound,
    ProcessStarted,
    SyncReceived,
)
from gpuyard_agent.core.model import Assignment, Closed
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Desired, Ended, Go, Order, OrderAnswer, OrderBatch, Report, Start, Sync
from support.agents import start_order

NODE, INSTANCE, BOOT = "node-1", "instance-1", "boot-1"
#: A replica of its own, a member of a gang, and the word for that to go.
START = start_order(1, "true")
KEY = START.key
GANG = start_order(2, "true", replicas=2, hold=True)
GO = Go(key=GANG.key, master_address="10.0.0.1", master_port=29_500)


def prepare(start: Start = START) -> PreparePartition:
    """What an order to start comes to first."""
    return PreparePartition(start.key, start.partition, start.launch)


@dataclass
class Told:
    """What one call brought about."""

    actions: list[Action]
    reports: list[Report]
    turn: Turn

    @property
    def answers(self) -> list[OrderAnswer]:
        return [action.answer for action in self.actions if isinstance(action, Answer)]

    @property
    def others(self) -> list[Action]:
        """Actions but for answers."""
        return [action for action in self.actions if not isinstance(action, Answer)]


@dataclass
class CoreHarness:
    """An `AgentCore`, its clock, and a ledger in memory that holds what its turns made durable."""

    now_ms: int = 1_000_000
    wall_ms: int = 1_700_000_000_000
    epoch: int = 7
    ordered: int = 0
    boot_id: str = BOOT
    #: What the ledger would hold: rows as they were encoded.
    rows: dict[AssignmentKey, bytes] = field(default_factory=dict)
    ended: dict[AssignmentKey, int] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    #: Each process of the agent is one of its own.
    instance: str = INSTANCE
    starts: int = 1
    #: Made so far.
    syncs: int = 0

    def __post_init__(self) -> None:
        self.core = AgentCore(NODE, self.instance, self.boot_id)

    def tell(self, *events: Event) -> Told:
        turn = self.core.handle(events, self.now_ms, self.wall_ms)
        self._make_durable(turn)
        self.check()
        return Told(turn.actions, [report for _, report in turn.reports], turn)

    def _make_durable(self, turn: Turn) -> None:
        for key, assignment in turn.saved.items():
            self.rows[key] = encode(assignment)
        for key, number in turn.closed.items():
            self.rows.pop(key, None)
            assert key not in self.ended
            self.ended[key] = number
        for key in turn.pruned:
            del self.ended[key]
        for number, report in turn.reports:
            assert number == len(self.reports) + 1
            self.reports.append(report)
        if turn.must_commit:
            self.counters = decode(Counters, encode(self.core.counters))

    def check(self) -> None:
        """What holds at any time."""
        live = self.core.live
        assert not live.keys() & self.ended.keys()
        assert self.rows.keys() == live.keys()
        ports = [assignment.port for assignment in live.values() if assignment.port]
        assert len(ports) == len(set(ports))
        ends = [report.key for report in self.reports if isinstance(report, Ended)]
        assert len(ends) == len(set(ends))
        assert self.core.counters.reported == len(self.reports)

    def restart(self, *, boot_id: str = "", found: Sequence[ProcessFound] = ()) -> Told:
        """A new process of the agent on the ledger as it is: only what was durable is known."""
        self.boot_id = boot_id or self.boot_id
        self.starts += 1
        self.instance = f"instance-{self.starts}"
        live = [decode(Assignment, row) for row in self.rows.values()]
        closed = {key: Closed(report=number) for key, number in self.ended.items()}
        self.core = AgentCore(
            NODE,
            self.instance,
            self.boot_id,
            counters=decode(Counters, encode(self.counters)),
            live=live,
            closed=closed,
        )
        return self.tell(ProcessesListed(tuple(found), at_start=True))

    def order(self, *orders: Order) -> Told:
        """The next orders, as the daemon sends them."""
        batch = OrderBatch(node=NODE, instance=self.instance, epoch=self.epoch, first=self.ordered + 1, orders=orders)
        self.ordered += len(orders)
        return self.tell(OrdersReceived(1, batch))

    def sync(self, *desired: Desired, n: int | None = None) -> Told:
        return self.tell(SyncReceived(1, self.next_sync(*desired, n=n)))

    def next_sync(self, *desired: Desired, n: int | None = None) -> Sync:
        self.syncs += 1
        return Sync(
            node=NODE,
            instance=self.instance,
            epoch=self.epoch,
            n=self.ordered if n is None else n,
            desired=desired,
            serial=self.syncs,
        )

    def run(self, start: Start, pid: int = 100) -> None:
        """Up to the running process."""
        self.order(start)
        if assignment_port := self.core.live[start.key].port:
            self.tell(PortFree(start.key, assignment_port))
        self.tell(PartitionReady(start.key))
        self.tell(ProcessStarted(start.key, pid, self.wall_ms))

    def undo(self, key: AssignmentKey) -> Told:
        return self.tell(PartitionUndone(key))

    def state(self, key: AssignmentKey) -> str:
        if key in self.ended:
            return "closed"
        return self.core.live[key].state if key in self.core.live else "unknown"
