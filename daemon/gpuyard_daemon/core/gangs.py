"""Where the replicas of a job go together: all of them or none.

The plan is made on copies of the nodes' spaces and thrown away if the last member finds no place. Nothing is held while
a gang waits, so gangs cannot block each other half-placed.

Few nodes are better than many: the nodes that hold the most members come first, and for the rest of the gang the node
that it fills best. A gang that fits one node may be time-sliced there; one over several nodes never is.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuyard_daemon.core.capacity import NodeSpace, Pool
from gpuyard_daemon.core.facts import Placement
from gpuyard_daemon.core.feasibility import Shape, carve, judge
from gpuyard_daemon.core.placement import Candidates
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Partition


class Offer(NamedTuple):
    """What one node could take of a gang."""

    space: NodeSpace
    partitions: tuple[Partition, ...]
    #: Left over on the node after the last of them.
    left: int


class Offers:
    """What each node could take of a gang of one shape; asked again only of nodes that have changed."""

    __slots__ = ("_candidates", "_known", "shape", "spanning")

    def __init__(self, candidates: Candidates, *, spanning: bool) -> None:
        self.shape = candidates.shape
        self.spanning = spanning
        self._candidates = candidates
        #: By node number, with the version of the space then.
        self._known: dict[int, tuple[int, Offer]] = {}

    def all(self, pool: Pool) -> list[Offer]:
        """Of every node that takes at least one replica, snuggest first."""
        return [self._of(space) for space in self._candidates.in_order(pool)]

    def _of(self, space: NodeSpace) -> Offer:
        number = space.node.number
        known = self._known.get(number)
        if known is None or known[0] != space.version:
            offer = offer_of(space, self.shape, self.shape.replicas, spanning=self.spanning)
            known = self._known[number] = (space.version, offer)
        return known[1]


def plan_gang(pool: Pool, together: Offers, spanning: Offers) -> tuple[Placement, ...] | None:
    """Places for all replicas, by rank; None if there are not enough."""
    shape = together.shape
    on_one = _on_one_node(together.all(pool), shape.replicas)
    if on_one is not None:
        return on_one
    offers = spanning.all(pool)
    if sum(len(offer.partitions) for offer in offers) < shape.replicas:
        return None
    offers.sort(key=lambda offer: (-len(offer.partitions), offer.left, offer.space.node.number))
    placements: list[Placement] = []
    for position, offer in enumerate(offers):
        missing = shape.replicas - len(placements)
        if len(offer.partitions) >= missing:
            chosen = _tightest(offers[position:], missing)
            placements += [Placement(chosen.space.node.id, p) for p in chosen.partitions[:missing]]
            return tuple(placements)
        placements += [Placement(offer.space.node.id, partition) for partition in offer.partitions]
    return None


def _on_one_node(offers: list[Offer], replicas: int) -> tuple[Placement, ...] | None:
    fitting = [offer for offer in offers if len(offer.partitions) == replicas]
    if not fitting:
        return None
    best = min(fitting, key=lambda offer: (offer.left, offer.space.node.number))
    return tuple([Placement(best.space.node.id, partition) for partition in best.partitions])


def _tightest(offers: list[Offer], missing: int) -> Offer:
    """Of the nodes that take all the missing members, the one with the fewest places to spare."""
    enough = [offer for offer in offers if len(offer.partitions) >= missing]
    return min(enough, key=lambda offer: (len(offer.partitions), offer.left, offer.space.node.number))


def offer_of(space: NodeSpace, shape: Shape, at_most: int, *, spanning: bool = False, empty: bool = False) -> Offer:
    """How many replicas a node takes, and how. `empty`: as if nothing ran there."""
    trial = space.copy(empty=empty)
    need = shape.need
    partitions: list[Partition] = []
    left = judge(trial, shape, spanning=spanning)
    after = 0
    while type(left) is int and len(partitions) < at_most:
        partition = carve(trial, shape, spanning=spanning)
        trial.take(AssignmentKey(0, 0, len(partitions)), partition, shape.tenant, need.cpu_milli, need.memory_mib)
        partitions.append(partition)
        after = left
        left = judge(trial, shape, spanning=spanning)
    return Offer(space, tuple(partitions), after)
