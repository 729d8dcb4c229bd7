"""When an elastic job gives back what a waiting one could start on.

What it has above its least is lent, and whoever waits in its band or a better one may have it once the job has had its
size for a while (`shrinking`). That is as firm a ground as there is for an estimate: time alone brings it about.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpuyard_daemon.core.explaining.survey import Work, room_on
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.preempting import shrinking
from gpuyard_daemon.core.preempting.occupants import Occupant
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.explaining import StartEstimate
from gpuyard_protocol.names import NodeId, Tenant
from gpuyard_protocol.units import format_ms

#: Judgements, and what placing one replica in a trial costs of them.
_WORK_UNITS = 200
_PLACING_UNITS = 6


def given_back(
    cluster: Cluster,
    settings: CoreSettings,
    job: Job,
    shape: Shape,
    roomy: Iterable[NodeId],
    now_ms: int,
    viewer: Tenant | None,
) -> StartEstimate | None:
    """When the job could start on what one other is lent, if it is first in line; None: on nobody's.

    `roomy`: nodes that take some of its replicas as they are.
    """
    band, work, best = cluster.ranking.band_of(job), Work(_WORK_UNITS), None
    for each in shrinking.lent(cluster, settings, now_ms):
        if band > cluster.ranking.band_of(each.job) or not work.spend(_PLACING_UNITS * shape.replicas):
            continue
        at_ms = max(now_ms, each.next_ms) + each.job.spec.stop_grace_ms
        if (best is None or at_ms < best[0]) and _suffices(cluster, job, shape, each, roomy):
            best = (at_ms, each.job)
    if best is None:
        return None
    at_ms, other = best
    whose = f"job {other.id}" if viewer in (None, other.tenant) else "a job of another tenant"
    left = format_ms((at_ms - now_ms) // 1000 * 1000)
    return StartEstimate(basis="lent", text=f"in {left}, when {whose} gives back what it is lent", at_ms=at_ms)


def _suffices(cluster: Cluster, job: Job, shape: Shape, victim: Occupant, roomy: Iterable[NodeId]) -> bool:
    trial = PoolTrial(cluster.pool).without(victim.goes)
    nodes = dict.fromkeys([each.node for each in victim.goes])
    if shape.replicas == 1:
        return any(room_on(trial.space(node), shape, job.id, spanning=False) for node in nodes)
    return trial.place(shape, job.id, [*nodes, *roomy]) is not None
