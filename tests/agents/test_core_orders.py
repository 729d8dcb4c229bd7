"""The agent's core and its orders: which messages are taken, what a whole desired set brings about."""

from __future__ import annotations

import pytest

from gpuyard_agent.core.actions import (
    StartProcess,
    StopProcess,
)
from gpuyard_agent.core.book import CLOSED_KEPT_MS
from gpuyard_agent.core.events import (
    OrdersReceived,
    PartitionFailed,
    PartitionReady,
    PortFree,
    ProcessExited,
    ProcessFound,
    ProcessStarted,
    ReportsDelivered,
    SyncReceived,
)
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    OrderAnswer,
    OrderBatch,
    Stop,
    Sync,
)
from support.agent_core import GANG, GO, INSTANCE, KEY, NODE, START, CoreHarness, prepare
from support.agents import start_order

# --- which orders are taken ---


def batch(first: int, *orders, epoch: int = 7, node: str = NODE, instance: str = INSTANCE) -> OrdersReceived:
    return OrdersReceived(1, OrderBatch(node=node, instance=instance, epoch=epoch, first=first, orders=orders))


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (batch(3, START), "gap"),
        (batch(2, START, epoch=6), "stale"),
        (batch(2, START, instance="instance-0"), "wrong-instance"),
        (batch(2, START, node="node-2"), "wrong-instance"),
        (SyncReceived(1, Sync(node=NODE, instance=INSTANCE, epoch=7, n=0, desired=())), "stale"),
        (SyncReceived(1, Sync(node=NODE, instance=INSTANCE, epoch=6, n=5, desired=())), "stale"),
        (SyncReceived(1, Sync(node=NODE, instance="instance-0", epoch=9, n=5, desired=())), "wrong-instance"),
    ],
)
def test_a_refused_message_changes_nothing(core: CoreHarness, refused, status: str) -> None:
    core.order(start_order(9, "true"))
    before = (dict(core.rows), core.core.counters.applied, core.core.counters.epoch)
    told = core.tell(refused)
    assert not told.turn.must_commit
    assert told.others == []
    (answer,) = told.answers
    assert (answer.status, answer.applied) == (status, 1)
    assert (dict(core.rows), core.core.counters.applied, core.core.counters.epoch) == before


def test_a_repeated_batch_is_answered_ok_and_changes_nothing(core: CoreHarness) -> None:
    core.tell(batch(1, START))
    told = core.tell(batch(1, START))
    assert told.actions[0].answer == OrderAnswer(status="ok", applied=1)  # type: ignore[union-attr]
    assert told.others == []
    assert not told.turn.must_commit


def test_of_a_batch_that_overlaps_only_the_rest_is_taken(core: CoreHarness) -> None:
    core.tell(batch(1, START))
    other = start_order(5, "true")
    told = core.tell(batch(1, START, other))
    assert told.others == [prepare(other)]
    assert told.answers == [OrderAnswer(status="ok", applied=2)]


def test_a_new_leader_is_durable_with_its_first_order(core: CoreHarness) -> None:
    core.tell(batch(1, START))
    core.tell(batch(2, Stop(key=KEY), epoch=8))
    core.restart(found=[ProcessFound(KEY, 100, 5)])
    late = batch(3, start_order(4, "true"), epoch=7, instance=core.instance)
    assert core.tell(late).answers[0].status == "stale"


# --- sync ---


def test_a_sync_starts_what_is_missing_and_stops_what_is_not_wanted(core: CoreHarness) -> None:
    core.run(START)
    wanted = start_order(5, "true")
    told = core.sync(Desired(start=wanted), n=4)
    assert told.others == [StopProcess(KEY, 30_000), prepare(wanted)]
    assert told.answers == [OrderAnswer(status="ok", applied=4)]
    core.tell(ProcessExited(KEY, signal=15))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.detail) == ("stopped", "superseded")


def test_a_sync_that_says_what_is_known_changes_nothing(core: CoreHarness) -> None:
    core.run(START)
    assert core.sync(Desired(start=START)).others == []


def test_a_sync_carries_the_word_to_go_and_the_stop(core: CoreHarness) -> None:
    core.order(GANG)
    core.tell(PartitionReady(GANG.key), PortFree(GANG.key, 29_500))
    told = core.sync(Desired(start=GANG, go=GO))
    assert told.others == [StartProcess(GANG.key, GANG.launch, GO, 29_500)]
    core.tell(ProcessStarted(GANG.key, 1, 2))
    stop = Stop(key=GANG.key, grace_ms=9)
    assert core.sync(Desired(start=GANG, go=GO, stop=stop)).others == [StopProcess(GANG.key, 9)]


def test_a_sync_with_a_stop_for_an_unknown_key_is_a_tombstone(core: CoreHarness) -> None:
    told = core.sync(Desired(start=START, stop=Stop(key=KEY, reason="cancelled")))
    assert [type(report) for report in told.reports] == [Ended]
    assert core.sync(Desired(start=START)).others == []


def test_a_sync_from_before_the_end_was_read_does_not_start_it_again(core: CoreHarness) -> None:
    """The daemon composes its sync before it has read the `Ended` that is already in the stream."""
    core.run(START)
    core.tell(ProcessExited(KEY))
    core.undo(KEY)
    core.tell(ReportsDelivered(len(core.reports)))
    told = core.sync(Desired(start=START))
    assert (told.others, told.reports) == ([], [])
    assert core.state(KEY) == "closed"


def test_a_key_is_forgotten_once_a_sync_no_longer_wants_it(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY))
    core.undo(KEY)
    core.sync()
    assert core.state(KEY) == "closed"  # its end is not delivered: the daemon cannot know of it
    core.tell(ReportsDelivered(len(core.reports)))
    core.sync()
    assert core.state(KEY) == "unknown"


def test_a_late_copy_of_an_older_sync_does_not_start_again_what_is_forgotten(core: CoreHarness) -> None:
    """Both stand for the same orders: only their serials say which is the newer."""
    core.run(START)
    late = SyncReceived(1, core.next_sync(Desired(start=START)))
    core.tell(late)
    core.tell(ProcessExited(KEY))
    core.undo(KEY)
    core.tell(ReportsDelivered(len(core.reports)))
    core.sync()
    told = core.tell(late)
    assert (told.answers[0].status, told.others, core.state(KEY)) == ("stale", [], "unknown")


def test_a_repeated_sync_is_answered_and_changes_nothing(core: CoreHarness) -> None:
    once = SyncReceived(1, core.next_sync(Desired(start=START)))
    core.tell(once)
    core.tell(PartitionFailed(KEY, "PartitionUnavailable", "no"))
    core.undo(KEY)
    core.tell(ReportsDelivered(len(core.reports)))
    core.now_ms += CLOSED_KEPT_MS
    for _ in range(2):
        told = core.tell(once)
        assert (told.answers[0].status, told.others) == ("ok", [])


def test_a_key_is_forgotten_some_time_after_its_end_was_delivered(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY))
    core.undo(KEY)
    core.tell(ReportsDelivered(len(core.reports)))
    core.now_ms += CLOSED_KEPT_MS - 1
    core.order(start_order(5, "true"))
    assert core.state(KEY) == "closed"
    core.now_ms += 1
    core.order(start_order(6, "true"))
    assert core.state(KEY) == "unknown"
