"""A job's place among all others: key (band, level, sequence), smaller first, from the state and the time alone.

The level is half an octave of GPU time: what the job is expected to need while it has had less, else what it has had
(`priority` holds the arithmetic). Terms move it: a tenant above its share sinks, waiting and a near deadline lift, and
so does a user's class, whose usage is charged accordingly. Jobs of one level go in the order of their numbers.

Nothing here is kept: whatever a key rests on stands in the records of `model` (since when a job waits, how long its
attempts ran, what was expected of it at acceptance, its tenant's shift), so that a restored core ranks as the one
before it. `order` keeps the jobs that wait in buckets of equal level and asks here only when one comes, or when
`next_change_ms` says that time moves it.

Above all other levels stands the top. A job reaches it by waiting only, whoever its tenant is, in a time bounded by its
own size (`priority.top_after_ms`, with the proof); there the order is first come, first served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuyard_daemon.core.placing.scoring import round_rank
from gpuyard_daemon.core.queueing import priority, promises
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import amounts_of, wanted_by
from gpuyard_daemon.core.tenants.quota import Amounts
from gpuyard_protocol.names import JobId
from gpuyard_protocol.resources import ResourceNeed
from gpuyard_protocol.units import MILLI

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

#: Floors of services; within quota, or no quota; borrowing; whoever takes what is left.
FLOOR, NOMINAL, BORROWING, SCAVENGING = range(4)
_WANTS_MAX = 4096
#: Smaller than any sum of terms.
TOP_LEVEL = -64
#: Lifts by waiting come at multiples of this time only, so that a hundred thousand waiting jobs wake the yard seldom.
LIFT_GRID_MS = 8192
#: In a sequence, from the right: the job's number, its turn among those of one moment, and the moment.
_NUMBER_BITS = 48
_TURN_BITS = 2
_MOMENT_BITS = 44
_SEQUENCE_BITS = _NUMBER_BITS + _TURN_BITS + _MOMENT_BITS
_LEVEL_BITS = 8
_LEVEL_OFFSET = 128
#: Compute of a share that is asked for by memory alone, per GiB: a card is taken to have 80.
_MILLI_PER_GIB = 13
#: A job is late by as much of the expected run time before that counts as wrong.
_LATE_PART = 4
#: Slices of compute on a card that can be cut into instances.
_MIG_SLICES = 7


class Rank(NamedTuple):
    """Smaller goes first."""

    band: int
    level: int
    #: First come, first served; of those who came at once, those first who are placed best before the others.
    sequence: int

    @property
    def key(self) -> int:
        """The same order in one integer."""
        return packed(*self)

    @property
    def job(self) -> JobId:
        return number_in(self.sequence)


def packed(band: int, level: int, sequence: int) -> int:
    """A rank in one integer."""
    return (band << _LEVEL_BITS | (level + _LEVEL_OFFSET)) << _SEQUENCE_BITS | sequence


def band_in(key: int) -> int:
    """The band of a packed rank."""
    return key >> _LEVEL_BITS + _SEQUENCE_BITS


def in_band(key: int, band: int) -> int:
    """The same packed rank in another band."""
    return key + (band - band_in(key) << _LEVEL_BITS + _SEQUENCE_BITS)


def number_in(sequence: int) -> JobId:
    """Whose sequence it is."""
    return sequence & (1 << _NUMBER_BITS) - 1


def sequence_of(job: Job) -> int:
    turn = round_rank(job.spec.least_replicas * job.spec.need.gpus)
    return (job.submitted_ms << _TURN_BITS | turn) << _NUMBER_BITS | job.id


class RankTerms(NamedTuple):
    """What a rank is made of. Levels are half octaves: two are a factor of 2 in size."""

    band: int
    #: Of the size.
    natural: int
    #: Levels that the tenant's usage against its share sinks (or, below 0, lifts) the job.
    tenant_shift: int
    #: Levels lifted by waiting.
    aging: int
    #: Levels lifted by a near deadline.
    deadline: int
    #: The user's class, -2 to 2; each step lifts by two octaves and doubles what the tenant is charged.
    user_class: int
    #: Waited long enough to go before everybody who has not.
    at_top: bool
    #: The size that decides, and where it comes from: `estimate`, `history`, `attained`, `probe`, `service`.
    size_gpu_ms: int
    size_from: str
    #: GPU time it has had.
    attained_gpu_ms: int

    @property
    def level(self) -> int:
        if self.at_top:
            return TOP_LEVEL
        lifted = self.aging + self.deadline + priority.CLASS_LEVELS * self.user_class
        return self.natural + self.tenant_shift - lifted


class Ranking:
    """Keys of jobs that wait or run."""

    __slots__ = ("_cluster", "_wants", "_wants_version")

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        #: Answers of `wanted`, for these inventories.
        self._wants: dict[tuple[ResourceNeed, int], tuple[Amounts, ...]] = {}
        self._wants_version = -1

    def rank_of(self, job: Job, now_ms: int) -> Rank:
        return Rank(self.band_of(job), self.level_of(job, now_ms), sequence_of(job))

    def level_of(self, job: Job, now_ms: int) -> int:
        """The level that `terms_of` explains."""
        natural = job.level if job.waits_since_ms else priority.natural_level(self._size(job, now_ms)[0])
        aging, at_top = self._lifts(job, natural, now_ms)
        if at_top:
            return TOP_LEVEL
        lifted = aging + priority.CLASS_LEVELS * job.spec.priority
        if job.promised:
            lifted += promises.lifts(job, ran_ms(job, now_ms), now_ms)
        return priority.shifted(natural - lifted, self.shift_of(job))

    def terms_of(self, job: Job, now_ms: int) -> RankTerms:
        """Every term of a job's key; also of a job that the core does not know (yet)."""
        size, size_from = self._size(job, now_ms)
        natural = job.level if job.waits_since_ms else priority.natural_level(size)
        aging, at_top = self._lifts(job, natural, now_ms)
        deadline = promises.lifts(job, ran_ms(job, now_ms), now_ms)
        unshifted = natural - aging - deadline - priority.CLASS_LEVELS * job.spec.priority
        return RankTerms(
            band=self.band_of(job),
            natural=natural,
            tenant_shift=priority.shifted(unshifted, self.shift_of(job)) - unshifted,
            aging=aging,
            deadline=deadline,
            user_class=job.spec.priority,
            at_top=at_top,
            size_gpu_ms=size,
            size_from=size_from,
            attained_gpu_ms=self.attained(job, now_ms),
        )

    def standing_of(self, job: Job, now_ms: int) -> tuple[int, int]:
        """(level without the tenant's shift, when time moves it) of a job in line; 0: it never does."""
        lifted, at_top = self._lifts(job, job.level, now_ms)
        if at_top:
            return TOP_LEVEL, 0
        level, moves_ms = (
            job.level - lifted - priority.CLASS_LEVELS * job.spec.priority,
            self._next_lift_ms(job, lifted),
        )
        if job.promised:
            ran = ran_ms(job, now_ms)
            level -= promises.lifts(job, ran, now_ms)
            moves_ms = min(moves_ms, promises.next_step_ms(job, ran, now_ms) or moves_ms)
        return level, moves_ms

    # --- what time does not move -------------------------------------------------------------------------------------

    def band_of(self, job: Job) -> int:
        """The band that a job would start in, or runs in."""
        cluster = self._cluster
        if job.service and self._is_floor(job):
            return FLOOR
        quota = cluster.quota
        if quota.is_plain:
            return NOMINAL
        name = quota.queue_of(job)
        if quota.is_scavenger(name):
            return SCAVENGING
        if job.live:
            spaces = cluster.pool.spaces
            held = [amounts_of(spaces[each.node], each.partition) for each in job.assignments if each.is_live]
            within = all(quota.within_nominal(name, amounts, held=True) for amounts in held)
        else:
            within = any(quota.within_nominal(name, amounts) for amounts in self.wanted(job)) or not width_milli(job)
        return NOMINAL if within else BORROWING

    def _is_floor(self, job: Job) -> bool:
        """Without it its service would have fewer replicas than it is never to fall below."""
        key = (job.tenant, job.service)
        service = self._cluster.services.get(key)
        if service is None or job.generation != service.generation:
            return False
        others = [
            other for other in self._cluster.service_jobs.get(key, {}).values() if other.live and other.id != job.id
        ]
        if job.live:
            # The oldest are the floor.
            others = [other for other in others if other.id < job.id]
        return len(others) < service.spec.min_replicas

    def wanted(self, job: Job) -> tuple[Amounts, ...]:
        """What a job will count for at least against quotas, for each model of card that could serve it."""
        return self.wanted_by(job.spec.need, job.spec.least_replicas)

    def wanted_by(self, need: ResourceNeed, replicas: int) -> tuple[Amounts, ...]:
        """The same for a request."""
        pool = self._cluster.pool
        if self._wants_version != pool.inventory_version or len(self._wants) > _WANTS_MAX:
            self._wants.clear()
            self._wants_version = pool.inventory_version
        key = (need, replicas)
        found = self._wants.get(key)
        if found is None:
            found = self._wants[key] = wanted_by(pool, *key)
        return found

    def shift_of(self, job: Job) -> int:
        """Levels by which its tenant's large jobs sink for its usage (`priority.shifted`: and a smaller one)."""
        return self._cluster.fairness.shift(job.tenant)

    def natural_of(self, job: Job, now_ms: int) -> int:
        """The level of a job's size."""
        if not job.attempt and job.expected_from != "estimate" and width_milli(job) <= priority.PROBE_GPUS * MILLI:
            # It has had nothing, and may show first whether it ends at once.
            return 0
        return priority.natural_level(self._size(job, now_ms)[0])

    # --- size --------------------------------------------------------------------------------------------------------

    def size_of(self, job: Job, now_ms: int) -> int:
        """The size that decides the level, GPU-milliseconds."""
        return self._size(job, now_ms)[0]

    def attained(self, job: Job, now_ms: int) -> int:
        """GPU-milliseconds over all attempts."""
        return ran_ms(job, now_ms) * width_milli(job) // MILLI

    def ran_ms(self, job: Job, now_ms: int) -> int:
        """Run time of all attempts."""
        return ran_ms(job, now_ms)

    def expected_ms(self, job: Job, now_ms: int) -> tuple[int, str] | None:
        """Run time of one attempt and where that comes from (`estimate`, `history`); None if nothing is known."""
        return (job.expected_ms, job.expected_from) if job.expected_ms else None

    def _size(self, job: Job, now_ms: int) -> tuple[int, str]:
        if job.service:
            # It runs for ever; its use says nothing about who should give way to it.
            return 0, "service"
        ran, width = ran_ms(job, now_ms), width_milli(job)
        if self._probes(job, ran, width):
            return 0, "probe"
        if ran < outlives_ms(job):
            return job.expected_ms * width // MILLI, job.expected_from
        # Once its probe is over it is no more like one that probes, however little it had.
        return max(priority.LEVEL_UNIT, self._cluster.lore.rank(ran * width // MILLI)), "attained"

    def _probes(self, job: Job, ran: int, width: int) -> bool:
        """It may show first whether it ends at once. A told length is believed; what others needed is a guess."""
        if ran >= priority.PROBE_MS or job.expected_from == "estimate":
            return False
        return priority.may_probe(-(-width // MILLI), self._cluster.pool.capacity_milli // MILLI)

    # --- time --------------------------------------------------------------------------------------------------------

    def _lifts(self, job: Job, natural: int, now_ms: int) -> tuple[int, bool]:
        """(levels lifted by waiting, whether that led to the top)."""
        if job.waits_since_ms:
            waited = now_ms // LIFT_GRID_MS * LIFT_GRID_MS - job.waits_since_ms
        elif job.live and natural <= job.level:
            # What lifted it holds until it has outgrown the level that it was lifted from.
            waited = job.waited_ms
        else:
            return 0, False
        if waited < priority.LIFT_MIN_MS:
            return 0, False
        return priority.lifts(job.level, width_milli(job), waited)

    def _next_lift_ms(self, job: Job, lifted: int) -> int:
        at_ms = job.waits_since_ms + priority.lift_after_ms(job.level, width_milli(job), lifted + 1)
        return -(-at_ms // LIFT_GRID_MS) * LIFT_GRID_MS

    def next_border_ms(self, job: Job, now_ms: int) -> int | None:
        """When a running job's size reaches another level; None: never."""
        if not job.runs_since_ms or job.service:
            return None
        width = width_milli(job)
        ran = ran_ms(job, now_ms)
        if self._probes(job, ran, width):
            border = priority.PROBE_MS
        elif ran < outlives_ms(job):
            border = outlives_ms(job)
        elif not width:
            return None
        else:
            level = priority.natural_level(ran * width // MILLI)
            border = -(-priority.level_begins(level + 1) * MILLI // width)
        return now_ms + wall_ms(job, border - ran)


def width_milli(job: Job) -> int:
    """GPUs that a job takes at once, in thousandths of a card, as far as its request says; an elastic one at least."""
    spec = job.spec
    return (spec.min_replicas or spec.replicas) * need_milli(spec.need)


def need_milli(need: ResourceNeed) -> int:
    """The same for one replica: whole cards, or the larger of a share's two dimensions."""
    if need.gpus:
        return need.gpus * MILLI
    if need.mig:
        slices = need.mig.partition("g")[0]
        return min(MILLI, (int(slices) if slices.isdigit() else _MIG_SLICES) * MILLI // _MIG_SLICES)
    return min(MILLI, max(need.share_milli, need.share_memory_mib * _MILLI_PER_GIB // 1024))


def outlives_ms(job: Job) -> int:
    """After which run time a job has outlived what was expected of it; 0: nothing was.

    What starting and being preempted cost it was not expected, and what is right by a fourth is right: a job that would
    end in a moment must not sink for being a little late.
    """
    if not job.expected_ms:
        return 0
    return job.expected_ms + job.expected_ms // _LATE_PART + job.spec.restart_ms + job.overhead_ms


def ran_ms(job: Job, now_ms: int) -> int:
    """Run time of all attempts, as on the fastest card."""
    passed_ms = max(0, now_ms - job.runs_since_ms) if job.runs_since_ms else 0
    return job.served_ms + passed_ms * job.speed_milli // MILLI


def wall_ms(job: Job, run_ms: int) -> int:
    """How long so much run time takes a job on the cards that it has."""
    return -(-run_ms * MILLI // job.speed_milli)
