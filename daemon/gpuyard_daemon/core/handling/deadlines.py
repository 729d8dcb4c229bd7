"""What time brings: timers that are due, and housekeeping.

A deadline holds only while the record it concerns still says so. Each that fires leaves a fact, so replay needs no
clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from gpuyard_daemon.core.applying.lost_facts import lapses_ms
from gpuyard_daemon.core.explaining.views import job_view
from gpuyard_daemon.core.handling.idleness import end_idle
from gpuyard_daemon.core.handling.lost_nodes import lease_ran_out
from gpuyard_daemon.core.handling.outcomes import give_up_preparing
from gpuyard_daemon.core.handling.services import rescale
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import AnswerKey, Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Job, KeptAnswer
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.timers import Timer
from gpuyard_protocol.names import AssignmentKey, JobId


def next_deadline_ms(cluster: Cluster, settings: CoreSettings) -> int | None:
    """When the core wants to be called again though nothing came in."""
    timers = cluster.timers
    while (first := timers.first()) is not None and not _holds(cluster, first):
        timers.drop_first()
    soonest = [first[0]] if first is not None else []
    soonest += _housekeeping_ms(cluster, settings)
    return min(soonest, default=None)


def _holds(cluster: Cluster, entry: tuple[int, Timer, JobId, str, str]) -> bool:
    at_ms, timer, job_id, owner, name = entry
    match timer:
        case Timer.WAKE:
            job = cluster.jobs.get(job_id)
            return job is not None and job.state == "pending" and job.not_before_ms == at_ms
        case Timer.PREPARE:
            job = cluster.jobs.get(job_id)
            return job is not None and job.prepare_until_ms == at_ms
        case Timer.RESUME:
            return job_id in cluster.suspended and cluster.jobs[job_id].resume_after_ms == at_ms
        case Timer.IDLE_END:
            job = cluster.jobs.get(job_id)
            return job is not None and job.idle_end_ms == at_ms
        case Timer.FORGIVE:
            node = cluster.nodes.get(owner)
            return node is not None and name in node.avoided and node.avoided[name].until_ms == at_ms
        case Timer.SETTLE:
            node = cluster.nodes.get(owner)
            past = node.pasts.get(name) if node is not None else None
            return past is not None and past.keeps_mode_until_ms == at_ms
        case Timer.SCALE_DOWN:
            service = cluster.services.get((owner, name))
            return service is not None and service.lower_since_ms + service.spec.scale_down_after_ms == at_ms
        case Timer.REPLACE:
            service = cluster.services.get((owner, name))
            return service is not None and service.not_before_ms == at_ms and not cluster.draining
        case Timer.LEASE:
            node, key = cluster.nodes[owner], AssignmentKey.parse(name)
            if node.state != "lost" or key not in cluster.leased.get(owner, {}):
                return False
            job = cluster.jobs[key.job]
            return lapses_ms(node, job.assignments[key.replica], job.spec) == at_ms


def fire_due(draft: Draft) -> None:
    """Let everything happen whose time has come."""
    cluster = draft.cluster
    timers = cluster.timers
    while (first := timers.first()) is not None and first[0] <= draft.now_ms:
        timers.drop_first()
        if _holds(cluster, first):
            _fire(draft, first)
    _keep_house(draft)


def _fire(draft: Draft, entry: tuple[int, Timer, JobId, str, str]) -> None:
    _, timer, job_id, owner, name = entry
    cluster = draft.cluster
    match timer:
        case Timer.WAKE:
            draft.add(f.JobWoken(job_id))
        case Timer.PREPARE:
            give_up_preparing(draft, cluster.jobs[job_id])
        case Timer.RESUME:
            # The turn itself is what it waited for.
            pass
        case Timer.IDLE_END:
            end_idle(draft, cluster.jobs[job_id])
        case Timer.FORGIVE:
            draft.add(f.NodeForgiven(owner, name))
        case Timer.SETTLE:
            draft.add(f.CardSettled(owner, name))
        case Timer.SCALE_DOWN:
            rescale(draft, cluster.services[owner, name])
        case Timer.REPLACE:
            draft.add(f.ServiceFaltered(owner, name, cluster.services[owner, name].crashes, 0))
        case Timer.LEASE:
            lease_ran_out(draft, owner, AssignmentKey.parse(name))


#: Of the tenants' own text that the retired jobs of one record may carry: scripts can be long, escaped even longer.
_RETIRED_BYTES_MAX = 512 * 1024


# --- housekeeping ----------------------------------------------------------------------------------------------------


def _housekeeping_ms(cluster: Cluster, settings: CoreSettings) -> list[int]:
    """When something old may go, a little later than it might: so that much goes in one turn."""
    due = []
    if cluster.finished:
        oldest = cluster.jobs[next(iter(cluster.finished))]
        due.append(oldest.ended_ms + settings.finished_kept_ms + settings.housekeeping_ms)
        if len(cluster.finished) > settings.finished_kept_max + settings.retired_per_turn:
            due.append(0)
        if cluster.backlog.ended_bytes > settings.finished_bytes_max:
            due.append(0)
    for answers, most in _answers(cluster, settings):
        if len(answers) > most + settings.retired_per_turn:
            due.append(0)
        elif answers:
            due.append(next(iter(answers.values())).until_ms + settings.housekeeping_ms)
    return due


def _answers(cluster: Cluster, settings: CoreSettings) -> tuple[tuple[OrderedDict[AnswerKey, KeptAnswer], int], ...]:
    """Answers of both kinds, and how many are kept."""
    return (
        (cluster.chosen_answers, settings.chosen_answers_max),
        (cluster.given_answers, settings.given_answers_max),
    )


def _keep_house(draft: Draft) -> None:
    cluster, settings, now_ms = draft.cluster, draft.settings, draft.now_ms
    if not any(at_ms <= now_ms for at_ms in _housekeeping_ms(cluster, settings)):
        return
    retired = size = 0
    while cluster.finished and retired < settings.retired_per_turn and size < _RETIRED_BYTES_MAX:
        job = cluster.jobs[next(iter(cluster.finished))]
        too_many = (
            len(cluster.finished) > settings.finished_kept_max
            or cluster.backlog.ended_bytes > settings.finished_bytes_max
        )
        if not too_many and job.ended_ms + settings.finished_kept_ms > now_ms:
            break
        draft.add(f.JobRetired(job.id, job_view(cluster, job, with_spec=True)))
        retired += 1
        size += _text_size(job) if job.array in (0, job.id) or not job.spec.script else 0
    chosen, given = [_expired(answers.values(), most, now_ms) for answers, most in _answers(cluster, settings)]
    if chosen or given:
        draft.add(f.AnswersForgotten(chosen, given))


def _text_size(job: Job) -> int:
    """About how many bytes of a job's view are its tenant's own text."""
    spec = job.spec
    return len(spec.script) + sum(map(len, spec.argv)) + sum([len(name) + len(value) for name, value in spec.env])


def _expired(answers: Collection[KeptAnswer], most: int, now_ms: int) -> int:
    """How many answers, oldest first, have had their time or are beyond the number kept."""
    surplus = max(0, len(answers) - most)
    count = 0
    for kept in answers:
        if count >= surplus and kept.until_ms > now_ms:
            break
        count += 1
    return count
