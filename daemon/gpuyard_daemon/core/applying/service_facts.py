"""What facts about services change in the state.

Called by `Cluster.apply_fact`, and by nobody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Job, Service, replica_spec
from gpuyard_daemon.core.state.timers import Timer

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def service(cluster: Cluster, fact: f.ServiceSet, now_ms: int, effects: Effects) -> None:
    key = (fact.tenant, fact.spec.name)
    service = cluster.services.get(key)
    cluster.backlog.set_service(fact.tenant, service.spec if service else None, fact.spec)
    if service is None:
        service = Service(fact.tenant, fact.user, fact.spec, fact.generation, now_ms)
        cluster.services[key] = service
    if service.spec.version != fact.spec.version or replica_spec(service.spec) != replica_spec(fact.spec):
        service.previous = service.spec
    service.spec, service.generation, service.applied_ms = fact.spec, fact.generation, now_ms
    service.crashes = service.not_before_ms = service.crashed_job = 0
    service.crash = None
    cluster.unsettled[key] = cluster.changing[key] = None


def service_removed(cluster: Cluster, fact: f.ServiceRemoved, now_ms: int, effects: Effects) -> None:
    service = cluster.services.pop((fact.tenant, fact.service))
    cluster.backlog.set_service(fact.tenant, service.spec, None)
    cluster.unsettled.pop((fact.tenant, fact.service), None)
    cluster.changing.pop((fact.tenant, fact.service), None)


def load(cluster: Cluster, fact: f.LoadTaken, now_ms: int, effects: Effects) -> None:
    service = cluster.services[fact.tenant, fact.service]
    service.concurrency, service.queue_depth = fact.concurrency, fact.queue_depth


def scaled(cluster: Cluster, fact: f.ServiceScaled, now_ms: int, effects: Effects) -> None:
    key = (fact.tenant, fact.service)
    service = cluster.services[key]
    if fact.lower_since_ms and fact.lower_since_ms != service.lower_since_ms:
        at_ms = fact.lower_since_ms + service.spec.scale_down_after_ms
        cluster.timers.set_named(at_ms, Timer.SCALE_DOWN, fact.tenant, fact.service)
    service.wanted = fact.wanted
    service.lower_since_ms, service.lower_peak = fact.lower_since_ms, fact.lower_peak
    cluster.unsettled[key] = None


def replica_wanted(cluster: Cluster, fact: f.ReplicaWanted, now_ms: int, effects: Effects) -> None:
    cluster.take_number(fact.job)
    service = cluster.services[fact.tenant, fact.service]
    job = Job(
        id=fact.job,
        tenant=service.tenant,
        user=service.user,
        submission_id="",
        spec=replica_spec(service.spec),
        submitted_ms=now_ms,
        service=service.spec.name,
        generation=service.generation,
        story=[(now_ms, f"asked for by service {service.spec.name}")],
    )
    cluster.demand.arrived(job.spec.need, 1, now_ms, len(cluster.pool.by_number))
    cluster.index_job(job)
    effects.tell_fresh(job, now_ms)


def faltered(cluster: Cluster, fact: f.ServiceFaltered, now_ms: int, effects: Effects) -> None:
    key = (fact.tenant, fact.service)
    service = cluster.services[key]
    service.crashes, service.not_before_ms = fact.crashes, fact.not_before_ms
    if fact.job:
        service.crashed_job, service.crash = fact.job, fact.why
    if fact.not_before_ms:
        cluster.timers.set_named(fact.not_before_ms, Timer.REPLACE, fact.tenant, fact.service)
    cluster.unsettled[key] = None
