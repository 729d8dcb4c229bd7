"""What people see of the state: jobs, services, nodes, numbers. Reading changes nothing."""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.placing.partitions import Card, amounts_on
from gpuyard_daemon.core.state.cluster import Cluster, ServiceKey
from gpuyard_daemon.core.state.model import Assignment, Job, Node, Service
from gpuyard_daemon.core.tenants.limits import over_quota
from gpuyard_daemon.core.tenants.tenancy import least_held
from gpuyard_protocol.jobs import JobSpec, JobView, ReplicaView, Why
from gpuyard_protocol.names import JobId, Tenant
from gpuyard_protocol.queries import (
    PAGE_ROWS_MAX,
    CardView,
    JobsPage,
    JobsQuery,
    NodeView,
    Stats,
)
from gpuyard_protocol.resources import (
    MigInstance,
    MpsShare,
    Partition,
    TimeSliceShare,
    WholeCards,
    devices_of,
    mode_of,
)
from gpuyard_protocol.services import ServiceView
from gpuyard_protocol.units import format_mib, format_milli, format_ms


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """The core in numbers, for metrics."""

    jobs: dict[str, int]
    nodes: dict[str, int]
    #: Jobs that may start now, and those that wait before a retry.
    waiting: int
    asleep: int
    #: GPU compute held in thousandths of a card, by mode; and the cards in each mode, "idle" included.
    held_milli_by_mode: dict[str, int]
    cards_by_mode: dict[str, int]
    unhealthy_cards: int
    capacity_milli: int
    services: int
    #: Since the yard began.
    started: int
    finished: int
    requeued: int
    rejected: int
    turns: int
    #: Times that running jobs gave way, what that cost in thousandths of a card × ms, and places kept now.
    preempted: int = 0
    preempted_milli_ms: int = 0
    claims: int = 0


def job_view(cluster: Cluster, job: Job, *, with_spec: bool = False) -> JobView:
    spec = job.spec
    return JobView(
        job=job.id,
        tenant=job.tenant,
        user=job.user,
        name=spec.name,
        state=job.state,
        submission_id=job.submission_id,
        priority=spec.priority,
        replicas=job.most_replicas,
        wants=spec.need.describe(),
        submitted_ms=job.submitted_ms,
        attempt=job.attempt,
        retries_left=job.retries_left,
        first_started_ms=job.first_started_ms,
        started_ms=job.started_ms,
        ended_ms=job.ended_ms,
        exit_code=job.exit_code,
        reason=_reason(cluster, job),
        service=job.service,
        placed=tuple([_replica_view(assignment) for assignment in job.assignments]) if job.state != "pending" else (),
        array=job.array,
        array_index=job.array_index,
        size=len(job.assignments) if job.is_elastic and job.live else 0,
        min_replicas=spec.min_replicas,
        spec=_shown_spec(job) if with_spec else None,
    )


def _shown_spec(job: Job) -> JobSpec:
    """The specification; the script of an array is shown with its first element, not ten thousand times."""
    if job.array in (0, job.id) or not job.spec.script:
        return job.spec
    return msgspec.structs.replace(job.spec, script="")


def _reason(cluster: Cluster, job: Job) -> Why | None:
    """Why a job is where it is, as far as the records say; what nodes say to a waiting job is for `why`."""
    if job.state == "pending" and (apart := why_apart(cluster, job)) is not None:
        return apart
    if job.id in cluster.waiting:
        over = cluster.tenancy.blocks(job.tenant, least_held(job.spec.need, job.spec.least_replicas))
        over = over or over_quota(cluster, job)
        if over is not None:
            return over
    return job.why if job.verdict is None else job.verdict.why


def why_apart(cluster: Cluster, job: Job) -> Why | None:
    """Why a pending job does not even look for a place, but for a wait before a retry; None if it does."""
    if job.held_by:
        return Why("Held", f"held by {job.held_by} until it is released")
    if job.not_before_ms and not job.attempt:
        return Why(
            "BeginTime", f"it was asked to begin {format_ms(job.not_before_ms - job.submitted_ms)} after its submission"
        )
    if (apart := cluster.gates.why(job, cluster.jobs, cluster.arrays)) is not None:
        return apart
    if job.id not in cluster.waiting and not job.not_before_ms and job.spec.array is not None:
        count = job.spec.array.at_once
        go = f"{count} elements of array {job.array} go" if count > 1 else f"one element of array {job.array} goes"
        return Why("ArrayLimit", f"{go} at once, and others are first")
    return None


def _replica_view(assignment: Assignment) -> ReplicaView:
    return ReplicaView(
        replica=assignment.key.replica,
        state=assignment.outcome or assignment.state,
        node=assignment.node,
        partition=describe_partition(assignment.home or assignment.partition),
        devices=devices_of(assignment.home or assignment.partition),
        exit_code=assignment.exit_code if assignment.outcome == "exited" else None,
    )


