"""What facts about requests and their answers change in the state.

Called by `Cluster.apply_fact`, and by nobody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.applying import job_facts
from gpuyard_daemon.core.queueing.promises import deadline_of, is_promised
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.arrays import elements
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Array, Job, KeptAnswer
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.jobs import JobSpec, SubmissionAnswer, Why
from gpuyard_protocol.names import JobId, Tenant

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def accepted(cluster: Cluster, fact: f.JobAccepted, now_ms: int, effects: Effects) -> None:
    cluster.take_number(fact.job)
    spec = cluster.alike.of(fact.spec)
    job = job_of(fact, now_ms, spec)
    cluster.demand.arrived(spec.need, spec.least_replicas, now_ms, len(cluster.pool.by_number))
    cluster.index_job(job)
    answer = SubmissionAnswer(
        submission_id=fact.submission_id, accepted=True, job=fact.job, note=_note(fact.deadline), at_ms=now_ms
    )
    _keep_answer(cluster, fact.tenant, answer, fact.answer_until_ms, chosen=fact.chosen)
    effects.answer(fact.tenant, answer)
    effects.tell_fresh(job, now_ms)


def job_of(fact: f.JobAccepted, now_ms: int, spec: JobSpec) -> Job:
    """The record of a job that is accepted; a dry run asks for one as well."""
    said = f"accepted; {fact.deadline.text}" if fact.deadline else "accepted"
    return _record(fact, spec, fact.job, now_ms, said)


def _record(
    fact: f.JobAccepted | f.ArrayAccepted,
    spec: JobSpec,
    number: JobId,
    now_ms: int,
    said: str,
    array: JobId = 0,
    index: int = 0,
) -> Job:
    job = Job(number, fact.tenant, fact.user, fact.submission_id, spec, now_ms, story=[(now_ms, said)])
    # Most ask for none of these, and there may be a hundred thousand of them to be read at once.
    if spec.retries:
        job.retries_left = spec.retries
    if spec.begin_ms or spec.begin_after_ms:
        job.not_before_ms = _begin_ms(spec, now_ms)
    if spec.hold:
        job.held_by = fact.user
    if array:
        job.array, job.array_index = array, index
    if fact.expected_ms:
        job.expected_ms = fact.expected_ms
    if fact.expected_from:
        job.expected_from = fact.expected_from
    if fact.deadline is not None or spec.deadline_ms or spec.deadline_after_ms:
        job.deadline_ms, job.promised = deadline_of(spec, now_ms), is_promised(fact.deadline)
    return job


def array_accepted(cluster: Cluster, fact: f.ArrayAccepted, now_ms: int, effects: Effects) -> None:
    """One answer, and no event for each of so many jobs until something happens to it."""
    assert fact.spec.array is not None
    count = fact.spec.array.count
    spec = cluster.alike.of(fact.spec)
    array = Array(fact.first, fact.tenant, count, spec, count, count)
    cluster.arrays.add(array)
    cluster.demand.arrived(spec.need, spec.least_replicas * count, now_ms, len(cluster.pool.by_number))
    for number, index in elements(array):
        cluster.take_number(number)
        said = f"accepted as element {index} of array {fact.first}"
        cluster.index_job(_record(fact, spec, number, now_ms, said, fact.first, index))
    answer = SubmissionAnswer(
        submission_id=fact.submission_id,
        accepted=True,
        job=fact.first,
        elements=count,
        note=_note(fact.deadline),
        at_ms=now_ms,
    )
    _keep_answer(cluster, fact.tenant, answer, fact.answer_until_ms, chosen=fact.chosen)
    effects.answer(fact.tenant, answer)


def _note(deadline: Why | None) -> str:
    return deadline.text if deadline is not None else ""


def array_cancelled(cluster: Cluster, fact: f.ArrayCancelled, now_ms: int, effects: Effects) -> None:
    for job in cluster.pending_elements(fact.array):
        job_facts.ended(cluster, f.JobEnded(job.id, "cancelled", fact.why), now_ms, effects)


def answered(cluster: Cluster, fact: f.RequestAnswered, now_ms: int, effects: Effects) -> None:
    _keep_answer(cluster, fact.tenant, fact.answer, fact.until_ms, chosen=fact.chosen)
    if not fact.answer.accepted:
        cluster.totals.rejected += 1
    effects.answer(fact.tenant, fact.answer)


def repeated(cluster: Cluster, fact: f.AnswerRepeated, now_ms: int, effects: Effects) -> None:
    answer = cluster.answer(fact.tenant, fact.submission_id)
    if answer is None:
        raise InvariantViolated(f"no answer {fact.submission_id!r} of {fact.tenant!r} to repeat")
    effects.answer(fact.tenant, answer)


def forgotten(cluster: Cluster, fact: f.AnswersForgotten, now_ms: int, effects: Effects) -> None:
    for _ in range(fact.chosen):
        cluster.chosen_answers.popitem(last=False)
    for _ in range(fact.given):
        cluster.given_answers.popitem(last=False)


def _keep_answer(cluster: Cluster, tenant: Tenant, answer: SubmissionAnswer, until_ms: int, *, chosen: bool) -> None:
    answers = cluster.chosen_answers if chosen else cluster.given_answers
    key = (tenant, answer.submission_id)
    if key in answers:
        # Asked for again: it is the youngest now.
        del answers[key]
    answers[key] = KeptAnswer(until_ms, answer)


def _begin_ms(spec: JobSpec, now_ms: int) -> int:
    """When a job may start first; 0: at once."""
    at_ms = spec.begin_ms or (now_ms + spec.begin_after_ms if spec.begin_after_ms else 0)
    return at_ms if at_ms > now_ms else 0
