"""Moving running work aside when that makes the place that somebody waits for: one MIG instance off a card whose other
slices are free, one job off a node that is whole but for it.

Not a preemption: whoever moves has room elsewhere right away, whatever its level. So it is not the exchange that
counts, but the cost: what the moves cost, four times over, is less than what the claimant would hold in ten minutes.
And they are rare: at most one for a hundred starts, of jobs that have run long enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.occupants import Occupant
from gpuyard_daemon.core.preempting.victims import Plan, Search
from gpuyard_daemon.core.queueing.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.queueing.ranking import width_milli
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.limits import may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.units import MILLI

#: One move for so many starts.
STARTS_PER_MOVE: Final = 100
#: Movers of one plan.
MOVERS_MAX: Final = 2
#: Plans made for one claimant in a round.
_PLANS_MAX: Final = 2
#: Nodes tried for a mover.
_NODES_MAX: Final = 16
#: What a claimant would hold in this time stands against what the moves cost.
HORIZON_MS: Final = 600_000


def make_room(
    draft: Draft, line: WaitingLine, queue: ShapeQueue, job: Job, occupants: Iterable[Occupant], looks: int
) -> int:
    """Move work aside for a job if that is worth it and all of it has room elsewhere; how many looks are left."""
    cluster = draft.cluster
    totals, width = cluster.totals, width_milli(job)
    if looks <= 0 or not width or (totals.moved + 1) * STARTS_PER_MOVE > totals.started:
        return looks
    # Whoever moves needs as much room elsewhere as the claimant finds where it was.
    free_milli = cluster.pool.capacity_milli - cluster.pool.held_milli
    if free_milli < width:
        return looks
    worth = width * HORIZON_MS // (exchange.COST_WEIGHT * MILLI)
    movable = [
        each
        for each in occupants
        if each.preemptible
        and each.exchangeable
        and each.kind != "suspend"
        and each.cost < worth
        and not each.job.is_gang
    ]
    if not movable:
        return looks
    for _ in range(_PLANS_MAX):
        search = Search(cluster.pool, queue.shape, job, movable, cluster.leaving.values(), looks)
        if queue.shape.replicas == 1:
            plan = search.single()
        else:
            plan = search.gang([space.node.id for space in queue.spanning.in_order(cluster.pool)])
        looks = search.looks
        if plan is None or not 0 < len(plan.victims) <= MOVERS_MAX:
            return looks
        stuck = _stuck(draft, line, plan)
        if stuck is None:
            if _is_worth_it(draft, job, plan, worth):
                _move(draft, job, plan)
            return looks
        movable = [each for each in movable if each is not stuck]
    return looks


def _move(draft: Draft, job: Job, plan: Plan) -> None:
    evictions = tuple(
        [
            f.Eviction(each.job.id, each.kind, each.overhead_ms, each.lost_milli_ms, _why(job), moved=True)
            for each in plan.victims
        ]
    )
    draft.add(f.ClaimMade(job.id, "preempt", plan.placements, evictions))


def _is_worth_it(draft: Draft, job: Job, plan: Plan, worth: int) -> bool:
    cluster = draft.cluster
    if sum([each.cost for each in plan.victims]) >= worth:
        return False
    if (cluster.totals.moved + len(plan.victims)) * STARTS_PER_MOVE > cluster.totals.started:
        return False
    return may_hold(cluster, job, plan.placements)


def _stuck(draft: Draft, line: WaitingLine, plan: Plan) -> Occupant | None:
    """A mover that finds no room elsewhere, beside those before it; None: all of them do."""
    pool = draft.cluster.pool
    taken = {placement.node for placement in plan.placements}
    trial = PoolTrial(pool)
    for each in plan.victims:
        mover = line.queue_of(each.job)
        fitting = [space.node.id for space in mover.candidates.in_order(pool) if space.node.id not in taken]
        if trial.place(mover.shape, each.job.id, fitting[:_NODES_MAX]) is None:
            return each
    return None


def _why(job: Job) -> Why:
    return Why("Preempted", f"moved: job {job.id} waits for just this place, and there is room for it elsewhere")
