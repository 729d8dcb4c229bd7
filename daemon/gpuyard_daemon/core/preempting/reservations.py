"""Places kept for a job that has waited to the top and may not take them from those who hold them.

No walltimes are needed: the set of places is chosen by what it is expected to cost until it is free, in GPU time of
those who hold it: what a stop would cost where it is allowed, else the run time that is left to them. Heavy tails make
the young the better bet: of unknown length, a job is taken to run for as long again as it has.

Meanwhile the free part of the set is not idle. Guests are let in who can be sent away at little cost: those that can be
suspended or start again within half a minute, scavengers, and those that will have ended first. Once nobody but guests
is left, they go; so they delay the owner by one stop at most.

A few sets at once, one per band. A set is chosen anew only when another would be free a quarter sooner, so that nobody
is chased from node to node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from gpuyard_daemon.core.placing.feasibility import carve, judge
from gpuyard_daemon.core.preempting.keeping import is_free
from gpuyard_daemon.core.preempting.occupants import Occupant, kind_of, restart_of
from gpuyard_daemon.core.preempting.suspension import can_be_suspended
from gpuyard_daemon.core.preempting.victims import Plan, Search
from gpuyard_daemon.core.queueing.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.queueing.ranking import FLOOR, SCAVENGING, TOP_LEVEL, Rank, ran_ms, wall_ms, width_milli
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Claim, Job
from gpuyard_daemon.core.tenants.limits import held_now, may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import JobId
from gpuyard_protocol.resources import devices_of

#: Sets of places that are kept at once.
RESERVATIONS_MAX: Final = 3
#: Whether another set would be better is asked at multiples of this time only.
REPLAN_MS: Final = 60_000
#: A guest's stop costs at most this, unless it is a scavenger or will have ended first.
GUEST_COST_MS: Final = 30_000


def may_reserve(cluster: Cluster, rank: Rank) -> bool:
    """Whether a job of this rank is entitled to a set of its own, beside those there are."""
    if rank.level != TOP_LEVEL and rank.band != FLOOR:
        return False
    kept = [claim for claim in cluster.claims if claim.kind == "reserve"]
    bands = [cluster.ranking.band_of(cluster.jobs[claim.job]) for claim in kept]
    return len(kept) < RESERVATIONS_MAX and rank.band not in bands


def reserve(draft: Draft, queue: ShapeQueue, job: Job, occupants: Iterable[Occupant], at_ms: int, looks: int) -> int:
    """Keep the best set of places for a job, if there is one; how many looks are left."""
    plan, looks = _plan(draft.cluster, queue, job, occupants, at_ms, looks)
    if plan is not None:
        draft.add(f.ClaimMade(job.id, "reserve", plan.placements))
    return looks


def _plan(
    cluster: Cluster, queue: ShapeQueue, job: Job, occupants: Iterable[Occupant], at_ms: int, looks: int
) -> tuple[Plan | None, int]:
    """The set of places that is expected to be free at the least cost; its victims are those who are waited for."""
    awaited = [
        occupant._replace(lost_milli_ms=_release_cost(occupant, at_ms), band=0, level=0)
        for occupant in occupants
        if not occupant.job.service and not occupant.goes
    ]
    search = Search(cluster.pool, queue.shape, job, awaited, cluster.leaving.values(), looks)
    if queue.shape.replicas == 1:
        plan = search.single()
    else:
        plan = search.gang([space.node.id for space in queue.spanning.in_order(cluster.pool)])
    if plan is None:
        return None, search.looks
    awaited_jobs = [each.job for each in plan.victims]
    own = sum([held_now(cluster, each) for each in awaited_jobs if each.tenant == job.tenant])
    fits = may_hold(cluster, job, plan.placements, less_milli=own, victims=awaited_jobs)
    return plan if fits else None, search.looks


def _release_cost(occupant: Occupant, at_ms: int) -> int:
    """What it costs until an occupant has left, thousandths of a card × ms."""
    waiting = left_ms(occupant.job, at_ms) * max(1, width_milli(occupant.job))
    return min(waiting, occupant.lost_milli_ms) if occupant.exchangeable and occupant.preemptible else waiting


def left_ms(job: Job, at_ms: int) -> int:
    """How long a running job is expected to go on."""
    # A limit stands still while a job is suspended.
    this_run_ms = at_ms - max(job.started_ms, job.runs_since_ms)
    left = job.expected_ms - ran_ms(job, at_ms) if job.expected_ms else 0
    left = wall_ms(job, left) if left > 0 else max(60_000, wall_ms(job, ran_ms(job, at_ms)))
    return min(left, max(0, job.spec.time_limit_ms - this_run_ms)) if job.spec.time_limit_ms else left


# --- the sets there are ----------------------------------------------------------------------------------------------


def review(draft: Draft, line: WaitingLine, occupants: Sequence[Occupant], at_ms: int, looks: int) -> int:
    """Send guests away where they are the last, and choose anew where another set is free much sooner."""
    cluster = draft.cluster
    kept = [claim for claim in cluster.claims if claim.kind == "reserve"]
    if not kept:
        return looks
    costs = {} if at_ms % REPLAN_MS else {each.job.id: _release_cost(each, at_ms) for each in occupants}
    for claim in kept:
        job = cluster.jobs[claim.job]
        guests = _guests(cluster, claim)
        if guests and is_free(cluster, job, claim, without=guests) and _may_come(cluster, job, claim, guests):
            _send_away(draft, job, claim, guests)
            continue
        if at_ms % REPLAN_MS:
            continue
        holders = [number for number in _holders(cluster, claim) if number not in claim.guests]
        cost = sum([costs.get(number, 0) for number in holders])
        plan, looks = _plan(cluster, line.queue_of(job), job, occupants, at_ms, looks)
        if plan is not None and sum([each.lost_milli_ms for each in plan.victims]) * 4 < cost * 3:
            draft.add(f.ClaimDropped(job.id, Why("ClaimMoved", "other places are expected to be free much sooner")))
            draft.add(f.ClaimMade(job.id, "reserve", plan.placements))
    return looks


def _guests(cluster: Cluster, claim: Claim) -> list[Job]:
    """Who was let in and is there now, each once: a guest may have left, come again, or run elsewhere since."""
    nodes = {placement.node for placement in claim.placements}
    known = [cluster.jobs[number] for number in dict.fromkeys(claim.guests) if number in cluster.jobs]
    return [job for job in known if any(each.is_live and each.node in nodes for each in job.assignments)]


def _may_come(cluster: Cluster, job: Job, claim: Claim, guests: list[Job]) -> bool:
    """Whether the owner may hold its places once the guests have left: else they would leave for nothing."""
    own = sum([held_now(cluster, guest) for guest in guests if guest.tenant == job.tenant])
    return may_hold(cluster, job, tuple(claim.placements), less_milli=own, victims=guests)


def _holders(cluster: Cluster, claim: Claim) -> list[JobId]:
    """Who holds cards of a set now."""
    found: dict[JobId, None] = {}
    for placement in claim.placements:
        space = cluster.pool.spaces[placement.node]
        for uuid in devices_of(placement.partition):
            if (card := space.by_uuid.get(uuid)) is not None:
                found.update(dict.fromkeys([key.job for key in card.held]))
        if not devices_of(placement.partition):
            found.update(dict.fromkeys([key.job for key in space.assignments]))
    return sorted(found)


def _send_away(draft: Draft, job: Job, claim: Claim, guests: list[Job]) -> None:
    cluster = draft.cluster
    evictions = []
    softly: list[Job] = []
    for guest in guests:
        if guest.verdict is None:
            kind = kind_of(cluster, guest) if guest.state == "running" else "requeue"
            overhead_ms = restart_of(cluster, draft.settings, guest)
            if kind == "suspend":
                if can_be_suspended(cluster, guest, softly):
                    softly.append(guest)
                else:
                    # The host's memory takes those before it and not this one as well.
                    kind, overhead_ms = "requeue", guest.spec.restart_ms or draft.settings.restart_requeue_ms
            if kind == "requeue" and guest.started_ms:
                overhead_ms += draft.now_ms - guest.started_ms
            why = Why("Preempted", f"preempted by job {job.id}, for which its place was kept before it came")
            evictions.append(f.Eviction(guest.id, kind, overhead_ms, overhead_ms * width_milli(guest), why))
    placements = tuple(claim.placements)
    draft.add(f.ClaimDropped(job.id, Why("ClaimComplete", "only guests are left in the places kept for it")))
    draft.add(f.ClaimMade(job.id, "preempt", placements, tuple(evictions)))


# --- guests ----------------------------------------------------------------------------------------------------------


def admit_guest(draft: Draft, queue: ShapeQueue, job: Job, rank: Rank) -> bool:
    """Place a job on what is kept for another, if it can be sent away again at little cost; whether it was."""
    cluster = draft.cluster
    if job.is_gang or job.spec.preemption == "never" or job.service:
        return False
    for claim in [claim for claim in cluster.claims if claim.kind == "reserve"]:
        if claim.job == job.id or not _may_be_guest(draft, claim, job, rank):
            continue
        for node in dict.fromkeys([placement.node for placement in claim.placements]):
            space = cluster.pool.spaces[node]
            if type(judge(space, queue.shape, owner=claim.job)) is int:
                placement = f.Placement(node, carve(space, queue.shape, owner=claim.job))
                if may_hold(cluster, job, (placement,)):
                    draft.add(f.JobPlaced(job.id, (placement,), 0, guest_of=claim.job))
                    return True
    return False


def _may_be_guest(draft: Draft, claim: Claim, job: Job, rank: Rank) -> bool:
    if rank.band >= SCAVENGING:
        return True
    settings, kind = draft.settings, job.spec.preemption
    if kind == "suspend" and settings.restart_suspend_ms <= GUEST_COST_MS:
        return True
    if kind == "checkpoint" and restart_of(draft.cluster, settings, job) <= GUEST_COST_MS:
        return True
    longest_ms = job.spec.time_limit_ms
    if not longest_ms:
        return False
    cluster, at_ms = draft.cluster, draft.now_ms
    holders = [cluster.jobs[number] for number in _holders(cluster, claim) if number not in claim.guests]
    return any(left_ms(holder, at_ms) >= longest_ms for holder in holders if holder.state == "running")
