"""The agent's core, exactly: which event brings about which actions and reports, and nothing else."""

from __future__ import annotations

import pytest

from gpuyard_agent.core.actions import (
    ForgetProcess,
    HoldPort,
    PreparePartition,
    StartProcess,
    StopProcess,
    UndoPartition,
)
from gpuyard_agent.core.book import CLOSED_KEPT_MS
from gpuyard_agent.core.events import (
    CardBroke,
    CardReturned,
    InventoryRead,
    MustEnd,
    OrdersReceived,
    PartitionFailed,
    PartitionReady,
    PartitionUndone,
    PortFree,
    PortTaken,
    ProcessesListed,
    ProcessExited,
    ProcessFound,
    ProcessRefused,
    ProcessStarted,
    ReportsDelivered,
    SyncReceived,
    TimePassed,
    UndoFailed,
)
from gpuyard_agent.core.life import HOLD_MS_MAX, UNDO_PAUSE_MS
from gpuyard_agent.core.model import Verdict
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    Go,
    Inventory,
    Joined,
    OrderAnswer,
    OrderBatch,
    Prepared,
    Started,
    Stop,
    Sync,
)
from gpuyard_protocol.resources import Device, MigInstance, WholeCards
from support.agent_core import INSTANCE, NODE, CoreHarness
from support.agents import start_order

START = start_order(1, "true")
KEY = START.key
GANG = start_order(2, "true", replicas=2, hold=True)
GO = Go(key=GANG.key, master_address="10.0.0.1", master_port=29_500)


@pytest.fixture
def core() -> CoreHarness:
    return CoreHarness()


def prepare(start=START):
    return PreparePartition(start.key, start.partition, start.launch)


# --- one replica, from order to end ---


def test_an_order_is_recorded_before_its_partition_is_made(core: CoreHarness) -> None:
    told = core.order(START)
    assert told.turn.must_commit
    assert list(told.turn.saved) == [KEY]
    assert told.others == [prepare()]
    assert told.answers == [OrderAnswer(status="ok", applied=1)]
    assert told.reports == []


def test_a_ready_partition_starts_the_process_without_a_second_commit(core: CoreHarness) -> None:
    core.order(START)
    told = core.tell(PartitionReady(KEY))
    assert told.actions == [StartProcess(KEY, START.launch, None, 0)]
    assert not told.turn.must_commit


def test_a_started_process_is_reported_once(core: CoreHarness) -> None:
    core.order(START)
    core.tell(PartitionReady(KEY))
    told = core.tell(ProcessStarted(KEY, 100, 5_000))
    assert told.reports == [Started(key=KEY, at_ms=5_000, pid=100)]
    assert told.actions == []
    assert core.tell(ProcessStarted(KEY, 100, 5_000)).reports == []


def test_an_exit_is_reported_after_the_partition_is_undone_and_then_forgotten(core: CoreHarness) -> None:
    core.run(START)
    told = core.tell(ProcessExited(KEY, exit_code=3, at_ms=9_000))
    assert (told.actions, told.reports) == ([UndoPartition(KEY)], [])
    told = core.undo(KEY)
    expected = Ended(key=KEY, outcome="exited", at_ms=9_000, exit_code=3, started_ms=core.wall_ms)
    assert told.reports == [expected]
    assert told.actions == [ForgetProcess(KEY)]
    assert core.state(KEY) == "closed"


def test_an_exit_that_overtakes_the_answer_to_the_start_still_reports_both(core: CoreHarness) -> None:
    """A process that ends within its first millisecond: the exit arrives before the start's answer."""
    core.order(START)
    core.tell(PartitionReady(KEY))
    told = core.tell(ProcessExited(KEY, exit_code=0, at_ms=6_000, started_ms=5_999))
    assert told.reports == [Started(key=KEY, at_ms=5_999)]
    assert core.tell(ProcessStarted(KEY, 100, 5_999)).actions == []
    assert [type(report) for report in core.undo(KEY).reports] == [Ended]


