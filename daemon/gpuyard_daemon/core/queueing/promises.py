"""Deadlines: whether one can be promised, and how far a promised one lifts its job.

A deadline is promised if the queue that guarantees the job's cards (the nearest from its own upwards that has a grant
for them; the yard, where there is none) can do all that it has promised, this job included, in time: for each deadline,
the GPU time that must be had by then fits the nominal part until then; the same for the limit of its tenant, where it
has one. And if the job can begin in time: it is not handed in held, those that it is to follow are known to end early
enough, and elements of an array that go one after the other are all done by then. Whoever asks for more is told, and
goes as any other job: a deadline that nobody can keep must not lift anybody over others.

A promised job rises by two octaves when its slack falls to four times what it still needs, and by four when it falls to
once. The slack counts half as much again as it needs, for what goes wrong. After the deadline nothing lifts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from gpuyard_daemon.core.queueing.priority import PER_OCTAVE
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import wanted_by
from gpuyard_protocol.jobs import JobSpec, Why
from gpuyard_protocol.names import JobId, Tenant, User
from gpuyard_protocol.units import MILLI, format_ms

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

KEPT: Final = "DeadlinePromised"
BEST_EFFORT: Final = "DeadlineBestEffort"
#: (slack in multiples of what the job still needs, levels that it rises then), the nearest first.
_STEPS: Final = ((1, 4 * PER_OCTAVE), (4, 2 * PER_OCTAVE))
#: Of what it still needs, in halves, that is taken off the slack.
_HALVES_TAKEN: Final = 3


def deadline_of(spec: JobSpec, accepted_ms: int) -> int:
    """When a job should have ended; 0: whenever."""
    return spec.deadline_ms or (accepted_ms + spec.deadline_after_ms if spec.deadline_after_ms else 0)


def is_promised(said: Why | None) -> bool:
    return said is not None and said.code == KEPT


def needs_ms(job: Job, ran_ms: int) -> int:
    """Run time that a job still needs, as far as is known."""
    return max(0, (job.expected_ms or job.spec.time_limit_ms) - ran_ms)


def lifts(job: Job, ran_ms: int, now_ms: int) -> int:
    """Levels that a near deadline lifts a job by."""
    if not job.promised or now_ms > job.deadline_ms:
        return 0
    needed_ms = needs_ms(job, ran_ms)
    slack_ms = job.deadline_ms - now_ms - needed_ms * _HALVES_TAKEN // 2
    return next((levels for times, levels in _STEPS if slack_ms <= times * needed_ms), 0)


def next_step_ms(job: Job, ran_ms: int, now_ms: int) -> int | None:
    """When a job that does not run rises or falls by its deadline next; None: never again."""
    if not job.promised:
        return None
    needed_ms = needs_ms(job, ran_ms)
    ready_ms = job.deadline_ms - needed_ms * _HALVES_TAKEN // 2
    moments = [*(ready_ms - times * needed_ms for times, _ in _STEPS), job.deadline_ms + 1]
    return min([moment for moment in moments if moment > now_ms], default=None)


def promise(cluster: Cluster, tenant: Tenant, user: User, spec: JobSpec, expected_ms: int, now_ms: int) -> Why | None:
    """Whether the deadline of a job that comes in is promised; None: it has none."""
    deadline_ms = deadline_of(spec, now_ms)
    if not deadline_ms:
        return None
    if spec.hold:
        return Why(BEST_EFFORT, "its deadline cannot be promised: nobody knows when it will be released")
    needed_ms = expected_ms or spec.time_limit_ms
    begins_ms = max(now_ms, spec.begin_ms or now_ms + spec.begin_after_ms)
    for other in to_follow(cluster, tenant, user, spec):
        ends_ms = _known_end_ms(cluster, other, now_ms)
        if ends_ms is None:
            text = f"its deadline cannot be promised: nobody knows when job {other.id} will have ended"
            return Why(BEST_EFFORT, text)
        begins_ms = max(begins_ms, ends_ms)
    count = spec.array.count if spec.array else 1
    at_once = 1 if spec.singleton else (spec.array.at_once if spec.array else 0) or count
    ends_ms = begins_ms + -(-count // at_once) * needed_ms
    if ends_ms > deadline_ms:
        late = format_ms(-(-(ends_ms - deadline_ms) // 1000) * 1000)
        when = "at once" if begins_ms == now_ms else "as soon as it may"
        return Why(BEST_EFFORT, f"its deadline cannot be promised: it would be {late} late if it began {when}")
    name = cluster.quota.queue_name(tenant, spec.queue)
    wanted = wanted_by(cluster.pool, spec.need, spec.least_replicas)
    if not wanted:
        return Why(KEPT, "its deadline is promised")
    width = max(sum(amounts.values()) for amounts in wanted)
    capacity = max(cluster.quota.guaranteed_milli(name, amounts, cluster.pool.capacity_milli) for amounts in wanted)
    due = [(deadline_ms, count * width * needed_ms), *_due(cluster, name, now_ms)]
    if width > capacity or _is_too_much(due, capacity, now_ms):
        text = f"its deadline cannot be promised: queue {name} is granted too little for all that is promised by then"
        return Why(BEST_EFFORT, text)
    limit = cluster.tenancy.limits(tenant).gpus_max_milli
    if limit and _is_too_much([due[0], *_due(cluster, "", now_ms, tenant)], limit, now_ms):
        text = f"its deadline cannot be promised: tenant {tenant} may hold too little for all that is promised by then"
        return Why(BEST_EFFORT, text)
    return Why(KEPT, "its deadline is promised")


def to_follow(cluster: Cluster, tenant: Tenant, user: User, spec: JobSpec, number: JobId = 0) -> Iterator[Job]:
    """Jobs that have not ended and that a job is to follow. `number`: its own; 0: it has none yet."""
    for _, named in spec.depends_on:
        array = cluster.arrays.records.get(named)
        for target in range(named, named + (array.count if array else 1)):
            if (job := cluster.jobs.get(target)) is not None and not job.is_final:
                yield job
    if spec.singleton:
        alike = cluster.gates.called(tenant, user, spec.name)
        yield from [cluster.jobs[other] for other in alike if not number or other < number]


def _known_end_ms(cluster: Cluster, job: Job, now_ms: int) -> int | None:
    """When a job will have ended, as far as its length is known or its own deadline is promised; None: whenever."""
    is_known = bool(job.expected_ms or job.spec.time_limit_ms)
    if job.state == "running" and is_known:
        return now_ms + needs_ms(job, cluster.ranking.ran_ms(job, now_ms)) * MILLI // job.speed_milli
    return job.deadline_ms if job.promised and job.deadline_ms >= now_ms else None


def _due(cluster: Cluster, name: str, now_ms: int, tenant: Tenant = "") -> Iterable[tuple[int, int]]:
    """(deadline, GPU time still needed) of what a queue has promised; of what a tenant has been, in whatever queue."""
    for number in cluster.promised:
        job = cluster.jobs[number]
        is_meant = job.tenant == tenant if tenant else cluster.quota.queue_of(job) == name
        if is_meant and job.deadline_ms >= now_ms:
            width = max([sum(amounts.values()) for amounts in cluster.ranking.wanted(job)], default=0)
            yield job.deadline_ms, width * needs_ms(job, cluster.ranking.ran_ms(job, now_ms))


def _is_too_much(due: Iterable[tuple[int, int]], capacity_milli: int, now_ms: int) -> bool:
    total = 0
    for deadline_ms, milli_ms in sorted(due):
        total += milli_ms
        if total > capacity_milli * (deadline_ms - now_ms):
            return True
    return False
