"""How jobs end: success, failure and who pays for it; reports that come twice, late, or from the wrong node."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard_daemon.core.state.facts import JobRetired, ReportsTaken
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Start, Started
from support.builders import CoreHarness, exited, job, node


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", 2))
    return h


def end(h: CoreHarness, number: int, outcome: Any, **fields: Any) -> None:
    """The one replica of a job ends in some way."""
    (assignment,) = h.core.cluster.jobs[number].assignments
    report = Ended(key=assignment.key, outcome=outcome, at_ms=0, **fields)
    h.report(assignment.node, report)


def outcome(h: CoreHarness, number: int) -> tuple[str, str, int | None, int, int]:
    """(state, reason, exit code, attempt, retries left)."""
    view = h.view(number)
    return view.state, view.reason.code if view.reason else "", view.exit_code, view.attempt, view.retries_left


def where(h: CoreHarness, number: int) -> str:
    (node,) = h.nodes_of(number)
    return node


def test_a_job_runs_and_succeeds(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.now_ms += 100
    yard.started(number)
    yard.now_ms += 1000
    yard.ended(number)
    assert outcome(yard, number) == ("succeeded", "", 0, 1, 0)
    assert [event.state for event in yard.events] == ["starting", "running", "succeeded"]
    view = yard.view(number)
    assert (view.started_ms - view.submitted_ms, view.ended_ms - view.started_ms) == (100, 1000)
    assert view.spec == job(gpus=1)
    assert yard.core.stats(yard.now_ms).wait_sum_ms == 100


@pytest.mark.parametrize(
    ("fields", "reason", "exit_code"),
    [
        ({"outcome": "exited", "exit_code": 3}, "ExitCode", 3),
        ({"outcome": "signalled", "signal": 11}, "Signalled", 139),
        ({"outcome": "refused", "code": "WorkingDirectoryMissing"}, "WorkingDirectoryMissing", None),
        ({"outcome": "refused", "code": "CommandNotFound", "detail": "no such file"}, "CommandNotFound", None),
    ],
)
def test_a_failure_of_its_own_spends_a_retry_and_then_fails(
    yard: CoreHarness, fields: dict[str, Any], reason: str, exit_code: int | None
) -> None:
    number = yard.submit(job(gpus=1, retries=1))
    end(yard, number, **fields)
    assert outcome(yard, number) == ("pending", reason, exit_code, 1, 0)
    yard.settle(most_ms=1000)
    assert outcome(yard, number)[0] == "starting"
    end(yard, number, **fields)
    assert outcome(yard, number) == ("failed", reason, exit_code, 2, 0)


def test_retries_wait_longer_each_time_up_to_a_minute(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=9))
    waits = []
    for _ in range(9):
        end(yard, number, "exited", exit_code=1)
        due = yard.core.next_deadline_ms()
        assert due is not None
        waits.append(due - yard.now_ms)
        yard.settle(most_ms=waits[-1])
    assert waits == [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000]


def test_a_waiting_retry_takes_no_place_and_keeps_its_turn(yard: CoreHarness) -> None:
    first = yard.submit(job(gpus=2, retries=1))
    second, third = yard.submit_many([job(gpus=2), job(gpus=2)])
    end(yard, first, "exited", exit_code=1)
    assert yard.states(first, second, third) == ["pending", "starting", "pending"]
    yard.settle(most_ms=1000)
    yard.ended(second)
    assert yard.states(first, second, third) == ["starting", "succeeded", "pending"]


def test_the_time_limit_ends_a_job_whatever_its_retries(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=5, time_limit_ms=1000))
    yard.run(number)
    end(yard, number, "signalled", signal=15, code="TimeLimit")
    assert outcome(yard, number) == ("failed", "TimeLimit", 143, 1, 5)


@pytest.mark.parametrize(
    "fields",
    [
        {"outcome": "lost", "code": "NodeRestarted"},
        {"outcome": "stopped", "code": "HoldExpired"},
        {"outcome": "refused", "code": "PartitionUnavailable"},
    ],
)
def test_the_nodes_fault_costs_the_job_nothing(yard: CoreHarness, fields: dict[str, Any]) -> None:
    yard.join(node("n-2", 2))
    number = yard.submit(job(gpus=1))
    end(yard, number, **fields)
    assert outcome(yard, number)[0] == "starting"
    yard.run(number)
    yard.ended(number)
    assert outcome(yard, number) == ("succeeded", "", 0, 2, 0)


def test_uncharged_starts_that_keep_going_wrong_wait_longer(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    waits = []
    for _ in range(9):
        end(yard, number, "lost")
        due = yard.core.next_deadline_ms() if yard.state(number) == "pending" else yard.now_ms
        assert due is not None
        waits.append(due - yard.now_ms)
        yard.settle(most_ms=waits[-1])
    assert waits == [0, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]
    yard.run(number)
    yard.now_ms += 60_000
    end(yard, number, "lost")
    assert yard.state(number) == "starting"


def test_a_node_that_cannot_make_a_partition_is_left_alone_for_that_mode(yard: CoreHarness) -> None:
    number = yard.submit(job(mig="1g.10gb"))
    end(yard, number, "refused", code="PartitionUnavailable", detail="MIG mode is pending")
    assert yard.state(number) == "pending"
    answer = yard.core.why(number)
    assert answer is not None
    assert [reason.reason.code for reason in answer.reasons] == ["ModeAvoided"]
    assert yard.core.node_views(None)[0].reason == "left alone for mig after a refusal"
    other = yard.submit(job(gpus=1))
    assert yard.state(other) == "starting"
    yard.settle(most_ms=10_000)
    assert yard.state(number) == "starting"
    end(yard, number, "refused", code="PartitionUnavailable")
    yard.settle(most_ms=10_000)
    assert yard.state(number) == "pending"
    yard.settle(most_ms=10_000)
    assert yard.state(number) == "starting"
    yard.run(number)
    assert not yard.core.cluster.nodes["n-1"].avoided


def test_a_node_whose_container_engine_fails_one_job_is_left_alone_for_containers_alone() -> None:
    """A user with an image must not close a node's cards to everybody else."""
    yard = CoreHarness()
    yard.join(msgspec.structs.replace(node("n-1", 2), container_engine="podman"))
    number = yard.submit(job(gpus=1, containers=True))
    end(yard, number, "refused", code="ContainerEngineMissing", detail="podman does not work for nobody")
    assert yard.state(number) == "pending"
    answer = yard.core.why(number)
    assert answer is not None
    assert [reason.reason.code for reason in answer.reasons] == ["ContainersAvoided"]
    assert yard.core.node_views(None)[0].reason == "left alone for containers after a refusal"
    other = yard.submit(job(gpus=1))
    yard.run(other)
    assert yard.core.cluster.nodes["n-1"].avoided
    yard.settle(most_ms=10_000)
    yard.run(number)
    assert not yard.core.cluster.nodes["n-1"].avoided


