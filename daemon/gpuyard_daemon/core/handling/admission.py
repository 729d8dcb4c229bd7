"""Requests of tenants: let in, refused, or answered again.

A request that no node could ever serve, even empty, is refused at once and told which resource is missing and what the
nearest is that exists. Where no node has joined yet there is nothing to compare with, and the job waits. A tenant with
as many unfinished jobs as it may have gets no more, and what asks for more GPUs than its tenant may ever hold is
refused as well; both may be let in later, so those refusals are not remembered.
"""

from __future__ import annotations

from msgspec.structs import replace

from gpuyard_daemon.core.handling.answers import answer as give_answer
from gpuyard_daemon.core.handling.answers import answer_again, answer_again_chosen, kept_until, refuse
from gpuyard_daemon.core.handling.dependencies import refused
from gpuyard_daemon.core.handling.parting import parted
from gpuyard_daemon.core.handling.services import apply_service, remove_service
from gpuyard_daemon.core.placing.impossible import Missing
from gpuyard_daemon.core.queueing.promises import promise
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.backlog import bytes_of, bytes_of_service
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.inputs import (
    JobSubmitted,
    RequestMalformed,
    RequestRefused,
    ServiceApplied,
    ServiceDeleted,
)
from gpuyard_daemon.core.state.model import replica_spec
from gpuyard_daemon.core.tenants.limits import never_within, refused_queue
from gpuyard_daemon.core.tenants.tenancy import OVER_QUOTA, least_held
from gpuyard_protocol.jobs import JobSpec, SubmissionAnswer, Why
from gpuyard_protocol.names import SubmissionId, Tenant, User, is_submission_id, nearest
from gpuyard_protocol.services import ServiceSpec


def submit(draft: Draft, request: JobSubmitted) -> None:
    if request.chosen_id and answer_again(draft, request.tenant, request.submission_id):
        return
    spec = parted(draft, request.tenant, request.user, _settled(draft, request.tenant, request.spec))
    count = spec.array.count if spec.array else 1
    refusal = _too_many_jobs(draft, request.tenant, count) or too_large(draft, request.tenant, bytes_of(spec))
    if refusal:
        reject_for_now(draft, request.tenant, request.submission_id, refusal)
        return
    if refusal_and_near := refused_queue(draft.cluster, request.tenant, spec):
        refuse(draft, request, refusal_and_near[0], near=refusal_and_near[1])
        return
    if not spec.allow_pending:
        missing = draft.possibilities.missing(
            draft.cluster.pool, spec.need, spec.least_replicas, request.tenant, request.user
        )
        if missing is not None:
            if spec.total_gpus:
                missing = missing._replace(path="$.total_gpus", found=str(spec.total_gpus))
            _reject_impossible(draft, request.tenant, request.submission_id, missing, chosen=request.chosen_id)
            return
        if never := draft.cluster.tenancy.never(request.tenant, least_held(spec.need, spec.least_replicas)):
            reject_for_now(draft, request.tenant, request.submission_id, never)
            return
        if never := never_within(draft.cluster, request.tenant, spec):
            reject_for_now(draft, request.tenant, request.submission_id, never)
            return
    if refusal_and_near := refused(draft, request.tenant, spec):
        refuse(draft, request, refusal_and_near[0], near=refusal_and_near[1])
        return
    until_ms = kept_until(draft, chosen=request.chosen_id)
    accepted = f.JobAccepted if spec.array is None else f.ArrayAccepted
    expected = expectation(draft.cluster, request.tenant, request.user, spec)
    draft.add(
        accepted(
            draft.cluster.last_job + 1,
            request.tenant,
            request.user,
            request.submission_id,
            spec,
            until_ms,
            request.chosen_id,
            *expected,
            promise(draft.cluster, request.tenant, request.user, spec, expected[0], draft.now_ms),
        )
    )


def expectation(cluster: Cluster, tenant: Tenant, user: User, spec: JobSpec) -> tuple[int, str]:
    """How long a job will run, ms, and how that is known (`estimate`, `history`); 0: it is not."""
    return cluster.lore.expected(tenant, user, spec)


def _settled(draft: Draft, tenant: Tenant, spec: JobSpec) -> JobSpec:
    """The specification with what it leaves to the yard and its queue."""
    settings = draft.settings
    what = spec.on_node_lost or settings.on_node_lost
    if (idle := draft.cluster.quota.idle_rule(tenant, spec.queue)) is not None:
        spec = replace(spec, idle=idle)
    if what == "wait":
        # As written: most jobs say nothing, and nothing is what the journal then keeps.
        return spec
    return replace(spec, on_node_lost=what, lease_ms=spec.lease_ms or settings.lease_ms)


def refuse_malformed(draft: Draft, request: RequestMalformed) -> None:
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    text = f"{request.path}: found {request.found}; expected {request.expected}"
    answer = SubmissionAnswer(
        submission_id=request.submission_id,
        accepted=False,
        reason=Why("Malformed", text),
        path=request.path,
        found=request.found,
        expected=request.expected,
        nearest=request.nearest,
        at_ms=draft.now_ms,
    )
    give_answer(draft, request.tenant, answer)


def refuse_unseen(draft: Draft, request: RequestRefused) -> None:
    """Refused before anybody looked at it. Not remembered: a repetition is decided anew."""
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    reject_for_now(draft, request.tenant, request.submission_id, request.reason, request.retry_after_ms)


