"""What is free on a node, kept up to date as assignments come and go, and what is held in the whole yard.

Derived state: rebuilt from inventories and assignments on restore. A `NodeSpace` can be copied to try a plan on; the
copy is thrown away whether or not the plan is carried out.

The pool lists the nodes whose space or state changed, in order. Whoever keeps findings about nodes (the candidates of
placement) reads on from where it stopped, so that a change costs work in proportion to itself.
"""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.model import Assignment, Node
from gpuyard_daemon.core.partitions import Card
from gpuyard_daemon.core.states import InvariantViolated
from gpuyard_protocol.names import AssignmentKey, NodeId, Tenant
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import MODES, Device, Mode, Partition, devices_of
from gpuyard_protocol.units import MILLI

#: Every mode, "idle" standing for work that needs no card.
ANY_MODE: tuple[Mode, ...] = ("idle", *MODES)


class NodeSpace:
    """Free CPU, memory and cards of one node."""

    __slots__ = (
        "assignments",
        "by_uuid",
        "cards",
        "cpu_free_milli",
        "idle_cards",
        "inventory_version",
        "is_imagined",
        "memory_free_mib",
        "modes",
        "node",
        "version",
    )

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cards: list[Card] = []
        self.by_uuid: dict[str, Card] = {}
        #: May be below 0 after a node came back with less than it had.
        self.cpu_free_milli = 0
        self.memory_free_mib = 0
        #: Cards that are not cut and take work.
        self.idle_cards = 0
        #: Modes the node may be asked for now: all but those it is left alone for.
        self.modes: tuple[Mode, ...] = ANY_MODE
        #: An empty copy, up and healthy whatever the node is now.
        self.is_imagined = False
        #: Live assignments on this node.
        self.assignments: dict[AssignmentKey, Assignment] = {}
        #: Grow with every change of the space, and of the inventory.
        self.version = 0
        self.inventory_version = 0

    def copy(self, *, empty: bool = False) -> NodeSpace:
        """For trials. `empty`: as the node would be without any work, to see what could ever run there."""
        twin = NodeSpace.__new__(NodeSpace)
        twin.node, twin.version, twin.inventory_version, twin.assignments = (
            self.node, self.version, self.inventory_version, {},
        )  # fmt: skip
        twin.is_imagined = empty
        if empty:
            twin.cards = [Card(_healthy(card.device), card.position) for card in self.cards if card.present]
            inventory = self.node.inventory
            twin.cpu_free_milli = inventory.cpu_milli if inventory else 0
            twin.memory_free_mib = inventory.memory_mib if inventory else 0
            twin.modes = ANY_MODE
        else:
            twin.cards = [card.copy() for card in self.cards]
            twin.cpu_free_milli, twin.memory_free_mib, twin.modes = (
                self.cpu_free_milli, self.memory_free_mib, self.modes,
            )  # fmt: skip
        twin.by_uuid = {card.device.uuid: card for card in twin.cards}
        twin.idle_cards = _count_idle(twin.cards)
        return twin

    def take(self, key: AssignmentKey, partition: Partition, tenant: Tenant, cpu_milli: int, memory_mib: int) -> None:
        self.cpu_free_milli -= cpu_milli
        self.memory_free_mib -= memory_mib
        for uuid in devices_of(partition):
            card = self.by_uuid[uuid]
            if card.mode == "idle" and card.takes_work:
                self.idle_cards -= 1
            card.take(key, partition, tenant)

    def give(self, key: AssignmentKey, partition: Partition, cpu_milli: int, memory_mib: int) -> None:
        self.cpu_free_milli += cpu_milli
        self.memory_free_mib += memory_mib
        for uuid in devices_of(partition):
            card = self.by_uuid[uuid]
            card.give(key)
            if card.mode == "idle" and card.takes_work:
                self.idle_cards += 1

    def refit(self) -> None:
        """Make cards and totals follow the node's inventory; what is held stays held."""
        node, inventory = self.node, self.node.inventory
        if inventory is None:
            return
        held = {uuid: card for uuid, card in self.by_uuid.items() if card.held}
        devices = [(device, True) for device in inventory.devices]
        devices += [(device, False) for device in node.absent]
        before = self.cards
        self.cards = []
        for position, (device, present) in enumerate(devices):
            card = Card(device, position, present=present)
            if old := held.get(device.uuid):
                _carry_over(old, card)
            self.cards.append(card)
        self.by_uuid = {card.device.uuid: card for card in self.cards}
        missing = [card.device.uuid for card in before if card.held and card.device.uuid not in self.by_uuid]
        if missing:
            raise InvariantViolated(f"node {node.id}: cards {missing} vanished under their jobs")
        self.idle_cards = _count_idle(self.cards)
        self.inventory_version += 1

    def set_totals(self, inventory: Inventory, cpu_held_milli: int, memory_held_mib: int) -> None:
        self.cpu_free_milli = inventory.cpu_milli - cpu_held_milli
        self.memory_free_mib = inventory.memory_mib - memory_held_mib


