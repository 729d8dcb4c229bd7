"""What its owner does to a job that is there: cancel, hold, release, suspend, resume, requeue.

Held is a pending job that does not start until it is released; a running one can only be held by requeueing it, or by
suspending it: then it keeps its attempt, is off its card, and stays there until it is resumed.
Requeueing ends the attempt with grace and charges no retry.
"""

from __future__ import annotations

from typing import TypeAlias

from gpuyard_daemon.core.handling.answers import answer, answer_again_chosen, refuse
from gpuyard_daemon.core.preempting.suspension import why_not
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.inputs import (
    CancelRequested,
    HoldRequested,
    ReleaseRequested,
    RequeueRequested,
    ResumeRequested,
    ScaleRequested,
    SuspendRequested,
)
from gpuyard_daemon.core.state.model import Array, Job
from gpuyard_protocol.jobs import ENDED_AS, SubmissionAnswer, Why

Directive: TypeAlias = (
    CancelRequested | HoldRequested | ReleaseRequested | SuspendRequested | ResumeRequested | RequeueRequested
)


def direct(draft: Draft, request: Directive) -> None:
    """Carry out what a job's owner asked for, or say why not."""
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    job = own_job(draft, request)
    if job is None:
        return
    refusal: Why | None = None
    match request:
        case _ if request.array:
            refusal = _direct_array(draft, job, request)
        case RequeueRequested():
            refusal = _requeue(draft, job, request)
        case CancelRequested():
            _cancel(draft, job, request)
        case HoldRequested():
            refusal = _hold(draft, job, request)
        case ReleaseRequested():
            refusal = _release(draft, job)
        case SuspendRequested():
            refusal = _suspend(draft, job, request)
        case ResumeRequested():
            refusal = _resume(draft, job)
    if refusal is not None:
        refuse(draft, request, refusal)
        return
    accepted = SubmissionAnswer(submission_id=request.submission_id, accepted=True, job=job.id, at_ms=draft.now_ms)
    answer(draft, request.tenant, accepted)


def own_job(draft: Draft, request: Directive | ScaleRequested) -> Job | None:
    """The job, if it is the caller's and has not ended; answers the request otherwise."""
    cluster = draft.cluster
    job = cluster.jobs.get(request.job)
    if job is None and (array := cluster.arrays.records.get(request.job)) is not None:
        # Its first elements have been put away; any other of them speaks for the array.
        job = next(job for number in range(array.id, array.id + array.count) if (job := cluster.jobs.get(number)))
        if not _of_array(request):
            job = None
    if job is None or job.tenant != request.tenant:
        jobs = cluster.lists.get(request.tenant)
        near = jobs.near(request.job) if jobs else 0
        why = Why("UnknownJob", f"there is no job {request.job} (any more)")
        refuse(draft, request, why, near=str(near) if near else "")
        return None
    if job.user != request.user:
        refuse(draft, request, Why("NotYours", f"job {job.id} belongs to user {job.user}"))
        return None
    if job.is_final and not _of_array(request):
        refuse(draft, request, Why("AlreadyEnded", f"job {job.id} {ENDED_AS[job.state]} already"))
        return None
    return job


def _of_array(request: Directive | ScaleRequested) -> bool:
    return not isinstance(request, ScaleRequested) and request.array


def _cancel(draft: Draft, job: Job, request: CancelRequested) -> None:
    why = Why("Cancelled", f"cancelled by {request.user}")
    if job.live == 0:
        draft.add(f.JobEnded(job.id, "cancelled", why))
    elif job.verdict is None or job.verdict.kind != "cancel":
        draft.add(f.JobStopping(job.id, "cancel", why, "cancelled"))


def _direct_array(draft: Draft, job: Job, request: Directive) -> Why | None:
    """The same for every element of the job's array."""
    cluster = draft.cluster
    if not job.array:
        return Why("NoArray", f"job {job.id} is no element of an array")
    record = cluster.arrays.records[job.array]
    waiting = cluster.pending_elements(job.array)
    match request:
        case CancelRequested() if record.unfinished:
            _cancel_array(draft, record, bool(waiting), request)
        case HoldRequested() if any(not element.held_by for element in waiting):
            draft.add(f.JobHeld(job.id, request.user, whole_array=True))
        case ReleaseRequested() if any(element.held_by for element in waiting):
            draft.add(f.JobReleased(job.id, whole_array=True))
        case RequeueRequested():
            return _requeue_array(draft, record, bool(waiting), request)
        case SuspendRequested() | ResumeRequested():
            return _suspend_or_resume_array(draft, record, request)
        case CancelRequested():
            return Why("AlreadyEnded", f"every element of array {job.array} has ended already")
        case HoldRequested():
            return Why("NotPending", f"no element of array {job.array} waits that is not held already")
        case _:
            return Why("NotHeld", f"no element of array {job.array} is held")
    return None