def test_a_user_without_an_account_on_a_node_goes_elsewhere_and_closes_it_to_nobody(yard: CoreHarness) -> None:
    yard.join(node("n-2", 2))
    number = yard.submit(job(gpus=1))
    first, other = where(yard, number), {"n-1": "n-2", "n-2": "n-1"}[where(yard, number)]
    end(yard, number, "refused", code="AccountMissing", detail="there is no account 'alice' on this node")
    assert where(yard, number) == other
    assert [view.reason for view in yard.core.node_views(None) if view.node == first] == [
        "left alone for 1 user without an account after a refusal"
    ]
    end(yard, number, "refused", code="AccountMissing", detail="there is no account 'alice' on this node")
    yard.settle(most_ms=1000)
    assert yard.state(number) == "pending"
    answer = yard.core.why(number)
    assert answer is not None
    assert answer.summary == "the node had no account for acme/alice lately (on 2 of 2 nodes)"
    assert [each.reason.text for each in answer.reasons] == [
        "the node had no account for acme/alice lately, and is tried again in 9s"
    ]
    assert (answer.holders, answer.estimate.basis if answer.estimate else "") == ((), "none")
    colleague = yard.submit(job(gpus=1), user="bob")
    assert where(yard, colleague)
    share = yard.submit(job(share_milli=500))
    assert where(yard, share)
    # Then the operator makes the account.
    yard.settle(most_ms=10_000)
    yard.run(number)
    assert not yard.core.cluster.nodes[where(yard, number)].avoided
    assert where(yard, yard.submit(job(gpus=1))) == where(yard, number)


