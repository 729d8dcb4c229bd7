"""What facts about claims and evictions change in the state.

Called by `Cluster.apply_fact`, and by nobody else. A claim ends without a fact of its own when its job leaves the line:
`Cluster` drops it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.applying import card_facts, elastic_facts, job_facts, suspend_facts
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Claim, Verdict
from gpuyard_daemon.core.state.states import InvariantViolated

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

#: The word for the agents of those who give way.
PREEMPTED = "preempted"
_KEPT = {
    "preempt": "freed", "reserve": "kept", "resize": "kept", "drain": "kept free, while those on its cards run out,",
}  # fmt: skip
#: Evicted jobs that a claimant's story names; more are counted.
_NAMED_MAX = 4


def made(cluster: Cluster, fact: f.ClaimMade, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if job.id not in cluster.waiting and job.id not in cluster.suspended:
        raise InvariantViolated(f"job {job.id} claims places, but it is {job.state} and not in line")
    evicted = [eviction.job for eviction in fact.evictions]
    cluster.claims.make(job, Claim(job.id, fact.kind, list(fact.placements), now_ms, evicted))
    where = ", ".join(dict.fromkeys([placement.node for placement in fact.placements]))
    named = ", ".join([str(number) for number in evicted[:_NAMED_MAX]])
    more = f" and {len(evicted) - _NAMED_MAX} more" if len(evicted) > _NAMED_MAX else ""
    who = f": {'jobs' if len(evicted) > 1 else 'job'} {named}{more} must leave" if evicted else ""
    job.note(now_ms, f"a place on {where} is {_KEPT[fact.kind]} for it{who}")
    if fact.kind == "drain":
        card_facts.drained(cluster, fact.placements, now_ms)
    for eviction in fact.evictions:
        _evict(cluster, eviction, now_ms, effects)


def _evict(cluster: Cluster, eviction: f.Eviction, now_ms: int, effects: Effects) -> None:
    victim = cluster.job(eviction.job)
    victim.preemptions += 1
    victim.overhead_ms += eviction.overhead_ms
    cluster.totals.preempted += 1
    cluster.totals.moved += eviction.moved
    cluster.totals.moved_milli_ms += eviction.lost_milli_ms if eviction.moved else 0
    cluster.totals.preempted_milli_ms += eviction.lost_milli_ms
    if eviction.kind == "suspend":
        suspend_facts.suspend(cluster, victim, eviction.why, now_ms, effects)
    elif eviction.kind == "shrink":
        elastic_facts.resize(cluster, victim, eviction.keeps, eviction.why, now_ms, effects)
    else:
        job_facts.stop_job(cluster, victim, Verdict("requeue", eviction.why, PREEMPTED), now_ms, effects)


def dropped(cluster: Cluster, fact: f.ClaimDropped, now_ms: int, effects: Effects) -> None:
    job = cluster.job(fact.job)
    if job.id not in cluster.claims:
        raise InvariantViolated(f"job {job.id} claims nothing that could be dropped")
    cluster.claims.drop(job.id)
    job.note(now_ms, fact.why.text)
