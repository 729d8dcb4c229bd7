"""What facts about elastic jobs change in the state.

A change of size is a new attempt: the processes of the present one are told to end, and meanwhile the places of the
next one are kept for the job by a claim, those that it leaves and comes back to as those that it gets beside them. The
claim holds while the job is stopping and, after that, in line; only then is it served, like any other.

Called by `Cluster.apply_fact`, and by handlers of other facts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.applying import job_facts
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects, start_order
from gpuyard_daemon.core.state.model import Claim, Job, Verdict
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.jobs import Why

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

#: The word for the agents.
RESIZED = "resized"


def widened(cluster: Cluster, fact: f.JobWidened, now_ms: int, effects: Effects) -> None:
    """Its members were only just ordered: they are told the new size before anybody hears of the old one."""
    job = cluster.job(fact.job)
    before = len(job.assignments)
    if job.state != "starting" or any(each.state != "ordered" for each in job.assignments):
        raise InvariantViolated(f"job {job.id} cannot be made wider: it is {job.state}")
    for placement in fact.placements:
        job_facts.take_place(cluster, job, placement, now_ms)
    for assignment in job.assignments[:before]:
        effects.amend(cluster.nodes[assignment.node], start_order(job, assignment))
    for assignment in job.assignments[before:]:
        effects.start(cluster.nodes[assignment.node], job, assignment)
    job.note(now_ms, f"begins with {job.live} replicas: nobody waits for the GPUs")
    effects.tell(job, now_ms)


def resizing(cluster: Cluster, fact: f.JobResizing, now_ms: int, effects: Effects) -> None:
    resize(cluster, cluster.job(fact.job), fact.placements, fact.why, now_ms, effects)


def resize(
    cluster: Cluster, job: Job, placements: tuple[f.Placement, ...], why: Why, now_ms: int, effects: Effects
) -> None:
    """End the attempt and keep the places of the next one."""
    if not job.is_resizable:
        raise InvariantViolated(f"job {job.id} cannot have another size: it is {job.state}")
    job.resizes += 1
    job_facts.stop_job(cluster, job, Verdict("requeue", why, RESIZED), now_ms, effects)
    cluster.claims.make(job, Claim(job.id, "resize", list(placements), now_ms))


def scaled(cluster: Cluster, fact: f.JobScaled, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    job.scaled_to, job.scaled_ms = fact.replicas, now_ms
    cluster.note_elastic(job)
    job.note(now_ms, f"wanted with {fact.replicas} replicas by its owner")
