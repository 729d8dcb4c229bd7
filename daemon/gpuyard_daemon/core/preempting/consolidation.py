"""Moving running work aside when that makes the place that somebody waits for: one MIG instance off a card whose other
slices are free, the small jobs off a node that others have room for.

Not a preemption: whoever moves has room elsewhere right away, whatever its level. So it is not the exchange that
counts, but the cost, against how long the claimant would go on waiting: as long as it has, for all that is known. The
delays of all who move, four times over, are no more than that, or else those who wait wait less and the others more;
and the GPU time that they lose, four times over, is less than what the claimant would hold meanwhile. So where starts
are dear places that come free by themselves soon are waited for, and whoever has waited for long gets its place. It is
asked before anybody is preempted.

Two things bound it: all moves together may cost one part in a hundred of the GPU time that work has held, and each
counts against the credit of the job that moves, as a preemption does. A bound by starts (one move in a hundred) left
whole nodes' worth of cards idle in pieces while jobs of eight cards waited for days; they were half of all queueing.

A round looks at so many occupants only, the largest of the yard. Where more run, nodes are seldom covered whole by
those, so the nodes that come nearest to what is asked are looked at first, with everybody on them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Final, NamedTuple

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.occupants import Occupant, occupant_of
from gpuyard_daemon.core.preempting.victims import Plan, Search
from gpuyard_daemon.core.queueing.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.queueing.ranking import width_milli
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.limits import may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.units import MILLI

#: Moves may cost one part in so many of the GPU time that was held.
BUDGET_DIVISOR: Final = 100
#: Of the whole yard, added to that: a young yard may move the first few.
BUDGET_PRIOR_MS: Final = 3_600_000
#: Movers of one plan: as many as a node has cards, mostly.
MOVERS_MAX: Final = 8
#: Plans made for one claimant in a round.
_PLANS_MAX: Final = 2
#: Nodes tried for a mover.
_NODES_MAX: Final = 16
#: Nodes that are looked at whole for one claimant, and plans made with those on them.
_NEAR_MAX: Final = 16
_NEAR_PLANS_MAX: Final = 4
#: What a claimant would hold in this time, or in what it has waited, stands against what the moves cost.
HORIZON_MS: Final = 600_000
#: Whoever waits is taken to wait so long at least: all of a node may move aside at once at a minute's start each.
WAIT_MS: Final = 1_800_000


class _Worth(NamedTuple):
    """What moves for one claimant may cost."""

    #: All delays of those who move.
    delay_ms: int
    #: GPU-milliseconds.
    cost: int


def _worth_of(job: Job, at_ms: int) -> _Worth:
    waited_ms = _waited_ms(job, at_ms)
    return _Worth(
        delay_ms=max(WAIT_MS, waited_ms) // exchange.COST_WEIGHT,
        cost=width_milli(job) * max(HORIZON_MS, waited_ms) // (exchange.COST_WEIGHT * MILLI),
    )


def _waited_ms(job: Job, at_ms: int) -> int:
    return at_ms - job.waits_since_ms if job.waits_since_ms else 0


def asked_again_ms(job: Job, at_ms: int) -> int:
    """When a claimant has waited so much longer, a fourth, that it may be worth more moves."""
    waited_ms = max(WAIT_MS, _waited_ms(job, at_ms))
    return at_ms - _waited_ms(job, at_ms) + waited_ms + waited_ms // 4


def could_be_made(cluster: Cluster, job: Job) -> bool:
    """Whether a place for a job could come about by moving, at a glance."""
    width = width_milli(job)
    # Whoever moves needs as much room elsewhere as the claimant finds where it was.
    is_free = cluster.pool.capacity_milli - cluster.pool.held_milli >= width
    return width > 0 and is_free and within_budget(cluster, 1)


def within_budget(cluster: Cluster, lost_milli_ms: int) -> bool:
    """Whether moves may cost so much more, thousandths of a card × ms."""
    held = cluster.totals.held_milli_ms + cluster.pool.capacity_milli * BUDGET_PRIOR_MS
    return (cluster.totals.moved_milli_ms + lost_milli_ms) * BUDGET_DIVISOR <= held


def make_room(
    draft: Draft, line: WaitingLine, queue: ShapeQueue, job: Job, occupants: Iterable[Occupant], at_ms: int, looks: int
) -> int:
    """Move work aside for a job if that is worth it and all of it has room elsewhere; how many looks are left."""
    cluster = draft.cluster
    if looks <= 0:
        return looks
    worth = _worth_of(job, at_ms)
    movable = _worth_moving(occupants, worth)
    if not movable:
        # Then those on the nearest nodes hardly are of a kind that moves either; they are dear to look at.
        return looks
    near = _worth_moving(_near(draft, queue.shape), worth)
    if near:
        looks = _make_room_among(draft, line, queue, job, near, worth, looks, _NEAR_PLANS_MAX)
        if job.id in cluster.claims:
            return looks
    return _make_room_among(draft, line, queue, job, movable, worth, looks, _PLANS_MAX)


def _worth_moving(occupants: Iterable[Occupant], worth: _Worth) -> list[Occupant]:
    return [
        each
        for each in occupants
        if each.preemptible
        and each.exchangeable
        and each.kind != "suspend"
        and each.cost < worth.cost
        and each.overhead_ms <= worth.delay_ms
        and not each.job.is_gang
    ]


def _make_room_among(
    draft: Draft, line: WaitingLine, queue: ShapeQueue, job: Job, movable: list[Occupant], worth: _Worth, looks: int,
    plans: int,
) -> int:  # fmt: skip
    """The same by moving some of these."""
    cluster = draft.cluster
    for _ in range(plans):
        if not movable or looks <= 0:
            return looks
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


def _near(draft: Draft, shape: Shape) -> list[Occupant]:
    """Everybody on the nodes that lack the fewest cards for a job, where a round does not look at all who run."""
    cluster, settings = draft.cluster, draft.settings
    if len(cluster.running) <= settings.preempt_occupants or not shape.need.gpus or shape.replicas > 1:
        return []
    at_ms = draft.now_ms - draft.now_ms % settings.preempt_every_ms
    found: dict[int, Occupant] = {}
    for space in _nearest(cluster.pool, shape):
        for key in sorted(space.assignments):
            other = cluster.jobs[key.job]
            if other.state == "running" and other.verdict is None and 0 < other.started_ms < at_ms:
                found[other.id] = occupant_of(cluster, settings, other, at_ms)
    return list(found.values())


def _nearest(pool: Pool, shape: Shape) -> list[NodeSpace]:
    """Nodes with idle cards that lack the fewest for one replica, and of equals hold the fewest."""
    wanted = shape.need.gpus
    found: list[tuple[int, int, int]] = []
    for number, space in enumerate(pool.by_number):
        held = len(space.assignments)
        if not space.idle_cards or held > MOVERS_MAX or space.claims:
            continue
        reason, positions = shape.eligible(space)
        if reason is None and len(positions) >= wanted:
            found.append((max(0, wanted - space.idle_cards), held, number))
    return [pool.by_number[number] for _, _, number in heapq.nsmallest(_NEAR_MAX, found)]


def _move(draft: Draft, job: Job, plan: Plan) -> None:
    evictions = tuple(
        [
            f.Eviction(each.job.id, each.kind, each.overhead_ms, each.lost_milli_ms, _why(job), moved=True)
            for each in plan.victims
        ]
    )
    draft.add(f.ClaimMade(job.id, "preempt", plan.placements, evictions))


def _is_worth_it(draft: Draft, job: Job, plan: Plan, worth: _Worth) -> bool:
    cluster = draft.cluster
    if sum([each.cost for each in plan.victims]) >= worth.cost:
        return False
    if sum([each.overhead_ms for each in plan.victims]) > worth.delay_ms:
        return False
    if not within_budget(cluster, sum([each.lost_milli_ms for each in plan.victims])):
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
