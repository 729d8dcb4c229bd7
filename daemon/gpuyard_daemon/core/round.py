"""One placement pass: start what fits, in order, until nothing more does or the turn's bound is reached.

Each job is one plan, committed whole as one `JobPlaced` or not at all. A plan that would take its tenant over its limit
is not carried out; the queue is held back until the tenant holds less.
"""

from __future__ import annotations

from gpuyard_daemon.core.capacity import Pool
from gpuyard_daemon.core.draft import Draft
from gpuyard_daemon.core.facts import JobPlaced, Placement
from gpuyard_daemon.core.feasibility import carve
from gpuyard_daemon.core.gangs import plan_gang
from gpuyard_daemon.core.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.tenancy import held_by


def place_waiting(draft: Draft, line: WaitingLine) -> bool:
    """Place waiting jobs; True if the bound stopped it and more may fit."""
    if draft.cluster.draining:
        return False
    line.catch_up()
    started = 0
    most = draft.settings.starts_per_turn
    tenancy = draft.cluster.tenancy
    while (head := line.next()) is not None:
        queue, job = head
        if started and started + job.spec.replicas > most:
            return True
        if not tenancy.has_room(job.tenant, queue.least_milli):
            line.hold_back(queue, costly=False)
            continue
        placements = places(draft.cluster.pool, queue)
        if placements is None:
            line.block(queue)
            continue
        if tenancy.is_limited(job.tenant) and not tenancy.has_room(
            job.tenant, counts_for(draft.cluster.pool, placements)
        ):
            line.hold_back(queue, costly=True)
            continue
        prepare_until_ms = draft.now_ms + draft.settings.prepare_timeout_ms if len(placements) > 1 else 0
        draft.add(JobPlaced(job.id, placements, prepare_until_ms))
        started += len(placements)
    return False


def counts_for(pool: Pool, placements: tuple[Placement, ...]) -> int:
    """Compute that these places count for, against the tenant's limit."""
    return sum([held_by(pool.spaces[placement.node], placement.partition) for placement in placements])


def places(pool: Pool, queue: ShapeQueue) -> tuple[Placement, ...] | None:
    """Where a job of this shape could start now; None if nowhere."""
    if queue.shape.replicas > 1:
        return plan_gang(pool, queue.together, queue.apart)
    space = queue.candidates.best(pool)
    if space is None:
        return None
    return (Placement(space.node.id, carve(space, queue.shape)),)
