"""Who runs and might be told to give way, and what that would cost.

Whatever time decides here (how long somebody ran, its level) is read at the beginning of the present round's period, so
that all turns of one period, and a core restored in the middle of it, see the same occupants.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.suspension import can_be_suspended
from gpuyard_daemon.core.queueing.priority import PROBE_MS, level_begins, natural_level
from gpuyard_daemon.core.queueing.ranking import NOMINAL, need_milli, outlives_ms, ran_ms, wall_ms, width_milli
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.fact_words import EvictionKind, Placement
from gpuyard_daemon.core.state.model import Assignment, Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.names import JobId
from gpuyard_protocol.units import MILLI


class Occupant(NamedTuple):
    """A running job as those see it who would like its place."""

    job: Job
    attempt: int
    #: `NOMINAL` where it does not matter, because nobody may take its place yet.
    band: int
    #: Its effective level, lower towards the end of an expected run time; 0 where it does not matter, because it is not
    #: exchangeable.
    level: int
    kind: EvictionKind
    #: Run time that it would have to spend again, ms.
    overhead_ms: int
    #: The same over its GPUs, thousandths of a card × ms.
    lost_milli_ms: int
    #: It ran long enough, and preemptions have cost it little enough, to be ended for somebody of its own band.
    exchangeable: bool
    #: Whether it may be stopped at all.
    preemptible: bool
    #: When time alone makes it easier to take next; 0: never.
    next_ms: int
    #: Of an elastic job that would shrink: the replicas that go, and the places that it keeps.
    goes: tuple[Assignment, ...] = ()
    keeps: tuple[Placement, ...] = ()

    @property
    def cost(self) -> int:
        """GPU-milliseconds."""
        return self.lost_milli_ms // MILLI


class Known:
    """Occupants as they were found before: of most that stay, nothing but time has changed, and that not enough.

    Good until levels move (`forget`), or cards come or go. Of jobs alone that write checkpoints, since what it costs
    others to give way grows with time, or depends on their nodes.
    """

    __slots__ = ("_before", "_version")

    def __init__(self) -> None:
        #: With the moment since which the job runs.
        self._before: dict[JobId, tuple[Occupant, int]] = {}
        #: Of the pool.
        self._version = -1

    def forget(self) -> None:
        self._before.clear()

    def occupants(self, cluster: Cluster, settings: CoreSettings, at_ms: int, most: int) -> list[Occupant]:
        """The largest of the running jobs, at most so many."""
        before = self._before if self._version == cluster.pool.inventory_version else {}
        self._version = cluster.pool.inventory_version
        found, kept, is_plain = [], {}, cluster.quota.is_plain
        for job, _ in zip(cluster.running.largest_first(at_ms), range(most), strict=False):
            if job.verdict is not None or not 0 < job.started_ms < at_ms:
                continue
            known = before.get(job.id)
            if known is not None and _still_holds(known[0], job, known[1], at_ms):
                occupant = known[0]
                if not is_plain:
                    occupant = in_its_band(cluster, settings, occupant, at_ms)
            else:
                occupant = occupant_of(cluster, settings, job, at_ms)
            if _holds_for_long(settings, occupant):
                kept[job.id] = (occupant, job.runs_since_ms)
            found.append(occupant)
        self._before = kept
        return found


def in_its_band(cluster: Cluster, settings: CoreSettings, occupant: Occupant, at_ms: int) -> Occupant:
    """The same in the band that it is in now."""
    if not (occupant.exchangeable or band_matters(settings, occupant.job, at_ms)) or occupant.goes:
        return occupant
    band = cluster.ranking.band_of(occupant.job)
    return occupant if band == occupant.band else occupant._replace(band=band)


def _still_holds(occupant: Occupant, job: Job, runs_since_ms: int, at_ms: int) -> bool:
    is_same = job is occupant.job and job.attempt == occupant.attempt and job.runs_since_ms == runs_since_ms
    return is_same and (not occupant.next_ms or at_ms < occupant.next_ms)


def _holds_for_long(settings: CoreSettings, occupant: Occupant) -> bool:
    """Whether nothing of it moves before `next_ms`, but its band."""
    job = occupant.job
    if occupant.kind != "checkpoint" or job.promised or job.service or job.is_elastic or job.speed_milli != MILLI:
        return False
    return occupant.overhead_ms == _restart_ms(settings, job, "checkpoint")


def occupant_of(cluster: Cluster, settings: CoreSettings, job: Job, at_ms: int) -> Occupant:
    ranking = cluster.ranking
    this_run_ms = at_ms - max(job.started_ms, job.runs_since_ms)
    kind = kind_of(cluster, job)
    restart_ms = _restart_ms(settings, job, kind)
    overhead_ms = _overhead_ms(job, kind, restart_ms, at_ms)
    run_ms = ran_ms(job, at_ms)
    useful_ms = run_ms - job.overhead_ms
    owed_ms = job.overhead_ms * exchange.CREDIT_DIVISOR - useful_ms if job.preemptions else 0
    start_ms = restart_ms if kind == "checkpoint" else 0
    missing_ms = max(exchange.least_attempt_ms(start_ms) - this_run_ms, owed_ms)
    # Who would lose all of its run is only given up if it is known to be large, and not for a guess at it.
    exchangeable = missing_ms <= 0 and not job.service and (kind != "requeue" or run_ms < outlives_ms(job))
    moments = [missing_ms, settings.reclaim_after_ms - this_run_ms]
    level = ranking.level_of(job, at_ms) if exchangeable else 0
    if exchangeable and run_ms < outlives_ms(job):
        nearer, until_ms = _nearer_its_end(job, useful_ms - job.spec.restart_ms)
        level -= nearer
        moments.append(wall_ms(job, until_ms))
    if exchangeable and (border_ms := ranking.next_border_ms(job, at_ms)) is not None:
        moments.append(border_ms - at_ms)
    moments = [moment for moment in moments if moment > 0]
    return Occupant(
        job=job,
        attempt=job.attempt,
        band=ranking.band_of(job) if exchangeable or band_matters(settings, job, at_ms) else NOMINAL,
        level=level,
        kind=kind,
        overhead_ms=overhead_ms,
        lost_milli_ms=overhead_ms * held_milli(job),
        exchangeable=exchangeable,
        preemptible=job.spec.preemption != "never",
        next_ms=at_ms + min(moments) if moments else 0,
    )


def _nearer_its_end(job: Job, useful_ms: int) -> tuple[int, int]:
    """(levels between what is expected of a job and twice what remains of it, run time until that may be more)."""
    width = width_milli(job)
    twice = 2 * max(0, job.expected_ms - max(0, useful_ms)) * width // MILLI
    at = natural_level(twice)
    nearer = natural_level(job.expected_ms * width // MILLI) - at
    until_ms = (twice - level_begins(at)) * MILLI // (2 * width) + 1 if twice and width else 0
    return max(0, nearer), until_ms


def band_matters(settings: CoreSettings, job: Job, at_ms: int) -> bool:
    """Whether a job has run so long that its place may be claimed by the rules of the bands: nobody's is before."""
    return at_ms - job.started_ms >= min(PROBE_MS, settings.reclaim_after_ms)


