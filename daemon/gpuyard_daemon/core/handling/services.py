"""How many replicas a service has, and which.

The load asks for `ceil((concurrency + queue depth) ÷ target)` replicas, kept between min and max. More are wanted at
once; fewer only when the load would have done with fewer for `scale_down_after`, and then as many as its peak in that
time needed. Each replica is a job of the yard's own making, placed like any other.

A replica that ends by itself is replaced, after a wait that grows while replicas keep crashing. One on a lost node is
replaced at once: a replica that runs twice harms nobody, so the old one is told to stop and no longer counts.

When what a replica runs changes, the service goes over to it one by one: a new one is asked for, and an old one goes
when a new one runs, or when the new one finds no place beside it.
"""

from __future__ import annotations

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import ServiceKey
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.inputs import LoadReported
from gpuyard_daemon.core.state.model import Job, Service, replica_spec
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import NodeId, Tenant
from gpuyard_protocol.services import ServiceSpec


def desired_replicas(spec: ServiceSpec, concurrency: int, queue_depth: int) -> int:
    """How many replicas this load asks for."""
    needed = -(-(concurrency + queue_depth) // spec.target_concurrency)
    return max(spec.min_replicas, min(spec.max_replicas, needed))


def take_load(draft: Draft, load: LoadReported) -> None:
    """A service's load changed."""
    service = draft.cluster.services.get((load.tenant, load.service))
    if service is None:
        return
    concurrency, queue_depth = max(0, load.concurrency), max(0, load.queue_depth)
    if (concurrency, queue_depth) == (service.concurrency, service.queue_depth):
        return
    draft.add(f.LoadTaken(load.tenant, load.service, concurrency, queue_depth))
    rescale(draft, service)


def rescale(draft: Draft, service: Service) -> None:
    """Up at once; down once the load has been lower for long enough."""
    spec = service.spec
    desired = desired_replicas(spec, service.concurrency, service.queue_depth)
    wanted = max(spec.min_replicas, min(spec.max_replicas, service.wanted))
    since_ms, peak = service.lower_since_ms, service.lower_peak
    if desired >= wanted:
        wanted, since_ms, peak = desired, 0, 0
    elif not since_ms:
        since_ms, peak = draft.now_ms, desired
    elif draft.now_ms - since_ms >= spec.scale_down_after_ms:
        wanted = max(peak, desired)
        # What is still lower than the peak begins a wait of its own.
        since_ms, peak = (draft.now_ms, desired) if desired < wanted else (0, 0)
    else:
        peak = max(peak, desired)
    if (wanted, since_ms, peak) != (service.wanted, service.lower_since_ms, service.lower_peak):
        draft.add(f.ServiceScaled(service.tenant, spec.name, wanted, since_ms, peak))


def apply_service(draft: Draft, tenant: Tenant, user: str, spec: ServiceSpec) -> None:
    """A service was applied; admission has let it in."""
    known = draft.cluster.services.get((tenant, spec.name))
    generation = 1
    if known is not None:
        same = replica_spec(known.spec) == replica_spec(spec) and known.spec.version == spec.version
        generation = known.generation if same else known.generation + 1
    draft.add(f.ServiceSet(tenant, user, spec, generation))
    rescale(draft, draft.cluster.services[tenant, spec.name])


def remove_service(draft: Draft, tenant: Tenant, name: str) -> None:
    """A service was deleted: its replicas go."""
    why = Why("ServiceDeleted", f"service {name} was deleted")
    for job in list(draft.cluster.service_jobs.get((tenant, name), {}).values()):
        _let_go(draft, job, why)
    draft.add(f.ServiceRemoved(tenant, name))


def settle_services(draft: Draft) -> None:
    """Bring the number of replicas to what is wanted, for every service that something happened to."""
    cluster = draft.cluster
    if cluster.draining:
        return
    unsettled, cluster.unsettled = cluster.unsettled, {}
    for key in sorted(unsettled):
        service = cluster.services.get(key)
        if service is not None:
            _settle(draft, key, service)
    # What the settling itself stirred up is settled: nothing below looks at it in another way.
    cluster.unsettled = {}


def _settle(draft: Draft, key: ServiceKey, service: Service) -> None:
    jobs = _counting(draft, key)
    current = [job for job in jobs if job.generation == service.generation]
    missing = service.wanted - len(current)
    if missing > 0 and service.not_before_ms <= draft.now_ms:
        for _ in range(missing):
            draft.add(f.ReplicaWanted(draft.cluster.last_job + 1, service.tenant, service.spec.name))
    elif missing < 0:
        why = Why("ScaledDown", f"the load of service {service.spec.name} needs {service.wanted} replicas")
        for job in sorted(current, key=_keep_order)[service.wanted :]:
            _let_go(draft, job, why)
    _replace_old(draft, key, service)


def _replace_old(draft: Draft, key: ServiceKey, service: Service) -> None:
    """Let replicas of earlier generations go as those of this one come up."""
    jobs = _counting(draft, key)
    old = [job for job in jobs if job.generation != service.generation]
    if not old:
        return
    why = Why("Replaced", f"service {service.spec.name} was changed")
    up = sum(1 for job in jobs if job.generation == service.generation and job.state == "running")
    surplus = len(old) - max(0, service.wanted - up)
    for job in sorted(old, key=_keep_order, reverse=True)[: max(0, surplus)]:
        _let_go(draft, job, why)


def make_room_for_new(draft: Draft) -> None:
    """After a placement pass: where a service's new replica found no place, one of its old ones goes for it.

    One at a time: not while another leaves, nor while a new one has a place and only has to come up.
    """
    cluster = draft.cluster
    for key in sorted(cluster.changing):
        service = cluster.services[key]
        jobs = cluster.service_jobs.get(key, {}).values()
        old = [job for job in jobs if job.generation != service.generation and job.verdict is None]
        states = [job.state for job in jobs if job.generation == service.generation]
        on_the_move = "starting" in states or any(job.verdict is not None for job in jobs)
        if not old:
            del cluster.changing[key]
        elif "pending" in states and not on_the_move and not cluster.draining:
            _let_go(draft, max(old, key=_keep_order), Why("Replaced", f"service {service.spec.name} was changed"))


def _counting(draft: Draft, key: ServiceKey) -> list[Job]:
    """The replicas that count: not those that are on their way out for good."""
    jobs = draft.cluster.service_jobs.get(key, {}).values()
    return [job for job in jobs if job.verdict is None or job.verdict.kind == "requeue"]


def _keep_order(job: Job) -> tuple[int, int]:
    """Which replicas stay when there are too many: running ones before those that only start or wait, then by age."""
    return ({"running": 0, "starting": 1, "stopping": 2}.get(job.state, 3), job.id)


def _let_go(draft: Draft, job: Job, why: Why) -> None:
    if job.live == 0:
        draft.add(f.JobEnded(job.id, "cancelled", why))
    elif job.verdict is None or job.verdict.kind != "cancel":
        draft.add(f.JobStopping(job.id, "cancel", why, "scaled-down"))


def replica_ended(draft: Draft, job: Job) -> None:
    """A service's replica ended by itself: the next one waits a little longer with each crash in a row."""
    service = draft.cluster.services.get((job.tenant, job.service))
    if service is None or job.state not in ("failed", "succeeded") or job.generation != service.generation:
        return
    steady = job.started_ms and draft.now_ms - job.started_ms >= draft.settings.steady_run_ms
    crashes = 1 if steady else service.crashes + 1
    wait = draft.backoff_ms(crashes - 1)
    draft.add(f.ServiceFaltered(job.tenant, job.service, crashes, draft.now_ms + wait, job.id, job.why))


def heal_from(draft: Draft, node: NodeId) -> None:
    """A node was lost: replicas on it no longer count, so others start at once."""
    cluster = draft.cluster
    why = Why("NodeLost", f"node {node} was lost; another replica takes its place")
    for key in sorted(cluster.pool.spaces[node].assignments):
        job = cluster.jobs[key.job]
        if job.service and (job.verdict is None or job.verdict.kind != "cancel"):
            draft.add(f.JobStopping(job.id, "cancel", why, "node-lost"))
