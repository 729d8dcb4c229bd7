"""Suspended jobs: off the card and back, what they hold meanwhile, and what happens when a node cannot."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest

from gpuyard_daemon.core.state.facts import ClaimDropped, ClaimMade, JobResuming
from gpuyard_daemon.core.state.turn import JobNotice
from gpuyard_protocol.jobs import JobSpec, Preemption
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import (
    Ended,
    Idle,
    Inventory,
    Resume,
    Resumed,
    ResumeFailed,
    Stop,
    Suspend,
    Suspended,
    SuspendFailed,
)
from support.builders import CoreHarness, job, node

HOUR = 3_600_000
CARD_MIB = 81_152


def able(name: str = "n-1", gpus: int = 1, suspend_mib: int = 512 * 1024, memory_mib: int = 1024 * 1024) -> Inventory:
    return msgspec.structs.replace(node(name, gpus, memory_mib=memory_mib), suspend_mib=suspend_mib)


def softly(**fields: Any) -> JobSpec:
    return msgspec.structs.replace(job(**fields), preemption="suspend")


def running_for(h: CoreHarness, spec: JobSpec, ms: int) -> int:
    number = h.submit(spec)
    h.run(number)
    h.settle(most_ms=ms)
    return number


def key(number: int) -> AssignmentKey:
    return AssignmentKey(number, 1, 0)


def harness(
    inventory: Inventory | None = None, *, hours: int = 20, kind: Preemption = "requeue"
) -> tuple[CoreHarness, int, int]:
    """A large job that was told to leave its card for a small one. `kind`: how that one would give way."""
    h = CoreHarness()
    h.join(inventory or able())
    large = running_for(h, softly(gpus=1), hours * HOUR)
    small = h.submit(msgspec.structs.replace(job(gpus=1), preemption=kind))
    return h, large, small


def suspended(*, hours: int = 20, kind: Preemption = "requeue") -> tuple[CoreHarness, int, int]:
    h, large, small = harness(hours=hours, kind=kind)
    h.report("n-1", Suspended(key=key(large), step=1, at_ms=0, image_mib=30_000))
    return h, large, small


def test_a_job_leaves_its_card_and_comes_back_with_its_attempt() -> None:
    h, large, small = harness()
    assert [(order.key, order.step) for order in h.new_orders(Suspend)] == [(key(large), 1)]
    assert h.states(large, small) == ["suspended", "pending"]
    h.report("n-1", Suspended(key=key(large), step=1, at_ms=0, image_mib=30_000))
    assert h.states(large, small) == ["suspended", "starting"]
    space = h.core.cluster.pool.spaces["n-1"]
    assert space.memory_free_mib == 1024 * 1024 - 1024 - 30_000 - 1024
    h.run(small)
    h.ended(small)
    assert [(order.key, order.step) for order in h.new_orders(Resume)] == [(key(large), 2)]
    assert space.memory_free_mib == 1024 * 1024 - 1024 - 30_000, "its image is there until it is back"
    h.report("n-1", Resumed(key=key(large), step=2, at_ms=0))
    assert space.memory_free_mib == 1024 * 1024 - 1024
    view = h.view(large)
    assert (view.state, view.attempt, view.placed[0].devices) == ("running", 1, ("GPU-n-1-0",))
    assert space.memory_free_mib == 1024 * 1024 - 1024
    h.ended(large)
    assert h.state(large) == "succeeded"


def test_it_does_not_come_back_before_those_who_go_first() -> None:
    h, _, small = suspended()
    next_one = h.submit(job(gpus=1))
    h.run(small)
    h.ended(small)
    assert h.state(next_one) == "starting"
    assert h.facts(JobResuming) == []


def test_it_comes_back_in_the_end_although_small_ones_keep_coming() -> None:
    h, large, small = suspended(hours=1)
    h.run(small)
    waited = 0
    while not h.facts(JobResuming):
        h.submit(job(gpus=1))
        h.settle(most_ms=HOUR)
        waited += 1
        assert waited < 300, "for ever"
        for number in [each for each in h.core.cluster.jobs if h.state(each) in ("starting", "running")]:
            if h.state(number) == "starting":
                h.run(number)
            h.ended(number)
    assert h.core.cluster.jobs[large].assignments[0].state == "resuming"


def test_a_node_without_memory_for_it_makes_it_start_anew_and_costs_it_all() -> None:
    h, large, small = harness(able(suspend_mib=0))
    assert h.states(large, small) == ["running", "pending"], "it would lose twenty hours for a small gain"
    assert h.facts(ClaimMade) == []


def test_images_of_all_jobs_stay_within_what_the_node_gives() -> None:
    h = CoreHarness()
    h.join(able(gpus=2, suspend_mib=CARD_MIB + 1))
    one, two = h.submit_many([softly(gpus=1), softly(gpus=1)])
    h.run(one)
    h.run(two)
    h.settle(most_ms=20 * HOUR)
    h.submit_many([job(gpus=1), job(gpus=1)])
    h.settle(most_ms=HOUR)
    assert sorted(h.states(one, two)) == ["running", "suspended"]


def test_a_job_that_cannot_be_suspended_after_all_runs_on() -> None:
    h, large, small = harness()
    h.report("n-1", SuspendFailed(key=key(large), step=1, at_ms=0, code="NotSuspendable", detail="two processes"))
    assert h.states(large, small) == ["running", "pending"]
    assert len(h.facts(ClaimDropped)) == 1
    h.settle(most_ms=2 * HOUR)
    assert h.states(large, small) == ["running", "pending"], "nor is it asked again"


def test_a_job_that_cannot_come_back_yet_is_asked_again() -> None:
    h, large, small = suspended()
    h.run(small)
    h.ended(small)
    space = h.core.cluster.pool.spaces["n-1"]
    resuming_mib = space.memory_free_mib
    h.report("n-1", ResumeFailed(key=key(large), step=2, at_ms=0, code="PartitionUnavailable"))
    assert h.state(large) == "suspended"
    assert h.core.cluster.jobs[large].assignments[0].image_mib == 30_000, "it is in the host's memory all the while"
    assert space.memory_free_mib == resuming_mib
    h.check_no_other_orders()
    h.settle(most_ms=10_000)
    assert [order.step for order in h.new_orders(Resume)] == [3]


def test_a_late_answer_changes_nothing() -> None:
    h, large, small = suspended()
    h.run(small)
    h.ended(small)
    before = h.core.digest()
    h.turn()
    assert h.core.digest() == before
    h.report("n-1", SuspendFailed(key=key(large), step=1, at_ms=0, code="DriverRefused"))
    assert h.core.cluster.jobs[large].assignments[0].state == "resuming"


def test_a_suspended_job_can_be_cancelled() -> None:
    h, large, small = suspended()
    h.cancel(large)
    assert [stop.key for stop in h.new_orders(Stop)] == [key(large)]
    h.report("n-1", Ended(key=key(large), outcome="stopped", at_ms=0))
    assert h.states(large, small) == ["cancelled", "starting"]


def test_a_suspended_job_that_is_lost_starts_anew_at_no_charge() -> None:
    h, large, _ = suspended()
    h.report("n-1", Ended(key=key(large), outcome="lost", at_ms=0, code="SuspendBroken"))
    assert h.state(large) == "pending"


def test_a_card_that_is_gone_is_not_waited_for() -> None:
    h, large, small = suspended()
    h.run(small)
    h.ended(small)
    h.report("n-1", ResumeFailed(key=key(large), step=2, at_ms=0, code="PartitionUnavailable"))
    h.join(able(gpus=0))
    h.settle(most_ms=11_000)
    assert h.core.cluster.jobs[large].state == "stopping"
    h.stopped(large)
    assert h.state(large) == "pending"


def test_a_restart_of_the_daemon_leaves_it_where_it_is() -> None:
    h, large, small = suspended()
    h.restart()
    number, desired = h.core.desired("n-1")
    assert number == 3
    standing = next(entry.standing for entry in desired if entry.start.key == key(large))
    assert isinstance(standing, Suspend)
    h.run(small)
    h.restart()
    h.ended(small)
    assert [order.step for order in h.new_orders(Resume)] == [2]


# --- cards held idle ---


def idle(number: int, stage: Literal["warn", "suspend"] = "suspend", release_ms: int = 0) -> Idle:
    return Idle(key=key(number), at_ms=0, idle_ms=600_000, stage=stage, release_ms=release_ms)


def idling(*, release_ms: int = 0) -> tuple[CoreHarness, int]:
    """A job that was suspended because it held its card idle."""
    h = CoreHarness(restart_every=2)
    h.join(able())
    number = running_for(h, softly(gpus=1), HOUR)
    h.report("n-1", idle(number, release_ms=release_ms))
    assert [order.step for order in h.new_orders(Suspend)] == [1]
    h.report("n-1", Suspended(key=key(number), step=1, at_ms=0, image_mib=30_000))
    return h, number


def test_a_job_that_holds_its_card_idle_leaves_it_until_it_is_released() -> None:
    h, number = idling()
    other = h.submit(job(gpus=1))
    h.run(other)
    h.ended(other)
    h.settle(most_ms=24 * HOUR)
    assert (h.state(number), h.facts(JobResuming)) == ("suspended", []), "its card is free, and it stays away from it"
    why = h.core.why(number, h.now_ms)
    assert why is not None
    assert "held by alice" in why.summary
    assert "computed nothing for 10m" in why.summary
    assert h.release(number).accepted
    h.report("n-1", Resumed(key=key(number), step=2, at_ms=0))
    assert (h.state(number), h.view(number).attempt) == ("running", 1)
    h.settle(most_ms=24 * HOUR)
    assert h.state(number) == "running"


def test_an_idle_job_that_nobody_releases_ends_when_its_time_is_over() -> None:
    h, number = idling(release_ms=3_600_000)
    h.settle(most_ms=2_900_000)
    assert h.state(number) == "suspended"
    h.settle(most_ms=200_000)
    assert [order.key for order in h.new_orders(Stop)] == [key(number)]
    h.stopped(number)
    reason = h.view(number).reason
    assert h.state(number) == "failed"
    assert reason is not None
    assert reason.code == "IdleGpu"


def test_an_idle_job_that_was_released_does_not_end_any_more() -> None:
    h, number = idling(release_ms=3_600_000)
    h.release(number)
    h.report("n-1", Resumed(key=key(number), step=2, at_ms=0))
    h.settle(most_ms=24 * HOUR)
    assert h.state(number) == "running"


def test_an_idle_job_that_loses_its_node_starts_anew_without_being_released() -> None:
    h, number = idling()
    h.report("n-1", Ended(key=key(number), outcome="lost", at_ms=0, code="NodeRestarted"))
    assert (h.state(number), h.view(number).attempt) == ("starting", 2)


def test_an_idle_job_that_its_node_cannot_suspend_runs_on_and_nothing_holds_it() -> None:
    h = CoreHarness(restart_every=2)
    h.join(able())
    number = running_for(h, softly(gpus=1), HOUR)
    h.report("n-1", idle(number))
    h.report("n-1", SuspendFailed(key=key(number), step=1, at_ms=0, code="DriverRefused"))
    assert h.state(number) == "running"
    assert h.core.cluster.jobs[number].held_by == ""
    h.report("n-1", idle(number))
    assert h.new_orders(Suspend) == [], "it is not asked twice"


@pytest.mark.parametrize(("spec", "stage"), [(job(gpus=1), "suspend"), (softly(gpus=1), "warn")])
def test_the_owner_of_an_idle_job_is_told_and_its_card_is_left_to_it(
    spec: JobSpec, stage: Literal["warn", "suspend"]
) -> None:
    h = CoreHarness(restart_every=2)
    h.join(able())
    number = running_for(h, spec, HOUR)
    turn = h.report("n-1", idle(number, stage))
    told = [notice.event for notice in turn.notices if isinstance(notice, JobNotice)]
    assert [(event.state, event.reason and event.reason.code) for event in told] == [("running", "IdleGpu")]
    assert h.new_orders(Suspend) == []
    why = h.core.why(number, h.now_ms)
    assert why is not None
    assert any("computed nothing" in line for line in why.story)
    assert h.view(number).reason is None


def test_an_idle_job_that_is_requeued_with_a_hold_waits_until_it_is_released() -> None:
    h, number = idling()
    assert h.requeue(number, hold=True).accepted
    h.stopped(number)
    h.settle(most_ms=HOUR)
    assert h.state(number) == "pending"
    assert h.release(number).accepted
    assert h.state(number) == "starting"


def test_a_suspended_job_takes_its_card_back_from_one_that_has_grown_larger() -> None:
    """It was told to go for somebody small, who turned out to be large."""
    h, large, small = suspended(hours=1, kind="checkpoint")
    h.run(small)
    h.settle(most_ms=HOUR)
    assert h.states(large, small) == ["suspended", "running"]
    h.settle(most_ms=100 * HOUR)
    claim = h.core.cluster.claims.of(large)
    assert claim is not None
    assert (claim.kind, claim.evicted, claim.placements[0].node) == ("preempt", [small], "n-1")
    assert h.states(large, small) == ["suspended", "stopping"]
    late = h.submit(job(gpus=1, priority=2))
    h.restart()
    h.stopped(small)
    assert h.core.cluster.jobs[large].assignments[0].state == "resuming"
    assert h.states(small, late) == ["pending", "pending"], "the card was kept for it"
    assert len(h.core.cluster.claims) == 0


def test_a_suspended_job_takes_its_card_from_nobody_who_is_never_preempted() -> None:
    h, large, small = suspended(hours=1, kind="never")
    h.run(small)
    h.settle(most_ms=300 * HOUR)
    assert h.states(large, small) == ["suspended", "running"]
