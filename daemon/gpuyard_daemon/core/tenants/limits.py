"""Whether a job may hold so much more, by its tenant's limit and the quotas of its queue; in words, if not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpuyard_daemon.core.placing.capacity import Pool
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import amounts_of, sum_of, wanted_by
from gpuyard_daemon.core.tenants.quota import ROOT, Amounts, Obstacle
from gpuyard_daemon.core.tenants.tenancy import OVER_QUOTA, held_by
from gpuyard_protocol.jobs import JobSpec, Why
from gpuyard_protocol.names import Tenant, nearest
from gpuyard_protocol.units import format_milli


def may_hold(
    cluster: Cluster,
    job: Job,
    placements: tuple[Placement, ...],
    *,
    less_milli: int = 0,
    victims: Iterable[Job] = (),
    also: Amounts | None = None,
    lent: Mapping[str, Amounts] | None = None,
) -> bool:
    """Whether a job may hold these places, as far as its tenant's limit and its queue's quota go.

    `less_milli`: so much that its tenant gives up for them; `victims`: who does; `lent`: by queue, what elastic jobs
    give back; `also`: what others of its queue will hold in a moment.
    """
    tenancy, quota = cluster.tenancy, cluster.quota
    is_limited = tenancy.is_limited(job.tenant)
    if is_limited and not tenancy.has_room(job.tenant, counts_for(cluster.pool, placements) - less_milli):
        return False
    if not quota.has_quotas:
        return True
    spaces = cluster.pool.spaces
    if len(placements) == 1 and not also:
        wanted = amounts_of(spaces[placements[0].node], placements[0].partition)
    else:
        wanted = sum_of([also or {}, *[amounts_of(spaces[each.node], each.partition) for each in placements]])
    less: dict[str, Amounts] = dict(lent or {})
    for victim in victims:
        name = quota.queue_of(victim)
        held = [amounts_of(spaces[each.node], each.partition) for each in victim.assignments if each.is_live]
        less[name] = sum_of([less.get(name, {}), *held])
    return quota.obstacle(quota.queue_of(job), wanted, less) is None


def within_quota(
    cluster: Cluster, job: Job, obstacles: Sequence[Obstacle | None] | None = None
) -> Obstacle | tuple[str, ...] | None:
    """Models of card on which a job's queue may hold so much more; None: all of them. Or what keeps it from any.

    `obstacles`: for each of what `Ranking.wanted` says of the job, if that is known.
    """
    quota = cluster.quota
    wanted = cluster.ranking.wanted(job)
    if obstacles is None:
        name = quota.queue_of(job)
        obstacles = [quota.obstacle(name, amounts) for amounts in wanted]
    if not any(obstacles):
        return None
    free = [model for amounts, obstacle in zip(wanted, obstacles, strict=True) if not obstacle for model, _ in amounts]
    if free:
        return tuple(free)
    first = obstacles[0]
    assert first is not None
    # Where they differ, the one above all eases whenever any of them does.
    return (
        first
        if all(each is not None and each.queue == first.queue for each in obstacles)
        else first._replace(queue=ROOT)
    )


def counts_for(pool: Pool, placements: tuple[Placement, ...]) -> int:
    """Compute that these places count for, against the tenant's limit."""
    return sum([held_by(pool.spaces[placement.node], placement.partition) for placement in placements])


def held_now(cluster: Cluster, job: Job) -> int:
    """Compute that a job's tenant holds by it, against its limit: of a gang, by those members that have not ended."""
    spaces = cluster.pool.spaces
    return sum([held_by(spaces[each.node], each.partition) for each in job.assignments if each.is_live])


def over_quota(cluster: Cluster, job: Job) -> Why | None:
    """What the quotas say against a waiting job now; None if nothing."""
    if not cluster.quota.has_quotas:
        return None
    found = within_quota(cluster, job)
    return Why(OVER_QUOTA, _text(found)) if isinstance(found, Obstacle) else None


def over_with(cluster: Cluster, job: Job, placements: tuple[Placement, ...]) -> Why | None:
    """What its tenant's limit or its queue's quotas say against just these places; None if `may_hold` lets it."""
    over = cluster.tenancy.blocks(job.tenant, counts_for(cluster.pool, placements))
    if over is not None or not cluster.quota.has_quotas:
        return over
    spaces = cluster.pool.spaces
    wanted = sum_of([amounts_of(spaces[each.node], each.partition) for each in placements])
    obstacle = cluster.quota.obstacle(cluster.quota.queue_of(job), wanted)
    return Why(OVER_QUOTA, _text(obstacle)) if obstacle is not None else None


def refused_queue(cluster: Cluster, tenant: Tenant, spec: JobSpec) -> tuple[Why, str] | None:
    """Why a job may not be let into the queue that it asks for, and the nearest there is; None if it may."""
    quota = cluster.quota
    if spec.queue and spec.queue not in quota.queues:
        shown = ", ".join(sorted(quota.queues)[:20])
        return Why("UnknownQueue", f"there is no queue {spec.queue!r}; there is: {shown}"), nearest(
            spec.queue, list(quota.queues)
        )
    if spec.queue and not quota.may_use(tenant, spec.queue):
        own = quota.queue_name(tenant, "")
        text = f"jobs of tenant {tenant} go to queue {own} and those below it, and {spec.queue} is none of them"
        return Why("NotYours", text), ""
    return None


def never_within(cluster: Cluster, tenant: Tenant, spec: JobSpec) -> Why | None:
    """Why so much at once can never run under the present quotas; None if it can."""
    quota = cluster.quota
    if not quota.has_quotas:
        return None
    name = quota.queue_name(tenant, spec.queue)
    obstacles = [quota.never(name, amounts) for amounts in wanted_by(cluster.pool, spec.need, spec.least_replicas)]
    first = next(iter(obstacles), None)
    if first is None or not all(obstacles):
        return None
    return Why(OVER_QUOTA, f"{_text(first)}: ask for less, or ask the yard's operator to raise its quota")


def _text(obstacle: Obstacle) -> str:
    allotment, queue = obstacle.allotment, obstacle.queue
    cards = allotment.model or "GPUs"
    kind = f" ({allotment.kind})" if allotment.kind else ""
    if queue == ROOT:
        kept = format_milli(allotment.unlent_milli)
        return f"the yard keeps {kept} {cards}{kind} that other queues do not lend, and this needs {_wanted(obstacle)}"
    most = format_milli(allotment.most_milli() or 0)
    borrowed = f", {format_milli(allotment.borrow_milli)} of them borrowed" if allotment.borrow_milli > 0 else ""
    return (
        f"queue {queue} holds {format_milli(allotment.used_milli)} of at most {most} {cards}{kind}{borrowed}, "
        f"and this needs {_wanted(obstacle)}"
    )


def _wanted(obstacle: Obstacle) -> str:
    return format_milli(obstacle.wanted_milli)