def test_a_user_without_any_account_is_asked_for_ever_more_rarely(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    tries = 0
    until_ms = yard.now_ms + 3_600_000
    while yard.now_ms < until_ms:
        if yard.state(number) == "starting":
            tries += 1
            end(yard, number, "refused", code="AccountMissing")
        yard.settle(most_ms=60_000)
    assert tries <= 12


def test_resources_are_free_only_when_the_node_says_so(yard: CoreHarness) -> None:
    first = yard.submit(job(gpus=2))
    yard.run(first)
    second = yard.submit(job(gpus=2))
    yard.cancel(first)
    yard.settle(most_ms=600_000)
    assert yard.states(first, second) == ["stopping", "pending"]
    yard.stopped(first)
    assert yard.states(first, second) == ["cancelled", "starting"]


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_batch_that_comes_again_changes_nothing(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=3))
    batch = yard.batch("n-1", exited(AssignmentKey(number, 1, 0), 1))
    yard.turn(batch)
    before = yard.core.digest()
    cursors = yard.core.cursors
    assert yard.core.handle([batch], yard.now_ms, cursors).record is None
    assert yard.core.digest() == before


def test_only_the_new_part_of_an_overlapping_batch_counts(yard: CoreHarness) -> None:
    first, second = yard.submit_many([job(gpus=1), job(gpus=1)])
    started = [Started(key=AssignmentKey(number, 1, 0), at_ms=1) for number in (first, second)]
    yard.turn(yard.batch("n-1", started[0]))
    yard.turn(yard.batch("n-1", *started, first=2))
    assert yard.states(first, second) == ["running", "running"]
    assert yard.core.cluster.nodes["n-1"].reports_seen == 3


def test_a_hole_in_the_numbers_is_taken_and_noted(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.turn(yard.batch("n-1", Started(key=AssignmentKey(number, 1, 0), at_ms=1), first=5))
    assert yard.new_facts(ReportsTaken) == [ReportsTaken("n-1", 5, 3)]
    assert yard.state(number) == "running"


def test_a_report_of_an_earlier_attempt_is_dropped(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    end(yard, number, "lost")
    yard.report("n-1", exited(AssignmentKey(number, 1, 0)))
    assert outcome(yard, number)[:4] == ("starting", "", None, 2)


def test_a_report_about_another_nodes_assignment_is_dropped(yard: CoreHarness) -> None:
    yard.join(node("n-2", 2))
    number = yard.submit(job(gpus=2))
    assert yard.nodes_of(number) == ["n-1"]
    yard.report("n-2", exited(AssignmentKey(number, 1, 0)))
    assert yard.state(number) == "starting"


@pytest.mark.parametrize("key", [(99, 1, 0), (1, 1, 1), (1, 2, 0), (1, 0, 0), (1, 1, -1)])
def test_a_report_about_nothing_is_dropped(yard: CoreHarness, key: tuple[int, int, int]) -> None:
    yard.submit(job(gpus=1))
    yard.report("n-1", exited(AssignmentKey(*key)))
    assert yard.state(1) == "starting"


def test_a_job_may_end_without_having_reported_its_start(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.ended(number)
    assert yard.state(number) == "succeeded"


def test_orders_are_numbered_without_holes_and_the_desired_set_agrees(yard: CoreHarness) -> None:
    first, second = yard.submit_many([job(gpus=1), job(gpus=1)])
    number, desired = yard.core.desired("n-1")
    assert number == 2
    assert [wanted.start for wanted in desired] == [order for order in yard.orders["n-1"] if isinstance(order, Start)]
    yard.cancel(first)
    number, desired = yard.core.desired("n-1")
    assert number == 3
    assert [wanted.stop is not None for wanted in desired] == [True, False]
    yard.stopped(first)
    yard.run(second)
    yard.ended(second)
    assert yard.core.desired("n-1") == (3, ())
    assert yard.core.desired("n-9") == (0, ())


def test_finished_jobs_leave_after_an_hour_with_all_that_history_needs(yard: CoreHarness) -> None:
    number = yard.submit(job(mig="1g.10gb", name="train"))
    yard.run(number)
    yard.ended(number)
    view = yard.view(number)
    yard.settle(most_ms=3_599_000)
    assert yard.state(number) == "succeeded"
    yard.settle(most_ms=20_000)
    assert yard.state(number) == "gone"
    assert [fact.view for fact in yard.facts(JobRetired)] == [view]
    assert view.placed[0].partition == "mig 1g.10gb@6"


def test_a_refusal_that_the_node_takes_upon_itself_costs_the_job_nothing_whatever_its_code() -> None:
    """A later agent may know reasons that this daemon does not."""
    h = CoreHarness()
    h.join(node("n-1", 1), node("n-2", 1))
    number = h.submit(job(gpus=1))
    (first,) = h.nodes_of(number)
    key = AssignmentKey(number, 1, 0)
    h.report(first, Ended(key=key, outcome="refused", at_ms=0, code="SomethingNew", node_fault=True))
    assert (h.state(number), h.view(number).attempt) == ("starting", 2)
    assert h.nodes_of(number) != [first]