def _healthy(device: Device) -> Device:
    return device if device.healthy else msgspec.structs.replace(device, healthy=True, fault="")


def _carry_over(old: Card, new: Card) -> None:
    new.held, new.mode, new.domain, new.milli, new.memory_mib = (
        old.held, old.mode, old.domain, old.milli, old.memory_mib,
    )  # fmt: skip
    new.clients, new.mask, new.profile_counts = old.clients, old.mask, old.profile_counts


def _count_idle(cards: list[Card]) -> int:
    return sum(1 for card in cards if card.mode == "idle" and card.takes_work)


class Pool:
    """The spaces of all nodes, and the yard's sums over them."""

    __slots__ = ("_changes", "_dropped", "_since", "capacity_milli", "held_milli", "inventory_version", "spaces")

    def __init__(self) -> None:
        #: In the order in which the nodes were first heard of.
        self.spaces: dict[NodeId, NodeSpace] = {}
        #: Spaces that changed, oldest first; the first `_dropped` ever entered are gone.
        self._changes: list[NodeSpace] = []
        self._dropped = 0
        #: The last answer of `changed_since`: (from, to, spaces). Many shapes ask the same.
        self._since: tuple[int, int, list[NodeSpace]] = (0, 0, [])
        #: GPU compute held by jobs (a card counts at most once, however over-subscribed), and present.
        self.held_milli = 0
        self.capacity_milli = 0
        #: Grows when any node's inventory changes.
        self.inventory_version = 0

    def add(self, node: Node) -> NodeSpace:
        space = self.spaces[node.id] = NodeSpace(node)
        return space

    def touch(self, space: NodeSpace) -> None:
        """Enter that a space or its node's state changed."""
        space.version += 1
        self._changes.append(space)
        if len(self._changes) > 4096 + 4 * len(self.spaces):
            half = len(self._changes) // 2
            del self._changes[:half]
            self._dropped += half

    @property
    def changes_made(self) -> int:
        """How many changes there have been; where a reader who knows the present stands."""
        return self._dropped + len(self._changes)

    def changed_since(self, point: int) -> list[NodeSpace] | None:
        """Each space that changed after a point, once; None if that is not known, or no fewer than all."""
        made = self.changes_made
        if point < self._dropped or made - point > len(self.spaces):
            return None
        if self._since[:2] != (point, made):
            self._since = (point, made, list(dict.fromkeys(self._changes[point - self._dropped :])))
        return self._since[2]

    def take(self, space: NodeSpace, assignment: Assignment, tenant: Tenant, cpu_milli: int, memory_mib: int) -> None:
        self.held_milli -= _held(space, assignment.partition)
        space.take(assignment.key, assignment.partition, tenant, cpu_milli, memory_mib)
        self.held_milli += _held(space, assignment.partition)
        space.assignments[assignment.key] = assignment
        self.touch(space)

    def give(self, space: NodeSpace, assignment: Assignment, cpu_milli: int, memory_mib: int) -> None:
        self.held_milli -= _held(space, assignment.partition)
        space.give(assignment.key, assignment.partition, cpu_milli, memory_mib)
        self.held_milli += _held(space, assignment.partition)
        del space.assignments[assignment.key]
        self.touch(space)

    def refit(self, space: NodeSpace, cpu_held_milli: int, memory_held_mib: int) -> None:
        self.capacity_milli -= _capacity(space)
        space.refit()
        if space.node.inventory is not None:
            space.set_totals(space.node.inventory, cpu_held_milli, memory_held_mib)
        self.capacity_milli += _capacity(space)
        self.inventory_version += 1
        self.touch(space)


def _held(space: NodeSpace, partition: Partition) -> int:
    """Compute held on the cards a partition is on."""
    return sum(min(MILLI, space.by_uuid[uuid].milli) for uuid in devices_of(partition))


def _capacity(space: NodeSpace) -> int:
    return MILLI * sum(1 for card in space.cards if card.present)
