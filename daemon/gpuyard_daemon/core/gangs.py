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


class _Offer(NamedTuple):
    """What one node could take of a gang."""

    space: NodeSpace
    partitions: tuple[Partition, ...]
    #: Left over on the node after the last of them.
    left: int


def plan_gang(pool: Pool, shape: Shape, candidates: Candidates, spanning: Candidates) -> tuple[Placement, ...] | None:
    """Places for all replicas, by rank; None if there are not enough."""
    together = _on_one_node(pool, shape, candidates)
    if together is not None:
        return together
    offers = [
        offer
        for space in spanning.in_order(pool)
        if (offer := offer_of(space, shape, shape.replicas, spanning=True)).partitions
    ]
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


def _on_one_node(pool: Pool, shape: Shape, candidates: Candidates) -> tuple[Placement, ...] | None:
    fitting = []
    for space in candidates.in_order(pool):
        offer = offer_of(space, shape, shape.replicas)
        if len(offer.partitions) == shape.replicas:
            fitting.append(offer)
    if not fitting:
        return None
    best = min(fitting, key=lambda offer: (offer.left, offer.space.node.number))
    return tuple([Placement(best.space.node.id, partition) for partition in best.partitions])


def _tightest(offers: list[_Offer], missing: int) -> _Offer:
    """Of the nodes that take all the missing members, the one with the fewest places to spare."""
    enough = [offer for offer in offers if len(offer.partitions) >= missing]
    return min(enough, key=lambda offer: (len(offer.partitions), offer.left, offer.space.node.number))


def offer_of(space: NodeSpace, shape: Shape, at_most: int, *, spanning: bool = False, empty: bool = False) -> _Offer:
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
    return _Offer(space, tuple(partitions), after)
