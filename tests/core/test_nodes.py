"""Nodes that fall silent, come back, come back changed; and a yard that is stopped and started."""

from __future__ import annotations

import pytest

from gpuyard_daemon.core.state.facts import LedgerReplaced, NodeChanged
from gpuyard_daemon.core.state.inputs import (
    NodeIncompatible,
    NodeLost,
    NodeReported,
    NodeReturned,
    NodeSuspected,
    RequeueAll,
    YardStarted,
)
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Joined, Started, Stop
from support.builders import CoreHarness, exited, gpu, job, node


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", 2))
    return h


def node_state(h: CoreHarness, name: str = "n-1") -> str:
    return next(view.state for view in h.core.node_views(None) if view.node == name)


@pytest.mark.parametrize("silence", [NodeSuspected(node="n-1"), NodeLost(node="n-1")])
def test_nothing_new_goes_to_a_silent_node(yard: CoreHarness, silence: NodeSuspected | NodeLost) -> None:
    yard.turn(silence)
    number = yard.submit(job(gpus=1))
    assert yard.state(number) == "pending"
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    assert node_state(yard) == "ready"
    assert yard.state(number) == "starting"


def test_jobs_wait_for_a_lost_node_and_go_on_when_it_returns(yard: CoreHarness) -> None:
    """`on_node_lost: wait`: nothing restarts elsewhere, however long it takes."""
    number = yard.submit(job(gpus=1))
    yard.run(number)
    yard.turn(NodeLost(node="n-1"))
    yard.join(node("n-2", 2))
    yard.settle(most_ms=86_400_000)
    assert (yard.state(number), yard.nodes_of(number)) == ("running", ["n-1"])
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    yard.ended(number)
    assert yard.state(number) == "succeeded"


