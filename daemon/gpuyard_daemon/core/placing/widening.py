"""Where an elastic job could have more replicas than it has: on GPUs that are free and that nobody waits for.

A node is somebody's who waits if it could serve him once others have left it, whether or not it could now: what a wider
job took there would be missing from the place that he needs. So a job grows only where the waiting find no use for the
node, and where nobody waits, anywhere.

Its own nodes come first, then the others as the scores of placement have them. Says nothing about whether growing is
worth a new start of the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.gangs import offer_of
from gpuyard_daemon.core.placing.placement import Candidates
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Assignment
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.resources import TimeSliceShare

#: Nodes looked at for one job.
_NODES_MAX: Final = 256


def more_places(
    pool: Pool,
    spanning: Candidates,
    assignments: Sequence[Assignment],
    at_most: int,
    waiting: Sequence[Shape],
    reserved: Iterable[NodeId] = (),
) -> tuple[Placement, ...]:
    """Places for up to so many more replicas beside those that run. `waiting`: what those ask for who find no place;
    `reserved`: nodes that suspended work goes back to."""
    if at_most <= 0 or any(isinstance(each.partition, TimeSliceShare) for each in assignments):
        return ()
    shape = spanning.shape
    own = dict.fromkeys([each.node for each in assignments])
    fitting = spanning.in_order(pool)
    order = [space for space in fitting if space.node.id in own]
    order += [space for space in fitting if space.node.id not in own]
    kept = set(reserved)
    if shape.need.within:
        domains = pool.domains(shape.need.within)
        there = {int(domains[pool.spaces[node].node.number - 1]) for node in own}
        order = [space for space in order if int(domains[space.node.number - 1]) in there]
    found: list[Placement] = []
    for space in order[:_NODES_MAX]:
        if space.node.id in kept or _is_awaited(space, waiting):
            continue
        offer = offer_of(space, shape, at_most - len(found), spanning=True)
        found += [Placement(space.node.id, partition) for partition in offer.partitions]
        if len(found) == at_most:
            break
    return tuple(found)


def _is_awaited(space: NodeSpace, waiting: Sequence[Shape]) -> bool:
    return any(shape.eligible(space)[0] is None for shape in waiting)
