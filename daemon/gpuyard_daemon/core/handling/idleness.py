"""Jobs that hold cards which compute nothing: what follows from a node's word on it.

The node measures, by the times of the job's queue or its own: a warning first, which goes to the job's owner; then the
word that the job might be suspended; at last it ends the job itself. Here stands what the yard does about the second: a
job that asked to give way by being suspended leaves its card, whether or not anybody waits for it, and stays off it
until it is resumed: halted, it cannot show by itself that it has work again. The time until the end runs on meanwhile,
so a job that nobody misses goes, and with it the host's memory that its image takes. Others keep their cards until
then.
"""

from __future__ import annotations

from gpuyard_daemon.core.preempting.suspension import can_be_suspended
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Assignment, Job
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.nodes import Idle
from gpuyard_protocol.units import format_ms

IDLE_GPU = "IdleGpu"


def take_idle(draft: Draft, report: Idle, assignment: Assignment) -> None:
    """A node says that a replica's cards compute nothing."""
    job = draft.cluster.jobs[report.key.job]
    if assignment.state != "running" or job.verdict is not None:
        return
    text = f"its cards computed nothing for {format_ms(report.idle_ms)}"
    if report.stage == "suspend" and job.state == "running" and can_be_suspended(draft.cluster, job):
        left_ms = max(1, report.release_ms - report.idle_ms) if report.release_ms else 0
        end_ms = draft.now_ms + left_ms if left_ms else 0
        draft.add(f.JobSuspending(job.id, Why(IDLE_GPU, text), job.user, idle=True, end_ms=end_ms))
    else:
        draft.add(f.JobIdled(job.id, Why(IDLE_GPU, text)))


def end_idle(draft: Draft, job: Job) -> None:
    """Nobody missed it."""
    why = Why(IDLE_GPU, f"it was suspended for holding its card idle, and nobody resumed it: {_said(job)}")
    draft.add(f.JobStopping(job.id, "abort", why, "idle"))


def _said(job: Job) -> str:
    return job.why.text if job.why is not None else "idle"
