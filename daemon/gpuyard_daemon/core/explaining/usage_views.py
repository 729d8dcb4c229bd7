"""What tenants see of what they hold, have used and may have. Reading changes nothing."""

from __future__ import annotations

from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import Usage
from gpuyard_daemon.core.tenants.quota import ROOT
from gpuyard_protocol.names import Tenant
from gpuyard_protocol.queries import ModelUsage, QueueUsage, TenantUsage, UsageReport, UserUsage


def usage_report(cluster: Cluster, tenant: Tenant | None, now_ms: int) -> UsageReport:
    """Of one tenant, or of all that ever held a GPU, have a job or are named in the policy; by name."""
    names = {tenant} if tenant is not None else _known_tenants(cluster)
    return UsageReport(tenants=tuple([_tenant_usage(cluster, name, now_ms) for name in sorted(names)]), now_ms=now_ms)


def _known_tenants(cluster: Cluster) -> set[Tenant]:
    tenancy = cluster.tenancy
    return {*cluster.lists, *(name for name, _ in tenancy.usage), *dict(tenancy.policy.tenants)} - {""}


def _tenant_usage(cluster: Cluster, tenant: Tenant, now_ms: int) -> TenantUsage:
    tenancy = cluster.tenancy
    limits, jobs = tenancy.limits(tenant), cluster.lists.get(tenant)
    mine = [usage for (owner, _), usage in sorted(tenancy.usage.items()) if owner == tenant]
    users = tuple([_user_usage(cluster, usage, now_ms) for usage in mine])
    queue = cluster.quota.queue_name(tenant, "")
    return TenantUsage(
        tenant=tenant,
        held_milli=tenancy.held_milli.get(tenant, 0),
        gpus_max_milli=limits.gpus_max_milli,
        jobs=jobs.unfinished if jobs else 0,
        jobs_max=limits.jobs_max,
        used_milli_ms=sum(user.used_milli_ms for user in users),
        since_ms=min([user.since_ms for user in users], default=0),
        users=users,
        models=_together(users),
        queue=queue,
        queues=_queue_usage(cluster, queue),
        weight=tenancy.weight(tenant),
        shift=cluster.fairness.shift(tenant),
    )


def _user_usage(cluster: Cluster, usage: Usage, now_ms: int) -> UserUsage:
    tenancy = cluster.tenancy
    return UserUsage(
        user=usage.user,
        held_milli=tenancy.user_held_milli.get((usage.tenant, usage.user), 0),
        used_milli_ms=tenancy.used_milli_ms(usage, now_ms),
        since_ms=usage.since_ms,
        models=tuple(
            [
                ModelUsage(
                    model=model,
                    held_milli=held,
                    held_milli_ms=held_ms,
                    used_milli_ms=used_ms,
                    speed_milli=cluster.speeds.of_name(model),
                )
                for model, held, held_ms, used_ms in tenancy.by_model(usage, now_ms)
            ]
        ),
    )


def _together(users: tuple[UserUsage, ...]) -> tuple[ModelUsage, ...]:
    """All users' by model."""
    found: dict[str, ModelUsage] = {}
    for each in [model for user in users for model in user.models]:
        before = found.get(each.model, ModelUsage(model=each.model))
        found[each.model] = ModelUsage(
            model=each.model,
            held_milli=before.held_milli + each.held_milli,
            held_milli_ms=before.held_milli_ms + each.held_milli_ms,
            used_milli_ms=before.used_milli_ms + each.used_milli_ms,
            speed_milli=each.speed_milli,
        )
    return tuple([found[model] for model in sorted(found)])


def _queue_usage(cluster: Cluster, name: str) -> tuple[QueueUsage, ...]:
    """Of a queue and those above it, from there upwards."""
    return tuple(
        [
            QueueUsage(
                queue=queue.name,
                parent=queue.parent.name if queue.parent is not None else ROOT,
                model=allotment.model,
                kind=allotment.kind,
                used_milli=allotment.used_milli,
                nominal_milli=allotment.nominal_milli,
                borrow_milli=allotment.borrow_milli,
                lend_milli=allotment.lend_milli,
            )
            for queue in cluster.quota.queues[name].upwards()
            if queue.name != ROOT
            for allotment in queue.allotments
        ]
    )
