"""Why a job is where it is: every reason, counted by node, from the code that places.

For a waiting job each node is judged as placement would judge it now. For the others the state says it all.
"""

from __future__ import annotations

from gpuyard_daemon.core.capacity import NodeSpace
from gpuyard_daemon.core.cluster import Cluster
from gpuyard_daemon.core.feasibility import LASTING, Reason, Shape, judge
from gpuyard_daemon.core.gangs import offer_of
from gpuyard_daemon.core.model import Job
from gpuyard_daemon.core.order import ShapeQueue
from gpuyard_daemon.core.round import counts_for, places
from gpuyard_daemon.core.tenancy import least_held
from gpuyard_daemon.core.views import why_apart
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.queries import NodeReason, WhyAnswer
from gpuyard_protocol.units import format_mib, format_milli, format_ms

_EXAMPLES_MAX = 5


def why(cluster: Cluster, job: Job, now_ms: int, timeslice_milli_max: int) -> WhyAnswer:
    story = tuple([f"+{format_ms(at_ms - job.submitted_ms)} {text}" for at_ms, text in job.story])
    if job.state != "pending":
        return WhyAnswer(job=job.id, state=job.state, summary=_summary_of_state(job), story=story)
    if (apart := _apart(cluster, job, now_ms)) is not None:
        return WhyAnswer(job=job.id, state=job.state, summary=apart, story=story)
    need = job.spec.need
    shape = Shape(need, job.spec.replicas, job.tenant, job.user, timeslice_milli_max)
    reasons, members = _judge_all(cluster, shape)
    limit = _over_limit(cluster, shape, members)
    ahead = sum(map(job.order_key.__gt__, cluster.waiting_keys.values()))
    return WhyAnswer(
        job=job.id,
        state=job.state,
        summary=_summary(cluster, job, reasons, members, limit),
        story=story,
        reasons=reasons,
        position=ahead + 1,
        ahead=ahead,
        limit=limit,
    )


