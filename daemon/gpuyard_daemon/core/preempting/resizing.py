"""When an elastic job gets more replicas, or fewer because its owner says so.

At its start a job is placed with its least; if nobody who waits has a use for what is left, it begins wider, before
anybody has heard of it. A running job grows by starting anew from what it saved, with all its replicas: that costs all
of them a restart, so it must be worth it, and cannot happen often:

- It has run for two minutes, or since its last change of size ten times as long as a restart takes.
- What the new replicas would do in the time that the attempt has lasted so far (of unknown length, a job is taken to
  run for as long again) is four times what the restart costs the whole job. So a job doubles soon, and grows by a tenth
  late; and one that saves nothing (`requeue`, `suspend`) never grows by itself, for a restart would cost it everything.
- One that is never to be preempted keeps the size that it began with.

Under a limit of its tenant's, what is lent to a job keeps the tenant's other jobs out: while any of those wait for the
limit no job of the tenant gets more, and one that has more goes back to its least, if that lets one of them start.

Its owner's word (`scale`) is carried out at once, down always and up as far as there is room, without these tests.

Who must give back what is above the least, and for whom, is `preemption`'s to say.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.widening import more_places
from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.occupants import restart_of
from gpuyard_daemon.core.queueing.order import WaitingLine
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.limits import counts_for, may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import Tenant

RESIZED: Final = "Resized"
#: More kinds of waiting jobs than this, and the yard is too full to ask for each which nodes it has a use for.
_WAITING_MAX: Final = 64
#: Waiting jobs that are asked whether their tenant's limit keeps them out.
_WAITERS_MAX: Final = 1000
#: Jobs that are looked at in one turn.
_JOBS_MAX: Final = 64


class Growing:
    """When jobs are looked at. Which are, follows from the state; what is kept only says when to wake up for it."""

    def __init__(self) -> None:
        #: When time alone may let a job grow next; 0: never, None: the next period finds out.
        self._next_ms: int | None = None

    def hold(self, draft: Draft, line: WaitingLine, last_record_ms: int, *, unfinished: bool) -> None:
        """Let jobs begin wider, and let those grow that may. `unfinished`: there are jobs that may yet be placed."""
        cluster = draft.cluster
        if draft.facts:
            self._next_ms = None
        if cluster.draining or unfinished:
            return
        placed = [fact.job for fact in draft.facts if isinstance(fact, f.JobPlaced) and _is_new(cluster, fact)]
        asked = [fact.job for fact in draft.facts if isinstance(fact, f.JobScaled)]
        period_ms = draft.now_ms - draft.now_ms % draft.settings.preempt_every_ms
        is_due = period_ms > last_record_ms and bool(cluster.growing or cluster.wide)
        if not placed and not asked and not is_due:
            return
        waiting = _waiting(line)
        for number in placed:
            _widen(draft, line, cluster.jobs[number], waiting)
        looked_at = sorted(
            cluster.growing.values()
            if is_due
            else [cluster.growing[each] for each in asked if each in cluster.growing],
            key=lambda job: cluster.ranking.rank_of(job, draft.now_ms),
        )
        moments = [_look_at(draft, line, job, waiting) for job in looked_at[:_JOBS_MAX]]
        if is_due:
            moments += _give_back(draft, line)
            self._next_ms = min([moment for moment in moments if moment], default=0)

    def next_ms(self, cluster: Cluster, settings: CoreSettings, now_ms: int) -> int | None:
        """When a turn is due for it; None: nobody could grow by time alone."""
        if cluster.draining or not (cluster.growing or cluster.wide) or self._next_ms == 0:
            return None
        every_ms = settings.preempt_every_ms
        following_ms = now_ms - now_ms % every_ms + every_ms
        return max(following_ms, -(-(self._next_ms or 0) // every_ms) * every_ms)


def _is_new(cluster: Cluster, fact: f.JobPlaced) -> bool:
    """It was placed with its least in this turn; one that has just changed its size has what it was to have."""
    job = cluster.jobs[fact.job]
    return job.is_elastic and not fact.resized and job.state == "starting"


def _waiting(line: WaitingLine) -> list[Shape] | None:
    """What those ask for who find no place; None: too many to ask for each."""
    shapes = [queue.shape for _, queue, _ in line.blocked_heads() if not line.is_at_limit(queue)]
    return shapes if len(shapes) <= _WAITING_MAX else None


def _places(draft: Draft, line: WaitingLine, job: Job, waiting: list[Shape] | None) -> tuple[f.Placement, ...]:
    """As many more places as there are for it, and as its tenant and queue may hold."""
    cluster = draft.cluster
    if waiting is None or job.id in cluster.claims:
        return ()
    if cluster.tenancy.is_limited(job.tenant) and _kept_out(cluster, line, job.tenant) is not None:
        return ()
    reserved = [each.assignments[0].node for each in cluster.suspended.values()]
    spanning = line.queue_of(job).spanning
    at_most = job.most_replicas - len(job.assignments)
    found = more_places(cluster.pool, spanning, job.assignments, at_most, waiting, reserved)
    while found and not may_hold(cluster, job, found):
        found = found[:-1]
    return found


def _kept_out(cluster: Cluster, line: WaitingLine, tenant: Tenant) -> Job | None:
    """The first of a tenant's waiting jobs that its limit alone keeps out; of those that came first."""
    for job in islice(cluster.waiting.values(), _WAITERS_MAX):
        if job.tenant == tenant and not cluster.tenancy.has_room(tenant, line.queue_of(job).least_milli(cluster.pool)):
            return job
    return None


