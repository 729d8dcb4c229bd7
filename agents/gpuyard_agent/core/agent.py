"""The agent's core: desired against actual, as a function of what happened.

`handle` takes events and returns a `Turn`: what must be durable, what is to be done, what is to be reported. It is
pure: the same state, events and times give the same turn. It knows no clock, process, card, file or connection; the
shell (`gpuyard_agent.runtime`) carries out what it says and tells it what came of that.

Two clocks come in from outside. `now_ms` counts on while the host sleeps and begins anew with each boot; deadlines are
kept in it. `wall_ms` is what reports say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

from gpuyard_agent.core import cards, life, orders, suspension
from gpuyard_agent.core.actions import ForgetProcess, Turn
from gpuyard_agent.core.book import Book, Counters
from gpuyard_agent.core.events import (
    AssignmentEvent,
    CardBroke,
    CardReturned,
    Event,
    InventoryRead,
    MustEnd,
    OrdersReceived,
    PartitionFailed,
    PartitionReady,
    PartitionUndone,
    PortFree,
    PortTaken,
    ProcessBroken,
    ProcessesListed,
    ProcessExited,
    ProcessRefused,
    ProcessResumed,
    ProcessStarted,
    ProcessSuspended,
    RenewalReceived,
    ReportsDelivered,
    ResumeRefused,
    SeenIdle,
    SuspendRefused,
    SyncReceived,
    TimeHalted,
    TimePassed,
    UndoFailed,
)
from gpuyard_agent.core.model import WITH_PROCESS, Assignment, Closed
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import Idle


class AgentCore:
    """One node's assignments. Made from the ledger's content; `ProcessesListed(at_start=True)` is its first event."""

    def __init__(
        self,
        node: NodeId,
        instance: str,
        boot_id: str,
        *,
        counters: Counters | None = None,
        live: Iterable[Assignment] = (),
        closed: Mapping[AssignmentKey, Closed] | None = None,
    ) -> None:
        restored = {assignment.key: life.resumed(assignment) for assignment in live}
        self._book = Book(node, instance, boot_id, counters or Counters(), restored, closed or {})
        for assignment in restored.values():
            if deadline := life.deadline_of(assignment):
                self._book.expect(assignment, deadline)

    # --- reads ---

    @property
    def counters(self) -> Counters:
        return self._book.counters

    @property
    def live(self) -> Mapping[AssignmentKey, Assignment]:
        return self._book.live

    def is_closed(self, key: AssignmentKey) -> bool:
        return key in self._book.closed

    @property
    def running(self) -> int:
        """Assignments with a process."""
        return sum(1 for assignment in self._book.live.values() if assignment.state in WITH_PROCESS)

    def next_deadline_ms(self) -> int | None:
        """When `TimePassed` is due, in the node's clock; None: time changes nothing."""
        due = self._book.next_deadline(life.deadline_of)
        return due[0] if due is not None else None

    # --- the one way in ---

    def handle(self, events: Sequence[Event], now_ms: int, wall_ms: int) -> Turn:
        book = self._book
        book.turn = turn = Turn()
        book.now_ms = max(book.now_ms, now_ms)
        book.renewed_ms = book.renewed_ms or book.now_ms
        book.wall_ms = wall_ms
        for event in events:
            self._handle_one(event)
        return turn

    def _handle_one(self, event: Event) -> None:
        book = self._book
        match event:
            case OrdersReceived():
                orders.take_orders(book, event)
            case SyncReceived():
                orders.take_sync(book, event)
            case RenewalReceived():
                orders.take_renewal(book, event)
            case ProcessesListed():
                life.compare(book, event)
            case InventoryRead(inventory=inventory):
                cards.read(book, inventory)
            case CardBroke():
                cards.broke(book, event)
            case CardReturned(device=device):
                cards.returned(book, device)
            case ReportsDelivered(up_to=up_to):
                book.delivered(up_to)
            case TimePassed():
                self._time_passed()
            case ProcessExited() if event.key not in book.live:
                book.act(ForgetProcess(event.key))
            case _:
                if (assignment := book.live.get(event.key)) is not None:
                    self._handle_assignment(assignment, event)

    def _handle_assignment(self, assignment: Assignment, event: AssignmentEvent) -> None:
        book = self._book
        match event:
            case PartitionReady():
                life.partition_ready(book, assignment)
            case PartitionFailed():
                life.partition_failed(book, assignment, event)
            case PartitionUndone():
                life.partition_undone(book, assignment)
            case UndoFailed():
                life.undo_failed(book, assignment, event)
            case PortFree(port=port):
                life.port_free(book, assignment, port)
            case PortTaken():
                life.port_taken(book, assignment, event)
            case ProcessStarted(pid=pid, at_ms=at_ms):
                life.process_started(book, assignment, pid, at_ms)
            case ProcessRefused():
                life.process_refused(book, assignment, event)
            case ProcessExited():
                life.process_exited(book, assignment, event)
            case ProcessSuspended():
                suspension.suspended(book, assignment, event)
            case SuspendRefused():
                suspension.suspend_refused(book, assignment, event)
            case ProcessResumed():
                suspension.resumed(book, assignment, event)
            case ResumeRefused():
                suspension.resume_refused(book, assignment, event)
            case ProcessBroken():
                suspension.broken(book, assignment, event)
            case TimeHalted(total_ms=total_ms):
                life.time_halted(book, assignment, total_ms)
            case SeenIdle(idle_ms=idle_ms, stage=stage, release_ms=release_ms):
                at_ms = book.wall_ms
                told = Idle(key=event.key, at_ms=at_ms, idle_ms=idle_ms, stage=stage, release_ms=release_ms)
                book.report(told)
            case MustEnd(verdict=verdict, grace_ms=grace_ms):
                life.stop(book, assignment, verdict, grace_ms)
            case _:
                assert_never(event)

    def _time_passed(self) -> None:
        book = self._book
        while (due := book.next_deadline(life.deadline_of)) is not None and due[0] <= book.now_ms:
            life.time_passed(book, due[1])