def held_milli(job: Job) -> int:
    """What its start costs stand still: an elastic job's attempt may be wider than its least."""
    if job.spec.least_replicas == job.spec.replicas:
        return width_milli(job)
    return max(job.spec.least_replicas, len(job.assignments)) * need_milli(job.spec.need)


def _overhead_ms(job: Job, kind: EvictionKind, restart_ms: int, at_ms: int) -> int:
    """Run time that a job would have to spend again. One that keeps its progress has at its start only that to lose."""
    ran_here_ms = at_ms - job.started_ms
    match kind:
        case "requeue":
            return restart_ms + ran_here_ms
        case "checkpoint":
            return min(restart_ms, ran_here_ms)
        case _:
            return restart_ms


def kind_of(cluster: Cluster, job: Job) -> EvictionKind:
    """How a job would give way now: the first rung of its ladder that holds."""
    if job.spec.preemption == "checkpoint":
        return "checkpoint"
    return "suspend" if can_be_suspended(cluster, job) else "requeue"


def restart_of(cluster: Cluster, settings: CoreSettings, job: Job) -> int:
    """What it costs a job to give way and go on later, ms; where it starts anew, beside what it loses."""
    return _restart_ms(settings, job, kind_of(cluster, job))


def _restart_ms(settings: CoreSettings, job: Job, kind: EvictionKind) -> int:
    match kind:
        case "suspend":
            return settings.restart_suspend_ms
        case "checkpoint" | "shrink":
            return job.spec.restart_ms or settings.restart_checkpoint_ms
        case "requeue":
            return job.spec.restart_ms or settings.restart_requeue_ms
