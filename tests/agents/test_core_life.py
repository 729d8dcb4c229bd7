"""The agent's core, exactly: one replica from order to end. Which event brings about which actions and reports, and
nothing else."""

from __future__ import annotations

import pytest

from gpuyard_agent.core.actions import (
    ForgetProcess,
    HoldPort,
    StartProcess,
    StopProcess,
    UndoPartition,
)
from gpuyard_agent.core.events import (
    MustEnd,
    PartitionFailed,
    PartitionReady,
    PartitionUndone,
    PortFree,
    PortTaken,
    ProcessExited,
    ProcessRefused,
    ProcessStarted,
    TimePassed,
    UndoFailed,
)
from gpuyard_agent.core.life import HOLD_MS_MAX, UNDO_PAUSE_MS
from gpuyard_agent.core.model import Verdict
from gpuyard_protocol.nodes import (
    Ended,
    OrderAnswer,
    Prepared,
    Started,
    Stop,
)
from support.agent_core import GANG, GO, KEY, START, CoreHarness, prepare
from support.agents import start_order

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


# --- what ends it, and whose fault it is ---


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
