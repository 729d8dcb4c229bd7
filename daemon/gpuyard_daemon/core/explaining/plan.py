"""What would become of a job that is not submitted: refused, started and where, or waiting and why.

Admission decides as it would for the job itself, on a draft that changes nothing. If it lets the job in, the job is
asked about as one that waits would be; where there is room, placement says where. Where there is none, the round of
preemption that its arrival would bring about says whether others would be told to go for it at once, or whether it
would be let in on places that are kept for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gpuyard_daemon.core.applying.request_facts import job_of
from gpuyard_daemon.core.explaining.views import describe_partition
from gpuyard_daemon.core.explaining.why import Asked, Explainer, named
from gpuyard_daemon.core.handling import admission
from gpuyard_daemon.core.placing.impossible import Possibilities
from gpuyard_daemon.core.preempting.preemption import foresee
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.inputs import JobSubmitted
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.explaining import StartEstimate
from gpuyard_protocol.jobs import JobSpec, ReplicaView, SubmissionAnswer
from gpuyard_protocol.names import Tenant, User
from gpuyard_protocol.queries import DryRun, WhyAnswer
from gpuyard_protocol.resources import devices_of
from gpuyard_protocol.units import format_ms

#: Stands in for the id that a submission would have.
_NO_SUBMISSION = "dry-run"


class _DryDraft(Draft):
    """Facts are noted and not applied."""

    __slots__ = ()

    def add(self, fact: f.Fact) -> None:
        self.facts.append(fact)


class Planner:
    """Answers dry runs about one cluster."""

    def __init__(
        self,
        cluster: Cluster,
        explainer: Explainer,
        possibilities: Possibilities,
        settings: CoreSettings,
    ) -> None:
        self._cluster = cluster
        self._explainer = explainer
        self._possibilities = possibilities
        self._settings = settings

    def plan(self, tenant: Tenant, user: User, spec: JobSpec, now_ms: int) -> DryRun:
        draft = _DryDraft(self._cluster, self._settings, self._possibilities, now_ms)
        admission.submit(draft, JobSubmitted(tenant=tenant, user=user, submission_id=_NO_SUBMISSION, spec=spec))
        match draft.facts:
            case [f.JobAccepted() as accepted]:
                return self._of_accepted(accepted, now_ms)
            case [f.ArrayAccepted() as accepted]:
                plan = self._of_accepted(_first_of(accepted), now_ms)
                return msgspec.structs.replace(plan, elements=spec.array.count if spec.array else 0)
            case [f.RequestAnswered(answer=answer)]:
                return _refused(answer)
            case _:
                raise InvariantViolated(f"a dry run led to {draft.facts}")

    def _of_accepted(self, accepted: f.JobAccepted, now_ms: int) -> DryRun:
        job = job_of(accepted, now_ms, accepted.spec)
        # One job of an array waits like any other; how many of them go at once matters to the later ones.
        job.spec = msgspec.structs.replace(job.spec, array=None)
        answer = self._explainer.why(Asked(job, now_ms, job.tenant, brief=False))
        answer = msgspec.structs.replace(answer, story=())
        if answer.estimate is None or answer.estimate.basis != "now":
            return self._of_waiting(job, answer, now_ms)
        placements = self._explainer.places(job)
        if not placements:
            raise InvariantViolated(f"there is room for {job.spec.need.describe()}, and no place")
        least = job.spec.least_replicas
        wider = f", with {least} replica{'s' if least > 1 else ''} or more" if job.is_elastic else ""
        return _starting(placements, wider)

    def _of_waiting(self, job: Job, answer: WhyAnswer, now_ms: int) -> DryRun:
        if answer.position:
            match self._foreseen(job, now_ms):
                case f.JobPlaced(placements=placements):
                    return _starting(placements, ", on what is kept for another, until that can have all of it")
                case f.ClaimMade() as claim:
                    answer = self._of_claim(answer, claim, job.tenant, now_ms)
        return DryRun(verdict="waits", summary=answer.summary, why=answer)

    def _foreseen(self, job: Job, now_ms: int) -> f.Fact | None:
        """What its arrival would bring about at once."""
        draft = _DryDraft(self._cluster, self._settings, self._possibilities, now_ms)
        foresee(draft, self._explainer.line, job)
        return next(iter(draft.facts), None)

    def _of_claim(self, answer: WhyAnswer, claim: f.ClaimMade, tenant: Tenant, now_ms: int) -> WhyAnswer:
        """Others would be told to go for it, or what those leave who go already would be kept for it."""
        cluster = self._cluster
        nodes = dict.fromkeys([placement.node for placement in claim.placements])
        victims = [cluster.jobs[eviction.job] for eviction in claim.evictions]
        going = [
            each for each in cluster.leaving.values() if any(a.is_live and a.node in nodes for a in each.assignments)
        ]
        whom = named(victims, tenant)
        does = f"{whom} would have to leave" if whom else "it would wait for those to leave who have been told to"
        summary = f"places on {', '.join(nodes)} would be freed for it at once: {does}"
        grace_ms = max([each.spec.stop_grace_ms for each in victims or going], default=0)
        text = f"in {format_ms(grace_ms)} at the latest, once they have left"
        estimate = StartEstimate(basis="stopping", text=text, at_ms=now_ms + grace_ms)
        return msgspec.structs.replace(answer, summary=summary, estimate=estimate, remedies=())


def _starting(placements: Sequence[f.Placement], how: str) -> DryRun:
    placed = tuple(
        [
            ReplicaView(
                replica=replica,
                state="planned",
                node=placement.node,
                partition=describe_partition(placement.partition),
                devices=devices_of(placement.partition),
            )
            for replica, placement in enumerate(placements)
        ]
    )
    where = ", ".join(dict.fromkeys(replica.node for replica in placed))
    return DryRun(verdict="starts", summary=f"it would start at once on {where}{how}", placed=placed)


def _first_of(array: f.ArrayAccepted) -> f.JobAccepted:
    """The same for the first of its jobs; the facts are alike but for the number's name."""
    same = {name: getattr(array, name) for name in f.JobAccepted.__struct_fields__[1:]}
    return f.JobAccepted(array.first, **same)


def _refused(answer: SubmissionAnswer) -> DryRun:
    text = answer.reason.text if answer.reason else "it would be rejected"
    refusal = msgspec.structs.replace(answer, submission_id="")
    return DryRun(verdict="rejected", summary=text, refusal=refusal)
