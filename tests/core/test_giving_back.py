"""Bands: quota takes back what was borrowed, floors of services come first, scavengers leave."""

from __future__ import annotations

from typing import Any

import msgspec

from gpuyard_daemon.core.state.facts import ClaimMade
from gpuyard_daemon.core.state.inputs import PolicyChanged, ServiceApplied
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.jobs import JobSpec, Preemption
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, job, need, node

MINUTE = 60_000


def gives(kind: Preemption = "requeue", **fields: Any) -> JobSpec:
    return msgspec.structs.replace(job(**fields), preemption=kind)


def shared_yard(*, scavengers: bool = False, settings: CoreSettings | None = None) -> CoreHarness:
    """Eight cards, half of them each queue's own; what is unused is lent."""
    h = CoreHarness(settings)
    h.join(node("n-1", 8))
    queues = tuple(QueuePolicy(name, grants=(Grant(nominal_milli=4000),)) for name in ("acme", "umbrella"))
    if scavengers:
        queues += (QueuePolicy("night", scavenger=True),)
    tenants = tuple((name, TenantLimits(queue=name)) for name in ("acme", "umbrella"))
    tenants += (("zed", TenantLimits(queue="night")),) if scavengers else ()
    h.turn(PolicyChanged(policy=Policy(tenants=tenants, queues=tuple(sorted(queues, key=lambda q: q.name)))))
    return h


def run_some(h: CoreHarness, count: int, tenant: str, spec: JobSpec | None = None, minutes: int = 30) -> list[int]:
    numbers = [h.submit(spec or gives(gpus=1), tenant=tenant) for _ in range(count)]
    for number in numbers:
        h.run(number)
    h.settle(most_ms=minutes * MINUTE)
    return numbers


def test_what_is_lent_for_seconds_comes_back_after_seconds() -> None:
    h = shared_yard(settings=CoreSettings(reclaim_after_ms=1_000, preempt_every_ms=1_000))
    lent = [h.submit(gives(gpus=1), tenant="umbrella") for _ in range(8)]
    for number in lent:
        h.run(number)
    mine = h.submit(gives(gpus=1), tenant="acme")
    h.settle(most_ms=5_000)
    assert h.states(*lent).count("stopping") == 1
    assert h.state(mine) == "pending"


def test_a_queue_takes_back_what_is_its_own_and_no_more() -> None:
    h = shared_yard()
    lent = run_some(h, 8, "umbrella")
    mine = [h.submit(gives(gpus=1), tenant="acme") for _ in range(6)]
    for _ in range(10):
        for number in lent:
            if h.state(number) == "stopping":
                h.stopped(number)
        h.settle(most_ms=11_000)
    assert h.states(*mine).count("starting") == 4
    assert h.states(*lent).count("running") == 4
    evicted = [eviction for claim in h.facts(ClaimMade) for eviction in claim.evictions]
    assert len(evicted) == 4
    assert {eviction.why.code for eviction in evicted} == {"Preempted"}
    assert "quota" in evicted[0].why.text


def test_the_borrower_has_some_minutes_before_it_must_leave() -> None:
    h = shared_yard()
    run_some(h, 8, "umbrella", minutes=5)
    mine = h.submit(gives(gpus=1), tenant="acme")
    h.settle(most_ms=4 * MINUTE)
    # A place may be kept for it by then, and nobody was told to leave.
    assert [claim for claim in h.facts(ClaimMade) if claim.evictions] == []
    h.settle(most_ms=2 * MINUTE)
    assert [claim.job for claim in h.facts(ClaimMade) if claim.evictions] == [mine]


def test_a_borrower_that_is_never_to_be_preempted_stays() -> None:
    h = shared_yard()
    lent = run_some(h, 8, "umbrella", gives("never", gpus=1))
    mine = h.submit(gives(gpus=1), tenant="acme")
    h.settle(most_ms=30 * MINUTE)
    assert h.states(mine, *lent) == ["pending"] + ["running"] * 8


def test_a_scavenger_leaves_for_whoever_borrows() -> None:
    h = shared_yard(scavengers=True)
    night = run_some(h, 4, "zed")
    run_some(h, 4, "umbrella")
    more = h.submit(gives(gpus=1), tenant="umbrella")
    assert [claim.job for claim in h.facts(ClaimMade)] == [more]
    assert h.states(*night).count("stopping") == 1


def test_queues_do_not_take_from_each_other_in_turns() -> None:
    h = shared_yard()
    run_some(h, 4, "umbrella")
    run_some(h, 4, "acme")
    waiting = [h.submit(gives(gpus=1), tenant=name) for name in ("umbrella", "acme")]
    h.settle(most_ms=120 * MINUTE)
    assert h.states(*waiting) == ["pending", "pending"]
    assert not any(claim.evictions for claim in h.facts(ClaimMade))


def test_a_service_gets_the_replicas_that_it_is_never_to_be_without() -> None:
    h = CoreHarness()
    h.join(node("n-1", 8))
    batch = run_some(h, 8, "acme", minutes=3)
    spec = ServiceSpec(
        name="chat", argv=("serve",), need=need(gpus=1), min_replicas=2, max_replicas=4, target_concurrency=1
    )
    h.turn(ServiceApplied(tenant="acme", user="alice", submission_id="apply", spec=spec))
    assert h.states(*batch).count("stopping") == 2
    for number in batch:
        if h.state(number) == "stopping":
            h.stopped(number)
    assert len(h.facts(ClaimMade)) == 2
    replicas = h.core.cluster.service_jobs["acme", "chat"].values()
    assert [replica.state for replica in replicas] == ["starting", "starting"]


def test_a_replica_beyond_the_floor_waits_like_a_job() -> None:
    h = CoreHarness()
    h.join(node("n-1", 8))
    batch = run_some(h, 8, "acme", minutes=30)
    spec = ServiceSpec(
        name="chat", argv=("serve",), need=need(gpus=1), min_replicas=0, max_replicas=4, target_concurrency=1
    )
    h.turn(ServiceApplied(tenant="acme", user="alice", submission_id="apply", spec=spec))
    assert h.states(*batch).count("running") == 8
