"""Suspended jobs that take back their own cards from those who run there, by the rules that hold for whoever waits.

Their work lies in the memory of one node, so no other place will do: what is searched is who must leave that card, and
at what cost. Everything else (whom they may take it from, what it may cost, that the card is kept for them meanwhile)
is as in any plan of `preemption`; in the end the job resumes instead of starting.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpuyard_daemon.core.placing.capacity import Pool
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.preempting.claims import takes
from gpuyard_daemon.core.preempting.occupants import Occupant
from gpuyard_daemon.core.preempting.victims import Search
from gpuyard_daemon.core.queueing.ranking import Rank
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Job
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.resources import devices_of


def homebound(cluster: Cluster, now_ms: int) -> list[tuple[Rank, Job]]:
    """Suspended jobs that may ask for their cards now and have none kept for them, best first."""
    found = [
        (cluster.ranking.rank_of(job, now_ms), job)
        for job in cluster.suspended.values()
        if job.resume_after_ms <= now_ms and job.id not in cluster.claims
    ]
    return sorted(found, key=lambda entry: entry[0])


class HomeSearch(Search):
    """Who must leave a suspended job's card."""

    def __init__(self, pool: Pool, job: Job, allowed: Iterable[Occupant], leaving: Iterable[Job]) -> None:
        need = job.spec.need
        super().__init__(pool, Shape(need, 1, job.tenant, job.user), job, allowed, leaving, 1)
        (assignment,) = job.assignments
        assert assignment.home is not None
        self._home = Placement(assignment.node, assignment.home)
        self._by_node = {self._home.node: self._by_node.get(self._home.node, [])}

    def _counted(self, node: NodeId) -> None:
        """Only its own card will do, so counts say nothing."""

    def _fits(self, node: NodeId) -> bool:
        space = self._trial.space(node)
        if space.node.state != "ready" or space.node.cordoned_by:
            return False
        space = space.beside_claims(self._job.id)
        cards = [space.by_uuid.get(uuid) for uuid in devices_of(self._home.partition)]
        is_free = all(
            card is not None and card.takes_work and card.could_take(self._home.partition, self._job.domain)
            for card in cards
        )
        cpu_milli, memory_mib = takes(self._job)
        return is_free and space.cpu_free_milli >= cpu_milli and space.memory_free_mib >= memory_mib

    def _place(self, nodes: list[NodeId]) -> tuple[Placement, ...] | None:
        if not self._fits(self._home.node):
            return None
        self._trial.take(self._job.id, 0, self._home, self._job.domain, *takes(self._job))
        return (self._home,)
