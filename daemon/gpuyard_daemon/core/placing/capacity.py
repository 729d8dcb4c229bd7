"""What is free on a node, kept up to date as assignments come and go, and what is held in the whole yard.

Derived state: rebuilt from inventories and assignments on restore. A `NodeSpace` can be copied to try a plan on; the
copy is thrown away whether or not the plan is carried out.

The pool lists the nodes whose space or state changed, in order. Whoever keeps findings about nodes (the candidates of
placement) reads on from where it stopped, so that a change costs work in proportion to itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from gpuyard_daemon.core.placing.claimed import Freed, claim_on
from gpuyard_daemon.core.placing.partitions import Card
from gpuyard_daemon.core.placing.topology import Wiring, rack_of, wiring_of
from gpuyard_daemon.core.state.model import LEAVING, Assignment, Node
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.names import AssignmentKey, JobId, NodeId, Tenant
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import MODES, Device, Mode, Partition, TimeSliceShare, WholeCards, Within, devices_of
from gpuyard_protocol.units import MILLI

#: Every mode, "idle" standing for work that needs no card.
ANY_MODE: tuple[Mode, ...] = ("idle", *MODES)


Groups: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
#: Kind, free CPU and memory, modes, looks of the cards by their numbers, what else the node is left alone for.
Condition: TypeAlias = tuple[int, int, int, tuple[Mode, ...], tuple[int, ...], tuple[str, ...]]
#: Of a card that more may go on, with all that look like it on a node: the look's number, whose it is, its position,
#: and the card.
Face: TypeAlias = tuple[int, Tenant, int, Card]
#: What a demand mix makes of a node: room on each card, idle compute, what each demand could use of it, and the waste.
Measure: TypeAlias = tuple[list[int], int, Sequence[int], int]
#: Kinds of node met so far: numbers that mean nothing but equality.
_KINDS: dict[tuple[object, ...], int] = {}


class ClaimedPlace(NamedTuple):
    """What is kept on a node for a job that does not hold it yet: nobody else may take it once it is free."""

    job: JobId
    tenant: Tenant
    partition: Partition
    cpu_milli: int
    memory_mib: int
    #: Others were told to go for it: once they have left, it is to be had.
    is_firm: bool = False


class NodeSpace:
    """Free CPU, memory and cards of one node."""

    __slots__ = (
        "_beside",
        "_faces",
        "accounts",
        "amounts",
        "assignments",
        "by_uuid",
        "cards",
        "claims",
        "condition_number",
        "cpu_free_milli",
        "domains",
        "idle_cards",
        "inventory_version",
        "is_imagined",
        "kind",
        "measured",
        "memory_free_mib",
        "modes",
        "node",
        "number",
        "shut",
        "version",
        "wiring",
    )

    def __init__(self, node: Node) -> None:
        self.node = node
        #: The node's, which never changes.
        self.number = node.number
        self.cards: list[Card] = []
        self.by_uuid: dict[str, Card] = {}
        #: May be below 0 after a node came back with less than it had.
        self.cpu_free_milli = 0
        self.memory_free_mib = 0
        #: Cards that are not cut and take work.
        self.idle_cards = 0
        #: Modes the node may be asked for now: all but those it is left alone for.
        self.modes: tuple[Mode, ...] = ANY_MODE
        #: What else it is left alone for: `CONTAINERS`, and whom it had no account for (`account_of`).
        self.shut: tuple[str, ...] = ()
        #: An empty copy, up and healthy whatever the node is now.
        self.is_imagined = False
        #: Live assignments on this node.
        self.assignments: dict[AssignmentKey, Assignment] = {}
        #: CPU and memory that each of them holds.
        self.amounts: dict[AssignmentKey, tuple[int, int]] = {}
        #: Kept for jobs that wait until others have gone.
        self.claims: list[ClaimedPlace] = []
        #: The last answer of `beside_claims`: (version, for whom, the twin).
        self._beside: tuple[int, JobId, NodeSpace] | None = None
        #: The last answer of `faces`, with the version.
        self._faces: tuple[int, list[Face]] | None = None
        #: What `scoring` last found out about it: (the mix, version, the rest).
        self.measured: tuple[object, int, Measure] | None = None
        #: How its cards are linked, where that differs between them.
        self.wiring: Wiring | None = None
        #: The pool's number of the space's condition; below 0: to be found.
        self.condition_number = -1
        #: Whom the node has accounts for, as patterns.
        self.accounts: tuple[str, ...] = ()
        #: Share domains that have cards of their own here.
        self.domains: set[Tenant] = set()
        #: Equal for nodes whose inventories differ in nothing but names.
        self.kind = -1
        #: Grow with every change of the space, and of the inventory.
        self.version = 0
        self.inventory_version = 0

    def copy(self, *, empty: bool = False, with_holders: bool = False) -> NodeSpace:
        """For trials. `empty`: as the node would be without any work, to see what could ever run there.
        `with_holders`: who holds what comes along, so that it can be given back in the trial.
        """
        twin = NodeSpace.__new__(NodeSpace)
        twin.node, twin.number, twin.version, twin.inventory_version = (
            self.node, self.number, self.version, self.inventory_version,
        )  # fmt: skip
        twin._beside = twin._faces = twin.measured = None
        twin.assignments = dict(self.assignments) if with_holders else {}
        twin.amounts = dict(self.amounts) if with_holders else {}
        twin.claims = [] if empty else list(self.claims)
        twin.is_imagined = empty
        twin.wiring, twin.kind, twin.domains, twin.condition_number = self.wiring, self.kind, self.domains, -1
        twin.accounts = self.accounts
        if empty:
            twin.cards = [Card(_healthy(card.device), card.position) for card in self.cards if card.present]
            inventory = self.node.inventory
            twin.cpu_free_milli = inventory.cpu_milli if inventory else 0
            twin.memory_free_mib = inventory.memory_mib if inventory else 0
            twin.modes, twin.shut = ANY_MODE, ()
        else:
            twin.cards = [card.copy(with_holders=with_holders) for card in self.cards]
            twin.cpu_free_milli, twin.memory_free_mib, twin.modes, twin.shut = (
                self.cpu_free_milli, self.memory_free_mib, self.modes, self.shut,
            )  # fmt: skip
        twin.by_uuid = {card.device.uuid: card for card in twin.cards}
        twin.idle_cards = _count_idle(twin.cards)
        return twin

    def beside_claims(self, owner: JobId = 0) -> NodeSpace:
        """The space as everybody but the owner of a claim may use it: itself where nothing is claimed."""
        if not self.claims or all(claim.job == owner for claim in self.claims):
            return self
        known = self._beside
        if known is None or known[:2] != (self.version, owner):
            known = self._beside = (self.version, owner, self._without_claimed(owner))
        return known[2]

    def _without_claimed(self, owner: JobId) -> NodeSpace:
        """A claim takes what its victims will free first, and of what is free only the rest."""
        twin = self.copy()
        twin.claims = []
        claims = [claim for claim in self.claims if claim.job != owner]
        leaving = [key for key, each in self.assignments.items() if key in self.amounts and each.state in LEAVING]
        cpu = sum([self.amounts[key][0] for key in leaving])
        memory = sum([self.amounts[key][1] for key in leaving])
        counted = set(leaving)
        freed: dict[str, Freed] = {}
        for claim in claims:
            awaited = self._awaited(claim.partition, counted)
            counted.update(awaited)
            cpu -= max(0, claim.cpu_milli - sum([self.amounts[key][0] for key in awaited]))
            memory -= max(0, claim.memory_mib - sum([self.amounts[key][1] for key in awaited]))
            gone = [*leaving, *awaited]
            for uuid in devices_of(claim.partition):
                if uuid in twin.by_uuid:
                    left = freed.setdefault(uuid, Freed())
                    claim_on(twin.by_uuid[uuid], self.by_uuid[uuid], claim.partition, claim.tenant, gone, left)
        twin.cpu_free_milli += min(0, cpu)
        twin.memory_free_mib += min(0, memory)
        twin.idle_cards = _count_idle(twin.cards)
        return twin

    def _awaited(self, partition: Partition, counted: set[AssignmentKey]) -> list[AssignmentKey]:
        """Who holds a card that is claimed whole and is not told to go: it will have left with its CPUs and memory,
        for that claim alone."""
        if not isinstance(partition, WholeCards):
            return []
        cards = [card for uuid in partition.devices if (card := self.by_uuid.get(uuid)) is not None]
        return sorted({key for card in cards for key in card.held if key in self.amounts and key not in counted})

    @property
    def faces(self) -> list[Face]:
        """The cards that more may go on, one of each look and owner, the first: what goes on it goes on the others."""
        known = self._faces
        if known is None or known[0] != self.version:
            found: dict[tuple[int, Tenant], Face] = {}
            for card in self.cards:
                if card.mode != "whole" and card.takes_work:
                    key = card.look_number, card.domain
                    if key not in found:
                        found[key] = (*key, card.position, card)
            known = self._faces = (self.version, list(found.values()))
        return known[1]

    def take(self, key: AssignmentKey, partition: Partition, tenant: Tenant, cpu_milli: int, memory_mib: int) -> None:
        self.amounts[key] = (cpu_milli, memory_mib)
        self._beside = self._faces = self.measured = None
        self.cpu_free_milli -= cpu_milli
        self.memory_free_mib -= memory_mib
        for uuid in devices_of(partition):
            card = self.by_uuid[uuid]
            if card.mode == "idle" and card.takes_work:
                self.idle_cards -= 1
            card.take(key, partition, tenant)

    def give(self, key: AssignmentKey, partition: Partition) -> None:
        cpu_milli, memory_mib = self.amounts.pop(key)
        self._beside = self._faces = self.measured = None
        self.cpu_free_milli += cpu_milli
        self.memory_free_mib += memory_mib
        for uuid in devices_of(partition):
            card = self.by_uuid[uuid]
            card.give(key)
            if card.mode == "idle" and card.takes_work:
                self.idle_cards += 1

    def hold(self, key: AssignmentKey, cpu_milli: int, memory_mib: int) -> None:
        """From now on it holds so much of the host itself; its cards stay as they are."""
        before_cpu, before_memory = self.amounts[key]
        self.amounts[key] = (cpu_milli, memory_mib)
        self._beside = self.measured = None
        self.cpu_free_milli += before_cpu - cpu_milli
        self.memory_free_mib += before_memory - memory_mib

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
            if (past := node.pasts.get(device.uuid)) is not None:
                card.recall(in_mig=past.in_mig, keeps_mode=past.keeps_mode_until_ms > 0)
            self.cards.append(card)
        self.by_uuid = {card.device.uuid: card for card in self.cards}
        missing = [card.device.uuid for card in before if card.held and card.device.uuid not in self.by_uuid]
        if missing:
            raise InvariantViolated(f"node {node.id}: cards {missing} vanished under their jobs")
        self.idle_cards = _count_idle(self.cards)
        self.wiring = wiring_of([card.device for card in self.cards])
        self.kind = self._kind(inventory)
        self.inventory_version += 1

    def _kind(self, inventory: Inventory) -> int:
        cards = tuple([(card.kind, card.present) for card in self.cards])
        plain = msgspec.structs.replace(
            inventory, hostname="", address="", devices=(), interfaces=(), rdma=(), driver="", agent_version=""
        )
        key = (plain, cards, self.wiring)
        return _KINDS.setdefault(key, len(_KINDS))

    @property
    def condition(self) -> Condition:
        """All that decides what goes on the node and how well; equal for nodes that differ in nothing but names.

        Whose a shared card is does not stand in it.
        """
        looks = [card.look_number for card in self.cards]
        if self.wiring is None:
            looks.sort()
        takes_work = self.node.state == "ready" and not self.node.cordoned_by
        modes = self.modes if takes_work or self.is_imagined else ()
        return self.kind, self.cpu_free_milli, self.memory_free_mib, modes, tuple(looks), self.shut

    def set_totals(self, inventory: Inventory, cpu_held_milli: int, memory_held_mib: int) -> None:
        self.cpu_free_milli = inventory.cpu_milli - cpu_held_milli
        self.memory_free_mib = inventory.memory_mib - memory_held_mib


def _healthy(device: Device) -> Device:
    return device if device.healthy else msgspec.structs.replace(device, healthy=True, fault="")


def _carry_over(old: Card, new: Card) -> None:
    new.held, new.mode, new.domain, new.milli, new.memory_mib = (
        old.held, old.mode, old.domain, old.milli, old.memory_mib,
    )  # fmt: skip
    new.clients, new.profile_counts, new.loads = old.clients, old.profile_counts, old.loads
    new.mask = old.mask & ~old.foreign | new.foreign
    new.changed()


def _count_idle(cards: list[Card]) -> int:
    return sum(1 for card in cards if card.mode == "idle" and card.takes_work)


class ChangeLog:
    """Spaces that changed, in order, for readers who go on from where they stopped."""

    __slots__ = ("_changes", "_dropped", "_since")

    def __init__(self) -> None:
        #: Oldest first; the first `_dropped` ever entered are gone.
        self._changes: list[NodeSpace] = []
        self._dropped = 0
        #: The last answer of `since`: (from, to, spaces). Many readers ask the same.
        self._since: tuple[int, int, list[NodeSpace]] = (0, 0, [])

    def add(self, space: NodeSpace, most: int) -> None:
        self._changes.append(space)
        if len(self._changes) > most:
            half = len(self._changes) // 2
            del self._changes[:half]
            self._dropped += half

    @property
    def made(self) -> int:
        """How many changes there have been; where a reader who knows the present stands."""
        return self._dropped + len(self._changes)

    def since(self, point: int) -> list[NodeSpace] | None:
        """Each space that changed after a point, once; None if that is not known any more."""
        made = self.made
        if point < self._dropped:
            return None
        if self._since[:2] != (point, made):
            self._since = (point, made, list(dict.fromkeys(self._changes[point - self._dropped :])))
        return self._since[2]


class Pool:
    """The spaces of all nodes, and the yard's sums over them."""

    __slots__ = (
        "_conditions", "_numbers_given", "_placed_at", "_shared", "accounts", "by_number", "capacity_milli",
        "card_kinds", "changes", "held_milli", "inventory_version", "shut_nodes", "spaces",
    )  # fmt: skip

    def __init__(self) -> None:
        #: In the order in which the nodes were first heard of.
        self.spaces: dict[NodeId, NodeSpace] = {}
        #: The same, by number less one.
        self.by_number: list[NodeSpace] = []
        #: What changed, of all nodes, and of those where a share domain has cards of its own.
        self.changes = ChangeLog()
        self._shared: dict[Tenant, ChangeLog] = {}
        #: Conditions that nodes are in, by numbers that mean nothing but equality.
        self._conditions: dict[Condition, int] = {}
        self._numbers_given = 0
        #: (inventory version, racks, spines) of all nodes.
        self._placed_at: tuple[int, Groups | None, Groups | None] = (-1, None, None)
        #: Whom nodes have accounts for, each pattern list once, with how many nodes.
        self.accounts: dict[tuple[str, ...], int] = {}
        #: How many nodes are left alone for each thing that any node is: keys of `NodeSpace.shut`.
        self.shut_nodes: dict[str, int] = {}
        #: How many cards of each kind the nodes have.
        self.card_kinds: dict[int, int] = {}
        #: GPU compute held by jobs (a card counts at most once, however over-subscribed), and present.
        self.held_milli = 0
        self.capacity_milli = 0
        #: Grows when any node's inventory changes, or what it is left alone for beside modes.
        self.inventory_version = 0

    def add(self, node: Node) -> NodeSpace:
        space = self.spaces[node.id] = NodeSpace(node)
        self.by_number.append(space)
        if node.number != len(self.by_number):
            raise InvariantViolated(f"node {node.id} has number {node.number}, and is the {len(self.by_number)}th")
        return space

    def touch(self, space: NodeSpace) -> None:
        """Enter that a space or its node's state changed."""
        space.version += 1
        space.condition_number = -1
        most = 4096 + 4 * len(self.spaces)
        self.changes.add(space, most)
        domains = {card.domain for card in space.cards if card.domain}
        domains.update([claim.tenant for claim in space.claims])
        for domain in domains | space.domains:
            self.changes_of(domain).add(space, most)
        space.domains = domains

    def changes_of(self, domain: Tenant) -> ChangeLog:
        """Changes of nodes where a share domain has, or just had, cards of its own."""
        log = self._shared.get(domain)
        if log is None:
            log = self._shared[domain] = ChangeLog()
        return log

    def shared_by(self, domain: Tenant) -> list[NodeSpace]:
        """The nodes where a share domain has cards of its own now."""
        return [space for space in self.by_number if domain in space.domains]

    def condition_number(self, space: NodeSpace) -> int:
        """Equal for nodes in equal condition, as others than the owners of claims may use them."""
        number = space.condition_number
        if number < 0:
            if len(self._conditions) > 65_536 + 8 * len(self.by_number):
                # Equal conditions get another number from now on, which costs scores, but no number comes twice.
                self._conditions.clear()
            condition = space.beside_claims().condition
            known = self._conditions.get(condition)
            if known is None:
                self._numbers_given += 1
                known = self._conditions[condition] = self._numbers_given
            number = space.condition_number = known
        return number

    def racks(self) -> Groups | None:
        """By node number less one: the rack, from 1; 0 where the node does not say. None: no node does."""
        return self._groups()[0]

    def spines(self) -> Groups | None:
        """The same of what joins racks."""
        return self._groups()[1]

    def domains(self, within: Within) -> Groups:
        """By node number less one: what it has in common with others, for gangs that must be together so. A node that
        does not say stands alone."""
        alone = np.arange(1, len(self.by_number) + 1, dtype=np.int64)
        named = self.racks() if within == "rack" else self.spines() if within == "spine" else None
        return alone if named is None else np.where(named > 0, named, alone + int(named.max()))

    def _groups(self) -> tuple[Groups | None, Groups | None]:
        if self._placed_at[0] != self.inventory_version:
            names = [rack_of(space.node.inventory) for space in self.by_number]
            racks = _numbered([(spine, rack) if rack else None for spine, rack in names])
            self._placed_at = (self.inventory_version, racks, _numbered([spine or None for spine, _ in names]))
        return self._placed_at[1:]

    @property
    def changes_made(self) -> int:
        """How many changes there have been; where a reader who knows the present stands."""
        return self.changes.made

    def changed_since(self, point: int) -> list[NodeSpace] | None:
        """Each space that changed after a point, once; None if that is not known, or no fewer than all."""
        return None if self.changes.made - point > len(self.spaces) else self.changes.since(point)

    def _count_cards(self, space: NodeSpace, change: int) -> None:
        for card in space.cards:
            left = self.card_kinds.get(card.kind, 0) + change
            if left:
                self.card_kinds[card.kind] = left
            else:
                del self.card_kinds[card.kind]

    def _count_accounts(self, accounts: tuple[str, ...], change: int) -> None:
        left = self.accounts.get(accounts, 0) + change
        if accounts and left:
            self.accounts[accounts] = left
        else:
            self.accounts.pop(accounts, None)

    def take(self, space: NodeSpace, assignment: Assignment, tenant: Tenant, cpu_milli: int, memory_mib: int) -> None:
        before = _held(space, assignment.partition)
        space.take(assignment.key, assignment.partition, tenant, cpu_milli, memory_mib)
        self.held_milli += _held(space, assignment.partition) - before
        space.assignments[assignment.key] = assignment
        self.touch(space)

    def give(self, space: NodeSpace, assignment: Assignment) -> None:
        before = _held(space, assignment.partition)
        space.give(assignment.key, assignment.partition)
        self.held_milli += _held(space, assignment.partition) - before
        del space.assignments[assignment.key]
        self.touch(space)

    def hold(self, space: NodeSpace, assignment: Assignment, cpu_milli: int, memory_mib: int) -> None:
        """Another amount of the host itself, on the place that it has."""
        space.hold(assignment.key, cpu_milli, memory_mib)
        self.touch(space)

    def image_bound(self, assignment: Assignment) -> int:
        """Memory of the host that the work of a replica on a card can take at most, MiB; 0: it cannot be taken off.

        A driver takes work off one whole card, or one used in turns.
        """
        match assignment.partition:
            case WholeCards(devices=(uuid,)):
                card = self.spaces[assignment.node].by_uuid.get(uuid)
                return card.device.memory_mib if card is not None else 0
            case TimeSliceShare(memory_mib=memory):
                return memory
            case _:
                return 0

    def recall(self, space: NodeSpace, uuid: str) -> None:
        """Make a card be what its node's record says of it."""
        card, past = space.by_uuid.get(uuid), space.node.pasts[uuid]
        if card is not None:
            was_idle = card.mode == "idle" and card.takes_work
            card.recall(in_mig=past.in_mig, keeps_mode=past.keeps_mode_until_ms > 0)
            space.idle_cards += (card.mode == "idle" and card.takes_work) - was_idle
            self.touch(space)

    def leaving(self, space: NodeSpace) -> None:
        """Somebody on the node was told to stop: what is claimed there takes that first."""
        if space.claims:
            self.touch(space)

    def claim(self, space: NodeSpace, place: ClaimedPlace) -> None:
        """Keep a place for a job that does not hold it yet."""
        space.claims.append(place)
        self.touch(space)

    def unclaim(self, space: NodeSpace, job: JobId) -> None:
        """Keep nothing for a job any more."""
        space.claims = [claim for claim in space.claims if claim.job != job]
        self.touch(space)

    def shut(self, space: NodeSpace, names: tuple[str, ...]) -> None:
        """Leave a node alone for these, or for nothing any more."""
        if names != space.shut:
            for each, change in ((space.shut, -1), (names, 1)):
                for name in each:
                    left = self.shut_nodes.pop(name, 0) + change
                    if left:
                        self.shut_nodes[name] = left
            space.shut = names
            self.inventory_version += 1
        self.touch(space)

    def refit(self, space: NodeSpace, cpu_held_milli: int, memory_held_mib: int) -> None:
        self.capacity_milli -= _capacity(space)
        self._count_accounts(space.accounts, -1)
        self._count_cards(space, -1)
        space.refit()
        self._count_cards(space, 1)
        space.accounts = space.node.inventory.accounts if space.node.inventory else ()
        self._count_accounts(space.accounts, 1)
        if space.node.inventory is not None:
            space.set_totals(space.node.inventory, cpu_held_milli, memory_held_mib)
        self.capacity_milli += _capacity(space)
        self.inventory_version += 1
        self.touch(space)


def _numbered(names: Sequence[Hashable]) -> Groups | None:
    """Numbers from 1 for names, in the order in which they come; 0 for None. None if that is all there is."""
    numbers: dict[Hashable, int] = {}
    found = [0 if name is None else numbers.setdefault(name, len(numbers) + 1) for name in names]
    return np.array(found, dtype=np.int64) if numbers else None


def _held(space: NodeSpace, partition: Partition) -> int:
    """Compute held on the cards a partition is on."""
    held = 0
    for uuid in devices_of(partition):
        milli = space.by_uuid[uuid].milli
        held += milli if milli < MILLI else MILLI
    return held


def _capacity(space: NodeSpace) -> int:
    return MILLI * sum(1 for card in space.cards if card.present)