def apply(draft: Draft, request: ServiceApplied) -> None:
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    spec = request.spec
    known = draft.cluster.services.get((request.tenant, spec.name))
    if known is not None and known.user != request.user:
        refuse(draft, request, Why("NotYours", f"service {spec.name} belongs to user {known.user}"))
        return
    missing = draft.possibilities.missing(draft.cluster.pool, spec.need, 1, request.tenant, request.user)
    if missing is not None:
        missing = missing._replace(path=missing.path.replace("$.", "$.replica.", 1))
        chosen = is_submission_id(request.submission_id)
        _reject_impossible(draft, request.tenant, request.submission_id, missing, chosen=chosen)
        return
    cluster = draft.cluster
    never = cluster.tenancy.never(request.tenant, least_held(spec.need, 1))
    if never := never or never_within(cluster, request.tenant, replica_spec(spec)):
        reject_for_now(draft, request.tenant, request.submission_id, never)
        return
    if refusal := too_much_service(draft, request.tenant, known.spec if known else None, spec):
        reject_for_now(draft, request.tenant, request.submission_id, refusal)
        return
    apply_service(draft, request.tenant, request.user, spec)
    answer = SubmissionAnswer(submission_id=request.submission_id, accepted=True, service=spec.name, at_ms=draft.now_ms)
    give_answer(draft, request.tenant, answer)


def delete(draft: Draft, request: ServiceDeleted) -> None:
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    services = draft.cluster.services
    service = services.get((request.tenant, request.service))
    if service is None:
        names = [name for tenant, name in services if tenant == request.tenant]
        near = nearest(request.service, names)
        refuse(draft, request, Why("UnknownService", f"there is no service {request.service!r}"), near=near)
        return
    if service.user != request.user:
        refuse(draft, request, Why("NotYours", f"service {request.service} belongs to user {service.user}"))
        return
    remove_service(draft, request.tenant, request.service)
    answer = SubmissionAnswer(
        submission_id=request.submission_id, accepted=True, service=request.service, at_ms=draft.now_ms
    )
    give_answer(draft, request.tenant, answer)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _too_many_jobs(draft: Draft, tenant: Tenant, count: int) -> Why | None:
    """Why a tenant may not hand in so many more jobs now; None if it may."""
    most = draft.cluster.tenancy.limits(tenant).jobs_max
    jobs = draft.cluster.lists.get(tenant)
    used = jobs.unfinished if jobs else 0
    if not most or used + count <= most:
        return None
    text = (
        f"tenant {tenant} has {used} jobs that have not ended, and may have {most}"
        + (f", and this is {count} more" if count > 1 else "")
        + ": wait for some to end, cancel some, or ask the yard's operator to raise jobs_max"
    )
    return Why(OVER_QUOTA, text)


def too_large(draft: Draft, tenant: Tenant, more: int) -> Why | None:
    """Why a tenant may not hand in so many more bytes now; None if it may."""
    most = draft.cluster.tenancy.limits(tenant).bytes_max
    used = draft.cluster.backlog.bytes.get(tenant, 0)
    if not most or more <= 0 or used + more <= most:
        return None
    text = (
        f"tenant {tenant} has {_mib(used)} of commands, environments and scripts in jobs that have not ended and in "
        f"services, and may have {_mib(most)}, and this is {_mib(more)} more: wait for some to end, cancel some, hand "
        "in files instead (--upload, a shared directory), send equal jobs as an array, or ask the yard's operator to "
        "raise backlog_max"
    )
    return Why(OVER_QUOTA, text)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def too_much_service(draft: Draft, tenant: Tenant, before: ServiceSpec | None, after: ServiceSpec) -> Why | None:
    """Why a service may not become this; None if it may. Replicas are jobs, and wanted long after it was asked for."""
    more = after.max_replicas - (before.max_replicas if before else 0)
    most = draft.cluster.tenancy.limits(tenant).jobs_max
    used = draft.cluster.backlog.replicas.get(tenant, 0)
    if most and more > 0 and used + more > most:
        text = (
            f"tenant {tenant}'s services may have {used} replicas together, and this would be {more} more than that, "
            f"where it may have {most} jobs: lower max_replicas, delete a service, or ask the yard's operator to raise "
            "jobs_max"
        )
        return Why(OVER_QUOTA, text)
    return too_large(draft, tenant, bytes_of_service(after) - (bytes_of_service(before) if before else 0))


def reject_for_now(
    draft: Draft, tenant: Tenant, submission_id: SubmissionId, why: Why, retry_after_ms: int = 0
) -> None:
    """Refuse what may be let in later: also under a chosen id, so that a repetition is decided anew."""
    answer = SubmissionAnswer(
        submission_id=submission_id,
        accepted=False,
        reason=why,
        retry_after_ms=retry_after_ms,
        at_ms=draft.now_ms,
    )
    draft.add(f.RequestAnswered(tenant, answer, kept_until(draft, chosen=False), False))


def _reject_impossible(
    draft: Draft, tenant: Tenant, submission_id: SubmissionId, missing: Missing, *, chosen: bool
) -> None:
    answer = SubmissionAnswer(
        submission_id=submission_id,
        accepted=False,
        reason=Why("Impossible", missing.text),
        path=missing.path,
        found=missing.found,
        expected=missing.expected,
        nearest=missing.nearest,
        at_ms=draft.now_ms,
    )
    draft.add(f.RequestAnswered(tenant, answer, kept_until(draft, chosen=chosen), chosen))
