"""`suspend` and `resume` by a job's owner: off the card until it is resumed, whatever else happens meanwhile."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard_daemon.core.state.facts import JobResuming
from gpuyard_daemon.core.state.inputs import ResumeRequested, SuspendRequested
from gpuyard_protocol.jobs import JobSpec, SubmissionAnswer, parse_array
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Resume, Resumed, Suspend, Suspended, SuspendFailed
from support.builders import CoreHarness, job, node

HOUR = 3_600_000


def softly(**fields: Any) -> JobSpec:
    return msgspec.structs.replace(job(**fields), preemption="suspend")


def harness(gpus: int = 1, *, suspend_mib: int = 512 * 1024) -> CoreHarness:
    h = CoreHarness()
    h.join(msgspec.structs.replace(node("n-1", gpus), suspend_mib=suspend_mib))
    return h


def running(h: CoreHarness, spec: JobSpec) -> int:
    number = h.submit(spec)
    h.run(number)
    return number


def suspend(h: CoreHarness, number: int, *, user: str = "alice", array: bool = False) -> SubmissionAnswer:
    h.turn(SuspendRequested(tenant="acme", user=user, submission_id=f"v{len(h.answers)}", job=number, array=array))
    return h.answers[-1]


def resume(h: CoreHarness, number: int, *, array: bool = False) -> SubmissionAnswer:
    h.turn(ResumeRequested(tenant="acme", user="alice", submission_id=f"r{len(h.answers)}", job=number, array=array))
    return h.answers[-1]


def key(number: int) -> AssignmentKey:
    return AssignmentKey(number, 1, 0)


def is_off(h: CoreHarness, number: int) -> None:
    step = h.core.cluster.jobs[number].assignments[0].step
    h.report("n-1", Suspended(key=key(number), step=step, at_ms=0, image_mib=1000))


def test_why_tells_its_owner_that_it_waits_for_a_word() -> None:
    h = harness()
    number = running(h, softly(gpus=1))
    assert suspend(h, number).accepted
    is_off(h, number)
    answer = h.core.why(number, h.now_ms)
    assert answer is not None
    assert "it stays off its card until it is resumed" in answer.summary
    assert answer.estimate is not None
    assert answer.estimate.text == "no estimate: it goes back once it is resumed"


def test_it_leaves_its_card_for_nobody_and_stays_off_until_it_is_resumed() -> None:
    h = harness()
    mine = running(h, softly(gpus=1))
    assert suspend(h, mine).accepted
    assert [order.step for order in h.new_orders(Suspend)] == [1]
    is_off(h, mine)
    view = h.view(mine)
    assert view.state == "suspended"
    assert view.reason is not None
    assert (view.reason.code, view.reason.text) == ("Suspended", "suspended by alice")
    h.settle(most_ms=50 * HOUR)
    assert h.facts(JobResuming) == []
    assert h.core.next_deadline_ms() is None or h.core.cluster.pool.held_milli == 0
    h.restart()
    h.settle(most_ms=HOUR)
    assert h.facts(JobResuming) == []
    assert resume(h, mine).accepted
    assert [order.step for order in h.new_orders(Resume)] == [2]
    h.report("n-1", Resumed(key=key(mine), step=2, at_ms=0))
    assert (h.view(mine).state, h.view(mine).attempt) == ("running", 1)


def test_others_have_the_card_meanwhile_and_it_waits_for_it_when_resumed() -> None:
    h = harness()
    mine = running(h, softly(gpus=1))
    suspend(h, mine)
    is_off(h, mine)
    other = running(h, job(gpus=1))
    assert resume(h, mine).accepted
    assert h.states(mine, other) == ["suspended", "running"]
    h.ended(other)
    assert len(h.new_orders(Resume)) == 1


def test_a_job_that_gave_way_stays_so_when_its_owner_says_so() -> None:
    h = harness()
    large = running(h, softly(gpus=1))
    h.settle(most_ms=20 * HOUR)
    small = h.submit(job(gpus=1))
    is_off(h, large)
    h.run(small)
    assert suspend(h, large).accepted
    h.ended(small)
    h.settle(most_ms=HOUR)
    assert h.state(large) == "suspended"
    resume(h, large)
    assert h.core.cluster.jobs[large].assignments[0].state == "resuming"


def test_resumed_before_it_was_off_it_goes_straight_back() -> None:
    h = harness()
    mine = running(h, softly(gpus=1))
    suspend(h, mine)
    assert resume(h, mine).accepted
    is_off(h, mine)
    assert [order.step for order in h.new_orders(Resume)] == [2]


def test_what_its_node_refuses_runs_on_and_is_not_held() -> None:
    h = harness()
    mine = running(h, softly(gpus=1))
    suspend(h, mine)
    h.report("n-1", SuspendFailed(key=key(mine), step=1, at_ms=0, code="DriverRefused"))
    assert h.state(mine) == "running"
    assert h.core.cluster.jobs[mine].held_by == ""
    again = suspend(h, mine)
    assert again.reason is not None
    assert again.reason.code == "NotSuspendable"
    assert "could not" in again.reason.text


def test_a_suspended_job_can_be_cancelled_and_requeued_and_stays_held_then() -> None:
    h = harness(2)
    one, other = running(h, softly(gpus=1)), running(h, softly(gpus=1))
    for number in (one, other):
        suspend(h, number)
        is_off(h, number)
    h.cancel(one)
    assert h.requeue(other).accepted
    h.stopped(one)
    h.stopped(other)
    assert h.states(one, other) == ["cancelled", "pending"]
    h.settle(most_ms=HOUR)
    assert h.state(other) == "pending", "its owner has not let it go on"
    assert resume(h, other).accepted
    assert h.state(other) == "starting"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (job(gpus=1), "preemption 'requeue'"),
        (softly(gpus=2), "one whole card"),
        (softly(share_milli=300), "one whole card"),
        (softly(gpus=1, replicas=2), "2 replicas"),
    ],
)
def test_what_cannot_be_suspended_is_told_why(spec: JobSpec, text: str) -> None:
    h = harness(2)
    mine = running(h, spec)
    answer = suspend(h, mine)
    assert not answer.accepted
    assert answer.reason is not None
    assert answer.reason.code == "NotSuspendable"
    assert text in answer.reason.text
    assert h.state(mine) == "running"


def test_a_node_without_memory_for_it_says_so() -> None:
    for suspend_mib, text in ((0, "suspends no jobs"), (1000, "too little memory")):
        h = harness(suspend_mib=suspend_mib)
        answer = suspend(h, running(h, softly(gpus=1)))
        assert answer.reason is not None
        assert text in answer.reason.text


def test_the_work_of_one_that_was_stopped_on_its_way_counts_until_it_has_ended() -> None:
    """The node may have it off the card before it hears of the stop, and kills it only then."""
    h = CoreHarness(restart_every=1)
    h.join(msgspec.structs.replace(node("n-1", 2), suspend_mib=100 * 1024))
    first, second = running(h, softly(gpus=1)), running(h, softly(gpus=1))
    assert suspend(h, first).accepted
    h.cancel(first)
    answer = suspend(h, second)
    assert answer.reason is not None
    assert "too little memory" in answer.reason.text
    h.stopped(first)
    assert suspend(h, second).accepted


def test_who_may_and_when() -> None:
    h = harness()
    mine = running(h, softly(gpus=1))
    waiting = h.submit(softly(gpus=1))
    refusals = [
        (suspend(h, mine, user="bob"), "NotYours"),
        (suspend(h, 99), "UnknownJob"),
        (suspend(h, waiting), "NotRunning"),
        (resume(h, mine), "NotSuspended"),
    ]
    assert [answer.reason.code if answer.reason else "" for answer, _ in refusals] == [code for _, code in refusals]
    h.cancel(waiting)
    suspend(h, mine)
    is_off(h, mine)
    resume(h, mine)
    answer = suspend(h, mine)
    assert answer.reason is not None
    assert answer.reason.code == "NotRunning"


def test_of_an_array_those_go_that_run() -> None:
    h = harness(2)
    first = h.submit(msgspec.structs.replace(softly(gpus=1), array=parse_array("0-2")))
    elements = [first, first + 1, first + 2]
    for number in elements[:2]:
        h.started(number)
    assert suspend(h, first, array=True).accepted
    assert h.states(*elements) == ["suspended", "suspended", "pending"]
    for number in elements[:2]:
        is_off(h, number)
    assert h.state(elements[2]) == "starting"
    assert resume(h, first, array=True).accepted
    assert sorted(h.states(*elements)) == ["starting", "suspended", "suspended"]
    assert [h.core.cluster.jobs[number].held_by for number in elements] == ["", "", ""]


@pytest.mark.parametrize(
    ("fields", "basis", "hours"),
    [({"estimate_ms": 4 * HOUR}, "estimate", 3), ({"time_limit_ms": 4 * HOUR}, "limit", 4)],
)
def test_who_waits_for_its_card_is_told_when_it_ends_after_all(fields: dict[str, int], basis: str, hours: int) -> None:
    """What it did before it was suspended is done; of its limit no more is left than the whole."""
    h = harness()
    mine = running(h, softly(gpus=1, **fields))
    h.turn(after_ms=HOUR)
    suspend(h, mine)
    is_off(h, mine)
    h.settle(most_ms=20 * HOUR)
    resume(h, mine)
    h.report("n-1", Resumed(key=key(mine), step=2, at_ms=0))
    answer = h.core.why(h.submit(job(gpus=1)), h.now_ms)
    assert answer is not None
    assert answer.estimate is not None
    assert (answer.estimate.basis, answer.estimate.at_ms - h.now_ms) == (basis, hours * HOUR)
