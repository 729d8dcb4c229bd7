"""Deadlines: whether one can be promised, and how far a promised one lifts its job.

A deadline is promised if the queue that guarantees the job's cards (the nearest from its own upwards that has a grant
for them; the yard, where there is none) can do all that it has promised, this job included, in time: for each deadline,
the GPU time that must be had by then fits the nominal part until then. Whoever asks for more is told, and goes as any
other job: a deadline that nobody can keep must not lift anybody over others.

A promised job rises by two octaves when its slack falls to four times what it still needs, and by four when it falls to
once. The slack counts half as much again as it needs, for what goes wrong. After the deadline nothing lifts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from gpuyard_daemon.core.queueing.priority import PER_OCTAVE
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import wanted_by
from gpuyard_protocol.jobs import JobSpec, Why
from gpuyard_protocol.names import Tenant
from gpuyard_protocol.units import format_ms

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


def promise(cluster: Cluster, tenant: Tenant, spec: JobSpec, expected_ms: int, now_ms: int) -> Why | None:
    """Whether the deadline of a job that comes in is promised; None: it has none."""
    deadline_ms = deadline_of(spec, now_ms)
    if not deadline_ms:
        return None
    needed_ms = expected_ms or spec.time_limit_ms
    begins_ms = max(now_ms, spec.begin_ms or now_ms + spec.begin_after_ms)
    if begins_ms + needed_ms > deadline_ms:
        late = format_ms((begins_ms + needed_ms - deadline_ms) // 1000 * 1000)
        return Why(BEST_EFFORT, f"its deadline cannot be promised: it would be {late} late if it began at once")
    name = cluster.quota.queue_name(tenant, spec.queue)
    count = spec.array.count if spec.array else 1
    wanted = wanted_by(cluster.pool, spec.need, spec.least_replicas)
    if not wanted:
        return Why(KEPT, "its deadline is promised")
    width = max(sum(amounts.values()) for amounts in wanted)
    capacity = max(cluster.quota.guaranteed_milli(name, amounts, cluster.pool.capacity_milli) for amounts in wanted)
    due = [(deadline_ms, count * width * needed_ms), *_due(cluster, name, now_ms)]
    if width > capacity or _is_too_much(due, capacity, now_ms):
        text = f"its deadline cannot be promised: queue {name} is granted too little for all that is promised by then"
        return Why(BEST_EFFORT, text)
    return Why(KEPT, "its deadline is promised")


def _due(cluster: Cluster, name: str, now_ms: int) -> Iterable[tuple[int, int]]:
    """(deadline, GPU time still needed) of what a queue has promised."""
    for number in cluster.promised:
        job = cluster.jobs[number]
        if cluster.quota.queue_of(job) == name and job.deadline_ms >= now_ms:
            width = max([sum(amounts.values()) for amounts in cluster.ranking.wanted(job)], default=0)
            yield job.deadline_ms, width * needs_ms(job, cluster.ranking.ran_ms(job, now_ms))


def _is_too_much(due: Iterable[tuple[int, int]], capacity_milli: int, now_ms: int) -> bool:
    total = 0
    for deadline_ms, milli_ms in sorted(due):
        total += milli_ms
        if total > capacity_milli * (deadline_ms - now_ms):
            return True
    return False
