"""Jobs that were to start after others: let in, refused, or ended because what they wait for can never be.

What they wait for is kept in `gates`; here are the decisions.
"""

from __future__ import annotations

from gpuyard_daemon.core.queueing.gates import never, outcome, target_of
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_protocol.jobs import JobSpec, Why
from gpuyard_protocol.names import Tenant

#: Bounds the record: whole arrays can hang on one job.
ENDED_PER_PASS = 2000


def refused(draft: Draft, tenant: Tenant, spec: JobSpec) -> tuple[Why, str] | None:
    """Why a job may not be let in for what it depends on, and the nearest job there is; None if it may."""
    cluster = draft.cluster
    for kind, number in spec.depends_on:
        target = target_of(number, cluster.jobs, cluster.arrays)
        if target is None or target.tenant != tenant:
            jobs = cluster.lists.get(tenant)
            near = jobs.near(number) if jobs else 0
            text = f"it depends on job {number}, which does not exist or ended so long ago that it has been put away"
            return Why("UnknownJob", text), str(near) if near else ""
        if outcome(kind, target) is False:
            return never(kind, target), ""
    return None


def end_doomed(draft: Draft) -> bool:
    """Cancel jobs that can never start, and those that can never start for that reason; True if some are left."""
    doomed = draft.cluster.gates.doomed
    left = ENDED_PER_PASS
    while doomed and left:
        for number in sorted(doomed)[:left]:
            draft.add(f.JobEnded(number, "cancelled", doomed[number]))
            left -= 1
    return bool(doomed)