def test_a_signal_from_outside_is_told_apart_from_an_exit(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY, signal=11, at_ms=9_000))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.signal) == ("signalled", 11)


def test_a_partition_that_cannot_be_made_refuses_the_assignment(core: CoreHarness) -> None:
    core.order(START)
    told = core.tell(PartitionFailed(KEY, "PartitionUnavailable", "card 0 is in MIG mode"))
    assert told.actions == [UndoPartition(KEY)]
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code, ended.detail) == ("refused", "PartitionUnavailable", "card 0 is in MIG mode")


def test_a_process_that_cannot_be_started_refuses_the_assignment(core: CoreHarness) -> None:
    core.order(START)
    core.tell(PartitionReady(KEY))
    core.tell(ProcessRefused(KEY, "WorkingDirectoryMissing", "/nowhere"))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code) == ("refused", "WorkingDirectoryMissing")


def test_a_partition_that_will_not_go_stays_held_and_is_tried_again(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY))
    assert core.tell(UndoFailed(KEY, "busy")).reports == []
    assert core.core.next_deadline_ms() == core.now_ms + UNDO_PAUSE_MS
    core.now_ms += UNDO_PAUSE_MS
    assert core.tell(TimePassed()).actions == [UndoPartition(KEY)]
    core.tell(UndoFailed(KEY, "busy"))
    assert core.core.next_deadline_ms() == core.now_ms + 2 * UNDO_PAUSE_MS
    assert [type(report) for report in core.undo(KEY).reports] == [Ended]


# --- stopping ---


def test_a_stop_of_a_running_process_gives_it_its_grace(core: CoreHarness) -> None:
    core.run(START)
    told = core.order(Stop(key=KEY, grace_ms=500, reason="preempted"))
    assert told.others == [StopProcess(KEY, 500)]
    core.tell(ProcessExited(KEY, signal=15))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.detail, ended.signal) == ("stopped", "preempted", 15)


def test_a_second_stop_only_shortens_the_grace(core: CoreHarness) -> None:
    core.run(START)
    core.order(Stop(key=KEY, grace_ms=500, reason="preempted"))
    assert core.order(Stop(key=KEY, grace_ms=900, reason="cancelled")).others == []
    assert core.order(Stop(key=KEY, grace_ms=0, reason="cancelled")).others == [StopProcess(KEY, 0)]
    core.tell(ProcessExited(KEY, signal=9))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert ended.detail == "preempted"


def test_a_stop_while_the_partition_is_made_undoes_it_and_starts_nothing(core: CoreHarness) -> None:
    core.order(START)
    assert core.order(Stop(key=KEY)).others == []
    assert core.tell(PartitionReady(KEY)).actions == [UndoPartition(KEY)]
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert ended.outcome == "stopped"


def test_a_stop_between_the_start_and_its_answer_reaches_the_process(core: CoreHarness) -> None:
    """A launcher that has not answered yet could not tell whom to stop."""
    core.order(START)
    core.tell(PartitionReady(KEY))
    assert core.order(Stop(key=KEY, grace_ms=70)).others == []
    assert core.tell(ProcessStarted(KEY, 100, 5_000)).actions == [StopProcess(KEY, 70)]


def test_a_stop_of_an_unknown_key_is_a_tombstone(core: CoreHarness) -> None:
    told = core.order(Stop(key=KEY))
    assert told.reports == [Ended(key=KEY, outcome="stopped", at_ms=core.wall_ms, detail="cancelled")]
    assert core.order(START).others == []
    assert core.state(KEY) == "closed"