def describe_partition(partition: Partition) -> str:
    """`2 whole`, `mps 0.3/24Gi`, `mig 1g.10gb@6`, `timeslice 0.5/40Gi`, `cpu`."""
    match partition:
        case WholeCards(devices=devices):
            return f"{len(devices)} whole"
        case MpsShare(share_milli=milli, memory_mib=memory):
            return f"mps {format_milli(milli)}/{format_mib(memory)}"
        case TimeSliceShare(share_milli=milli, memory_mib=memory):
            return f"timeslice {format_milli(milli)}/{format_mib(memory)}"
        case MigInstance(profile=profile, start=start, processes=processes):
            return f"mig {profile}@{start}" + (f" mps {processes}" if processes else "")
        case _:
            return "cpu"


def jobs_page(cluster: Cluster, tenant: Tenant | None, query: JobsQuery) -> JobsPage:
    """Newest first. Without `states` and `all`: those that are not final."""
    jobs = cluster.lists.get(tenant or "")
    if jobs is None:
        return JobsPage(jobs=())
    limit = max(1, min(PAGE_ROWS_MAX, query.limit))
    rows: list[JobView] = []
    last = 0
    #: The waiting elements of arrays that were met.
    folded: dict[JobId, list[Job]] = {}
    for number in jobs.newest_first(query.cursor):
        job = cluster.jobs[number]
        if query.states:
            if job.state not in query.states:
                continue
        elif job.is_final and not query.all:
            continue
        if (query.user and job.user != query.user) or (query.service and job.service != query.service):
            continue
        folds = query.fold and job.array and job.state == "pending"
        if folds and job.array not in folded:
            folded[job.array] = cluster.pending_elements(job.array)
        if folds and folded[job.array][-1].id != number:
            # Its array has a row already, on this page or an earlier one.
            continue
        if len(rows) == limit:
            return JobsPage(jobs=tuple(rows), next=last, counts=_counts(cluster, tenant))
        view = job_view(cluster, job)
        rows.append(msgspec.structs.replace(view, elements=len(folded[job.array])) if folds else view)
        last = number
    return JobsPage(jobs=tuple(rows), counts=_counts(cluster, tenant))


def _counts(cluster: Cluster, tenant: Tenant | None) -> dict[str, int]:
    return {str(state): count for state, count in cluster.lists[tenant or ""].counts.items() if count}


# --- services --------------------------------------------------------------------------------------------------------


def service_view(cluster: Cluster, key: ServiceKey, service: Service) -> ServiceView:
    jobs = list(cluster.service_jobs.get(key, {}).values())
    spec = service.spec
    return ServiceView(
        service=spec.name,
        tenant=service.tenant,
        user=service.user,
        model=spec.model,
        version=spec.version,
        wanted=service.wanted,
        running=sum(1 for job in jobs if job.state == "running"),
        starting=sum(1 for job in jobs if job.state == "starting"),
        pending=sum(1 for job in jobs if job.state == "pending"),
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        target_concurrency=spec.target_concurrency,
        concurrency=service.concurrency,
        queue_depth=service.queue_depth,
        endpoints=tuple([where for job in jobs if job.state == "running" for where in _endpoints(cluster, job)]),
        jobs=tuple([job.id for job in jobs]),
        applied_ms=service.applied_ms,
        generation=service.generation,
        updated=sum(1 for job in jobs if job.generation == service.generation and job.state == "running"),
        outdated=sum(1 for job in jobs if job.generation != service.generation),
        crashes=service.crashes,
        crashed_job=service.crashed_job,
        crash=service.crash,
    )


def _endpoints(cluster: Cluster, job: Job) -> list[str]:
    found = []
    for assignment in job.assignments:
        inventory = cluster.nodes[assignment.node].inventory
        if assignment.port and inventory is not None and cluster.nodes[assignment.node].state != "lost":
            found.append(f"{inventory.address}:{assignment.port}")
    return found


# --- nodes -----------------------------------------------------------------------------------------------------------


def node_view(cluster: Cluster, space: NodeSpace, tenant: Tenant | None) -> NodeView:
    """A node and its cards; of jobs, a tenant sees its own."""
    node = space.node
    inventory = node.inventory
    if inventory is None:
        return NodeView(node=node.id, hostname=node.id, state=node.state, reason=node.reason)
    return NodeView(
        node=node.id,
        hostname=inventory.hostname,
        state=node.state,
        cards=tuple([_card_view(cluster, space, card, tenant) for card in space.cards]),
        cpu_milli=inventory.cpu_milli,
        cpu_held_milli=inventory.cpu_milli - space.cpu_free_milli,
        memory_mib=inventory.memory_mib,
        memory_held_mib=inventory.memory_mib - space.memory_free_mib,
        labels=inventory.labels,
        simulated=inventory.simulated,
        driver=inventory.driver,
        agent_version=inventory.agent_version,
        reason=node.reason or _cordon(node) or _avoidance(space),
        cordoned=bool(node.cordoned_by),
    )


