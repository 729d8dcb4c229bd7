"""Requests of tenants: let in, refused, or answered again.

A request that no node could ever serve, even empty, is refused at once and told which resource is missing and what the
nearest is that exists. Where no node has joined yet there is nothing to compare with, and the job waits.
"""

from __future__ import annotations

from gpuyard_daemon.core import facts as f
from gpuyard_daemon.core.draft import Draft
from gpuyard_daemon.core.impossible import Missing
from gpuyard_daemon.core.inputs import (
    CancelRequested,
    JobSubmitted,
    RequestMalformed,
    ServiceApplied,
    ServiceDeleted,
)
from gpuyard_daemon.core.services import apply_service, remove_service
from gpuyard_protocol.jobs import SubmissionAnswer, Why
from gpuyard_protocol.names import SubmissionId, Tenant, is_submission_id, nearest


def submit(draft: Draft, request: JobSubmitted) -> None:
    if request.chosen_id and _answer_again(draft, request.tenant, request.submission_id):
        return
    spec = request.spec
    if not spec.allow_pending:
        missing = draft.possibilities.missing(
            draft.cluster.pool, spec.need, spec.replicas, request.tenant, request.user
        )
        if missing is not None:
            _reject_impossible(draft, request.tenant, request.submission_id, missing, chosen=request.chosen_id)
            return
    until_ms = _kept_until(draft, chosen=request.chosen_id)
    draft.add(
        f.JobAccepted(
            draft.cluster.last_job + 1,
            request.tenant,
            request.user,
            request.submission_id,
            spec,
            until_ms,
            request.chosen_id,
        )
    )


def refuse_malformed(draft: Draft, request: RequestMalformed) -> None:
    if _answer_again_chosen(draft, request.tenant, request.submission_id):
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
    _answer(draft, request.tenant, answer)


def cancel(draft: Draft, request: CancelRequested) -> None:
    if _answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    cluster = draft.cluster
    job = cluster.jobs.get(request.job)
    if job is None or job.tenant != request.tenant:
        jobs = cluster.lists.get(request.tenant)
        near = jobs.near(request.job) if jobs else 0
        text = f"there is no job {request.job} (any more)"
        _refuse(draft, request, Why("UnknownJob", text), near=str(near) if near else "")
        return
    if job.user != request.user:
        _refuse(draft, request, Why("NotYours", f"job {job.id} belongs to user {job.user}"))
        return
    if job.is_final:
        _refuse(draft, request, Why("AlreadyEnded", f"job {job.id} has {job.state} already"))
        return
    why = Why("Cancelled", f"cancelled by {request.user}")
    if job.live == 0:
        draft.add(f.JobEnded(job.id, "cancelled", why))
    elif job.verdict is None or job.verdict.kind != "cancel":
        draft.add(f.JobStopping(job.id, "cancel", why, "cancelled"))
    answer = SubmissionAnswer(submission_id=request.submission_id, accepted=True, job=job.id, at_ms=draft.now_ms)
    _answer(draft, request.tenant, answer)


def apply(draft: Draft, request: ServiceApplied) -> None:
    if _answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    spec = request.spec
    known = draft.cluster.services.get((request.tenant, spec.name))
    if known is not None and known.user != request.user:
        _refuse(draft, request, Why("NotYours", f"service {spec.name} belongs to user {known.user}"))
        return
    missing = draft.possibilities.missing(draft.cluster.pool, spec.need, 1, request.tenant, request.user)
    if missing is not None:
        missing = missing._replace(path=missing.path.replace("$.", "$.replica.", 1))
        chosen = is_submission_id(request.submission_id)
        _reject_impossible(draft, request.tenant, request.submission_id, missing, chosen=chosen)
        return
    apply_service(draft, request.tenant, request.user, spec)
    answer = SubmissionAnswer(submission_id=request.submission_id, accepted=True, service=spec.name, at_ms=draft.now_ms)
    _answer(draft, request.tenant, answer)


def delete(draft: Draft, request: ServiceDeleted) -> None:
    if _answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    services = draft.cluster.services
    service = services.get((request.tenant, request.service))
    if service is None:
        names = [name for tenant, name in services if tenant == request.tenant]
        near = nearest(request.service, names)
        _refuse(draft, request, Why("UnknownService", f"there is no service {request.service!r}"), near=near)
        return
    if service.user != request.user:
        _refuse(draft, request, Why("NotYours", f"service {request.service} belongs to user {service.user}"))
        return
    remove_service(draft, request.tenant, request.service)
    answer = SubmissionAnswer(
        submission_id=request.submission_id, accepted=True, service=request.service, at_ms=draft.now_ms
    )
    _answer(draft, request.tenant, answer)


# --- answers ---------------------------------------------------------------------------------------------------------


def _answer_again_chosen(draft: Draft, tenant: Tenant, submission_id: SubmissionId) -> bool:
    return is_submission_id(submission_id) and _answer_again(draft, tenant, submission_id)


def _answer_again(draft: Draft, tenant: Tenant, submission_id: SubmissionId) -> bool:
    """Answer a repeated request with the first one's answer; False if it is the first."""
    if (tenant, submission_id) not in draft.cluster.chosen_answers:
        return False
    draft.add(f.AnswerRepeated(tenant, submission_id))
    return True


def _kept_until(draft: Draft, *, chosen: bool) -> int:
    settings = draft.settings
    return draft.now_ms + (settings.chosen_answers_kept_ms if chosen else settings.given_answers_kept_ms)


def _answer(draft: Draft, tenant: Tenant, answer: SubmissionAnswer) -> None:
    chosen = is_submission_id(answer.submission_id)
    draft.add(f.RequestAnswered(tenant, answer, _kept_until(draft, chosen=chosen), chosen))


def _refuse(
    draft: Draft, request: CancelRequested | ServiceApplied | ServiceDeleted, why: Why, *, near: str = ""
) -> None:
    if near:
        why = Why(why.code, f"{why.text}; did you mean {near}?")
    answer = SubmissionAnswer(
        submission_id=request.submission_id, accepted=False, reason=why, nearest=near, at_ms=draft.now_ms
    )
    _answer(draft, request.tenant, answer)


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
    draft.add(f.RequestAnswered(tenant, answer, _kept_until(draft, chosen=chosen), chosen))
