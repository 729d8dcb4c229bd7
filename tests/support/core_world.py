"""Nodes as the core sees them, without processes: ledgers that follow desired sets and report what happened.

Each node keeps a ledger of what it was told to run and an outbox of numbered reports. A test decides when a node looks
at its orders, what its replicas do, and which reports arrive, again or late.
"""

from __future__ import annotations

from typing import Any

from gpuyard_daemon.core.state.inputs import NodeReported, NodeReturned
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    Inventory,
    Joined,
    Prepared,
    Report,
    Resume,
    Resumed,
    Started,
    Suspend,
    Suspended,
    SuspendFailed,
)
from support.builders import CoreHarness


class WorldNode:
    """One node: ledger, outbox, and whether its agent lives and is heard."""

    def __init__(self, name: str, inventory: Inventory) -> None:
        self.name = name
        self.inventory = inventory
        self.process = 0
        self.is_up = False
        #: "held" (prepared), "running", "suspended" or "ended".
        self.ledger: dict[AssignmentKey, str] = {}
        #: Every report ever written, in order; a report's number is its position + 1.
        self.outbox: list[Report] = []
        self.delivered = 0
        #: The newest order to suspend or resume that was taken, by replica.
        self.steps: dict[AssignmentKey, int] = {}

    @property
    def instance(self) -> str:
        return f"{self.name}-process-{self.process}"

    def live(self, state: str = "") -> list[AssignmentKey]:
        return sorted(key for key, now in self.ledger.items() if now != "ended" and state in ("", now))


class World:
    """A harness and its nodes."""

    def __init__(self, harness: CoreHarness, inventories: list[Inventory]) -> None:
        self.harness = harness
        self.nodes = {name: WorldNode(name, inv) for inv in inventories if (name := inv.hostname.removeprefix("host-"))}

    # --- agents ---

    def join(self, node: WorldNode) -> None:
        """The agent process starts anew on its old ledger."""
        node.process += 1
        node.is_up = True
        node.outbox.append(Joined(inventory=node.inventory, held=tuple(node.live())))
        self.deliver(node)

    def change_inventory(self, node: WorldNode, inventory: Inventory) -> None:
        node.inventory = inventory
        if node.is_up:
            node.outbox.append(Joined(inventory=inventory, held=tuple(node.live())))
            self.deliver(node)

    def heard_again(self, node: WorldNode) -> None:
        self.harness.turn(NodeReturned(node=node.name, instance=node.instance))

    def sync(self, node: WorldNode) -> None:
        """The node takes in its whole desired set and does what it says."""
        if not node.is_up:
            return
        _, desired = self.harness.core.desired(node.name)
        for wanted in desired:
            self._obey(node, wanted)
        keys = {wanted.start.key for wanted in desired}
        for key in node.live():
            if key not in keys:
                self.end(node, key, "stopped", code="superseded")

    def _obey(self, node: WorldNode, wanted: Desired) -> None:
        key = wanted.start.key
        state = node.ledger.get(key)
        if wanted.stop is not None:
            if state is None:
                node.ledger[key] = "running"
            if state != "ended":
                self.end(node, key, "stopped")
        elif state is None:
            assert all(other[0] != key[0] or other[1] == key[1] for other in node.live()), "two attempts at once"
            node.ledger[key] = "held" if wanted.start.hold else "running"
            if wanted.start.hold:
                node.outbox.append(Prepared(key=key, port=29_500))
            else:
                node.outbox.append(Started(key=key, at_ms=0, port=29_501))
        elif state == "held" and wanted.go is not None:
            node.ledger[key] = "running"
            node.outbox.append(Started(key=key, at_ms=0))
        elif wanted.standing is not None and node.steps.get(key, 0) < wanted.standing.step:
            self._step(node, wanted.standing)

    def _step(self, node: WorldNode, order: Suspend | Resume) -> None:
        """Suspend or resume a replica; some jobs cannot be suspended."""
        key, step = order.key, order.step
        node.steps[key] = step
        if isinstance(order, Resume):
            node.ledger[key] = "running"
            node.outbox.append(Resumed(key=key, step=step, at_ms=0))
        elif key.job % 5 == 0:
            node.outbox.append(SuspendFailed(key=key, step=step, at_ms=0, code="NotSuspendable"))
        else:
            node.ledger[key] = "suspended"
            node.outbox.append(Suspended(key=key, step=step, at_ms=0, image_mib=100))

    def end(
        self, node: WorldNode, key: AssignmentKey, outcome: Any, *, exit_code: int = 0, signal: int = 0, code: str = ""
    ) -> None:
        node.ledger[key] = "ended"
        node.outbox.append(Ended(key=key, outcome=outcome, at_ms=0, exit_code=exit_code, signal=signal, code=code))

    def deliver(self, node: WorldNode, most: int = 1000) -> None:
        """What the core has not seen of the outbox arrives."""
        waiting = node.outbox[node.delivered : node.delivered + most]
        if waiting:
            batch = self.batch(node, node.delivered + 1, waiting)
            node.delivered += len(waiting)
            self.harness.turn(batch)

    def batch(self, node: WorldNode, first: int, reports: list[Report]) -> NodeReported:
        return NodeReported(
            node=node.name, instance=node.instance, boot_id="boot-1", first=first, reports=tuple(reports)
        )

    # --- in the end ---

    def heal(self) -> None:
        """Everything comes up, is heard, and takes in its orders."""
        for node in self.nodes.values():
            self.join(node)

    def finish(self, rounds: int = 400) -> None:
        """Every replica runs and exits well, until nothing lives any more and time brings nothing new."""
        for _ in range(rounds):
            for node in self.nodes.values():
                self.sync(node)
                for key in node.live("running"):
                    self.end(node, key, "exited")
                self.deliver(node)
            core = self.harness.core
            held = [each for space in core.cluster.pool.spaces.values() for each in space.assignments.values()]
            if any(each.home is None for each in held):
                continue
            if not held and not any(job.state == "pending" for job in core.cluster.jobs.values()):
                return
            # Nothing runs: only time can bring something.
            due_ms = core.next_deadline_ms()
            if due_ms is None:
                return
            self.harness.turn(after_ms=max(0, due_ms - self.harness.now_ms))
