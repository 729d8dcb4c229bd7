"""When something is learnt from jobs that ended, and what becomes of it.

Counting follows from the facts about a job. Working out ranks from the counts is a decision with a fact of its own: it
looks at jobs that run, and a core with better arithmetic must not change what an older one went by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.queueing.ranking import ran_ms, width_milli
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Job
from gpuyard_protocol.resources import devices_of
from gpuyard_protocol.units import MILLI

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster
    from gpuyard_daemon.core.state.draft import Draft


def begin_run_time(cluster: Cluster, job: Job, now_ms: int) -> None:
    """All of a job runs, for the first time or again."""
    job.runs_since_ms = now_ms
    job.speed_milli = _speed_of(cluster, job)
    enter_run(cluster, job)


def enter_run(cluster: Cluster, job: Job) -> None:
    """Enter a job that runs, also after a restart."""
    if job.runs_since_ms and not job.service:
        cluster.underway.enter(job.id, width_milli(job), job.served_ms, job.runs_since_ms, job.speed_milli)


def _speed_of(cluster: Cluster, job: Job) -> int:
    """How fast the cards are that a job is on; a gang is as slow as its slowest."""
    own = job.spec.need.speeds
    if not cluster.speeds.named and not own:
        return MILLI
    spaces = cluster.pool.spaces
    models = {
        spaces[each.node].by_uuid[uuid].device.model
        for each in job.assignments
        if each.is_live
        for uuid in devices_of(each.partition)
    }
    return min([cluster.speeds.of(model, own) for model in models], default=MILLI)


def bank_run_time(cluster: Cluster, job: Job, now_ms: int) -> None:
    """A job ceases to run, for good or for a while: what it ran is counted."""
    if not job.runs_since_ms:
        return
    before = job.served_ms
    job.served_ms = ran_ms(job, now_ms)
    job.runs_since_ms = 0
    cluster.underway.leave(job.id)
    if not job.service:
        width = width_milli(job)
        cluster.lore.note_use(before * width // MILLI, job.served_ms * width // MILLI)


def note_end(cluster: Cluster, job: Job) -> None:
    """A job has ended. One that was cancelled says nothing about how long it would have run."""
    if job.state in ("succeeded", "failed") and job.served_ms and not job.service:
        cluster.lore.note_end(job.served_ms * width_milli(job) // MILLI)
        useful_ms = job.served_ms - job.overhead_ms - job.spec.restart_ms
        cluster.lore.note_run(job.tenant, job.user, job.spec, useful_ms if useful_ms > 0 else job.served_ms)


def read_ranks(draft: Draft) -> None:
    """Work out ranks anew, if enough has ended since."""
    cluster = draft.cluster
    if not cluster.lore.wants_reading:
        return
    draft.add(f.SizesLearnt(cluster.lore.read_ranks(cluster.underway.reached(draft.now_ms))))


def learnt(cluster: Cluster, fact: f.SizesLearnt, now_ms: int, effects: Effects) -> None:
    cluster.lore.set_ranks(fact.ranks)