def test_the_time_limit_counts_from_the_start_of_the_process(core: CoreHarness) -> None:
    start = start_order(1, "true", time_limit_ms=60_000, stop_grace_ms=3_000)
    core.order(start)
    core.tell(PartitionReady(KEY))
    core.tell(ProcessStarted(KEY, 100, core.wall_ms - 10_000))
    assert core.core.next_deadline_ms() == core.now_ms + 50_000
    core.now_ms += 49_999
    assert core.tell(TimePassed()).actions == []
    core.now_ms += 1
    assert core.tell(TimePassed()).actions == [StopProcess(KEY, 3_000)]
    core.tell(ProcessExited(KEY, signal=15))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code, ended.detail) == ("stopped", "TimeLimit", "reached its time limit of 1m")


# --- gangs and ports ---


def test_a_member_of_a_gang_waits_for_the_word_to_go(core: CoreHarness) -> None:
    assert core.order(GANG).others == [prepare(GANG), HoldPort(GANG.key, 29_500)]
    assert core.tell(PartitionReady(GANG.key)).reports == []
    assert core.tell(PortFree(GANG.key, 29_500)).reports == [Prepared(key=GANG.key, port=29_500)]
    assert core.order(GO).others == [StartProcess(GANG.key, GANG.launch, GO, 29_500)]
    assert core.order(GO).others == []


def test_a_port_that_somebody_else_has_is_passed_over(core: CoreHarness) -> None:
    core.order(GANG)
    told = core.tell(PortTaken(GANG.key, 29_500))
    assert told.actions == [HoldPort(GANG.key, 29_501)]
    assert told.turn.must_commit
    core.tell(PortFree(GANG.key, 29_501))
    assert core.tell(PartitionReady(GANG.key)).reports == [Prepared(key=GANG.key, port=29_501)]


def test_no_two_assignments_hold_one_port(core: CoreHarness) -> None:
    services = [start_order(job, "true", service="chat") for job in range(1, 502)]
    told = core.order(*services)
    ports = [action.port for action in told.others if isinstance(action, HoldPort)]
    assert sorted(ports) == list(range(29_500, 30_000))
    core.tell(PartitionReady(services[-1].key))
    (ended,) = core.undo(services[-1].key).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code) == ("refused", "NoFreePort")


def test_a_service_is_started_with_its_port_and_says_it(core: CoreHarness) -> None:
    service = start_order(1, "true", service="chat")
    core.order(service)
    core.tell(PortFree(KEY, 29_500))
    assert core.tell(PartitionReady(KEY)).actions == [StartProcess(KEY, service.launch, None, 29_500)]
    assert core.tell(ProcessStarted(KEY, 1, 2)).reports == [Started(key=KEY, at_ms=2, pid=1, port=29_500)]


def test_a_member_of_a_gang_does_not_wait_for_ever(core: CoreHarness) -> None:
    core.order(GANG)
    core.tell(PartitionReady(GANG.key), PortFree(GANG.key, 29_500))
    core.now_ms += HOLD_MS_MAX
    assert core.tell(TimePassed()).actions == [UndoPartition(GANG.key)]
    (ended,) = core.undo(GANG.key).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code) == ("stopped", "HoldExpired")
    assert core.order(GO).others == []


def test_a_stop_of_a_waiting_member_frees_it_at_once(core: CoreHarness) -> None:
    core.order(GANG)
    core.tell(PartitionReady(GANG.key), PortFree(GANG.key, 29_500))
    assert core.order(Stop(key=GANG.key, reason="prepare-timeout")).others == [UndoPartition(GANG.key)]


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


# --- restarts ---


def test_a_process_that_outlived_the_agent_is_taken_over(core: CoreHarness) -> None:
    core.run(START, pid=100)
    told = core.restart(found=[ProcessFound(KEY, 100, core.wall_ms)])
    assert (told.actions, told.reports) == ([], [])
    assert core.state(KEY) == "running"
    core.tell(PartitionReady(KEY), ProcessExited(KEY, exit_code=4))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert ended.exit_code == 4