def _cancel_array(draft: Draft, record: Array, any_waits: bool, request: CancelRequested) -> None:
    why = Why("Cancelled", f"cancelled by {request.user}")
    if any_waits:
        draft.add(f.ArrayCancelled(record.id, why))
    for number in range(record.id, record.id + record.count):
        element = draft.cluster.jobs.get(number)
        if element is not None and element.live:
            _cancel(draft, element, request)


def _requeue_array(draft: Draft, record: Array, any_waits: bool, request: RequeueRequested) -> Why | None:
    """Those that run wait again; with a hold nothing of the array starts until it is released."""
    elements = [draft.cluster.jobs.get(number) for number in range(record.id, record.id + record.count)]
    live = [element for element in elements if element is not None and element.live]
    if request.hold and any_waits:
        draft.add(f.JobHeld(next(job.id for job in elements if job is not None), request.user, whole_array=True))
    requeued = [_requeue(draft, element, request) is None for element in live]
    if not any(requeued) and not (request.hold and any_waits):
        return Why("NotRunning", f"no element of array {record.id} runs")
    return None


def _hold(draft: Draft, job: Job, request: HoldRequested) -> Why | None:
    if job.service:
        return Why("OfService", f"job {job.id} is a replica of service {job.service}, which would start another one")
    if job.state != "pending":
        text = f"job {job.id} is {job.state}: only a job that waits can be held; requeue it with a hold to stop it"
        return Why("NotPending", text)
    if not job.held_by:
        draft.add(f.JobHeld(job.id, request.user))
    return None


def _release(draft: Draft, job: Job) -> Why | None:
    if not job.held_by:
        return Why("NotHeld", f"job {job.id} is not held")
    draft.add(f.JobReleased(job.id))
    return None


def _suspend(draft: Draft, job: Job, request: SuspendRequested) -> Why | None:
    if job.state == "suspended" and job.verdict is None:
        if job.assignments[0].state == "resuming":
            return Why("NotRunning", f"job {job.id} is on its way back to its card: suspend it once it runs")
        if not job.held_by or job.idled:
            draft.add(f.JobHeld(job.id, request.user))
        return None
    if job.state != "running":
        text = f"job {job.id} is {job.state}: only a running job can be suspended"
        return Why("NotRunning", text + ("; hold it instead" if job.state == "pending" else ""))
    if obstacle := why_not(draft.cluster, job):
        return Why("NotSuspendable", f"job {job.id} cannot be suspended: {obstacle}")
    draft.add(f.JobSuspending(job.id, Why("Suspended", f"suspended by {request.user}"), request.user))
    return None


def _resume(draft: Draft, job: Job) -> Why | None:
    if job.held_by:
        draft.add(f.JobReleased(job.id))
        return None
    if job.state == "suspended":
        text = f"job {job.id} gave way to another, and goes back to its card by itself once that is free for it"
        return Why("NotHeld", text)
    return Why("NotSuspended", f"job {job.id} is {job.state}")


def _suspend_or_resume_array(draft: Draft, record: Array, request: SuspendRequested | ResumeRequested) -> Why | None:
    """Those elements that can be; refused, with the first one's reason, if none can."""
    numbers = range(record.id, record.id + record.count)
    elements = [job for number in numbers if (job := draft.cluster.jobs.get(number)) is not None and job.live]
    refusals = [
        _suspend(draft, job, request) if isinstance(request, SuspendRequested) else _resume(draft, job)
        for job in elements
    ]
    if not all(refusals):
        return None
    return next(iter(refusals), None) or Why("NotRunning", f"no element of array {record.id} runs")


def _requeue(draft: Draft, job: Job, request: RequeueRequested) -> Why | None:
    if job.service and request.hold:
        return Why("OfService", f"job {job.id} is a replica of service {job.service}, which would start another one")
    if job.state == "pending":
        return Why("NotRunning", f"job {job.id} waits already")
    if job.verdict is not None and job.verdict.kind != "requeue":
        return Why("AlreadyStopping", f"job {job.id} is stopping already: {job.verdict.why.text}")
    if request.hold and (not job.held_by or job.idled):
        draft.add(f.JobHeld(job.id, request.user))
    if job.verdict is None:
        why = Why("Requeued", f"requeued by {request.user}")
        draft.add(f.JobStopping(job.id, "requeue", why, "requeued"))
    return None
