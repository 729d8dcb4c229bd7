"""What elastic jobs have above their least, as those see it who would like its place.

That is lent: it was given because nobody waited for it, so whoever waits in the same band or a better one may have it,
whatever its level, and before anybody is suspended or stopped. In return the job goes on with its least at once. Two
things protect it: it shrinks to its least in one step, however little is asked for, and then keeps its size for ten
restarts; and one that is never to be preempted never shrinks.

Any of its replicas may be the ones that go: of each node that it is on, those there go first.
"""

from __future__ import annotations

from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.occupants import Occupant, restart_of
from gpuyard_daemon.core.queueing.ranking import SCAVENGING, need_milli
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Assignment, Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.holdings import amounts_of, sum_of
from gpuyard_daemon.core.tenants.quota import Amounts
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.units import MILLI, format_ms

#: Elastic jobs that a round looks at.
_JOBS_MAX = 256


def lent(cluster: Cluster, settings: CoreSettings, at_ms: int) -> list[Occupant]:
    """All of it, once for each node that a job is on."""
    wide = [job for job in cluster.wide.values() if job.is_resizable and job.started_ms <= at_ms]
    found = []
    for job in sorted(wide, key=lambda each: each.id)[:_JOBS_MAX]:
        if job.spec.preemption != "never":
            nodes = dict.fromkeys([each.node for each in job.assignments])
            found += [_on(cluster, settings, job, node, at_ms) for node in nodes]
    return found


def _on(cluster: Cluster, settings: CoreSettings, job: Job, node: NodeId, at_ms: int) -> Occupant:
    restart_ms = restart_of(cluster, settings, job)
    ran_ms = at_ms - job.started_ms
    missing_ms = exchange.least_run_ms(restart_ms, job.resizes) - ran_ms
    overhead_ms = restart_ms if job.spec.preemption == "checkpoint" else restart_ms + ran_ms
    goes = going(job, node)
    return Occupant(
        job=job,
        attempt=job.attempt,
        band=SCAVENGING,
        level=0,
        kind="shrink",
        overhead_ms=overhead_ms,
        lost_milli_ms=overhead_ms * need_milli(job.spec.need) * job.spec.least_replicas,
        exchangeable=False,
        preemptible=missing_ms <= 0,
        next_ms=at_ms + missing_ms if missing_ms > 0 else 0,
        goes=goes,
        keeps=tuple([Placement(each.node, each.partition) for each in job.assignments if each not in goes]),
    )


def going(job: Job, node: NodeId) -> tuple[Assignment, ...]:
    """The replicas above a job's least: those on a node, then the last."""
    first = sorted(job.assignments, key=lambda each: (each.node != node, -each.key.replica))
    return tuple(first[: len(job.assignments) - job.spec.least_replicas])


def given_up(cluster: Cluster, victim: Occupant) -> Amounts:
    """What one leaves that goes on with fewer replicas."""
    spaces = cluster.pool.spaces
    return sum_of([amounts_of(spaces[each.node], each.partition) for each in victim.goes])


def why_shrunk(claimant: Job, victim: Occupant) -> Why:
    least = victim.job.spec.least_replicas
    kept = f"goes on with {least} replica{'s' if least > 1 else ''}"
    cost = format_ms(victim.overhead_ms // MILLI * MILLI)
    return Why("Preempted", f"{kept}: job {claimant.id} waits for what it had above that; it costs {cost} of run time")
