"""How many replicas an owner wants: of an elastic job at most, of a service at least and at most; and rollouts.

A job that has more than its owner wants starts anew with as many at once, or as soon as it runs; one that has fewer
grows as soon as there is room that nobody waits for. A service's word changes its specification, as applying it again
would, and no replica is replaced for it. A rollout replaces all of them, one by one: a restart by equal ones, an undo
by those of the specification before.
"""

from __future__ import annotations

from msgspec.structs import replace

from gpuyard_daemon.core.handling.admission import reject_for_now, too_much_service
from gpuyard_daemon.core.handling.answers import answer, answer_again_chosen, refuse
from gpuyard_daemon.core.handling.directives import own_job
from gpuyard_daemon.core.handling.services import rescale
from gpuyard_daemon.core.preempting.resizing import shrink_to_most
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.inputs import RolloutAsked, ScaleRequested, ServiceScaleAsked
from gpuyard_daemon.core.state.model import Job, Service
from gpuyard_protocol.jobs import SubmissionAnswer, Why
from gpuyard_protocol.names import nearest
from gpuyard_protocol.services import ServiceSpec


def scale_job(draft: Draft, request: ScaleRequested) -> None:
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    job = own_job(draft, request)
    if job is None:
        return
    refusal = _scale(draft, job, request)
    if refusal is not None:
        refuse(draft, request, refusal)
        return
    answer(
        draft,
        request.tenant,
        SubmissionAnswer(submission_id=request.submission_id, accepted=True, job=job.id, at_ms=draft.now_ms),
    )


def _scale(draft: Draft, job: Job, request: ScaleRequested) -> Why | None:
    least, wanted = job.spec.least_replicas, request.replicas
    if not job.is_elastic:
        how = "scale the service" if job.service else "submit it with min_replicas below replicas"
        return Why("NotElastic", f"job {job.id} has {least} replica{'s' if least > 1 else ''} and no other size: {how}")
    if wanted < least:
        return Why("BelowLeast", f"job {job.id} needs {least} replicas at least, and {wanted} were asked for")
    if wanted != job.most_replicas or (job.live and len(job.assignments) < wanted):
        # Said again, it is meant for the present attempt too.
        draft.add(f.JobScaled(job.id, wanted))
    if job.is_resizable and len(job.assignments) > wanted:
        shrink_to_most(draft, job)
    return None


def scale_service(draft: Draft, request: ServiceScaleAsked) -> None:
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    service = _own_service(draft, request)
    if service is None:
        return
    spec = replace(service.spec, min_replicas=request.min_replicas, max_replicas=request.max_replicas)
    if refusal := too_much_service(draft, request.tenant, service.spec, spec):
        reject_for_now(draft, request.tenant, request.submission_id, refusal)
        return
    _set(draft, request, service, spec, service.generation)


def roll_out(draft: Draft, request: RolloutAsked) -> None:
    if answer_again_chosen(draft, request.tenant, request.submission_id):
        return
    service = _own_service(draft, request)
    if service is None:
        return
    spec = service.spec
    if request.undo:
        if service.previous is None:
            refuse(draft, request, Why("NothingBefore", f"service {spec.name} has had no other specification"))
            return
        # How many there are is no part of what is undone.
        spec = replace(service.previous, min_replicas=spec.min_replicas, max_replicas=spec.max_replicas)
    _set(draft, request, service, spec, service.generation + 1)


def _own_service(draft: Draft, request: ServiceScaleAsked | RolloutAsked) -> Service | None:
    """The service, if it is the caller's; answers the request otherwise."""
    services = draft.cluster.services
    service = services.get((request.tenant, request.service))
    if service is None:
        near = nearest(request.service, [name for tenant, name in services if tenant == request.tenant])
        refuse(draft, request, Why("UnknownService", f"there is no service {request.service!r}"), near=near)
        return None
    if service.user != request.user:
        refuse(draft, request, Why("NotYours", f"service {request.service} belongs to user {service.user}"))
        return None
    return service


def _set(
    draft: Draft, request: ServiceScaleAsked | RolloutAsked, service: Service, spec: ServiceSpec, generation: int
) -> None:
    draft.add(f.ServiceSet(service.tenant, service.user, spec, generation))
    rescale(draft, service)
    answer(
        draft,
        request.tenant,
        SubmissionAnswer(submission_id=request.submission_id, accepted=True, service=spec.name, at_ms=draft.now_ms),
    )