def _give_back(draft: Draft, line: WaitingLine) -> list[int]:
    """Jobs under a limit go back to their least for others under it, and those that have more than their owners want
    since they said so, to that; when time alone lets the next do so."""
    cluster, moments = draft.cluster, []
    for job in sorted(cluster.wide.values(), key=lambda each: each.id)[:_JOBS_MAX]:
        if job.is_resizable and len(job.assignments) > job.most_replicas:
            shrink_to_most(draft, job)
            continue
        if not cluster.tenancy.is_limited(job.tenant) or not job.is_resizable or job.spec.preemption == "never":
            continue
        out = _kept_out(cluster, line, job.tenant)
        lent = [f.Placement(each.node, each.partition) for each in job.assignments[job.spec.least_replicas :]]
        back_milli = counts_for(cluster.pool, tuple(lent))
        if out is None or not cluster.tenancy.has_room(
            job.tenant, max(0, line.queue_of(out).least_milli(cluster.pool) - back_milli)
        ):
            continue
        ripe_ms = job.started_ms + exchange.least_run_ms(restart_of(cluster, draft.settings, job), job.resizes)
        if draft.now_ms < ripe_ms:
            moments.append(ripe_ms)
            continue
        least = job.spec.least_replicas
        text = f"goes on with {least} replicas: job {out.id} waits for the limit of tenant {job.tenant}"
        shrink_to(draft, job, least, Why(RESIZED, text))
    return moments


def _widen(draft: Draft, line: WaitingLine, job: Job, waiting: list[Shape] | None) -> None:
    if found := _places(draft, line, job, waiting):
        draft.add(f.JobWidened(job.id, found))


def _look_at(draft: Draft, line: WaitingLine, job: Job, waiting: list[Shape] | None) -> int:
    """Let a running job grow; else when time alone lets it, 0: never."""
    cluster, now_ms = draft.cluster, draft.now_ms
    if not job.is_resizable:
        return 0
    is_asked = job.scaled_ms > 0
    ripe_ms = 0 if is_asked else ripe_after_ms(cluster, draft.settings, job)
    if ripe_ms is None:
        return 0
    if now_ms < job.started_ms + ripe_ms:
        return job.started_ms + ripe_ms
    found = _places(draft, line, job, waiting)
    if not found:
        return 0
    size = len(job.assignments)
    worth_ms = 0 if is_asked else worth_after_ms(cluster, draft.settings, job, size + len(found))
    if now_ms < job.started_ms + worth_ms:
        return job.started_ms + worth_ms
    places = tuple([f.Placement(each.node, each.partition) for each in job.assignments]) + found
    who = "its owner wants more replicas" if is_asked else "there is room that nobody waits for"
    draft.add(
        f.JobResizing(job.id, places, Why(RESIZED, f"starts anew with {len(places)} replicas, not {size}: {who}"))
    )
    return 0


def ripe_after_ms(cluster: Cluster, settings: CoreSettings, job: Job) -> int | None:
    """How long an attempt runs before the job may be started anew to grow; None: it never is."""
    if job.spec.preemption != "checkpoint":
        return None
    return exchange.least_run_ms(restart_of(cluster, settings, job), job.resizes)


def worth_after_ms(cluster: Cluster, settings: CoreSettings, job: Job, size: int) -> int:
    """How long it must have run for growing to so many replicas to pay."""
    more = size - len(job.assignments)
    return exchange.COST_WEIGHT * restart_of(cluster, settings, job) * size // max(1, more)


def shrink_to_most(draft: Draft, job: Job) -> None:
    """Go on with no more than its owner wants."""
    text = f"starts anew with {job.most_replicas} replicas, not {len(job.assignments)}: its owner wants no more"
    shrink_to(draft, job, job.most_replicas, Why(RESIZED, text))


def shrink_to(draft: Draft, job: Job, replicas: int, why: Why) -> None:
    """Go on with the first so many of its replicas."""
    places = tuple([f.Placement(each.node, each.partition) for each in job.assignments[:replicas]])
    draft.add(f.JobResizing(job.id, places, why))
