"""Elastic jobs: between their least and their most, wide where nobody waits, and never in between sizes."""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.occupants import occupant_of
from gpuyard_daemon.core.state.facts import ClaimMade, JobPlaced, JobResizing, JobWidened
from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Start, Stop
from support.builders import CoreHarness, exited, job, node

RESTART_MS = 60_000


def harness(*gpus: int) -> CoreHarness:
    h = CoreHarness()
    h.join(*[node(f"n-{number}", count) for number, count in enumerate(gpus, 1)])
    return h


def elastic(least: int, most: int, *, restart_ms: int = RESTART_MS, preemption: str = "checkpoint") -> JobSpec:
    spec = job(replicas=most, gpus=1)
    return msgspec.structs.replace(spec, min_replicas=least, preemption=preemption, restart_ms=restart_ms)


def size(h: CoreHarness, number: int) -> int:
    return h.view(number).size


def test_a_job_begins_as_wide_as_there_is_room() -> None:
    h = harness(4, 2)
    number = h.submit(elastic(2, 8))
    assert size(h, number) == 6
    assert [start.launch.replicas for start in h.new_orders(Start)] == [6] * 6
    h.run(number)
    assert h.state(number) == "running"


def test_it_begins_with_its_least_where_no_more_is_free_and_waits_where_that_is_not() -> None:
    h = harness(4)
    h.submit(job(gpus=2))
    first = h.submit(elastic(2, 8))
    assert size(h, first) == 2
    second = h.submit(elastic(1, 4))
    assert h.state(second) == "pending"


def test_an_attempt_of_one_replica_is_a_gang_like_any_other_size() -> None:
    h = harness(1)
    number = h.submit(elastic(1, 4))
    (start,) = h.new_orders(Start)
    assert start.hold
    assert start.launch.replicas == 1
    assert (start.launch.replicas_min, start.launch.replicas_max) == (1, 4)
    h.run(number)
    assert h.state(number) == "running"


def test_those_who_wait_go_before_those_who_would_be_wider() -> None:
    h = harness(8)
    first, second = h.submit_many([elastic(2, 8), job(gpus=4)])
    assert h.states(first, second) == ["starting", "starting"]
    assert size(h, first) == 4


def test_it_takes_nothing_that_somebody_waits_for() -> None:
    h = harness(8)
    h.submit(job(gpus=5))
    waiting = h.submit(job(gpus=8))
    assert h.state(waiting) == "pending"
    assert size(h, h.submit(elastic(2, 8))) == 2


def grown(h: CoreHarness) -> tuple[int, int]:
    """A job of two replicas beside a job that has just ended."""
    other = h.submit(job(gpus=6))
    h.run(other)
    number = h.submit(elastic(2, 8))
    h.run(number)
    assert size(h, number) == 2
    return number, other


