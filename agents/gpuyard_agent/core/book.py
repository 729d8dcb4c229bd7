"""All that the agent's core knows, and the only place where it is written.

The book holds the assignments that have not ended, the keys of those that have, the counters of orders and reports,
and collects what a turn changes. It knows no rule of an assignment's life (`life`) nor of the order of orders
(`orders`); it keeps these invariants:

- a key is live or closed, never both, and every report that closes a key is made exactly once;
- report numbers are dense; a number, once given, is never used for anything else;
- a port is held by one live assignment at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import msgspec

from gpuyard_agent.core.actions import Action, Turn
from gpuyard_agent.core.model import TRANSITIONS, Assignment, Closed, InvariantViolated, State
from gpuyard_protocol.names import AssignmentKey, DeviceUuid, NodeId
from gpuyard_protocol.nodes import Ended, Inventory, Joined, Report

#: Rendezvous and listening ports given to gangs and services: below the kernel's ephemeral range.
PORTS = range(29_500, 30_000)
#: How long the key of an ended assignment is remembered after its report was delivered, counted up to the newest order
#: taken: a daemon that sends orders while it is this far behind in reading reports does not exist.
CLOSED_KEPT_MS = 600_000


class Counters(msgspec.Struct, kw_only=True):
    """The numbers that must never go back."""

    #: The highest leader's epoch from which anything was taken.
    epoch: int = 0
    #: Orders taken up to this number.
    applied: int = 0
    #: Reports written up to this number.
    reported: int = 0
    #: Reports delivered up to this number.
    delivered: int = 0


class Book:
    """See the module's invariants. `turn` collects the changes of the call of `handle` that is under way."""

    def __init__(
        self,
        node: NodeId,
        instance: str,
        boot_id: str,
        counters: Counters,
        live: Mapping[AssignmentKey, Assignment],
        closed: Mapping[AssignmentKey, Closed],
    ) -> None:
        self.node = node
        self.instance = instance
        self.boot_id = boot_id
        self.counters = counters
        self.live = dict(live)
        self.closed = dict(closed)
        self.turn = Turn()
        #: Clock that counts on while the host sleeps, and stands for nothing after a reboot: deadlines.
        self.now_ms = 0
        #: Wall clock: what reports say.
        self.wall_ms = 0
        #: Node clock from which leases count, and the one that the launcher was last told.
        self.renewed_ms = 0
        self.renewal_told_ms = 0
        #: (epoch, serial) of the newest `Sync` taken. Not in the ledger: another process is another instance.
        self.newest_sync = (0, 0)
        #: What the daemon was last told, and what was read since; equal while nothing has changed.
        self.inventory_told: Inventory | None = None
        self.inventory_read: Inventory | None = None
        #: Cards that broke and have not returned, with what is wrong. Not in the ledger: a new process asks the cards.
        self.broken: dict[DeviceUuid, str] = {}
        #: Number of the newest `Joined`: no second one is queued behind one that is not delivered.
        self.joined_report = 0
        #: (node clock, key) of what time will do, a heap; entries that no longer hold are dropped when they come up.
        self._deadlines: list[tuple[int, AssignmentKey]] = []
        self._last_port = PORTS.stop - 1
        self._ports = {assignment.port for assignment in self.live.values() if assignment.port}
        #: Reports that closed a key and are not known to be delivered, in order: (number, key).
        self._undelivered = sorted(
            (entry.report, key) for key, entry in self.closed.items() if entry.delivered_ms is None
        )

    # --- assignments ---

    def add(self, assignment: Assignment) -> None:
        if assignment.key in self.live or assignment.key in self.closed:
            raise InvariantViolated(f"{assignment.key} is taken a second time")
        if assignment.needs_port:
            assignment.port = self._free_port()
        self.live[assignment.key] = assignment
        self.save(assignment)

    def move(self, assignment: Assignment, to: State) -> None:
        if to not in TRANSITIONS[assignment.state]:
            raise InvariantViolated(f"{assignment.key}: no way from {assignment.state} to {to}")
        assignment.state = to

    def save(self, assignment: Assignment) -> None:
        self.turn.saved[assignment.key] = assignment

    def close(self, key: AssignmentKey, ended: Ended) -> None:
        """The one place where an assignment ends. Without a live one: a tombstone."""
        if key in self.closed:
            raise InvariantViolated(f"{key} ends a second time")
        assignment = self.live.pop(key, None)
        if assignment is not None:
            self._ports.discard(assignment.port)
        number = self.report(ended)
        self.closed[key] = Closed(report=number)
        self._undelivered.append((number, key))
        self.turn.saved.pop(key, None)
        self.turn.closed[key] = number

    def expect(self, assignment: Assignment, at_ms: int) -> None:
        """Time will do something to it then."""
        heapq.heappush(self._deadlines, (at_ms, assignment.key))

    def next_deadline(self, deadline_of: Callable[[Assignment], int]) -> tuple[int, Assignment] | None:
        """The earliest that still holds."""
        while self._deadlines:
            at_ms, key = self._deadlines[0]
            assignment = self.live.get(key)
            if assignment is not None and deadline_of(assignment) == at_ms:
                return at_ms, assignment
            heapq.heappop(self._deadlines)
        return None

    def act(self, action: Action) -> None:
        self.turn.actions.append(action)

    # --- ports ---

    def next_port(self, assignment: Assignment) -> None:
        """Somebody else has its port: take another. `port` is 0 afterwards if none is left."""
        taken = assignment.port
        assignment.port = self._free_port()
        self._ports.discard(taken)

    def _free_port(self) -> int:
        """The next one round the range, so that a port rests before it is used again; 0 when all are held."""
        for step in range(1, len(PORTS) + 1):
            port = PORTS.start + (self._last_port - PORTS.start + step) % len(PORTS)
            if port not in self._ports:
                self._last_port = port
                self._ports.add(port)
                return port
        return 0

    # --- reports ---

    def report(self, report: Report) -> int:
        self.counters.reported += 1
        self.turn.reports.append((self.counters.reported, report))
        return self.counters.reported

    def delivered(self, up_to: int) -> None:
        self.counters.delivered = max(self.counters.delivered, min(up_to, self.counters.reported))
        done = 0
        for number, key in self._undelivered:
            if number > self.counters.delivered:
                break
            done += 1
            if (entry := self.closed.get(key)) is not None:
                entry.delivered_ms = self.now_ms
        del self._undelivered[:done]
        self.tell_inventory()

    def tell_inventory(self, *, at_once: bool = False) -> None:
        """A `Joined` for what the node has now, unless the daemon knows it or one is still on its way. `at_once`: also
        then, since what is reported next is only understood after it."""
        if self.inventory_read is None or self.inventory_read == self.inventory_told:
            return
        if self.joined_report > self.counters.delivered and not at_once:
            return
        self.inventory_told = self.inventory_read
        self.joined_report = self.report(Joined(inventory=self.inventory_read, held=tuple(sorted(self.live))))

    # --- ended keys ---

    def prune(self, keys: list[AssignmentKey]) -> None:
        for key in keys:
            del self.closed[key]
        self.turn.pruned.extend(keys)

    def prune_old(self) -> None:
        """Called when orders are taken. Keys are closed in the order of time, and dicts keep it: cost is what goes."""
        old = []
        for key, entry in self.closed.items():
            if entry.delivered_ms is None or self.now_ms - entry.delivered_ms < CLOSED_KEPT_MS:
                break
            old.append(key)
        self.prune(old)
