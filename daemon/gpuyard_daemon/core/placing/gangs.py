"""Where the replicas of a job go together: all of them or none.

How many members each node takes is kept for all nodes, like the scores of placement; the plan is made from these
numbers and carved on copies of the chosen nodes alone. Nothing is held while a gang waits, so gangs cannot block each
other half-placed.

One node that takes them all comes first: the best-scored of them. Else as few nodes as possible, in one rack if one has
the room (the tightest), else under one spine, else anywhere: the nodes that take the most members, and for the rest of
the gang the node that it fills best. A gang that fits one node may be time-sliced there; one over several never is.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Shape, carve, carve_from, judge, whole_cards
from gpuyard_daemon.core.placing.placement import Candidates, TableKey
from gpuyard_daemon.core.placing.scoring import UNFIT
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Partition

Counts: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


class Offer(NamedTuple):
    """What one node could take of a gang."""

    space: NodeSpace
    partitions: tuple[Partition, ...]
    #: Left over on the node after the last of them.
    left: int


class Members:
    """How many members of a gang each node could take; asked again only of nodes that have changed."""

    __slots__ = ("_by_condition", "_by_node", "_counts", "_read_to", "_shape", "_spanning")

    def __init__(self, shape: Shape, *, spanning: bool, by_node: bool) -> None:
        self._shape = shape
        self._spanning = spanning
        #: The answer may depend on more of a node than its condition.
        self._by_node = by_node
        #: By node number less one; never more than the gang has.
        self._counts: Counts = np.zeros(0, dtype=np.int64)
        self._read_to = -1
        self._by_condition: dict[int, int] = {}

    def counts(self, pool: Pool) -> Counts:
        log = pool.changes
        if self._read_to != log.made:
            changed = log.since(self._read_to) if self._read_to >= 0 else None
            if changed is None:
                changed = pool.by_number
            if len(self._counts) < len(pool.by_number):
                more = len(pool.by_number) - len(self._counts)
                self._counts = np.concatenate((self._counts, np.zeros(more, dtype=np.int64)))
            counts, need = self._counts, self._shape.need
            cpu_milli, memory_mib, cards = need.cpu_milli, need.memory_mib, need.gpus
            for space in changed:
                is_out = cpu_milli > space.cpu_free_milli or memory_mib > space.memory_free_mib
                # Most nodes of a full yard, and found out at once. What is claimed only makes it less.
                counts[space.number - 1] = 0 if is_out or cards > space.idle_cards else self._count(pool, space)
            self._read_to = log.made
        return self._counts

    def _count(self, pool: Pool, space: NodeSpace) -> int:
        need = self._shape.need
        joins = need.is_share and need.isolation != "hard"
        if self._by_node or (joins and space.domains):
            return self._take(space)
        condition = pool.condition_number(space)
        known = self._by_condition.get(condition)
        if known is None:
            if len(self._by_condition) > 65_536 + 8 * len(pool.by_number):
                self._by_condition.clear()
            known = self._by_condition[condition] = self._take(space)
        return known

    def _take(self, space: NodeSpace) -> int:
        shape, need = self._shape, self._shape.need
        if type(judge(space, shape, spanning=self._spanning)) is not int:
            return 0
        if need.is_share or need.mig:
            return len(offer_of(space, shape, shape.replicas, spanning=self._spanning).partitions)
        space = space.beside_claims()
        most = shape.replicas
        if need.gpus:
            _, positions = shape.eligible(space)
            most = min(most, len(whole_cards(space, positions, len(space.cards))[0]) // need.gpus)
        if need.cpu_milli:
            most = min(most, space.cpu_free_milli // need.cpu_milli)
        if need.memory_mib:
            most = min(most, space.memory_free_mib // need.memory_mib)
        return most


class Offers:
    """What the nodes could take of a gang of one shape. Shapes that differ only in whose they are share the work."""

    __slots__ = ("_candidates", "_members", "_version", "shape", "spanning")

    def __init__(self, candidates: Candidates, *, spanning: bool) -> None:
        self.shape = candidates.shape
        self.spanning = spanning
        self._candidates = candidates
        self._members: Members | None = None
        #: Of the inventories, when the table was looked up.
        self._version = -1

    def counts(self, pool: Pool) -> Counts:
        """Members that each node takes, by number less one. To read only."""
        if self._members is None or self._version != pool.inventory_version:
            self._version = pool.inventory_version
            common, own = self._candidates.group(pool)
            key = ("members", common, own, self.shape.replicas, self.spanning)
            self._members = self._candidates.finder.shared(key, lambda: self._make(common))
        return self._members.counts(pool)

    def _make(self, common: TableKey) -> Members:
        by_node = bool(self.shape.need.nodes) or common.who is not None
        return Members(self.shape, spanning=self.spanning, by_node=by_node)

    def scores(self, pool: Pool) -> Counts:
        """The score of one member on each node."""
        return self._candidates.scores(pool)


def fits(pool: Pool, together: Offers, apart: Offers) -> bool:
    """Whether all replicas would find a place now."""
    shape = together.shape
    return bool((together.counts(pool) >= shape.replicas).any() or _apart(pool, apart, shape).sum() >= shape.replicas)


def _apart(pool: Pool, apart: Offers, shape: Shape) -> Counts:
    """Members that each node takes, where it may be in one gang with enough others."""
    counts = apart.counts(pool)
    if not shape.need.within or not len(counts):
        return counts
    domains = pool.domains(shape.need.within)
    sums = np.bincount(domains, weights=counts)
    return np.where(sums[domains] >= shape.replicas, counts, 0)


def plan_gang(pool: Pool, together: Offers, spanning: Offers) -> tuple[Placement, ...] | None:
    """Places for all replicas, by rank; None if there are not enough."""
    shape = together.shape
    enough = np.flatnonzero(together.counts(pool) >= shape.replicas)
    if len(enough):
        scores = together.scores(pool)[enough]
        return _take_from(pool, [(int(enough[scores.argmin()]), shape.replicas)], shape, spanning=False)
    counts = _apart(pool, spanning, shape)
    if counts.sum() < shape.replicas:
        return None
    chosen = _domain_for(pool, counts, shape)
    scores = np.minimum(spanning.scores(pool)[chosen], UNFIT)
    order = chosen[np.lexsort((chosen, scores, -counts[chosen]))]
    shares: list[tuple[int, int]] = []
    missing = shape.replicas
    for position, place in enumerate(order):
        if counts[place] >= missing:
            rest = order[position:]
            rest = rest[counts[rest] >= missing]
            # Of those that take all that is missing, the tightest: the last of the most.
            tightest = rest[counts[rest] == counts[rest].min()]
            shares.append((int(tightest[0]), missing))
            break
        shares.append((int(place), int(counts[place])))
        missing -= int(counts[place])
    return _take_from(pool, shares, shape, spanning=True)


def _domain_for(pool: Pool, counts: Counts, shape: Shape) -> Counts:
    """Nodes (by number less one) of the tightest rack that takes all, else of such a spine, else all that take any."""
    some = np.flatnonzero(counts)
    for groups in (pool.racks(), pool.spines()):
        if groups is None:
            continue
        of = groups[some]
        sums = np.bincount(of, weights=counts[some])
        sums[0] = 0
        roomy = np.flatnonzero(sums >= shape.replicas)
        if len(roomy):
            least = roomy[sums[roomy] == sums[roomy].min()]
            chosen: Counts = some[of == least[0]]
            return chosen
    return some


def _take_from(
    pool: Pool, shares: list[tuple[int, int]], shape: Shape, *, spanning: bool
) -> tuple[Placement, ...] | None:
    placements: list[Placement] = []
    for place, members in shares:
        space = pool.by_number[place]
        offer = offer_of(space, shape, members, spanning=spanning)
        if len(offer.partitions) < members:
            return None
        placements += [Placement(space.node.id, partition) for partition in offer.partitions]
    return tuple(placements)


def offer_of(space: NodeSpace, shape: Shape, at_most: int, *, spanning: bool = False, empty: bool = False) -> Offer:
    """How many replicas a node takes, and how. `empty`: as if nothing ran there."""
    trial = (space if empty else space.beside_claims()).copy(empty=empty)
    need = shape.need
    partitions: list[Partition] = []
    left = judge(trial, shape, spanning=spanning)
    after = 0
    together = _cards_together(trial, shape, at_most)
    while type(left) is int and len(partitions) < at_most:
        if together and trial.wiring is not None:
            cards = trial.wiring.pick(together, need.gpus).positions
            together = tuple([card for card in together if card not in cards])
            partition: Partition = carve_from(trial, shape, cards, spanning=spanning)
        else:
            partition = carve(trial, shape, spanning=spanning)
        trial.take(AssignmentKey(0, 0, len(partitions)), partition, shape.domain, need.cpu_milli, need.memory_mib)
        partitions.append(partition)
        after = left
        left = judge(trial, shape, spanning=spanning)
    return Offer(space, tuple(partitions), after)


def _cards_together(space: NodeSpace, shape: Shape, members: int) -> tuple[int, ...]:
    """The cards of so many members, chosen as those of one replica would be; () where any choice is as good."""
    count = members * shape.need.gpus
    if members < 2 or not count or space.wiring is None:
        return ()
    cards = space.cards
    _, positions = shape.eligible(space)
    idle = tuple([position for position in positions if cards[position].mode == "idle" and cards[position].takes_work])
    return space.wiring.pick(idle, count).positions if len(idle) >= count else ()
