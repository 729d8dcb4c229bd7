"""Why a job is where it is: every reason, from the code that places; what would start it now; and when it may start.

For a waiting job each kind of node is judged as placement would judge it. For the others the state says it all. Nothing
is changed, and the work is bounded: a question costs the same whether ten jobs wait or a hundred thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from gpuyard_daemon.core.explaining import cooldowns
from gpuyard_daemon.core.explaining.forecast import AHEAD_MAX, Forecast
from gpuyard_daemon.core.explaining.holders import expected_end, holders_of, holders_on, rows
from gpuyard_daemon.core.explaining.lent import given_back
from gpuyard_daemon.core.explaining.reasons import key_terms
from gpuyard_daemon.core.explaining.remedies import Remedies
from gpuyard_daemon.core.explaining.survey import Survey, Surveyor
from gpuyard_daemon.core.explaining.views import why_apart
from gpuyard_daemon.core.placing.feasibility import LASTING, Reason, Shape
from gpuyard_daemon.core.queueing.order import WaitingLine
from gpuyard_daemon.core.queueing.promises import to_follow
from gpuyard_daemon.core.queueing.round import places
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants import limits
from gpuyard_daemon.core.tenants.quota import Obstacle
from gpuyard_daemon.core.tenants.tenancy import OVER_QUOTA
from gpuyard_protocol.explaining import StartEstimate
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import Tenant
from gpuyard_protocol.queries import WhyAnswer
from gpuyard_protocol.resources import devices_of
from gpuyard_protocol.units import format_ms

#: Nodes of one kind with room for some of a gang that are tried.
_ROOMY_MAX: Final = 16
#: Jobs to be waited for whose ends are looked at.
_BEFORE_MAX: Final = 100


class Asked(NamedTuple):
    """One question."""

    job: Job
    now_ms: int
    #: Whose eyes it is for; None: an operator's, who sees every tenant's jobs.
    viewer: Tenant | None
    #: Without what costs most: holders, remedies, estimate.
    brief: bool


class Explainer:
    """Answers about one cluster."""

    def __init__(self, cluster: Cluster, line: WaitingLine, settings: CoreSettings) -> None:
        self._cluster = cluster
        self.line = line
        self._settings = settings
        self.surveyor = Surveyor(cluster.pool)

    def why(self, asked: Asked) -> WhyAnswer:
        job, now_ms = asked.job, asked.now_ms
        story = tuple([f"+{format_ms(at_ms - job.submitted_ms)} {text}" for at_ms, text in job.story])
        answer = WhyAnswer(job=job.id, state=job.state, summary="", story=story)
        if job.state == "suspended":
            return self._of_suspended(asked, answer)
        if job.state != "pending":
            return msgspec.structs.replace(answer, summary=_summary_of_state(job))
        if (apart := self._apart(job, now_ms)) is not None:
            return msgspec.structs.replace(answer, summary=apart, estimate=self._estimate_apart(job, now_ms))
        return self.of_waiting(asked, answer)

    def of_waiting(self, asked: Asked, answer: WhyAnswer) -> WhyAnswer:
        """A job that looks for a place; it need not be in the cluster."""
        job, now_ms, cluster = asked.job, asked.now_ms, self._cluster
        shape = self.shape_of(job)
        survey = self.surveyor.survey(shape, job.id)
        limit = self._over_limit(survey, job)
        ahead = self.line.ahead_of(job, now_ms)
        ends = cooldowns.ends_of(cluster, survey)
        switch_ms = ends.get(Reason.SWITCHED_LATELY, 0)
        answer = msgspec.structs.replace(
            answer,
            summary=self._kept_for(job, asked.viewer) or _summary(cluster, survey, limit),
            reasons=cooldowns.with_ends(survey.reasons(), ends, now_ms),
            position=ahead + 1,
            ahead=ahead,
            limit=limit,
        )
        if asked.brief or cluster.draining or not cluster.nodes:
            return answer
        held = holders_on(cluster, shape, survey.held(), now_ms)
        starts = survey.starts and limit is None
        first_ahead = None if starts else self._first_ahead(job, now_ms, ahead)
        return msgspec.structs.replace(
            answer,
            cards=survey.cards(job.id),
            holders=() if starts else rows(held, asked.viewer),
            terms=key_terms(cluster.ranking.terms_of(job, now_ms)),
            remedies=()
            if starts
            else Remedies(cluster, self.surveyor, job, survey, asked.viewer).find(held, first_ahead, limit),
            estimate=StartEstimate(basis="now", text="with the next turn", at_ms=now_ms)
            if starts
            else cooldowns.estimate_of_switch(switch_ms, now_ms)
            if switch_ms and not ahead and limit is None and job.spec.replicas == 1
            else self._estimate(
                asked,
                survey,
                Forecast(cluster, job, survey, now_ms).estimate(held, first_ahead, ahead, limit),
                is_first=not ahead and limit is None,
            ),
        )

    def _estimate(self, asked: Asked, survey: Survey, played: StartEstimate, *, is_first: bool) -> StartEstimate:
        """Of whoever is first in line, what elastic jobs give back may come before what others end."""
        if not is_first or not self._cluster.wide or not survey.may_ever:
            return played
        roomy = [node for finding in survey.findings if finding.room for node in finding.group.nodes[:_ROOMY_MAX]]
        lent = given_back(self._cluster, self._settings, asked.job, survey.shape, roomy, asked.now_ms, asked.viewer)
        return lent if lent is not None and (not played.at_ms or lent.at_ms < played.at_ms) else played

    def _kept_for(self, job: Job, viewer: Tenant | None) -> str:
        """Whom it waits for, if places are kept for it; "" if none are."""
        claim = self._cluster.claims.of(job.id)
        if claim is None:
            return ""
        nodes = list(dict.fromkeys([placement.node for placement in claim.placements]))
        leaving = [self._cluster.jobs[number] for number in claim.evicted if number in self._cluster.jobs]
        leaving = [each for each in leaving if each.live]
        names = named(leaving, viewer)
        whom = f"{names} to leave" if names else "those that hold them to end"
        return f"places on {', '.join(nodes)} are kept for it: it waits for {whom}"

    def shape_of(self, job: Job) -> Shape:
        return Shape(job.spec.need, job.spec.least_replicas, job.tenant, job.user, self._settings.timeslice_milli_max)

    def _first_ahead(self, job: Job, now_ms: int, ahead: int) -> list[Job] | None:
        """Those before it, in order; None: too many to play them forward."""
        return self.line.those_ahead(job, now_ms, ahead) if ahead <= AHEAD_MAX else None

    def _of_suspended(self, asked: Asked, answer: WhyAnswer) -> WhyAnswer:
        """A job whose work lies in the host's memory: it goes back to its own cards, once they are free."""
        job, now_ms, cluster = asked.job, asked.now_ms, self._cluster
        summary = _summary_of_state(job)
        if kept := self._kept_for(job, asked.viewer):
            summary += f"; {kept}"
        answer = msgspec.structs.replace(answer, summary=summary)
        (assignment,) = job.assignments
        if job.held_by:
            estimate = StartEstimate(basis="none", text="no estimate: it goes back once it is resumed")
            return msgspec.structs.replace(answer, estimate=estimate)
        if assignment.home is None or asked.brief:
            return answer
        held = holders_of(cluster, assignment.node, devices_of(assignment.home), now_ms)
        last = max(held, key=lambda each: each.until_ms, default=None)
        estimate = StartEstimate(basis="none", text="no basis for an estimate: nobody knows how long its card is held")
        if last is not None and last.basis and all(each.basis for each in held):
            left = format_ms(max(0, last.until_ms - now_ms) // 1000 * 1000)
            text = f"in {left}, when its card should be free, if nobody goes before it"
            estimate = StartEstimate(basis=last.basis, text=text, at_ms=last.until_ms)
        terms = key_terms(cluster.ranking.terms_of(job, now_ms))
        return msgspec.structs.replace(answer, holders=rows(held, asked.viewer), estimate=estimate, terms=terms)

    # --- jobs that do not look for a place yet -----------------------------------------------------------------------

    def _apart(self, job: Job, now_ms: int) -> str | None:
        """Why a pending job does not even look for a place; None if it does."""
        left = format_ms(max(0, job.not_before_ms - now_ms) // 1000 * 1000)
        if job.not_before_ms and not job.held_by:
            if not job.attempt:
                return f"begins in {left}, as it was asked to"
            because = f" after: {job.why.text}" if job.why else ""
            return f"waits {left} before a new start{because}"
        apart = why_apart(self._cluster, job)
        return apart.text if apart else None

    def _estimate_apart(self, job: Job, now_ms: int) -> StartEstimate:
        if job.held_by:
            return StartEstimate(basis="none", text="no estimate: it starts once it is released")
        if job.not_before_ms:
            left = format_ms(max(0, job.not_before_ms - now_ms) // 1000 * 1000)
            return StartEstimate(
                basis="begin", text=f"not before {left} from now; then as room allows", at_ms=job.not_before_ms
            )
        ends = []
        for other in islice(to_follow(self._cluster, job.tenant, job.user, job.spec, job.id), _BEFORE_MAX):
            # When one begins that waits itself is not played here.
            known = expected_end(self._cluster, other, now_ms) if other.live else (0, "")
            ends.append((other.id, *known))
        if ends and len(ends) < _BEFORE_MAX and all(basis for _, _, basis in ends):
            number, at_ms, basis = max(ends, key=lambda end: end[1])
            left = format_ms(max(0, at_ms - now_ms) // 1000 * 1000)
            if basis:
                return StartEstimate(
                    basis=basis, text=f"in {left}, when job {number} has ended; then as room allows", at_ms=at_ms
                )
        return StartEstimate(basis="none", text="no basis for an estimate: what it waits for may end at any time")

    # --- limits ------------------------------------------------------------------------------------------------------

    def places(self, job: Job) -> tuple[Placement, ...] | None:
        """Where placement would put it now, on cards that its queue may use; None: nowhere."""
        queue = self.line.queue_of(job)
        if self._cluster.quota.has_quotas:
            within = limits.within_quota(self._cluster, job)
            if within is not None and not isinstance(within, Obstacle):
                queue = queue.limited_to(within)
        return places(self._cluster.pool, queue)

    def _over_limit(self, survey: Survey, job: Job) -> Why | None:
        """What limit and quotas say: to the least it could count for, or else to the places it would get now."""
        cluster = self._cluster
        least = self.line.queue_of(job).least_milli(cluster.pool)
        over = cluster.tenancy.blocks(job.tenant, least) or limits.over_quota(cluster, job)
        if over is None and survey.starts and (cluster.tenancy.is_limited(job.tenant) or cluster.quota.has_quotas):
            placements = self.places(job)
            if placements is not None:
                return limits.over_with(cluster, job, placements)
            if cluster.quota.has_quotas:
                return Why(OVER_QUOTA, "its queue's quota leaves it only cards of models that are not free")
        return over


def named(jobs: Sequence[Job], viewer: Tenant | None) -> str:
    """Jobs in a sentence, as somebody may see them; "" for none."""
    own = [f"job {each.id}" for each in jobs if viewer is None or each.tenant == viewer]
    others = len(jobs) - len(own)
    return " and ".join(own + ([f"{others} job{'s' if others > 1 else ''} of other tenants"] if others else []))


def _summary(cluster: Cluster, survey: Survey, limit: Why | None) -> str:
    if cluster.draining:
        return "the yard is stopping: nothing starts until it is started again"
    if not cluster.nodes:
        return "no node has joined yet"
    if limit is not None:
        return limit.text
    replicas, members = survey.shape.replicas, survey.members
    if members >= replicas:
        return "it starts with the next turn"
    if members:
        return f"{replicas} replicas start together or not at all: there is room for {members} now"
    reasons = survey.reasons()
    if all(Reason(reason.reason.code) in LASTING for reason in reasons):
        return f"no node of today could ever run it: {reasons[0].reason.text}"
    return f"{reasons[0].reason.text} (on {reasons[0].nodes} of {len(cluster.nodes)} nodes)"


def _size(job: Job) -> str:
    """How wide an elastic job runs."""
    if not job.is_elastic:
        return ""
    size = len(job.assignments)
    return f" with {size} replica{'s' if size > 1 else ''}, of {job.spec.least_replicas} to {job.most_replicas}"


def _summary_of_state(job: Job) -> str:
    because = job.verdict.why if job.verdict else job.why
    where = ", ".join(dict.fromkeys(assignment.node for assignment in job.assignments))
    match job.state:
        case "starting":
            waits = sum(1 for assignment in job.assignments if assignment.state == "ordered")
            return f"starting on {where}" + (
                f": {waits} replicas are not prepared yet" if waits and job.is_gang else ""
            )
        case "running":
            return f"running on {where}" + _size(job)
        case "suspended":
            reason = f" ({because.text})" if because else ""
            if job.assignments and job.assignments[0].home is None:
                return f"leaving its card on {where}{reason}"
            if job.held_by:
                return f"suspended on {where}{reason}: held by {job.held_by}, it stays off its card until it is resumed"
            return f"suspended on {where}{reason}: it goes back to its card when that is free"
        case "stopping":
            left = ", ".join(dict.fromkeys(a.node for a in job.assignments if a.is_live))
            return f"stopping ({because.text if because else 'told to'}): waits for {left} to report the end"
        case _:
            return f"{job.state}: {because.text}" if because else job.state
