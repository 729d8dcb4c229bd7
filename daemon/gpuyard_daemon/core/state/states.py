"""The states of jobs and assignments, and which moves between them are legal.

The tables are the authority: `Cluster` asks here before every move, and a move that is not listed is a programming
error that ends the daemon before it is journaled.

A job::

    pending ──▶ starting ──▶ running ──▶ succeeded | failed | cancelled
       ▲            │           │
       │            └──▶ stopping ──▶ (the same)
       └── requeued ◀── starting | running | stopping

    running ◀──▶ suspended                                (its attempt goes on; from there as from running)

An assignment::

    ordered ──▶ prepared ──▶ released ──▶ running ──▶ ended      (a gang's member)
    ordered ──▶ running ──▶ ended                                (a single replica)
    any of them ──▶ stopping ──▶ ended
    running ──▶ suspending ──▶ suspended ──▶ resuming ──▶ running
"""

from __future__ import annotations

from gpuyard_daemon.core.state.model import Assignment, AssignmentState, Job
from gpuyard_protocol.jobs import JobState

JOB_MOVES: dict[JobState, tuple[JobState, ...]] = {
    "pending": ("starting", "cancelled"),
    "starting": ("running", "stopping", "pending", "succeeded", "failed", "cancelled"),
    "running": ("suspended", "stopping", "pending", "succeeded", "failed", "cancelled"),
    "suspended": ("running", "stopping", "pending", "succeeded", "failed", "cancelled"),
    "stopping": ("pending", "succeeded", "failed", "cancelled"),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}

ASSIGNMENT_MOVES: dict[AssignmentState, tuple[AssignmentState, ...]] = {
    "ordered": ("prepared", "running", "stopping", "ended"),
    "prepared": ("released", "stopping", "ended"),
    "released": ("running", "stopping", "ended"),
    "running": ("suspending", "stopping", "ended"),
    "suspending": ("suspended", "running", "stopping", "ended"),
    "suspended": ("resuming", "stopping", "ended"),
    "resuming": ("running", "suspended", "stopping", "ended"),
    "stopping": ("ended",),
    "ended": (),
}


class InvariantViolated(Exception):
    """The core found itself in a state that must not exist. Nothing of the turn may be dispatched."""


def story_of(job: Job) -> str:
    return "; ".join(f"{at_ms}: {text}" for at_ms, text in job.story)


def check_job_move(job: Job, to: JobState) -> None:
    if to not in JOB_MOVES[job.state]:
        raise InvariantViolated(f"job {job.id}: {job.state} → {to} is no legal move; its story: {story_of(job)}")


def check_assignment_move(job: Job, assignment: Assignment, to: AssignmentState) -> None:
    if to not in ASSIGNMENT_MOVES[assignment.state]:
        raise InvariantViolated(
            f"assignment {assignment.key}: {assignment.state} → {to} is no legal move; its job's story: {story_of(job)}"
        )