def test_a_lost_node_keeps_its_reports(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.turn(NodeLost(node="n-1"))
    yard.ended(number)
    assert yard.state(number) == "succeeded"
    assert node_state(yard) == "lost"


def test_heartbeats_of_another_process_do_not_bring_a_node_back(yard: CoreHarness) -> None:
    yard.turn(NodeLost(node="n-1"))
    yard.turn(NodeReturned(node="n-1", instance="somebody-else"))
    assert node_state(yard) == "lost"
    yard.join(node("n-1", 2))
    assert node_state(yard) == "ready"


def test_changes_of_unknown_nodes_and_repeated_changes_are_nothing(yard: CoreHarness) -> None:
    yard.turn(NodeSuspected(node="n-1"))
    yard.turn(
        NodeSuspected(node="n-1"),
        NodeSuspected(node="n-7"),
        NodeLost(node="n-7"),
        NodeReturned(node="n-7", instance="x"),
    )
    assert yard.new_facts(NodeChanged) == []


def test_an_incompatible_node_is_left_alone_with_its_jobs(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.turn(NodeIncompatible(node="n-1", reason="speaks version 7, this daemon 1 to 2"))
    yard.check_no_other_orders()
    waiting = yard.submit(job(gpus=1))
    assert yard.states(number, waiting) == ["starting", "pending"]
    view = yard.core.node_views(None)[0]
    assert (view.state, view.reason) == ("incompatible", "speaks version 7, this daemon 1 to 2")
    yard.join(node("n-1", 2))
    assert yard.state(waiting) == "starting"


def test_an_agent_that_restarts_keeps_its_jobs(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.run(number)
    yard.join(node("n-1", 2))
    assert yard.state(number) == "running"
    assert yard.core.node_instance("n-1") == "n-1-process-2"
    yard.check_no_other_orders()


def test_what_a_restarted_agent_no_longer_holds_is_lost_and_waits_again(yard: CoreHarness) -> None:
    """It had reported the start, so it had it in its ledger; now it is not there, and will never report."""
    number, unconfirmed = yard.submit_many([job(gpus=1), job(gpus=1)])
    yard.started(number)
    yard.join(node("n-1", 2), held={})
    view = yard.view(number)
    assert (view.state, view.attempt) == ("starting", 2)
    # The other was never confirmed: it is still to be started, and its order is in the desired set.
    assert yard.core.cluster.jobs[unconfirmed].attempt == 1
    _, desired = yard.core.desired("n-1")
    assert [wanted.start.key for wanted in desired] == [AssignmentKey(number, 2, 0), AssignmentKey(unconfirmed, 1, 0)]


def test_a_new_ledger_under_an_old_name_begins_anew(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.started(number)
    yard.report("n-1", Started(key=AssignmentKey(9, 1, 0), at_ms=0))
    fresh = NodeReported(
        node="n-1", instance="fresh", boot_id="boot-2", first=1, reports=(Joined(inventory=node("n-1", 2)),)
    )
    yard.turn(fresh)
    assert yard.new_facts(LedgerReplaced) == [LedgerReplaced("n-1")]
    assert yard.core.cluster.nodes["n-1"].reports_seen == 1
    assert yard.core.cluster.jobs[number].attempt == 2


def test_a_late_report_of_an_earlier_process_is_no_new_ledger(yard: CoreHarness) -> None:
    first = yard.batch("n-1", Joined(inventory=node("n-1", 2)), first=1)
    for _ in range(3):
        yard.join(node("n-1", 2))
    yard.turn(first)
    assert yard.new_facts(LedgerReplaced) == []
    assert yard.core.cluster.nodes["n-1"].reports_seen == 4


def test_a_repetition_of_everything_by_a_restarted_agent_is_no_new_ledger(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.started(number)
    joined, started = Joined(inventory=node("n-1", 2)), Started(key=AssignmentKey(number, 1, 0), at_ms=0)
    again = Joined(inventory=node("n-1", 2), held=(AssignmentKey(number, 1, 0),))
    yard.turn(NodeReported(node="n-1", instance="second", boot_id="boot-1", first=1, reports=(joined, started, again)))
    assert yard.new_facts(LedgerReplaced) == []
    assert yard.state(number) == "running"
    assert yard.core.node_instance("n-1") == "second"


def test_a_card_that_vanishes_takes_nothing_new_and_keeps_its_job_until_the_end(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=2))
    yard.run(number)
    yard.join(node("n-1", devices=[gpu(0)]))
    cards = yard.core.node_views(None)[0].cards
    assert [(card.uuid, card.healthy, card.jobs) for card in cards] == [
        ("GPU-n-1-0", True, (number,)),
        ("GPU-n-1-1", False, (number,)),
    ]
    assert yard.core.stats(yard.now_ms).gpus == 1
    yard.ended(number)
    assert len(yard.core.node_views(None)[0].cards) == 1
    first, second = yard.submit_many([job(gpus=1), job(gpus=1)])
    assert yard.states(first, second) == ["starting", "pending"]


def test_a_sick_card_is_passed_over_until_it_is_well(yard: CoreHarness) -> None:
    yard.join(node("n-1", devices=[gpu(0, healthy=False), gpu(1)]))
    first, second = yard.submit_many([job(gpus=1), job(gpus=1)])
    assert yard.states(first, second) == ["starting", "pending"]
    assert yard.view(first).placed[0].devices == ("GPU-n-1-1",)
    answer = yard.core.why(second)
    assert answer is not None
    assert answer.reasons[0].reason.code == "CardsBusy"
    yard.join(node("n-1", 2))
    assert yard.state(second) == "starting"


def test_a_node_that_comes_back_smaller_is_overcommitted_but_takes_nothing_new(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, cpu_milli=100_000))
    yard.run(number)
    yard.join(node("n-1", 2, cpu_milli=64_000))
    assert yard.core.cluster.pool.spaces["n-1"].cpu_free_milli == -36_000
    waiting = yard.submit(job(gpus=1))
    assert yard.state(waiting) == "pending"
    yard.ended(number)
    assert yard.state(waiting) == "starting"


# --- the yard stops and starts ---------------------------------------------------------------------------------------


def test_a_stopping_yard_stops_everything_and_charges_nobody(yard: CoreHarness) -> None:
    running, starting, waiting = yard.submit_many([job(gpus=1, retries=1), job(gpus=1), job(gpus=1)])
    yard.started(running)
    yard.turn(RequeueAll())
    assert [stop.reason for stop in yard.new_orders(Stop)] == ["shutdown", "shutdown"]
    assert yard.core.is_draining
    assert yard.states(running, starting, waiting) == ["stopping", "stopping", "pending"]
    yard.stopped(running)
    yard.stopped(starting)
    view = yard.view(running)
    assert (view.state, view.retries_left) == ("pending", 1)
    late = yard.submit(job(gpus=1))
    yard.settle(most_ms=600_000)
    assert yard.states(running, starting, waiting, late) == ["pending"] * 4
    answer = yard.core.why(late)
    assert answer is not None
    assert "the yard is stopping" in answer.summary


def test_a_job_that_ends_well_while_the_yard_stops_has_succeeded(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.started(number)
    yard.turn(RequeueAll())
    yard.ended(number)
    assert yard.state(number) == "succeeded"


def test_a_started_yard_goes_on_where_agents_have_joined(yard: CoreHarness) -> None:
    yard.join(node("n-2", 2))
    first, second = yard.submit_many([job(gpus=2), job(gpus=2)])
    yard.turn(RequeueAll())
    yard.stopped(first)
    yard.stopped(second)
    yard.restart()
    yard.turn(YardStarted(epoch=7))
    assert yard.states(first, second) == ["pending", "pending"]
    assert node_state(yard) == "joining"
    yard.join(node("n-2", 2))
    assert yard.states(first, second) == ["starting", "pending"]
    assert yard.nodes_of(first) == ["n-2"]
    yard.join(node("n-1", 2))
    assert yard.states(first, second) == ["starting", "starting"]
    assert yard.view(first).attempt == 2


def test_what_had_not_ended_when_the_daemon_died_is_still_to_be_stopped(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.started(number)
    yard.turn(RequeueAll())
    yard.restart()
    yard.turn(YardStarted(epoch=7))
    _, (wanted,) = yard.core.desired("n-1")
    assert wanted.stop is not None
    assert wanted.stop.reason == "shutdown"
    yard.join(node("n-1", 2))
    yard.stopped(number)
    assert yard.state(number) == "starting"


def test_a_start_of_a_yard_that_was_not_stopped_is_nothing(yard: CoreHarness) -> None:
    yard.turn(YardStarted(epoch=7))
    assert node_state(yard) == "ready"


def test_cancelling_while_the_yard_stops_wins_over_the_requeue(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.started(number)
    yard.turn(RequeueAll())
    assert yard.cancel(number).accepted
    yard.stopped(number)
    assert yard.state(number) == "cancelled"


def test_reports_of_nodes_that_never_joined_make_them_known_but_not_usable() -> None:
    h = CoreHarness()
    h.report("n-1", exited(AssignmentKey(1, 1, 0)))
    number = h.submit(job(gpus=1))
    assert h.state(number) == "pending"
    assert node_state(h) == "joining"
    answer = h.core.why(number)
    assert answer is not None
    assert answer.reasons[0].reason.code == "NodeNotJoined"


def _from_ledger(ledger: str, instance: str, first: int, count: int) -> NodeReported:
    reports = (Joined(inventory=node("n-2", 2)),) * count
    return NodeReported(node="n-2", instance=instance, boot_id="boot-1", first=first, reports=reports, ledger=ledger)


def test_the_first_batch_of_all_that_comes_last_is_no_new_ledger(yard: CoreHarness) -> None:
    """Sent by the agent's first process and stored late, behind what its third one sent: same ledger, seen numbers."""
    yard.turn(_from_ledger("one", "process-3", 1, 3))
    yard.turn(_from_ledger("one", "process-1", 1, 1))
    assert yard.new_facts(LedgerReplaced) == []
    assert yard.core.node_instance("n-2") == "process-3"


def test_another_ledger_begins_anew_however_long_it_is(yard: CoreHarness) -> None:
    yard.turn(_from_ledger("one", "process-1", 1, 2))
    yard.turn(_from_ledger("two", "process-2", 1, 5))
    assert yard.new_facts(LedgerReplaced) == [LedgerReplaced("n-2")]
    assert yard.core.cluster.nodes["n-2"].reports_seen == 5
