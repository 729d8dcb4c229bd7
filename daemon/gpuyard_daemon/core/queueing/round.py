"""One placement pass: start what fits, in order, until nothing more does or the turn's bound is reached.

Each job is one plan, committed whole as one `JobPlaced` or not at all. A plan that would take its tenant over its limit
is not carried out; the queue is held back until the tenant holds less. The same goes for the quota of its queue and of
those above; where a quota leaves some models of card only, the job is placed on those.
"""

from __future__ import annotations

from collections.abc import Callable

from gpuyard_daemon.core.placing.affinity import NONE, Wishes, wishes_of
from gpuyard_daemon.core.placing.capacity import Pool
from gpuyard_daemon.core.placing.gangs import plan_gang
from gpuyard_daemon.core.queueing.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.queueing.ranking import Rank
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.facts import JobPlaced, Placement
from gpuyard_daemon.core.tenants.limits import counts_for as counts_for
from gpuyard_daemon.core.tenants.limits import may_hold as may_hold
from gpuyard_daemon.core.tenants.limits import within_quota
from gpuyard_daemon.core.tenants.quota import Obstacle


def place_waiting(draft: Draft, line: WaitingLine, let_back: Callable[[Rank | None], None]) -> bool:
    """Place waiting jobs; True if the bound stopped it and more may fit.

    `let_back`: lets suspended jobs go back to their cards, those that go before a rank; None: all of them. Asked for
    each job that is looked at, so that it does not matter who of those in line was found to fit nowhere before.
    """
    cluster = draft.cluster
    if cluster.draining:
        return False
    line.catch_up(draft.now_ms)
    started = 0
    most = draft.settings.starts_per_turn
    tenancy = cluster.tenancy
    while (head := line.next()) is not None:
        queue, job = head
        if cluster.suspended:
            let_back(cluster.ranking.rank_of(job, draft.now_ms))
        if started and started + job.spec.least_replicas > most:
            return True
        if not tenancy.has_room(job.tenant, queue.least_milli(cluster.pool)):
            line.hold_back(queue)
            continue
        granted = queue
        if cluster.quota.has_quotas and any(obstacles := line.obstacles(queue)):
            within = within_quota(cluster, job, obstacles)
            if isinstance(within, Obstacle):
                line.hold_back(queue, over=within.queue)
                continue
            granted = queue if within is None else queue.limited_to(within)
        placements = places(cluster.pool, granted, wishes_of(cluster, job))
        if placements is None and granted is queue:
            line.block(queue)
            continue
        if placements is None or not may_hold(cluster, job, placements):
            line.hold_back(queue, costly=True)
            continue
        prepare_until_ms = draft.now_ms + draft.settings.prepare_timeout_ms if job.is_gang else 0
        was_kept = job.id in cluster.claims
        draft.add(JobPlaced(job.id, placements, prepare_until_ms))
        started += len(placements)
        if was_kept:
            # What was kept for it elsewhere is there for others now.
            line.catch_up(draft.now_ms)
    let_back(None)
    return False


def places(pool: Pool, queue: ShapeQueue, wishes: Wishes = NONE) -> tuple[Placement, ...] | None:
    """Where a job of this shape could start now; None if nowhere."""
    if queue.shape.replicas > 1:
        return plan_gang(pool, queue.together, queue.apart)
    space = queue.candidates.best(pool, wishes)
    if space is None:
        return None
    return (Placement(space.node.id, queue.candidates.carve(space)),)