def _apart(cluster: Cluster, job: Job, now_ms: int) -> str | None:
    """Why a pending job does not even look for a place; None if it does."""
    left = format_ms(max(0, job.not_before_ms - now_ms) // 1000 * 1000)
    if job.not_before_ms and not job.held_by:
        if not job.attempt:
            return f"begins in {left}, as it was asked to"
        because = f" after: {job.why.text}" if job.why else ""
        return f"waits {left} before a new start{because}"
    apart = why_apart(cluster, job)
    return apart.text if apart else None


def _over_limit(cluster: Cluster, shape: Shape, members: int) -> Why | None:
    """What the tenant's limit says: to the least it could count for, or else to the places it would get now."""
    tenancy = cluster.tenancy
    over = tenancy.blocks(shape.tenant, least_held(shape.need, shape.replicas))
    if over is None and members >= shape.replicas and tenancy.is_limited(shape.tenant):
        placements = places(
            cluster.pool,
            ShapeQueue((shape.need, shape.replicas, shape.tenant, shape.user), 0, shape.timeslice_milli_max),
        )
        if placements is not None:
            over = tenancy.blocks(shape.tenant, counts_for(cluster.pool, placements))
    return over


def _judge_all(cluster: Cluster, shape: Shape) -> tuple[tuple[NodeReason, ...], int]:
    """Reasons, most frequent first, and how many replicas would find a place now."""
    by_reason: dict[Reason, list[NodeSpace]] = {}
    members = 0
    for space in cluster.pool.spaces.values():
        verdict = judge(space, shape, spanning=shape.replicas > 1)
        if isinstance(verdict, Reason):
            by_reason.setdefault(verdict, []).append(space)
        elif shape.replicas > 1:
            members += len(offer_of(space, shape, shape.replicas, spanning=True).partitions)
        else:
            members += 1
    order = list(Reason)
    ranked = sorted(by_reason.items(), key=lambda item: (-len(item[1]), order.index(item[0])))
    return (
        tuple(
            [
                NodeReason(
                    reason=Why(reason.value, text_of(reason, shape)),
                    nodes=len(spaces),
                    examples=tuple([space.node.id for space in spaces[:_EXAMPLES_MAX]]),
                )
                for reason, spaces in ranked
            ]
        ),
        members,
    )


def _summary(cluster: Cluster, job: Job, reasons: tuple[NodeReason, ...], members: int, limit: Why | None) -> str:
    if cluster.draining:
        return "the yard is stopping: nothing starts until it is started again"
    if not cluster.nodes:
        return "no node has joined yet"
    if limit is not None:
        return limit.text
    if job.spec.replicas > 1 and members:
        return f"{job.spec.replicas} replicas start together or not at all: there is room for {members} now"
    if members:
        return "it starts with the next turn"
    if all(Reason(reason.reason.code) in LASTING for reason in reasons):
        return f"no node of today could ever run it: {reasons[0].reason.text}"
    waiting = [reason for reason in reasons if Reason(reason.reason.code) not in LASTING]
    return f"{waiting[0].reason.text} (on {waiting[0].nodes} of {len(cluster.nodes)} nodes)"


def _summary_of_state(job: Job) -> str:
    because = job.verdict.why if job.verdict else job.why
    where = ", ".join(dict.fromkeys(assignment.node for assignment in job.assignments))
    match job.state:
        case "starting":
            waits = sum(1 for assignment in job.assignments if assignment.state == "ordered")
            return f"starting on {where}" + (
                f": {waits} replicas are not prepared yet" if waits and job.spec.replicas > 1 else ""
            )
        case "running":
            return f"running on {where}"
        case "stopping":
            left = ", ".join(dict.fromkeys(a.node for a in job.assignments if a.is_live))
            return f"stopping ({because.text if because else 'told to'}): waits for {left} to report the end"
        case _:
            return f"{job.state}: {because.text}" if because else job.state


def text_of(reason: Reason, shape: Shape) -> str:
    """The reason in words, for any node that gives it."""
    need = shape.need
    match reason:
        case Reason.NODE_NOT_NAMED:
            return f"it asks for {', '.join(need.nodes)}"
        case Reason.LABEL_MISSING:
            return f"it asks for nodes with {', '.join(f'{name}={value}' for name, value in need.node_labels)}"
        case Reason.NO_ACCOUNT:
            return f"no account for {shape.tenant}/{shape.user}"
        case Reason.TOO_FEW_CPUS:
            return f"fewer than {format_milli(need.cpu_milli)} CPU cores"
        case Reason.TOO_LITTLE_MEMORY:
            return f"less than {format_mib(need.memory_mib)} of memory"
        case Reason.MODEL_MISSING:
            return f"no {'|'.join(need.models)}"
        case Reason.CARD_TOO_SMALL:
            return f"no card with {format_mib(max(need.card_memory_mib, need.share_memory_mib))}"
        case Reason.TOO_FEW_CARDS:
            return f"fewer than {need.gpus} such cards" if need.gpus > 1 else "no such card"
        case Reason.PROFILE_MISSING:
            return f"no card offers MIG profile {need.mig}"
        case Reason.MODE_MISSING:
            return f"no card can be shared with isolation {need.isolation}"
        case Reason.CPUS_BUSY:
            return f"fewer than {format_milli(need.cpu_milli)} CPU cores free"
        case Reason.MEMORY_BUSY:
            return f"less than {format_mib(need.memory_mib)} of memory free"
        case Reason.CARDS_BUSY:
            return f"fewer than {need.gpus} such cards free" if need.gpus > 1 else "no such card free"
        case Reason.PROFILE_BUSY:
            return f"no free slices for {need.mig}"
        case Reason.SHARE_BUSY:
            return f"no card with room for {need.describe()} of tenant {shape.tenant}"
        case _:
            return _TEXTS[reason]


_TEXTS = {
    Reason.NO_GPU: "no GPU",
    Reason.NOT_JOINED: "the node's agent has not joined",
    Reason.SUSPECTED: "the node has not been heard of for some seconds",
    Reason.LOST: "the node is lost",
    Reason.INCOMPATIBLE: "the node's agent speaks another version",
    Reason.CARDS_UNHEALTHY: "its cards are not healthy",
    Reason.MODE_AVOIDED: "the node could not set up such a partition lately",
}
