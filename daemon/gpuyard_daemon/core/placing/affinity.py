"""Which nodes one particular job would rather have, or not: what its shape does not say.

Replicas of one service stay apart, so that a lost node takes one of them; and where racks are labelled, each goes to
one of those that hold the fewest, for a rack is lost at once when its power or its switch is. A job that ran before
goes back to where it ran, and a service's new replica to where one ended: files, images and weights may lie there
still. All are wishes: a job goes elsewhere rather than wait, and going back may cost the others no more than a little
room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from gpuyard_daemon.core.state.model import Job
from gpuyard_protocol.names import NodeId

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

#: Nodes remembered as warm, the latest.
_WARM_MAX: Final = 8


class Wishes(NamedTuple):
    """Numbers of nodes."""

    #: There, and in racks with more of these than others have, only where nothing else is left.
    apart_from: tuple[int, ...] = ()
    #: Rather there, if they score about as well as the best.
    warm: tuple[int, ...] = ()


NONE: Final = Wishes()


def wishes_of(cluster: Cluster, job: Job) -> Wishes:
    """What a waiting job of one replica would like."""
    if job.service:
        return _of_replica(cluster, job)
    if not job.attempt:
        return NONE
    return Wishes(warm=_numbers(cluster, [assignment.node for assignment in job.assignments]))


def _of_replica(cluster: Cluster, job: Job) -> Wishes:
    live: list[NodeId] = []
    before: list[NodeId] = [assignment.node for assignment in job.assignments]
    for other in cluster.service_jobs.get((job.tenant, job.service), {}).values():
        for assignment in other.assignments:
            (live if assignment.is_live else before).append(assignment.node)
    taken = _numbers(cluster, live)
    return Wishes(taken, tuple([number for number in _numbers(cluster, before[-_WARM_MAX:]) if number not in taken]))


def _numbers(cluster: Cluster, nodes: list[NodeId]) -> tuple[int, ...]:
    return tuple(sorted({cluster.nodes[node].number for node in nodes if node in cluster.nodes}))
