"""A twin that judges: it takes over records fact by fact, and looks at each decision just before it comes true.

What it asks is said again from the rules, not from the code that decides: who may be told to go and how, that nobody
goes without need, that nobody passes an equal who goes first, that what is kept is kept for few, that elastic jobs get
what nobody waits for and give it back. It sees the state in
which a decision was made, so nothing has to be guessed from what it led to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.consolidation import within_budget
from gpuyard_daemon.core.preempting.occupants import restart_of
from gpuyard_daemon.core.preempting.reclaim import Reclaiming
from gpuyard_daemon.core.preempting.reservations import RESERVATIONS_MAX
from gpuyard_daemon.core.queueing.priority import PROBE_MS
from gpuyard_daemon.core.queueing.ranking import BORROWING, FLOOR, NOMINAL, TOP_LEVEL, ran_ms
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import LEAVING, Assignment, Claim, Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.turn import Record, Turn
from gpuyard_daemon.core.tenants.limits import may_hold, within_quota
from gpuyard_daemon.core.tenants.tenancy import held_by, least_held
from gpuyard_protocol.names import AssignmentKey, JobId, NodeId
from gpuyard_protocol.resources import NoGpu, TimeSliceShare, WholeCards, devices_of
from support.builders import CoreHarness

#: In the reason of those who were let in to leave last.
_GUEST = "kept before it came"


class Judge(Scheduler):
    """Applies records as any core does; `AssertionError` at the fact that breaks a rule."""

    def __init__(self, settings: CoreSettings | None = None) -> None:
        super().__init__(settings)
        #: When a job was evicted for which other, the last time.
        self.evicted: dict[tuple[JobId, JobId], int] = {}
        #: How often each kind of decision was judged: a judge that is never asked proves nothing.
        self.judged: dict[str, int] = {}
        #: Whose set is being moved elsewhere; its band may have become that of another since it was made.
        self._moved: JobId = 0

    def apply(self, record: Record) -> Turn:
        assert record.turn == self.turn + 1
        effects = Effects()
        for fact in record.facts:
            match fact:
                case f.JobPlaced():
                    self._placed(fact, record.now_ms)
                case f.ClaimMade():
                    self._claimed(fact, record.now_ms)
                case f.JobResuming():
                    self._resumes(fact)
                case f.JobWidened():
                    self._widened(fact, record.now_ms)
                case f.JobResizing():
                    self._resized(fact, record.now_ms)
                case f.ClaimDropped():
                    self._moved = fact.job if fact.why.code == "ClaimMoved" else 0
                case _:
                    pass
            self.cluster.apply_fact(fact, record.now_ms, effects)
        self._note(record)
        return Turn(record=record, orders=effects.orders(), notices=effects.notices())

    def _count(self, what: str) -> None:
        self.judged[what] = self.judged.get(what, 0) + 1

    # --- places ------------------------------------------------------------------------------------------------------

    def _placed(self, fact: f.JobPlaced, now_ms: int) -> None:
        cluster, job = self.cluster, self.cluster.jobs[fact.job]
        assert job.id in cluster.waiting, f"job {job.id} starts and was not in line: {job.state}"
        assert len({placement.node for placement in fact.placements} & self._shut()) == 0, "on a node that takes none"
        own = Claim(job.id, "preempt", list(fact.placements), now_ms)
        assert self._fits(own), f"job {job.id} is put where there is no room: {fact.placements}"
        if fact.guest_of:
            self._count("guest")
            assert cluster.claims.records[fact.guest_of].kind == "reserve"
            assert job.spec.preemption != "never", "a guest must be able to leave"
            return
        claim = cluster.claims.of(job.id)
        if claim is not None and list(fact.placements) == claim.placements:
            assert fact.resized == (claim.kind == "resize")
            self._count("kept place")
            return
        assert len(fact.placements) == job.spec.least_replicas, "a job starts with its least"
        self._count("free place")
        mine = cluster.ranking.rank_of(job, now_ms)
        for other in cluster.waiting.values():
            if other.id not in cluster.claims and self._is_equal(job, other):
                theirs = cluster.ranking.rank_of(other, now_ms)
                assert mine <= theirs, f"job {job.id} {mine} starts before its equal {other.id} {theirs}"

    def _is_equal(self, job: Job, other: Job) -> bool:
        """Whether two jobs fit the same places, and the same limits hold for both."""
        if (job.spec.need, job.spec.least_replicas) != (other.spec.need, other.spec.least_replicas):
            return False
        if (job.tenant, job.user, job.spec.queue) == (other.tenant, other.user, other.spec.queue):
            return True
        tenancy, quota = self.cluster.tenancy, self.cluster.quota
        limited = tenancy.is_limited(job.tenant) or tenancy.is_limited(other.tenant) or not quota.is_plain
        return bool(job.spec.need.gpus) and not limited

    def _shut(self) -> set[NodeId]:
        return {node.id for node in self.cluster.nodes.values() if node.state != "ready" or node.cordoned_by}

    def _resumes(self, fact: f.JobResuming) -> None:
        self._count("resumption")
        job = self.cluster.jobs[fact.job]
        (assignment,) = job.assignments
        assert not job.held_by, f"job {job.id} is to stay suspended"
        assert assignment.home is not None
        space = self.cluster.pool.spaces[assignment.node]
        cards = [space.by_uuid[uuid] for uuid in devices_of(assignment.home)]
        assert all(card.takes_work and card.could_take(assignment.home, job.tenant) for card in cards)
        assert space.cpu_free_milli >= job.spec.need.cpu_milli

    # --- sizes -------------------------------------------------------------------------------------------------------

    def _widened(self, fact: f.JobWidened, now_ms: int) -> None:
        self._count("wide start")
        job = self.cluster.jobs[fact.job]
        assert job.is_elastic
        assert job.state == "starting"
        assert len(job.assignments) + len(fact.placements) <= job.most_replicas
        self._lent(job, fact.placements, now_ms)

    def _resized(self, fact: f.JobResizing, now_ms: int) -> None:
        cluster, job = self.cluster, self.cluster.jobs[fact.job]
        assert job.is_resizable
        has = [f.Placement(each.node, each.partition) for each in job.assignments]
        ran_ms = now_ms - job.started_ms
        assert job.spec.least_replicas <= len(fact.placements) <= job.most_replicas or len(has) > job.most_replicas
        if len(fact.placements) < len(has):
            assert list(fact.placements) == has[: len(fact.placements)]
            if len(fact.placements) == job.most_replicas and job.scaled_ms:
                self._count("shrunk by its owner")
                return
            self._count("shrunk for its tenant's limit")
            assert job.spec.preemption != "never"
            assert cluster.tenancy.is_limited(job.tenant)
            assert ran_ms >= exchange.least_run_ms(restart_of(cluster, self.settings, job), job.resizes)
            return
        assert list(fact.placements[: len(has)]) == has
        more = fact.placements[len(has) :]
        self._lent(job, more, now_ms)
        if job.scaled_ms:
            self._count("grown for its owner")
            return
        self._count("grown")
        assert job.spec.preemption == "checkpoint", "what saves nothing does not grow by itself"
        restart_ms = restart_of(cluster, self.settings, job)
        assert ran_ms >= exchange.least_run_ms(restart_ms, job.resizes)
        assert (ran_ms + 1) * len(more) >= exchange.COST_WEIGHT * restart_ms * len(fact.placements)

    def _lent(self, job: Job, more: tuple[f.Placement, ...], now_ms: int) -> None:
        """Beyond its least: on GPUs that nobody waits for and that nobody is to come back to."""
        cluster = self.cluster
        nodes = {place.node for place in more}
        assert not nodes & self._shut()
        assert self._fits(Claim(job.id, "resize", list(more), now_ms))
        assert may_hold(cluster, job, more), f"job {job.id} gets more than its tenant may hold"
        assert not nodes & {each.assignments[0].node for each in cluster.suspended.values()}
        for other in cluster.waiting.values():
            if other is not job and not self._is_at_limit(other):
                need = other.spec.need
                shape = Shape(need, 1, other.tenant, other.user)
                wanted = [name for name in nodes if shape.eligible(cluster.pool.spaces[name])[0] is None]
                assert not wanted, f"job {other.id} has a use for {wanted}, and job {job.id} is lent places there"

    def _is_at_limit(self, job: Job) -> bool:
        cluster = self.cluster
        if not cluster.tenancy.has_room(job.tenant, least_held(job.spec.need, job.spec.least_replicas)):
            return True
        claim = cluster.claims.of(job.id)
        # What it waits for is kept for it already.
        return (claim is not None and claim.kind == "resize") or within_quota(cluster, job) is not None

    # --- claims ------------------------------------------------------------------------------------------------------

    def _claimed(self, fact: f.ClaimMade, now_ms: int) -> None:
        cluster, job = self.cluster, self.cluster.jobs[fact.job]
        assert job.id in cluster.waiting or job.id in cluster.suspended
        assert job.id not in cluster.claims
        assert len({placement.node for placement in fact.placements} & self._shut()) == 0
        if fact.kind == "reserve":
            self._reserved(fact, now_ms)
        if fact.kind != "preempt":
            self._count(fact.kind)
            assert not fact.evictions, "nobody is told to go for a place that is only kept"
            return
        if job.id in cluster.suspended:
            self._count("card taken back")
            (assignment,) = job.assignments
            assert [(place.node, place.partition) for place in fact.placements] == [(assignment.node, assignment.home)]
        victims = [cluster.jobs[eviction.job] for eviction in fact.evictions]
        assert len({victim.id for victim in victims}) == len(victims)
        assert all(not (victim.verdict or victim.id == job.id) for victim in victims)
        taken: list[Job] = []
        softly: list[Job] = []
        for eviction, victim in zip(fact.evictions, victims, strict=True):
            if eviction.kind == "shrink":
                self._shrinks(job, victim, eviction, now_ms)
                continue
            self._ladder(job, eviction, victim, softly, now_ms)
            if eviction.kind == "suspend":
                softly.append(victim)
            if eviction.moved:
                self._count("move")
                assert within_budget(cluster, sum(each.lost_milli_ms for each in fact.evictions))
            elif _GUEST in eviction.why.text:
                self._count("guest sent away")
            else:
                self._count(f"eviction by {eviction.kind}")
                self._entitled(job, victim, eviction, taken, now_ms)
                self._no_circle(job, victim, now_ms)
            taken.append(victim)
        self._needed(fact, victims, now_ms)
        self._within_limits(fact, job, victims)

    def _shrinks(self, job: Job, victim: Job, eviction: f.Eviction, now_ms: int) -> None:
        """What it has above its least is whosever waits in its band or a better one, after a while."""
        self._count("eviction by shrink")
        assert victim.spec.preemption != "never"
        assert victim.is_resizable
        assert len(eviction.keeps) == victim.spec.least_replicas < len(victim.assignments)
        assert len(_stay(victim, eviction)) == len(eviction.keeps), "it keeps what it has"
        assert self.cluster.ranking.band_of(job) <= self.cluster.ranking.band_of(victim)
        restart_ms = restart_of(self.cluster, self.settings, victim)
        assert now_ms - victim.started_ms >= exchange.least_run_ms(restart_ms, victim.resizes)

    def _reserved(self, fact: f.ClaimMade, now_ms: int) -> None:
        cluster = self.cluster
        rank = cluster.ranking.rank_of(cluster.jobs[fact.job], now_ms)
        kept = [cluster.jobs[claim.job] for claim in cluster.claims if claim.kind == "reserve"]
        assert len(kept) < RESERVATIONS_MAX
        if fact.job != self._moved:
            assert rank.level == TOP_LEVEL or rank.band == FLOOR
            assert rank.band not in [cluster.ranking.band_of(owner) for owner in kept], "two owners in one band"

    def _ladder(self, job: Job, eviction: f.Eviction, victim: Job, before: Iterable[Job], now_ms: int) -> None:
        """Each gives way as it asked to: by the softest rung that holds."""
        if victim.spec.preemption == "never":
            self._count("eviction by force")
            assert self._out_of_patience(job, now_ms), f"job {victim.id} is never to be preempted"
            assert self.cluster.ranking.band_of(victim) >= BORROWING, "only what is borrowed is taken by force"
        if victim.state == "starting":
            # A guest whose process has not come up has nothing to save.
            assert eviction.kind == "requeue"
        elif victim.spec.preemption == "checkpoint":
            assert eviction.kind == "checkpoint"
        elif eviction.kind == "suspend":
            assert self._can_be_suspended(victim, before), f"job {victim.id} cannot be suspended: no memory for it"
        else:
            assert eviction.kind == "requeue"
            if victim.state == "running" and not eviction.moved:
                assert not self._can_be_suspended(victim, before), f"job {victim.id} could have been suspended"

    def _out_of_patience(self, job: Job, now_ms: int) -> bool:
        nominal = self.cluster.ranking.band_of(job) <= NOMINAL
        least_ms = self.settings.force_nominal_ms if nominal else self.settings.force_borrowing_ms
        return now_ms - job.waits_since_ms >= least_ms

    def _can_be_suspended(self, job: Job, before: Iterable[Job]) -> bool:
        if job.spec.preemption != "suspend" or job.refused_suspension or len(job.assignments) != 1 or job.service:
            return False
        (assignment,) = job.assignments
        space = self.cluster.pool.spaces[assignment.node]
        image = self._image_mib(space, assignment)
        images = sum(
            [
                each.image_mib if each.home is not None else self._image_mib(space, each)
                for each in space.assignments.values()
                if each.home is not None or each.state == "suspending"
            ]
        )
        images += sum(
            self._image_mib(space, other.assignments[0])
            for other in before
            if other.assignments[0].node == assignment.node
        )
        inventory = space.node.inventory
        room = inventory.suspend_mib if inventory else 0
        return 0 < image <= space.memory_free_mib and images + image <= room

    def _image_mib(self, space: NodeSpace, assignment: Assignment) -> int:
        match assignment.partition:
            case WholeCards(devices=(uuid,)):
                return space.by_uuid[uuid].device.memory_mib if uuid in space.by_uuid else 0
            case TimeSliceShare(memory_mib=memory):
                return memory
            case _:
                return 0

    def _entitled(self, job: Job, victim: Job, eviction: f.Eviction, taken: list[Job], now_ms: int) -> None:
        cluster, settings = self.cluster, self.settings
        assert victim.state == "running"
        at_ms = now_ms - now_ms % settings.preempt_every_ms
        ranking = cluster.ranking
        mine = ranking.rank_of(job, now_ms)
        theirs = ranking.rank_of(victim, at_ms)
        if mine.band == FLOOR and theirs.band > FLOOR and at_ms - victim.started_ms >= PROBE_MS:
            return
        if mine.band == theirs.band and not victim.service and self._may_exchange(job, victim, eviction, now_ms, at_ms):
            assert mine < theirs, "a victim's key is larger"
            return
        assert at_ms - victim.started_ms >= settings.reclaim_after_ms, f"job {victim.id} was let run for too short"
        assert theirs.band >= BORROWING, f"job {victim.id} holds what its queue is guaranteed"
        assert theirs.band >= mine.band
        reclaiming = Reclaiming(cluster, job)
        for other in [*cluster.leaving.values(), *taken]:
            reclaiming.take(other)
        assert reclaiming.may_take(victim), f"quota does not give job {job.id} what job {victim.id} holds"

    def _may_exchange(self, job: Job, victim: Job, eviction: f.Eviction, now_ms: int, at_ms: int) -> bool:
        start_ms = restart_of(self.cluster, self.settings, victim) if eviction.kind == "checkpoint" else 0
        if at_ms - max(victim.started_ms, victim.runs_since_ms) < exchange.least_attempt_ms(start_ms):
            return False
        useful_ms = ran_ms(victim, at_ms) - victim.overhead_ms
        if victim.preemptions and victim.overhead_ms * exchange.CREDIT_DIVISOR > useful_ms:
            return False
        ranking = self.cluster.ranking
        mine, theirs = ranking.rank_of(job, now_ms), ranking.rank_of(victim, at_ms)
        cost, size = eviction.lost_milli_ms // 1000, ranking.size_of(job, now_ms)
        return exchange.may_take(size, mine.level, theirs.level, cost, at_top=mine.level == TOP_LEVEL)

    def _no_circle(self, job: Job, victim: Job, now_ms: int) -> None:
        back = self.evicted.get((job.id, victim.id))
        assert back is None or now_ms - back >= PROBE_MS, f"jobs {job.id} and {victim.id} evict each other"
        self.evicted[victim.id, job.id] = now_ms

    def _needed(self, fact: f.ClaimMade, victims: list[Job], now_ms: int) -> None:
        """Nobody goes who could stay, and what they leave is enough."""
        claim = Claim(fact.job, fact.kind, list(fact.placements), now_ms)
        others = [other for other in self.cluster.claims if other.kind in ("preempt", "resize")]
        nodes = {placement.node for placement in fact.placements}
        if any(place.node in nodes for other in self.cluster.claims for place in other.placements):
            # Who has to go depends on what is kept for others then: only that all of it fits is for `invariants`.
            return
        softly = {eviction.job for eviction in fact.evictions if eviction.kind == "suspend"}
        going = [_going(victim, eviction) for victim, eviction in zip(victims, fact.evictions, strict=True)]
        gone = set().union(*going)
        assert self._fits(claim, gone=gone, beside=others, softly=softly), f"not enough leaves for job {fact.job}"
        for mine, eviction in zip(going, fact.evictions, strict=True):
            if _GUEST not in eviction.why.text:
                assert not self._fits(claim, gone=gone - mine, beside=others, softly=softly), (
                    f"job {eviction.job} goes for job {fact.job} without need"
                )

    def _within_limits(self, fact: f.ClaimMade, job: Job, victims: list[Job]) -> None:
        """With those gone who leave for anybody, the claimant's queue may hold it: nominal and what it may borrow."""
        cluster = self.cluster
        tenancy = cluster.tenancy
        if job.tenant in [other.tenant for other in cluster.leaving.values()] or cluster.claims.records:
            return  # who comes and goes first is not for one claim to say
        limit = dict(tenancy.policy.tenants).get(job.tenant, tenancy.policy.default).gpus_max_milli
        if limit:
            held = tenancy.held_milli.get(job.tenant, 0)
            less = sum(
                self._width(each, _going(each, eviction))
                for each, eviction in zip(victims, fact.evictions, strict=True)
                if each.tenant == job.tenant
            )
            assert held - less + self._asked(job) <= limit, f"tenant {job.tenant} would be over its limit"

    def _width(self, job: Job, going: set[AssignmentKey]) -> int:
        spaces = self.cluster.pool.spaces
        return sum([held_by(spaces[each.node], each.partition) for each in job.assignments if each.key in going])

    def _asked(self, job: Job) -> int:
        return 1000 * job.spec.need.gpus * job.spec.least_replicas

    # --- trying it out -----------------------------------------------------------------------------------------------

    def _fits(
        self,
        claim: Claim,
        *,
        gone: set[AssignmentKey] | None = None,
        beside: Iterable[Claim] = (),
        softly: Iterable[JobId] = (),
    ) -> bool:
        """Whether places are free: now, or once some replicas have gone, and whoever leaves anyway."""
        cluster = self.cluster
        leaving = gone or set()
        soft = set(softly)
        claims = [*beside, claim]
        for node in dict.fromkeys([placement.node for placement in claim.placements]):
            space = cluster.pool.spaces[node].copy(with_holders=True)
            for key, assignment in cluster.pool.spaces[node].assignments.items():
                if key in leaving or (gone is not None and assignment.state in LEAVING):
                    memory_mib = space.amounts[key][1]
                    image = self._image_mib(space, assignment)
                    space.give(key, assignment.partition)
                    if key.job in soft:
                        space.take(key, NoGpu(), cluster.jobs[key.job].tenant, 0, memory_mib + image)
            for number, each in enumerate(claims):
                owner = cluster.jobs[each.job]
                for replica, placement in enumerate(each.placements):
                    if placement.node == node and not _take(space, owner, placement, number, replica):
                        return False
        return True


