"""Answers to tenants' requests: given, kept, and given again to a repetition."""

from __future__ import annotations

from typing import Protocol

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_protocol.jobs import SubmissionAnswer, Why
from gpuyard_protocol.names import SubmissionId, Tenant, is_submission_id


class Attributed(Protocol):
    """A request with the name that its answer goes under."""

    @property
    def tenant(self) -> Tenant: ...
    @property
    def submission_id(self) -> SubmissionId: ...


def answer_again_chosen(draft: Draft, tenant: Tenant, submission_id: SubmissionId) -> bool:
    return is_submission_id(submission_id) and answer_again(draft, tenant, submission_id)


def answer_again(draft: Draft, tenant: Tenant, submission_id: SubmissionId) -> bool:
    """Answer a repeated request with the first one's answer; False if it is the first."""
    if (tenant, submission_id) not in draft.cluster.chosen_answers:
        return False
    draft.add(f.AnswerRepeated(tenant, submission_id))
    return True


def kept_until(draft: Draft, *, chosen: bool) -> int:
    settings = draft.settings
    return draft.now_ms + (settings.chosen_answers_kept_ms if chosen else settings.given_answers_kept_ms)


def answer(draft: Draft, tenant: Tenant, given: SubmissionAnswer) -> None:
    chosen = is_submission_id(given.submission_id)
    draft.add(f.RequestAnswered(tenant, given, kept_until(draft, chosen=chosen), chosen))


def refuse(draft: Draft, request: Attributed, why: Why, *, near: str = "") -> None:
    if near:
        why = Why(why.code, f"{why.text}; did you mean {near}?")
    refusal = SubmissionAnswer(
        submission_id=request.submission_id, accepted=False, reason=why, nearest=near, at_ms=draft.now_ms
    )
    answer(draft, request.tenant, refusal)
