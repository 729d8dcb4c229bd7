"""Rounds of preemption: waiting jobs that may take the place of running ones do so, or nothing happens.

Who may take whose place: a job of a better band that of a worse one, if the rules of the bands say so; within a band,
whoever passes the exchange test, for a victim that ran long enough and has credit left. A job that is never to be
preempted never is.

When: in each turn for those who came into line in it, and at the beginning of each period of some seconds for all whose
queues are blocked. Which period a turn is in follows from the last record's time, so a restored core holds the same
rounds. A plan is carried out whole, as one fact: the claimant's places are kept for it, and the victims told to go.

Who may take nothing and has waited to the top gets a set of places kept for it (`reservations`), and the free part of
such sets takes guests.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpuyard_daemon.core.preempting import draining, exchange, homing, reservations, shrinking
from gpuyard_daemon.core.preempting.consolidation import asked_again_ms, could_be_made, make_room
from gpuyard_daemon.core.preempting.draining import CutNodes
from gpuyard_daemon.core.preempting.occupants import Known, Occupant, in_its_band, kind_of, occupant_of
from gpuyard_daemon.core.preempting.reclaim import Reclaiming
from gpuyard_daemon.core.preempting.suspension import can_be_suspended
from gpuyard_daemon.core.preempting.victims import Plan, Search
from gpuyard_daemon.core.queueing.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.queueing.priority import PROBE_MS
from gpuyard_daemon.core.queueing.ranking import BORROWING, FLOOR, NOMINAL, TOP_LEVEL, Rank, width_milli
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.holdings import amounts_of, sum_of
from gpuyard_daemon.core.tenants.limits import counts_for, held_now, may_hold
from gpuyard_daemon.core.tenants.quota import Amounts
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import JobId
from gpuyard_protocol.units import MILLI, format_ms

PREEMPTED = "Preempted"
#: Facts after which a job may stand in line that did not before.
_ARRIVALS = (f.JobAccepted, f.ReplicaWanted, f.JobRequeued, f.JobWoken, f.JobReleased)
#: Facts that move the levels of those who run, or after which somebody runs who did for long before.
_LEVELS_MOVED = frozenset((f.TenantsShifted, f.SizesLearnt, f.PolicySet, f.SuspensionFailed, f.ReplicaResumed))
#: Plans made for one claimant before it has to wait for the next round.
_PLANS_MAX = 4
#: Jobs of one queue that a round looks at.
_OF_ONE_QUEUE_MAX = 32
#: Claimants of a round for whom work may move aside, or is looked for.
_ROOMS_MAX = 4
#: GPUs that may be on their way from one job to another in the smallest of yards, in thousandths.
_MOVING_MIN_MILLI = 8 * MILLI


class Rounds:
    """When rounds are held. Which are, follows from the state; what is kept here only says when to wake up for one."""

    def __init__(self) -> None:
        #: When time alone may make a difference next; 0: never, None: the next period's round finds out.
        self._next_ms: int | None = None
        #: The occupants at the beginning of a period, and which period. Who starts in it is none of them yet; that
        #: tenants' levels moved is seen from the facts; the rest is looked at when it is used.
        self._occupants: tuple[int, list[Occupant]] = (-1, [])
        self._known = Known()
        #: Versions of their nodes when those who can be suspended were last asked whether they still can.
        self._kinds_at: dict[JobId, int] = {}
        #: Where among the occupants those stand who can be suspended, or could.
        self._suspendable: list[int] = []
        #: Where cards are cut by MIG; made when first asked for.
        self._cut_nodes: CutNodes | None = None

    def forget(self) -> None:
        """Levels may have moved in ways that were not seen here."""
        self._occupants = (-1, [])
        self._known.forget()

    def give_up(self, draft: Draft, line: WaitingLine, last_record_ms: int) -> None:
        """Before anybody is placed: give up places in pieces that are no longer worth keeping free."""
        period_ms = draft.now_ms - draft.now_ms % draft.settings.preempt_every_ms
        if period_ms > last_record_ms and any(claim.kind == "drain" for claim in draft.cluster.claims):
            draining.review(draft, line, period_ms)

    def hold(self, draft: Draft, line: WaitingLine, last_record_ms: int) -> None:
        """Let those take others' places who may."""
        cluster, settings = draft.cluster, draft.settings
        if cluster.draining or not len(cluster.running):
            return
        if draft.facts:
            self._next_ms = None
            if not _LEVELS_MOVED.isdisjoint(map(type, draft.facts)):
                self.forget()
        period_ms = draft.now_ms - draft.now_ms % settings.preempt_every_ms
        if is_full := period_ms > last_record_ms or _made_way(draft):
            heads = [queue for _, queue, _ in line.blocked_heads()[: settings.preempt_heads]]
        else:
            heads = _arrived(draft, line)
        if not heads and not len(cluster.claims) and not (is_full and cluster.suspended):
            return
        if self._cut_nodes is None:
            self._cut_nodes = CutNodes(cluster.pool)
        held = _Round(draft, line, self._present(draft, period_ms), self._cut_nodes, period_ms, is_full=is_full)
        is_through = held.hold(heads)
        if is_full and is_through:
            self._next_ms = held.next_ms

    def _present(self, draft: Draft, period_ms: int) -> list[Occupant]:
        """Who of a period's occupants is still there, in the band that it is in now."""
        cluster, settings = draft.cluster, draft.settings
        if is_new := self._occupants[0] != period_ms:
            running = self._known.occupants(cluster, settings, period_ms, settings.preempt_occupants)
            self._occupants = (period_ms, running + shrinking.lent(cluster, settings, period_ms))
            self._kinds_at.clear()
            self._suspendable = [
                place
                for place, each in enumerate(self._occupants[1])
                if each.job.spec.preemption == "suspend" and not each.goes
            ]
        self._renew_kinds(cluster, settings)
        # Their bands were just asked for, or everybody is in one.
        are_known = is_new or (cluster.quota.is_plain and not cluster.services)
        return [
            each if are_known else in_its_band(cluster, settings, each, period_ms)
            for each in self._occupants[1]
            if each.job.state == "running"
            and each.job.attempt == each.attempt
            and (not each.goes or each.job.is_resizable)
        ]

    def _renew_kinds(self, cluster: Cluster, settings: CoreSettings) -> None:
        """Whether somebody can be suspended depends on its node's memory, and so on who came and went there."""
        at_ms, there = self._occupants
        for place in self._suspendable:
            each = there[place]
            if each.job.state == "running":
                version = cluster.pool.spaces[each.job.assignments[0].node].version
                if self._kinds_at.get(each.job.id) != version:
                    self._kinds_at[each.job.id] = version
                    if kind_of(cluster, each.job) != each.kind:
                        there[place] = occupant_of(cluster, settings, each.job, at_ms)

    def next_ms(self, cluster: Cluster, settings: CoreSettings, now_ms: int) -> int | None:
        """When a turn is due for a round; None: there is nobody who could gain by it."""
        nobody_waits = not cluster.waiting and not cluster.suspended
        if cluster.draining or nobody_waits or not len(cluster.running) or self._next_ms == 0:
            return None
        period_ms = settings.preempt_every_ms
        following_ms = now_ms - now_ms % period_ms + period_ms
        if self._next_ms is None:
            return following_ms
        return max(following_ms, -(-self._next_ms // period_ms) * period_ms)


def foresee(draft: Draft, line: WaitingLine, job: Job) -> None:
    """Note on a draft that changes nothing what would be done at once for a job, if it came into line now."""
    cluster = draft.cluster
    if cluster.draining or not len(cluster.running):
        return
    queue, rank = line.queue_of(job), cluster.ranking.rank_of(job, draft.now_ms)
    if not cluster.tenancy.has_room(job.tenant, queue.least_milli(cluster.pool)):
        return
    if any(cluster.ranking.rank_of(first, draft.now_ms) < rank for first in line.first_of(queue, 1)):
        return
    period_ms = draft.now_ms - draft.now_ms % draft.settings.preempt_every_ms
    present = Rounds()._present(draft, period_ms)
    _Round(draft, line, present, CutNodes(cluster.pool), period_ms, is_full=False).serve_newcomer(queue, job, rank)


def _made_way(draft: Draft) -> bool:
    """Somebody who had given way has left in this turn: the next may be told to go."""
    return any(isinstance(fact, f.JobRequeued) and fact.why.code == PREEMPTED for fact in draft.facts)


def _arrived(draft: Draft, line: WaitingLine) -> list[ShapeQueue]:
    """Blocked queues whose heads came into line in this turn, best first."""
    cluster, found = draft.cluster, {}
    for fact in draft.facts:
        if isinstance(fact, _ARRIVALS) and (job := cluster.waiting.get(fact.job)) is not None:
            queue = line.blocked_queue_of(job)
            if queue is not None:
                found[job.id] = (queue, job)
    ranked = sorted(found.values(), key=lambda entry: cluster.ranking.rank_of(entry[1], draft.now_ms))
    return [queue for queue, _ in ranked[: draft.settings.preempt_heads]]


class _Round:
    """One pass over waiting jobs, with the occupants as they were at the beginning of the period."""

    def __init__(
        self,
        draft: Draft,
        line: WaitingLine,
        present: list[Occupant],
        cut_nodes: CutNodes,
        at_ms: int,
        *,
        is_full: bool,
    ) -> None:
        self._draft = draft
        self._line = line
        self._is_full = is_full
        self._at_ms = at_ms
        self._looks = draft.settings.preempt_nodes
        self._occupants = present
        #: Those of them whom any claimant but a floor may take the place of; the highest level among those that may be
        #: exchanged; and whether there are others. None: to be found.
        self._open: tuple[list[Occupant], int, bool] | None = None
        #: Queues of those whom the round was held for.
        self._heads: Sequence[ShapeQueue] = ()
        #: Claimants for whom it may yet be asked whether work could move aside, or a card be kept free.
        self._rooms_left = self._drains_left = _ROOMS_MAX
        #: When it is asked next whether work should move aside for somebody; 0: never.
        self._rooms_from_ms = 0
        #: When it is asked next whether a card should be kept free for somebody; 0: never.
        self._drain_from_ms = 0
        self._cut_nodes, self._cut_looks = cut_nodes, draft.settings.preempt_nodes
        cluster = draft.cluster
        moving = [cluster.leaving.get(number) for claim in cluster.claims for number in claim.evicted]
        self._moving_milli = sum([width_milli(job) for job in moving if job is not None])

    @property
    def next_ms(self) -> int:
        """When time alone makes one of them easier to take; 0: never."""
        moments = [occupant.next_ms for occupant in self._occupants if occupant.next_ms]
        if any(claim.kind == "reserve" for claim in self._draft.cluster.claims):
            moments.append(self._at_ms - self._at_ms % reservations.REPLAN_MS + reservations.REPLAN_MS)
        if any(claim.kind == "drain" for claim in self._draft.cluster.claims):
            moments.append(self._at_ms + 1)
        moments += [at_ms for at_ms in (self._drain_from_ms, self._rooms_from_ms) if at_ms]
        # Whoever waits is lifted by waiting, and may take then what it could not before.
        cluster, now_ms = self._draft.cluster, self._draft.now_ms
        waiting = [job for queue in self._heads for job in self._line.first_of(queue, 1)]
        lifts = [cluster.ranking.standing_of(job, now_ms)[1] for job in [*waiting, *cluster.suspended.values()]]
        return min([*moments, *[at_ms for at_ms in lifts if at_ms]], default=0)

    @property
    def _moving_most(self) -> int:
        """How much may be on its way from one job to another."""
        cluster, settings = self._draft.cluster, self._draft.settings
        return max(_MOVING_MIN_MILLI, cluster.pool.capacity_milli * settings.preempt_moving_permille // 1000)

    def serve_newcomer(self, queue: ShapeQueue, job: Job, rank: Rank) -> None:
        """As `hold`, for a job that does not stand in line yet."""
        if self._moving_milli < self._moving_most or rank.band == FLOOR:
            self._serve(queue, job, rank)

    def hold(self, heads: Sequence[ShapeQueue]) -> bool:
        """Whether all of them were looked at."""
        cluster, most = self._draft.cluster, self._moving_most
        is_through = True
        self._heads = heads
        if self._is_full:
            self._looks = reservations.review(self._draft, self._line, self._occupants, self._at_ms, self._looks)
            self._take_what_is_kept()
        homebound = homing.homebound(cluster, self._draft.now_ms) if self._is_full else []
        for queue in heads:
            is_through = self._send_home(homebound, queue, most) and is_through
            # Of equal jobs one after the other, until one finds nothing.
            for job in self._line.first_of(queue, _OF_ONE_QUEUE_MAX):
                if job.id in cluster.claims:
                    continue
                if self._looks <= 0:
                    return False
                rank = cluster.ranking.rank_of(job, self._draft.now_ms)
                if self._moving_milli >= most and rank.band != FLOOR:
                    is_through = False
                    break
                if not self._serve(queue, job, rank):
                    break
        return self._send_home(homebound, None, most) and is_through

    def _take_what_is_kept(self) -> None:
        """Whoever has a set of places kept takes places after all, once it may: those who hold them have run long
        enough by now, or it has waited beyond all patience for borrowers that nobody may preempt."""
        cluster, now_ms = self._draft.cluster, self._draft.now_ms
        if self._at_ms % reservations.REPLAN_MS >= self._draft.settings.preempt_every_ms:
            # Time alone makes the difference, so it is asked at moments that every core keeps.
            return
        for claim in [claim for claim in cluster.claims if claim.kind == "reserve"]:
            job = cluster.jobs[claim.job]
            rank = cluster.ranking.rank_of(job, now_ms)
            is_forced = self._has_no_patience(job, rank)
            if self._looks > 0 and (is_forced or not self._at_ms % reservations.REPLAN_MS):
                plan = self._plan(self._line.queue_of(job), job, rank)
                if plan is not None:
                    text = "it has waited so long that borrowers leave for it who otherwise need not"
                    why = Why("ClaimForced", text if is_forced else "others may be told to leave for it now")
                    self._draft.add(f.ClaimDropped(job.id, why))
                    self._carry_out(job, rank, plan)

    def _has_no_patience(self, job: Job, rank: Rank) -> bool:
        """Whether borrowers that may not be preempted leave for a job all the same."""
        settings = self._draft.settings
        most_ms = settings.force_nominal_ms if rank.band <= NOMINAL else settings.force_borrowing_ms
        waited_ms = self._at_ms - job.waits_since_ms if job.waits_since_ms else 0
        return rank.band <= BORROWING and waited_ms >= most_ms and not self._draft.cluster.quota.is_plain

    def _send_home(self, homebound: list[tuple[Rank, Job]], before: ShapeQueue | None, most: int) -> bool:
        """Let suspended jobs take back their cards; those only that go before a queue's head. Whether all could."""
        ranking, now_ms = self._draft.cluster.ranking, self._draft.now_ms
        head = next(iter(self._line.first_of(before, 1)), None) if before is not None else None
        while homebound and (before is None or head is None or homebound[0][0] < ranking.rank_of(head, now_ms)):
            if self._looks <= 0 or (self._moving_milli >= most and homebound[0][0].band != FLOOR):
                return False
            rank, job = homebound.pop(0)
            plan = self._plan(None, job, rank)
            if plan is not None:
                self._carry_out(job, rank, plan)
        return True

    def _serve(self, queue: ShapeQueue, job: Job, rank: Rank) -> bool:
        """Whether somebody gave way to a job, or it was let in as a guest."""
        cluster = self._draft.cluster
        if self._rooms_left and could_be_made(cluster, job):
            # Before anybody gives way: whoever moves has room elsewhere and goes on at once, a victim waits.
            self._rooms_left -= 1
            self._looks = make_room(self._draft, self._line, queue, job, self._occupants, self._at_ms, self._looks)
            if (claim := cluster.claims.of(job.id)) is not None:
                self._gone(claim.evicted)
                return True
            again_ms = asked_again_ms(job, self._at_ms)
            self._rooms_from_ms = min(self._rooms_from_ms or again_ms, again_ms)
        plan = self._plan(queue, job, rank)
        if plan is not None:
            self._carry_out(job, rank, plan)
            return True
        if self._is_full and reservations.may_reserve(cluster, rank):
            self._looks = reservations.reserve(self._draft, queue, job, self._occupants, self._at_ms, self._looks)
            return job.id in cluster.claims
        if self._is_full and self._drain(queue, job):
            return True
        return reservations.admit_guest(self._draft, queue, job, rank)

    def _drain(self, queue: ShapeQueue, job: Job) -> bool:
        """Whether a card that is cut in pieces is kept free for a job from now on."""
        cluster, at_ms = self._draft.cluster, self._at_ms
        if not draining.is_of_mig(job) or not self._cut_nodes.may_be:
            return False
        is_time = at_ms % draining.LOOK_MS < self._draft.settings.preempt_every_ms
        if is_time and at_ms >= draining.patient_from_ms(job) and self._drains_left:
            self._drains_left -= 1
            nodes, looks = self._cut_nodes, self._cut_looks
            self._cut_looks = draining.keep_free(self._draft, self._line, nodes, queue, job, at_ms, looks)
            if job.id in cluster.claims:
                return True
        following_ms = max(at_ms + 1, draining.patient_from_ms(job))
        following_ms = -(-following_ms // draining.LOOK_MS) * draining.LOOK_MS
        self._drain_from_ms = min(self._drain_from_ms or following_ms, following_ms)
        return False

    def _plan(self, queue: ShapeQueue | None, job: Job, rank: Rank) -> Plan | None:
        """The cheapest plan whose victims the claimant is entitled to one after the other.

        `queue`: where it stands in line; None: it is suspended, and only its own card will do.
        """
        refused: set[JobId] = set()
        for _ in range(_PLANS_MAX):
            allowed = [each for each in self._allowed(job, rank) if each.job.id not in refused]
            plan = self._search(queue, job, allowed) if allowed and self._looks > 0 else None
            if plan is None:
                return None
            wrong = self._not_entitled(job, rank, plan)
            if wrong is None:
                victims = [each.job for each in plan.victims if not each.goes]
                return plan if self._may_hold(job, plan, victims) else None
            refused.add(wrong)
        return None

    def _may_hold(self, job: Job, plan: Plan, victims: list[Job]) -> bool:
        """Once all those who give way, for it and for others, have left, and the others have come."""
        cluster = self._draft.cluster
        coming = [
            claim
            for claim in cluster.claims
            if claim.kind in ("preempt", "resize") and cluster.jobs[claim.job].tenant == job.tenant
        ]
        going = [*victims, *cluster.leaving.values()]
        less_milli = sum([held_now(cluster, each) for each in going if each.tenant == job.tenant])
        less_milli -= sum([counts_for(cluster.pool, tuple(each.placements)) for each in coming])
        lent: dict[str, Amounts] = {}
        for each in [each for each in plan.victims if each.goes]:
            name, back = cluster.quota.queue_of(each.job), shrinking.given_up(cluster, each)
            lent[name] = sum_of([lent.get(name, {}), back])
            less_milli += sum(back.values()) if each.job.tenant == job.tenant else 0
        also = self._coming(job)
        return may_hold(cluster, job, plan.placements, less_milli=less_milli, victims=going, also=also, lent=lent)

    def _coming(self, job: Job) -> Amounts:
        """What those of a job's queue will hold for whom places are being freed."""
        cluster = self._draft.cluster
        if not cluster.quota.has_quotas:
            return {}
        name, spaces = cluster.quota.queue_of(job), cluster.pool.spaces
        return sum_of(
            [
                amounts_of(spaces[place.node], place.partition)
                for claim in cluster.claims
                if claim.kind in ("preempt", "resize") and cluster.quota.queue_of(cluster.jobs[claim.job]) == name
                for place in claim.placements
                if place.node in spaces
            ]
        )

    def _reclaiming(self, job: Job) -> Reclaiming | None:
        cluster = self._draft.cluster
        if not cluster.quota.has_quotas:
            return None
        reclaiming = Reclaiming(cluster, job, self._coming(job))
        for leaving in cluster.leaving.values():
            reclaiming.take(leaving)
        return reclaiming

    def _search(self, queue: ShapeQueue | None, job: Job, allowed: list[Occupant]) -> Plan | None:
        cluster = self._draft.cluster
        if queue is None:
            return homing.HomeSearch(cluster.pool, job, allowed, cluster.leaving.values()).single()
        search = Search(cluster.pool, queue.shape, job, allowed, cluster.leaving.values(), self._looks)
        if queue.shape.replicas == 1:
            plan = search.single()
        else:
            plan = search.gang([space.node.id for space in queue.spanning.in_order(cluster.pool)])
        self._looks = search.looks
        return plan

    def _allowed(self, job: Job, rank: Rank) -> list[Occupant]:
        """Whom the claimant could take the place of, each for itself."""
        cluster = self._draft.cluster
        # Its cost can only raise a claimant's level: whoever is not above it even for nothing need not be looked at.
        least = (exchange.TOP if rank.level == TOP_LEVEL else rank.level) + exchange.MARGIN
        allowed: list[Occupant] = []
        if not (candidates := self._candidates(rank, least)):
            return allowed
        size = cluster.ranking.size_of(job, self._draft.now_ms)
        reclaiming = self._reclaiming(job)
        forced = self._has_no_patience(job, rank)
        for occupant in candidates:
            is_larger = occupant.exchangeable and occupant.level >= least
            if occupant.goes:
                if occupant.preemptible and rank.band <= cluster.ranking.band_of(occupant.job):
                    allowed.append(occupant)
            elif (
                occupant.preemptible
                and (
                    (is_larger and self._may_exchange(rank, size, occupant))
                    or self._may_reclaim(rank, occupant, reclaiming)
                )
            ) or (forced and occupant.band >= BORROWING and self._may_reclaim(rank, occupant, reclaiming)):
                allowed.append(occupant)
        return allowed

    def _candidates(self, rank: Rank, least: int) -> list[Occupant]:
        """Occupants, without those whom nobody of a rank could take the place of, whatever else is asked."""
        if rank.band == FLOOR:
            return self._occupants
        if self._open is None:
            reclaim_from_ms = self._at_ms - self._draft.settings.reclaim_after_ms
            others = [
                each.goes or (each.band >= BORROWING and each.job.started_ms <= reclaim_from_ms)
                for each in self._occupants
            ]
            found = [each for each, other in zip(self._occupants, others, strict=True) if other or each.exchangeable]
            highest = max([each.level for each in found if each.exchangeable], default=TOP_LEVEL)
            self._open = (found, highest, any(others))
        found, highest, are_others = self._open
        return found if are_others or highest >= least else []

    def _may_exchange(self, rank: Rank, size: int, occupant: Occupant) -> bool:
        at_top = rank.level == TOP_LEVEL
        return occupant.band == rank.band and exchange.may_take(
            size, rank.level, occupant.level, occupant.cost, at_top=at_top
        )

    def _may_reclaim(self, rank: Rank, occupant: Occupant, reclaiming: Reclaiming | None) -> bool:
        """The floor of a service takes from whoever is not one; of others, quota says who may have what back."""
        ran_ms = self._at_ms - occupant.job.started_ms
        if rank.band == FLOOR:
            return occupant.band > FLOOR and ran_ms >= PROBE_MS
        if reclaiming is None or occupant.band < max(rank.band, BORROWING):
            return False
        return ran_ms >= self._draft.settings.reclaim_after_ms and reclaiming.may_take(occupant.job)

    def _not_entitled(self, job: Job, rank: Rank, plan: Plan) -> JobId | None:
        """The first victim that cannot go, or that quota does not give up, once those before it have gone; or None."""
        cluster = self._draft.cluster
        softly: list[Job] = []
        for each in plan.victims:
            if each.kind == "suspend":
                if not can_be_suspended(cluster, each.job, softly):
                    return each.job.id
                softly.append(each.job)
        reclaiming = self._reclaiming(job)
        if reclaiming is None:
            return None
        size = cluster.ranking.size_of(job, self._draft.now_ms)
        for each in plan.victims:
            if each.goes:
                continue
            exchanges = each.exchangeable and self._may_exchange(rank, size, each)
            if not exchanges and not self._may_reclaim(rank, each, reclaiming):
                return each.job.id
            reclaiming.take(each.job)
        return None

    def _carry_out(self, job: Job, rank: Rank, plan: Plan) -> None:
        size = self._draft.cluster.ranking.size_of(job, self._draft.now_ms)
        evictions = tuple(
            [
                f.Eviction(
                    each.job.id,
                    each.kind,
                    each.overhead_ms,
                    each.lost_milli_ms,
                    _why(job, rank, each, exchanges=each.exchangeable and self._may_exchange(rank, size, each)),
                    keeps=each.keeps,
                )
                for each in plan.victims
            ]
        )
        self._draft.add(f.ClaimMade(job.id, "preempt", plan.placements, evictions))
        self._gone([each.job.id for each in plan.victims])

    def _gone(self, victims: list[JobId]) -> None:
        self._occupants = [each for each in self._occupants if each.job.id not in victims]
        self._open = None
        jobs = self._draft.cluster.jobs
        self._moving_milli += sum([width_milli(jobs[number]) for number in victims])


def _why(job: Job, rank: Rank, victim: Occupant, *, exchanges: bool) -> Why:
    if victim.goes:
        return shrinking.why_shrunk(job, victim)
    cost = f"it costs {format_ms(victim.overhead_ms // 1000 * 1000)} of run time"
    if rank.band == FLOOR:
        return Why(PREEMPTED, f"preempted by job {job.id}, which a service is never to be without; {cost}")
    if not victim.preemptible:
        return Why(PREEMPTED, f"preempted by job {job.id}, which has waited too long for what this borrows; {cost}")
    if not exchanges:
        return Why(PREEMPTED, f"preempted by job {job.id}, whose queue takes back its part of the quota; {cost}")
    levels = f"which is at level {rank.level} where this is at {victim.level}"
    return Why(PREEMPTED, f"preempted by job {job.id}, {levels}; {cost}")
