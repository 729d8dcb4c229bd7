"""One placement pass: start what fits, in order, until nothing more does or the turn's bound is reached.

Each job is one plan, committed whole as one `JobPlaced` or not at all.
"""

from __future__ import annotations

from gpuyard_daemon.core.draft import Draft
from gpuyard_daemon.core.facts import JobPlaced, Placement
from gpuyard_daemon.core.feasibility import carve
from gpuyard_daemon.core.gangs import plan_gang
from gpuyard_daemon.core.order import ShapeQueue, WaitingLine


def place_waiting(draft: Draft, line: WaitingLine) -> bool:
    """Place waiting jobs; True if the bound stopped it and more may fit."""
    if draft.cluster.draining:
        return False
    line.catch_up()
    started = 0
    most = draft.settings.starts_per_turn
    while (head := line.next()) is not None:
        queue, job = head
        if started and started + job.spec.replicas > most:
            return True
        placements = places(draft, queue)
        if placements is None:
            line.block(queue)
            continue
        prepare_until_ms = draft.now_ms + draft.settings.prepare_timeout_ms if len(placements) > 1 else 0
        draft.add(JobPlaced(job.id, placements, prepare_until_ms))
        started += len(placements)
    return False


def places(draft: Draft, queue: ShapeQueue) -> tuple[Placement, ...] | None:
    """Where a job of this shape could start now; None if nowhere."""
    pool = draft.cluster.pool
    if queue.shape.replicas > 1:
        return plan_gang(pool, queue.together, queue.apart)
    space = queue.candidates.best(pool)
    if space is None:
        return None
    return (Placement(space.node.id, carve(space, queue.shape)),)