def test_an_intent_that_the_launcher_does_not_know_is_started_now(core: CoreHarness) -> None:
    """Killed between the intent and the start: the launcher remembers every start, so this one was not made."""
    core.order(START)
    core.tell(PartitionReady(KEY))
    assert core.restart().actions == []
    assert core.tell(PartitionReady(KEY)).actions == [StartProcess(KEY, START.launch, None, 0)]


def test_an_intent_that_the_launcher_knows_is_reported_as_started(core: CoreHarness) -> None:
    """Killed between the start and the record of it."""
    core.order(START)
    core.tell(PartitionReady(KEY))
    told = core.restart(found=[ProcessFound(KEY, 100, 5_000)])
    assert told.reports == [Started(key=KEY, at_ms=5_000, pid=100)]
    assert core.tell(PartitionReady(KEY)).actions == []


def test_what_ended_while_the_agent_was_away_is_reported_with_its_status(core: CoreHarness) -> None:
    core.run(START, pid=100)
    told = core.restart(found=[ProcessFound(KEY, 100, core.wall_ms, has_ended=True)])
    assert told.actions == []
    core.tell(PartitionReady(KEY), ProcessExited(KEY, exit_code=2, at_ms=77))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.exit_code, ended.at_ms) == ("exited", 2, 77)


def test_after_a_restart_of_the_node_everything_is_lost_and_nothing_starts(core: CoreHarness) -> None:
    core.run(START)
    core.order(start_order(5, "true"))
    core.order(GANG)
    told = core.restart(boot_id="boot-2")
    assert all(isinstance(action, UndoPartition) for action in told.actions)
    for key in list(core.core.live):
        (ended,) = core.undo(key).reports
        assert isinstance(ended, Ended)
        assert (ended.outcome, ended.code) == ("lost", "NodeRestarted")
    assert core.core.live == {}


def test_a_running_process_that_the_launcher_does_not_know_is_lost(core: CoreHarness) -> None:
    core.run(START)
    assert core.restart().actions == [UndoPartition(KEY)]
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code) == ("lost", "SupervisorLost")


def test_a_stop_under_way_goes_on_after_a_restart_with_the_rest_of_its_grace(core: CoreHarness) -> None:
    core.run(START)
    core.order(Stop(key=KEY, grace_ms=5_000))
    core.now_ms += 2_000
    told = core.restart(found=[ProcessFound(KEY, 100, 1)])
    assert told.actions == [StopProcess(KEY, 3_000)]


def test_a_waiting_member_of_a_gang_waits_on_after_a_restart(core: CoreHarness) -> None:
    core.order(GANG)
    core.tell(PartitionReady(GANG.key), PortFree(GANG.key, 29_500))
    assert core.restart().actions == []
    core.tell(PartitionReady(GANG.key))
    assert core.state(GANG.key) == "prepared"
    assert core.order(GO).others == [StartProcess(GANG.key, GANG.launch, GO, 29_500)]


def test_a_word_to_go_survives_a_restart(core: CoreHarness) -> None:
    core.order(GANG)
    core.tell(PartitionReady(GANG.key), PortFree(GANG.key, 29_500))
    core.order(GO)
    core.restart()
    assert core.tell(PartitionReady(GANG.key)).actions == [StartProcess(GANG.key, GANG.launch, GO, 29_500)]


def test_a_running_process_whose_cards_cannot_be_taken_over_is_stopped(core: CoreHarness) -> None:
    core.run(START)
    core.restart(found=[ProcessFound(KEY, 100, 1)])
    told = core.tell(PartitionFailed(KEY, "PartitionUnavailable", "no such card"))
    assert told.actions == [StopProcess(KEY, 30_000)]
    core.tell(ProcessExited(KEY, signal=15))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code) == ("lost", "PartitionLost")


def test_processes_that_the_ledger_does_not_hold_are_ended_and_forgotten(core: CoreHarness) -> None:
    told = core.restart(found=[ProcessFound(KEY, 100, 1), ProcessFound(GANG.key, 101, 1, has_ended=True)])
    assert told.actions == [StopProcess(KEY, 0), ForgetProcess(GANG.key)]
    assert core.tell(ProcessExited(KEY, signal=9)).actions == [ForgetProcess(KEY)]


