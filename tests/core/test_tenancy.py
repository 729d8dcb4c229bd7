"""What a tenant may hold and hand in, what it has used, and what it is told."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_daemon.core.state.facts import PolicySet
from gpuyard_daemon.core.state.inputs import (
    LoadReported,
    PolicyChanged,
    ServiceApplied,
    ServiceDeleted,
    ServiceScaleAsked,
)
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.policy import Policy, TenantLimits
from gpuyard_protocol.jobs import ArraySpec, JobSpec
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, gpu, job, need, node


@pytest.fixture
def yard() -> CoreHarness:
    harness = CoreHarness(restart_every=2)
    harness.join(node("n-1", 8))
    return harness


def test_what_is_beyond_the_limit_waits_and_others_pass(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=2000)
    first, second = yard.submit(job(gpus=2)), yard.submit(job(gpus=1))
    other = yard.submit(job(gpus=3), tenant="umbrella", user="bob")
    assert yard.states(first, second, other) == ["starting", "pending", "starting"]
    yard.run(first)
    yard.ended(first)
    assert yard.state(second) == "starting"


def test_a_smaller_job_of_the_tenant_passes_a_larger_one(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=2500)
    running, large, small = yard.submit(job(gpus=2)), yard.submit(job(gpus=1)), yard.submit(job(share_milli=500))
    assert yard.states(running, large, small) == ["starting", "pending", "starting"]


def test_work_without_gpus_is_never_held_back(yard: CoreHarness) -> None:
    numbers = yard.submit_many([job(gpus=4)] * 2)
    yard.limit("acme", gpus_milli=1000)
    assert yard.states(*numbers, yard.submit()) == ["starting"] * 3


def test_fractions_and_mig_count_by_their_part(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=1000)
    shares = yard.submit_many([job(share_milli=300)] * 4)
    assert yard.states(*shares) == ["starting"] * 3 + ["pending"]
    for number in shares:
        yard.cancel(number)
    for number in shares[:3]:
        yard.stopped(number)
    slices = yard.submit_many([job(mig="3g.40gb")] * 3)
    assert yard.states(*slices) == ["starting", "starting", "pending"]
    why = yard.core.why(slices[2])
    assert why is not None
    assert why.limit is not None
    assert "holds 0.856 of at most 1 GPUs, and this needs 0.428" in why.summary


def test_a_gang_gets_all_of_its_places_within_the_limit_or_none(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=3000)
    held, gang = yard.submit(job(gpus=1)), yard.submit(job(replicas=3, gpus=1))
    assert yard.states(held, gang) == ["starting", "pending"]
    assert yard.core.cluster.tenancy.held_milli["acme"] == 1000
    yard.run(held)
    yard.ended(held)
    assert yard.state(gang) == "starting"
    assert yard.core.cluster.tenancy.held_milli["acme"] == 3000


def test_a_raised_limit_lets_waiting_jobs_go_and_a_lowered_one_stops_nobody(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=1000)
    first, second = yard.submit_many([job(gpus=1)] * 2)
    assert yard.state(second) == "pending"
    yard.limit("acme", gpus_milli=2000)
    assert yard.state(second) == "starting"
    yard.limit("acme", gpus_milli=1000)
    yard.run(first)
    yard.run(second)
    assert yard.states(first, second) == ["running", "running"]


def test_the_same_policy_again_leaves_no_fact(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=1000)
    yard.limit("acme", gpus_milli=1000)
    assert len(yard.facts(PolicySet)) == 1


def test_more_than_a_tenant_may_ever_hold_is_refused_at_once(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=2000)
    assert not yard.submit(job(replicas=2, gpus=2))
    refusal = yard.refused()
    assert refusal.code == "OverQuota"
    assert "asks for 4 GPUs at once, and tenant acme may hold at most 2" in refusal.text
    spec = ServiceSpec(name="chat", argv=("serve",), need=need(gpus=3))
    yard.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s99", spec=spec))
    assert yard.refused().code == "OverQuota"
    kept = yard.submit(job(gpus=3, allow_pending=True))
    assert yard.state(kept) == "pending"
    assert yard.view(kept).reason is not None
    yard.turn(PolicyChanged(policy=Policy()))
    assert yard.state(kept) == "starting"


def test_the_view_and_why_of_a_job_over_its_limit_say_so_with_numbers(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=2500)
    yard.submit(job(gpus=2))
    yard.submit(job(gpus=1, priority=1))
    waiting = yard.submit(job(gpus=1))
    reason = yard.view(waiting).reason
    assert reason is not None
    assert (reason.code, reason.text) == (
        "OverQuota",
        "tenant acme holds 2 of at most 2.5 GPUs, and this needs 1",
    )
    why = yard.core.why(waiting)
    assert why is not None
    assert why.limit == reason
    assert why.summary == reason.text
    assert (why.position, why.ahead) == (2, 1)


def test_services_count_and_grow_up_to_the_limit(yard: CoreHarness) -> None:
    yard.limit("acme", gpus_milli=2000)
    spec = ServiceSpec(name="chat", argv=("serve",), need=need(gpus=1), max_replicas=4, target_concurrency=1)
    yard.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s1", spec=spec))
    yard.turn(LoadReported(tenant="acme", service="chat", concurrency=4))
    counts = sorted(view.state for view in yard.core.cluster.service_jobs["acme", "chat"].values())
    assert counts == ["pending", "pending", "starting", "starting"]


def test_unfinished_jobs_are_bounded_and_the_refusal_is_not_remembered(yard: CoreHarness) -> None:
    yard.limit("acme", jobs=2)
    first, second = yard.submit_many([job(gpus=8)] * 2)
    assert not yard.submit(submission_id="mine")
    refusal = yard.refused()
    assert refusal.code == "OverQuota"
    assert "has 2 jobs that have not ended, and may have 2" in refusal.text
    assert yard.submit(tenant="umbrella")
    yard.cancel(second)
    third = yard.submit(submission_id="mine")
    assert yard.states(first, second, third) == ["starting", "cancelled", "starting"]
    assert yard.submit(submission_id="mine") == third


def test_the_default_holds_for_tenants_that_are_not_named(yard: CoreHarness) -> None:
    policy = Policy(default=TenantLimits(gpus_max_milli=1000), tenants=(("umbrella", TenantLimits()),))
    yard.turn(PolicyChanged(policy=policy))
    assert yard.states(*yard.submit_many([job(gpus=1)] * 2)) == ["starting", "pending"]
    assert yard.states(*yard.submit_many([job(gpus=1)] * 2, tenant="umbrella")) == ["starting", "starting"]


def test_usage_is_summed_by_fraction_and_user_over_restarts(yard: CoreHarness) -> None:
    whole = yard.submit(job(gpus=2))
    share = yard.submit(job(share_milli=250), user="bob")
    yard.now_ms += 10_000
    yard.run(whole)
    yard.ended(whole)
    yard.restart()
    yard.now_ms += 10_000
    [usage] = yard.core.usage("acme", yard.now_ms).tenants
    users = {user.user: (user.held_milli, user.used_milli_ms) for user in usage.users}
    assert users == {"alice": (0, 2000 * 10_000), "bob": (250, 250 * 20_000)}
    assert (usage.held_milli, usage.used_milli_ms, usage.jobs) == (250, 2000 * 10_000 + 250 * 20_000, 1)
    yard.run(share)
    yard.ended(share)
    assert [each.tenant for each in yard.core.usage(None, yard.now_ms).tenants] == ["acme"]


def test_a_costly_place_is_not_taken_and_a_cheaper_one_is_once_there(yard: CoreHarness) -> None:
    """Hard isolation may mean a whole card or a MIG instance: what counts is what it would get."""
    harness = CoreHarness(restart_every=3)
    plain = [gpu(0, node="n-1", modes=("whole",))]
    harness.join(node("n-1", devices=plain))
    harness.limit("acme", gpus_milli=500)
    waiting = harness.submit(job(share_milli=300, isolation="hard"))
    why = harness.core.why(waiting)
    assert why is not None
    assert harness.state(waiting) == "pending"
    assert "may hold at most 0.5" in why.summary
    harness.join(node("n-2", 1))
    assert harness.state(waiting) == "starting"
    assert harness.nodes_of(waiting) == ["n-2"]


def limit_bytes(yard: CoreHarness, kib: int, *, jobs: int = 0) -> None:
    yard.turn(PolicyChanged(policy=Policy(tenants=(("acme", TenantLimits(jobs_max=jobs, bytes_max=kib * 1024)),))))


def script(kib: int, **of: object) -> JobSpec:
    return msgspec.structs.replace(job(gpus=8), argv=(), script="#!/bin/sh\n" + "x" * 1024 * kib, **of)


def serve(yard: CoreHarness, name: str, most: int, *, kib: int = 0) -> None:
    spec = ServiceSpec(name=name, argv=("serve", "x" * 1024 * kib), need=need(gpus=1), max_replicas=most)
    yard.turn(ServiceApplied(tenant="acme", user="alice", submission_id=f"{name}-{most}", spec=spec))


def test_what_a_tenants_jobs_bring_is_bounded_in_bytes_and_an_array_counts_once(yard: CoreHarness) -> None:
    limit_bytes(yard, 100)
    first = yard.submit(script(40))
    array = yard.submit(script(40, array=ArraySpec(ranges=((0, 49, 1),))))
    assert first
    assert array
    assert not yard.submit(script(40), submission_id="mine")
    refusal = yard.refused()
    assert refusal.code == "OverQuota"
    assert "0.1 MiB of commands, environments and scripts" in refusal.text
    assert "raise backlog_max" in refusal.text
    assert yard.submit(script(200), tenant="umbrella")
    assert yard.submit(job())
    yard.cancel(array)  # one of its elements: the others hold the script all the same
    assert not yard.submit(script(40), submission_id="mine")
    yard.run(first)
    yard.ended(first)
    assert yard.submit(script(40), submission_id="mine")


def test_a_service_counts_for_each_replica_that_it_may_have(yard: CoreHarness) -> None:
    limit_bytes(yard, 100, jobs=10)
    serve(yard, "large", 3, kib=40)
    assert "raise backlog_max" in yard.refused().text
    serve(yard, "large", 2, kib=40)
    serve(yard, "small", 8)
    assert set(yard.core.cluster.services) == {("acme", "large"), ("acme", "small")}
    serve(yard, "more", 1)
    assert "10 replicas together" in yard.refused().text
    scaled = ServiceScaleAsked(
        tenant="acme", user="alice", submission_id="s7", service="large", min_replicas=1, max_replicas=3
    )
    yard.turn(scaled)
    assert yard.refused().code == "OverQuota"
    yard.turn(msgspec.structs.replace(scaled, submission_id="s8", max_replicas=1))
    assert yard.answers[-1].accepted
    yard.turn(ServiceDeleted(tenant="acme", user="alice", submission_id="s9", service="large"))
    serve(yard, "more", 1)
    assert yard.answers[-1].accepted


def test_ended_jobs_leave_early_when_there_is_much_in_them() -> None:
    yard = CoreHarness(CoreSettings(finished_bytes_max=100 * 1024), restart_every=2)
    yard.join(node("n-1", 8))
    for _ in range(5):
        number = yard.submit(script(40))
        yard.run(number)
        yard.ended(number)
        yard.settle()
    kept = sorted(yard.core.cluster.finished)
    assert kept == [number - 1, number]
    assert yard.core.cluster.backlog.ended_bytes <= 100 * 1024