def test_it_grows_into_what_others_leave_once_that_is_worth_a_restart() -> None:
    h = harness(8)
    number, other = grown(h)
    h.settle(most_ms=10_000)
    h.ended(other)
    assert h.new_facts(JobResizing) == []
    # Six of eight replicas are new: 4 × 60 s × 8/6.
    h.settle(most_ms=exchange.COST_WEIGHT * RESTART_MS * 8 // 6 - 20_000)
    assert h.new_facts(JobResizing) == []
    h.settle(most_ms=30_000)
    assert len(h.new_facts(JobResizing)) == 1
    assert [stop.reason for stop in h.new_orders(Stop)] == ["resized"] * 2
    assert h.state(number) == "stopping"
    h.stopped(number)
    view = h.view(number)
    assert (view.state, view.size, view.attempt, view.retries_left) == ("starting", 8, 2, 0)
    h.run(number)
    assert h.state(number) == "running"


def test_what_it_grows_into_is_kept_for_it_until_its_attempt_has_ended() -> None:
    h = harness(8)
    number, other = grown(h)
    h.ended(other)
    h.settle(most_ms=600_000)
    assert h.state(number) == "stopping"
    late = h.submit(job(gpus=1))
    assert h.state(late) == "pending"
    h.stopped(number)
    assert size(h, number) == 8
    assert h.state(late) == "pending"


def test_it_does_not_grow_for_one_that_saves_nothing_or_is_never_to_be_stopped() -> None:
    for preemption in ("requeue", "never", "suspend"):
        h = harness(8)
        other = h.submit(job(gpus=6))
        h.run(other)
        number = h.submit(elastic(2, 8, preemption=preemption))
        h.run(number)
        h.ended(other)
        h.settle(most_ms=86_400_000)
        assert (h.state(number), size(h, number)) == ("running", 2)


def test_a_job_that_has_changed_its_size_keeps_that_for_ten_restarts() -> None:
    h = harness(8, 8)
    blockers = [h.submit(job(gpus=6)), h.submit(job(gpus=8))]
    for blocker in blockers:
        h.run(blocker)
    number = h.submit(elastic(2, 16))
    h.run(number)
    h.ended(blockers[0])
    h.settle(most_ms=600_000)
    h.stopped(number)
    h.run(number)
    assert size(h, number) == 8
    h.ended(blockers[1])
    h.settle(most_ms=exchange.GAP_RESTARTS * RESTART_MS - 20_000)
    assert h.state(number) == "running"
    h.settle(most_ms=40_000)
    assert h.state(number) == "stopping"
    h.stopped(number)
    assert size(h, number) == 16


def test_a_node_that_is_lost_under_a_change_of_size_leaves_the_job_in_line() -> None:
    h = harness(4, 4)
    other = h.submit(job(gpus=4))
    h.run(other)
    number = h.submit(elastic(2, 8))
    h.run(number)
    assert size(h, number) == 4
    h.ended(other)
    h.settle(most_ms=600_000)
    assert h.state(number) == "stopping"
    assert len(h.core.cluster.claims) == 1
    h.cancel(number)
    assert len(h.core.cluster.claims) == 0
    h.stopped(number)
    assert h.state(number) == "cancelled"


def test_a_job_that_is_cancelled_or_held_while_it_changes_its_size_keeps_no_places() -> None:
    h = harness(8)
    number, other = grown(h)
    h.ended(other)
    h.settle(most_ms=600_000)
    h.requeue(number, hold=True)
    h.stopped(number)
    assert (h.state(number), len(h.core.cluster.claims)) == ("pending", 0)
    h.release(number)
    assert size(h, number) == 8


def test_a_failed_member_ends_the_attempt_and_a_retry_finds_its_size_anew() -> None:
    h = harness(4)
    spec = msgspec.structs.replace(elastic(2, 8), retries=1)
    number = h.submit(spec)
    h.run(number)
    h.ended(number, 1)
    h.settle(most_ms=5_000)
    view = h.view(number)
    assert (view.state, view.size, view.attempt, view.retries_left) == ("starting", 4, 2, 0)
    assert len([fact for record in h.records for fact in record.facts if isinstance(fact, JobPlaced | JobWidened)]) == 4


# --- shrinking --------------------------------------------------------------------------------------------------------


def test_what_it_has_above_its_least_goes_to_whoever_waits() -> None:
    h = harness(8)
    number = h.submit(elastic(2, 8))
    h.run(number)
    assert size(h, number) == 8
    h.settle(most_ms=130_000)
    waiting = h.submit(job(gpus=4))
    assert h.states(number, waiting) == ["stopping", "pending"]
    h.stopped(number)
    assert h.states(number, waiting) == ["starting", "starting"]
    view = h.view(number)
    assert (view.size, view.attempt) == (2, 2)
    assert "goes on with 2 replicas" in str(h.core.cluster.jobs[number].story)
    h.run(number)
    # What nobody took is not given back at once.
    assert size(h, number) == 2


def test_a_larger_job_gets_it_as_well_before_anybody_is_stopped_for_it() -> None:
    h = harness(8, 8)
    number = h.submit(elastic(2, 8))
    h.run(number)
    small = h.submit(job(gpus=8))
    h.run(small)
    h.settle(most_ms=130_000)
    waiting = h.submit(msgspec.structs.replace(job(gpus=6), estimate_ms=30 * 86_400_000))
    assert h.states(number, small, waiting) == ["stopping", "running", "pending"]
    h.stopped(number)
    assert h.states(number, small, waiting) == ["starting", "running", "starting"]


def test_it_gives_up_the_replicas_that_stand_where_room_is_needed() -> None:
    h = harness(4, 4)
    number = h.submit(elastic(4, 8))
    h.run(number)
    h.settle(most_ms=130_000)
    waiting = h.submit(job(gpus=4))
    h.stopped(number)
    assert h.states(number, waiting) == ["starting", "starting"]
    assert len(set(h.nodes_of(number))) == 1


def test_a_gang_gets_what_several_lent() -> None:
    h = harness(4, 4)
    first = h.submit(msgspec.structs.replace(elastic(1, 4)))
    h.run(first)
    second = h.submit(elastic(1, 4))
    h.run(second)
    assert (size(h, first), size(h, second)) == (4, 4) if size(h, first) == 4 else True
    h.settle(most_ms=130_000)
    waiting = h.submit(job(replicas=6, gpus=1))
    for number in (first, second):
        if h.state(number) == "stopping":
            h.stopped(number)
    assert h.state(waiting) == "starting"


def test_it_keeps_its_size_for_two_minutes_and_then_for_ten_restarts() -> None:
    h = harness(8)
    number = h.submit(elastic(2, 8))
    h.run(number)
    waiting = h.submit(job(gpus=6))
    h.settle(most_ms=100_000)
    assert h.states(number, waiting) == ["running", "pending"]
    h.settle(most_ms=40_000)
    assert h.state(number) == "stopping"
    h.stopped(number)
    h.run(number)
    h.run(waiting)
    h.ended(waiting)
    h.settle(most_ms=exchange.GAP_RESTARTS * RESTART_MS - 20_000)
    assert h.state(number) == "running"
    h.settle(most_ms=60_000)
    assert h.state(number) == "stopping"


def test_a_wide_attempt_costs_as_victim_what_it_holds() -> None:
    h = harness(4)
    number = h.submit(elastic(2, 4))
    h.run(number)
    h.settle(most_ms=600_000)
    wide = h.core.cluster.jobs[number]
    found = occupant_of(h.core.cluster, h.core.settings, wide, h.now_ms)
    assert found.lost_milli_ms == RESTART_MS * 4000


def test_one_that_is_never_preempted_lends_nothing() -> None:
    h = harness(8)
    number = h.submit(elastic(2, 8, preemption="never"))
    h.run(number)
    waiting = h.submit(job(gpus=4))
    h.settle(most_ms=86_400_000)
    assert h.states(number, waiting) == ["running", "pending"]


def test_a_job_below_its_own_size_is_not_shrunk_below_its_least() -> None:
    h = harness(4)
    number = h.submit(elastic(4, 8))
    h.run(number)
    waiting = h.submit(job(gpus=1))
    h.settle(most_ms=110_000)
    assert h.states(number, waiting) == ["running", "pending"]
    assert len(h.core.cluster.wide) == 0


def test_a_job_some_of_whose_replicas_have_done_their_work_keeps_its_size() -> None:
    h = harness(8)
    number = h.submit(elastic(1, 2))
    h.run(number)
    h.settle(most_ms=130_000)
    h.report("n-1", exited(AssignmentKey(number, 1, 0)))
    h.submit(job(gpus=6))
    h.submit(job(gpus=2))
    h.settle(most_ms=20_000)
    facts = [fact for record in h.records for fact in record.facts]
    kinds = {eviction.kind for fact in facts if isinstance(fact, ClaimMade) for eviction in fact.evictions}
    assert "shrink" not in kinds


# --- limits ----------------------------------------------------------------------------------------------------------


def test_what_is_lent_under_a_limit_goes_to_the_tenants_other_jobs() -> None:
    h = harness(8)
    h.limit("acme", gpus_milli=6000)
    number = h.submit(elastic(2, 8))
    h.run(number)
    assert size(h, number) == 6
    waiting = h.submit(job(gpus=3))
    other = h.submit(job(gpus=1), tenant="umbrella")
    assert h.states(number, waiting, other) == ["running", "pending", "starting"]
    h.settle(most_ms=140_000)
    assert h.state(number) == "stopping"
    h.stopped(number)
    assert h.states(number, waiting) == ["starting", "starting"]
    assert size(h, number) == 2
    why = h.core.cluster.jobs[number].story
    assert any("waits for the limit of tenant acme" in text for _, text in why)


def test_it_gives_nothing_back_where_that_would_let_nobody_in() -> None:
    h = harness(8)
    h.limit("acme", gpus_milli=6000)
    number = h.submit(elastic(4, 8))
    h.run(number)
    h.submit(job(gpus=3))
    h.settle(most_ms=600_000)
    assert (h.state(number), size(h, number)) == ("running", 6)


def test_it_does_not_grow_while_its_tenants_limit_keeps_others_out() -> None:
    h = harness(8)
    h.limit("acme", gpus_milli=4000)
    blocker = h.submit(job(gpus=6), tenant="umbrella")
    h.run(blocker)
    number = h.submit(elastic(2, 8))
    h.run(number)
    waiting = h.submit(job(gpus=3))
    h.ended(blocker)
    h.settle(most_ms=3_600_000)
    assert (size(h, number), h.state(waiting)) == (2, "pending")


def test_who_waits_for_what_is_lent_is_told_when_it_is_given_back() -> None:
    h = harness(4, 4)
    wide = h.submit(elastic(2, 8))
    h.run(wide)
    h.settle(most_ms=30_000)
    small, gang = job(gpus=2), job(replicas=3, gpus=2)
    for spec in (small, gang):
        answer = h.core.plan("umbrella", "bob", spec, h.now_ms).why
        assert answer is not None
        assert answer.estimate is not None
        assert answer.estimate.basis == "lent"
        assert "a job of another tenant gives back" in answer.estimate.text
    number = h.submit(small)
    told = h.core.why(number, h.now_ms)
    assert told is not None
    assert told.estimate is not None
    grace_ms = small.stop_grace_ms
    assert told.estimate.at_ms - grace_ms == h.core.cluster.jobs[wide].started_ms + exchange.LEAST_RUN_MS
    h.settle(most_ms=told.estimate.at_ms - grace_ms - h.now_ms + h.settings.preempt_every_ms)
    h.stopped(wide)
    assert h.states(wide, number) == ["starting", "starting"]


def test_what_is_borrowed_from_a_queue_is_given_back_to_it_by_shrinking() -> None:
    h = harness(8)
    grants = (Grant(nominal_milli=4000),)
    h.turn(
        PolicyChanged(
            policy=Policy(
                tenants=(("acme", TenantLimits(queue="a")), ("umbrella", TenantLimits(queue="b"))),
                queues=(QueuePolicy("a", grants=grants), QueuePolicy("b", grants=grants)),
            )
        )
    )
    wide = h.submit(elastic(2, 8), tenant="umbrella")
    h.run(wide)
    assert size(h, wide) == 8
    h.settle(most_ms=3 * exchange.LEAST_RUN_MS)
    own = h.submit(job(gpus=4))
    (claim,) = h.new_facts(ClaimMade)
    assert [(each.job, each.kind) for each in claim.evictions] == [(wide, "shrink")]
    h.stopped(wide)
    assert h.states(own, wide) == ["starting", "starting"]