def _cordon(node: Node) -> str:
    if not node.cordoned_by:
        return ""
    return f"cordoned by {node.cordoned_by}" + (f": {node.cordon_reason}" if node.cordon_reason else "")


def _avoidance(space: NodeSpace) -> str:
    names = sorted(name for name, avoidance in space.node.avoided.items() if avoidance.until_ms)
    modes = [name for name in names if "/" not in name]
    # Whose they are is between their owner (`why`) and whoever runs the yard (the agent's log).
    accounts = len(names) - len(modes)
    modes += [f"{accounts} user{'s' if accounts > 1 else ''} without an account"] if accounts else []
    return f"left alone for {', '.join(modes)} after a refusal" if modes else ""


def _card_view(cluster: Cluster, space: NodeSpace, card: Card, tenant: Tenant | None) -> CardView:
    device = card.device
    past = space.node.pasts.get(device.uuid)
    jobs = sorted({key.job for key in card.held})
    return CardView(
        uuid=device.uuid,
        index=device.index,
        model=device.model,
        memory_mib=device.memory_mib,
        mode=card.mode,
        healthy=card.takes_work,
        fault=device.fault,
        held_milli=card.milli,
        held_memory_mib=card.memory_mib,
        jobs=tuple([job for job in jobs if tenant is None or cluster.jobs[job].tenant == tenant]),
        note="; ".join([*_kept_for(cluster, space, card, tenant), *_kept_mode(card)]),
        keeps_mode_until_ms=past.keeps_mode_until_ms if past is not None else 0,
    )


def _kept_for(cluster: Cluster, space: NodeSpace, card: Card, tenant: Tenant | None) -> list[str]:
    """For whom a card in pieces is kept free; a tenant is told the numbers of its own jobs."""
    found = []
    for claim in space.claims:
        kept = cluster.claims.of(claim.job)
        if kept is not None and kept.kind == "drain" and card.device.uuid in devices_of(claim.partition):
            whom = f"job {claim.job}" if tenant in (None, claim.tenant) else "a job that waits"
            found.append(f"kept free for {whom} while those on it run out")
    return found


def _kept_mode(card: Card) -> list[str]:
    if not card.keeps_mode:
        return []
    return ["in MIG mode, for now" if card.in_mig else "out of MIG mode, for now"]


# --- numbers ---------------------------------------------------------------------------------------------------------


def stats(cluster: Cluster, now_ms: int, turns: int) -> Stats:
    """The yard in numbers; the yard's name is the shell's to add."""
    totals, pool = cluster.totals, cluster.pool
    since = max(0, now_ms - totals.summed_to_ms) if totals.summed_to_ms else 0
    return Stats(
        yard="",
        now_ms=now_ms,
        jobs=_counts(cluster, None),
        nodes=_nodes_by_state(cluster),
        gpus=sum(1 for space in pool.spaces.values() for card in space.cards if card.present),
        held_milli=pool.held_milli,
        held_milli_ms=totals.held_milli_ms + since * pool.held_milli,
        capacity_milli_ms=totals.capacity_milli_ms + since * pool.capacity_milli,
        finished=totals.finished,
        wait_sum_ms=totals.wait_sum_ms,
        started=totals.started,
        turns=turns,
    )


def _nodes_by_state(cluster: Cluster) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in cluster.nodes.values():
        if node.is_removed:
            continue
        counts[node.state] = counts.get(node.state, 0) + 1
    return counts


def gauges(cluster: Cluster, turns: int) -> Gauges:
    held: dict[str, int] = {"whole": 0, "mig": 0, "mps": 0, "timeslice": 0}
    cards = dict.fromkeys(("idle", *held), 0)
    unhealthy = 0
    for space in cluster.pool.spaces.values():
        for card in space.cards:
            cards[card.mode] += 1
            unhealthy += not card.takes_work
            for partition in card.held.values():
                held[mode_of(partition)] += amounts_on(card.device, partition)[0]
    totals = cluster.totals
    pending = cluster.lists[""].counts["pending"]
    return Gauges(
        jobs={str(state): count for state, count in cluster.lists[""].counts.items()},
        nodes=_nodes_by_state(cluster),
        waiting=len(cluster.waiting),
        asleep=pending - len(cluster.waiting),
        held_milli_by_mode=held,
        cards_by_mode=cards,
        unhealthy_cards=unhealthy,
        capacity_milli=cluster.pool.capacity_milli,
        services=len(cluster.services),
        started=totals.started,
        finished=totals.finished,
        requeued=totals.requeued,
        rejected=totals.rejected,
        turns=turns,
        preempted=totals.preempted,
        preempted_milli_ms=totals.preempted_milli_ms,
        claims=len(cluster.claims),
    )