def test_a_start_cut_off_with_the_launcher_is_asked_again(core: CoreHarness) -> None:
    core.order(START)
    core.tell(PartitionReady(KEY))
    told = core.tell(ProcessesListed(()))
    assert told.actions == [StartProcess(KEY, START.launch, None, 0)]


def test_a_time_limit_survives_a_restart(core: CoreHarness) -> None:
    start = start_order(1, "true", time_limit_ms=60_000)
    core.run(start)
    deadline = core.core.next_deadline_ms()
    core.now_ms += 1_000
    core.restart(found=[ProcessFound(KEY, 100, 1)])
    assert core.core.next_deadline_ms() == deadline


# --- what the daemon is told of the node ---


def test_the_inventory_is_told_at_the_start_and_when_it_changed(core: CoreHarness) -> None:
    first = Inventory(hostname="a", address="b", cpu_milli=1000, memory_mib=1)
    core.order(START)
    assert core.tell(InventoryRead(first)).reports == [Joined(inventory=first, held=(KEY,))]
    core.tell(ReportsDelivered(1))
    assert core.tell(InventoryRead(first)).reports == []
    second = Inventory(hostname="a", address="b", cpu_milli=2000, memory_mib=1)
    assert core.tell(InventoryRead(second)).reports == [Joined(inventory=second, held=(KEY,))]


def test_a_card_that_comes_and_goes_while_the_bus_is_away_queues_one_report(core: CoreHarness) -> None:
    cards = [Inventory(hostname="a", address="b", cpu_milli=n, memory_mib=1) for n in range(4)]
    core.tell(InventoryRead(cards[0]))
    for inventory in cards[1:]:
        assert core.tell(InventoryRead(inventory)).reports == []
    assert core.tell(ReportsDelivered(1)).reports == [Joined(inventory=cards[3])]


# --- cards that break ---

CARD, OTHER = "GPU-1", "GPU-2"
ON_CARD = start_order(5, "true", partition=WholeCards((CARD,)))


def cards(*, broken: str = "") -> Inventory:
    devices = tuple(
        Device(
            uuid=uuid, index=index, model="H100", memory_mib=80_000, modes=("whole",), healthy=not fault, fault=fault
        )
        for index, (uuid, fault) in enumerate(((CARD, broken), (OTHER, "")))
    )
    return Inventory(hostname="a", address="b", cpu_milli=1000, memory_mib=1, devices=devices)


def test_a_card_that_breaks_is_told_before_the_ends_of_its_jobs(core: CoreHarness) -> None:
    core.tell(InventoryRead(cards()))  # not delivered yet: the fence does not wait for that
    neighbour = start_order(6, "true", partition=WholeCards((OTHER,)))
    core.run(ON_CARD)
    core.run(neighbour, pid=101)
    told = core.tell(CardBroke(CARD, "Xid 79"))
    assert told.reports == [Joined(inventory=cards(broken="Xid 79"), held=(ON_CARD.key, neighbour.key))]
    assert told.actions == [StopProcess(ON_CARD.key, 0)]
    core.tell(ProcessExited(ON_CARD.key, signal=9))
    (ended,) = core.undo(ON_CARD.key).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code, ended.detail) == ("lost", "DeviceFault", "Xid 79")
    assert core.state(neighbour.key) == "running"


def test_an_order_for_a_broken_card_is_lost_before_anything_is_made(core: CoreHarness) -> None:
    core.tell(InventoryRead(cards()), CardBroke(CARD, "Xid 79"))
    assert core.order(ON_CARD).others == [UndoPartition(ON_CARD.key)]
    (ended,) = core.undo(ON_CARD.key).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.code) == ("lost", "DeviceFault")