def _stay(victim: Job, eviction: f.Eviction) -> set[AssignmentKey]:
    """Replicas of one that shrinks whose places it keeps."""
    keeps = Counter(eviction.keeps)
    stay = set()
    for each in victim.assignments:
        place = f.Placement(each.node, each.partition)
        if keeps[place]:
            keeps[place] -= 1
            stay.add(each.key)
    return stay


def _going(victim: Job, eviction: f.Eviction) -> set[AssignmentKey]:
    """What leaves its place for good."""
    stay = _stay(victim, eviction) if eviction.kind == "shrink" else set()
    return {each.key for each in victim.assignments if each.is_live and each.key not in stay}


def _take(space: NodeSpace, owner: Job, placement: f.Placement, number: int, replica: int) -> bool:
    need = owner.spec.need
    memory_mib = 0 if owner.state == "suspended" else need.memory_mib
    if space.cpu_free_milli < need.cpu_milli or space.memory_free_mib < memory_mib:
        return False
    cards = [space.by_uuid.get(uuid) for uuid in devices_of(placement.partition)]
    if any(card is None or not card.could_take(placement.partition, owner.tenant) for card in cards):
        return False
    key = AssignmentKey(-owner.id, number, replica)
    space.take(key, placement.partition, owner.tenant, need.cpu_milli, memory_mib)
    return True


class JudgedHarness(CoreHarness):
    """A harness whose twin judges every decision."""

    def __init__(self, settings: CoreSettings | None = None, *, restart_every: int = 0) -> None:
        super().__init__(settings, restart_every=restart_every)
        self.twin: Judge = Judge(self.settings)