def test_a_partition_on_a_broken_card_need_not_be_undone(core: CoreHarness) -> None:
    core.tell(InventoryRead(cards()))
    for start in (ON_CARD, start_order(6, "true", partition=WholeCards((CARD,)))):
        core.run(start)
        core.tell(ProcessExited(start.key))
    core.tell(UndoFailed(ON_CARD.key, "it does not answer"))  # known to be stuck before the fault is known
    reports = core.tell(CardBroke(CARD, "lost")).reports
    assert [type(report) for report in reports] == [Joined, Ended]
    assert core.state(ON_CARD.key) == "closed"
    core.tell(UndoFailed(start.key, "it does not answer"))
    assert core.state(start.key) == "closed"


def test_a_broken_card_stays_broken_until_it_is_said_to_have_returned(core: CoreHarness) -> None:
    core.tell(InventoryRead(cards()), CardBroke(CARD, "Xid 79"))
    core.tell(ReportsDelivered(len(core.reports)))
    core.tell(ReportsDelivered(len(core.reports)))
    assert core.reports[-1] == Joined(inventory=cards(broken="Xid 79"))
    assert core.tell(InventoryRead(cards())).reports == []
    assert core.tell(CardReturned(CARD), InventoryRead(cards())).reports == [Joined(inventory=cards())]


def test_a_broken_instance_takes_only_its_own_job_with_it(core: CoreHarness) -> None:
    places = [MigInstance(CARD, "1g.10gb", start, 1, 9_856, 1) for start in (0, 1)]
    first, second = (start_order(5 + n, "true", partition=place) for n, place in enumerate(places))
    core.run(first)
    core.run(second, pid=101)
    told = core.tell(CardBroke(CARD, "Xid 94", frozenset({second.key})))
    assert told.actions == [StopProcess(second.key, 0)]
    assert core.state(first.key) == "running"


def test_what_the_shell_ends_says_why(core: CoreHarness) -> None:
    core.run(START)
    verdict = Verdict(outcome="signalled", code="OutOfPartitionMemory", detail="9 of 8 GiB")
    assert core.tell(MustEnd(KEY, verdict)).actions == [StopProcess(KEY, 0)]
    core.tell(ProcessExited(KEY, signal=9))
    (ended,) = core.undo(KEY).reports
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.signal, ended.code) == ("signalled", 9, "OutOfPartitionMemory")


def test_late_and_unknown_events_change_nothing(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY))
    late = [PartitionReady(KEY), ProcessStarted(KEY, 1, 2), ProcessRefused(KEY, "x", "y"), PortFree(KEY, 29_500)]
    for event in [*late, PartitionFailed(KEY, "x", "y"), ProcessExited(KEY, exit_code=9)]:
        assert core.tell(event).actions == []
    core.undo(KEY)
    for event in [*late, PartitionUndone(KEY), UndoFailed(KEY, "x"), PortTaken(KEY, 29_500)]:
        assert core.tell(event).actions == []


# --- whose fault a refusal is ---


@pytest.mark.parametrize(
    ("code", "is_nodes"),
    [
        ("AccountMissing", True),
        ("OutputUnavailable", True),
        ("LauncherFailed", True),
        ("WorkingDirectoryMissing", False),
        ("CommandNotFound", False),
        ("PermissionDenied", False),
        ("StartFailed", False),
    ],
)
def test_a_refusal_says_whether_the_node_is_to_blame(core: CoreHarness, code: str, is_nodes: bool) -> None:
    core.order(START)
    core.tell(PartitionReady(KEY), ProcessRefused(KEY, code, "in words"))
    (report,) = core.undo(KEY).reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.code, report.node_fault) == ("refused", code, is_nodes)


def test_what_the_job_does_itself_is_never_the_nodes_fault(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY, exit_code=1))
    (report,) = core.undo(KEY).reports
    assert isinstance(report, Ended)
    assert not report.node_fault
