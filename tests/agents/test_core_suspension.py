"""The agent's core suspending and resuming, exactly: each step once, one answer each, and every way out of it."""

from __future__ import annotations

import pytest

from gpuyard_agent.core.actions import ForgetProcess, ResumeProcess, StopProcess, SuspendProcess, UndoPartition
from gpuyard_agent.core.events import (
    CardBroke,
    MustEnd,
    ProcessBroken,
    ProcessesListed,
    ProcessExited,
    ProcessFound,
    ProcessResumed,
    ProcessSuspended,
    ResumeRefused,
    SuspendRefused,
    TimePassed,
)
from gpuyard_agent.core.model import Verdict
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    Resume,
    Resumed,
    ResumeFailed,
    Stop,
    Suspend,
    Suspended,
    SuspendFailed,
)
from gpuyard_protocol.resources import MpsShare, Partition, TimeSliceShare, WholeCards
from support.agent_core import CoreHarness
from support.agents import start_order

CARD = "GPU-1"
START = start_order(
    1, "true", partition=WholeCards((CARD,)), suspendable=True, time_limit_ms=60_000, memory_limit_mib=4_096
)
KEY = START.key
PID = 100
AGAIN = SuspendProcess(KEY, 1, START.partition, PID, (101,), 30_000, 4_096)
DOWN = ProcessSuspended(KEY, (101,), 30_000, 7_000)
UP = ProcessResumed(KEY, 6_000)


def ask(step: int) -> SuspendProcess:
    return SuspendProcess(KEY, step, START.partition, PID, memory_limit_mib=4_096)


def back(step: int) -> ResumeProcess:
    return ResumeProcess(KEY, step, START.partition, START.launch, PID, (101,), 30_000)


def down(step: int) -> Suspend:
    return Suspend(key=KEY, step=step)


def up(step: int) -> Resume:
    return Resume(key=KEY, step=step)


@pytest.fixture
def core() -> CoreHarness:
    core = CoreHarness()
    core.run(START, PID)
    return core


@pytest.fixture
def suspended(core: CoreHarness) -> CoreHarness:
    core.order(down(1))
    core.tell(DOWN)
    return core


def test_it_goes_down_and_comes_back(core: CoreHarness) -> None:
    told = core.order(down(1))
    assert (told.others, told.reports, core.state(KEY)) == ([ask(1)], [], "suspending")
    assert KEY in told.turn.saved
    told = core.tell(DOWN)
    assert told.reports == [Suspended(key=KEY, step=1, at_ms=core.wall_ms, image_mib=30_000, took_ms=7_000)]
    assert (told.actions, core.state(KEY)) == ([], "suspended")
    told = core.order(up(2))
    assert (told.others, told.reports, core.state(KEY)) == ([back(2)], [], "resuming")
    told = core.tell(UP)
    assert told.reports == [Resumed(key=KEY, step=2, at_ms=core.wall_ms, took_ms=6_000)]
    assert core.state(KEY) == "running"
    assert core.core.live[KEY].image_mib == 0
    assert core.core.running == 1


def test_a_step_is_taken_once_and_an_older_one_never(core: CoreHarness) -> None:
    core.order(down(2))
    for late in (down(2), down(1), up(1)):
        assert core.order(late).others == []
    core.tell(DOWN)
    told = core.sync(Desired(start=START, standing=down(2)))
    assert (told.others, told.reports) == ([], [])
    assert core.state(KEY) == "suspended"


def test_a_sync_says_it_as_well_as_an_order(core: CoreHarness) -> None:
    assert core.sync(Desired(start=START, standing=down(1))).others == [ask(1)]
    core.tell(DOWN)
    assert core.sync(Desired(start=START, standing=up(2))).others == [back(2)]


def test_what_is_so_already_is_answered(core: CoreHarness) -> None:
    assert core.order(up(1)).reports == [Resumed(key=KEY, step=1, at_ms=core.wall_ms)]
    core.order(down(2))
    core.tell(DOWN)
    (report,) = core.order(down(3)).reports
    assert report == Suspended(key=KEY, step=3, at_ms=core.wall_ms, image_mib=30_000)


def test_a_change_of_mind_on_the_way_is_carried_out_afterwards(core: CoreHarness) -> None:
    core.order(down(1))
    assert core.order(up(2)).others == []
    told = core.tell(DOWN)
    assert [type(report) for report in told.reports] == [Suspended]
    assert told.reports[0].step == 1  # type: ignore[union-attr]
    assert told.others == [back(2)]
    assert core.order(down(3)).others == []
    told = core.tell(UP)
    assert [(type(report), report.step) for report in told.reports] == [(Resumed, 2)]  # type: ignore[union-attr]
    assert told.others == [ask(3)]


def test_a_mind_changed_twice_needs_one_way(core: CoreHarness) -> None:
    core.order(down(1))
    core.order(up(2))
    core.order(down(3))
    told = core.tell(DOWN)
    assert [report.step for report in told.reports] == [3]  # type: ignore[union-attr]
    assert told.others == []


def test_a_refusal_leaves_it_running_and_is_told_once(core: CoreHarness) -> None:
    core.order(down(1))
    told = core.tell(SuspendRefused(KEY, "NoHostMemory", "full"))
    assert told.reports == [SuspendFailed(key=KEY, step=1, at_ms=core.wall_ms, code="NoHostMemory", detail="full")]
    assert (told.others, core.state(KEY)) == ([], "running")
    assert core.tell(SuspendRefused(KEY, "NoHostMemory", "full")).reports == []
    assert core.order(down(2)).others == [ask(2)]


def test_a_resumption_that_is_refused_leaves_it_suspended(suspended: CoreHarness) -> None:
    suspended.order(up(2))
    told = suspended.tell(ResumeRefused(KEY, "PartitionUnavailable", "taken"))
    assert told.reports == [
        ResumeFailed(key=KEY, step=2, at_ms=suspended.wall_ms, code="PartitionUnavailable", detail="taken")
    ]
    assert suspended.state(KEY) == "suspended"
    assert suspended.order(up(3)).others == [back(3)]


@pytest.mark.parametrize(
    ("partition", "changes", "why"),
    [
        (WholeCards((CARD,)), {}, "did not ask"),
        (WholeCards((CARD, "GPU-2")), {"suspendable": True}, "one whole card"),
        (MpsShare(CARD, 300, 1_000), {"suspendable": True}, "one whole card"),
        (WholeCards((CARD,)), {"suspendable": True, "replicas": 2}, "member of a gang"),
    ],
)
def test_what_the_driver_cannot_is_refused_without_asking_it(
    partition: Partition, changes: dict[str, object], why: str
) -> None:
    core, start = CoreHarness(), start_order(1, "true", partition=partition, **changes)
    core.run(start, PID)
    told = core.order(down(1))
    (report,) = told.reports
    assert isinstance(report, SuspendFailed)
    assert (report.code, told.others, core.state(KEY)) == ("NotSuspendable", [], "running")
    assert why in report.detail


def test_turns_on_a_card_can_be_suspended() -> None:
    core, start = CoreHarness(), start_order(1, "x", partition=TimeSliceShare(CARD, 500, 1_000), suspendable=True)
    core.run(start, PID)
    assert core.order(down(1)).others == [SuspendProcess(KEY, 1, start.partition, PID)]


def test_what_does_not_run_yet_cannot_be_suspended() -> None:
    core = CoreHarness()
    told = core.order(START, down(1))
    (report,) = told.reports
    assert isinstance(report, SuspendFailed)
    assert report.code == "NotRunning"


def test_its_time_limit_stands_still(core: CoreHarness) -> None:
    core.now_ms += 10_000
    core.order(down(1))
    core.now_ms += 5_000
    core.tell(DOWN)
    core.now_ms += 3_600_000
    assert core.core.next_deadline_ms() is None
    assert core.tell(TimePassed()).others == []
    core.order(up(2))
    core.now_ms += 4_000
    core.tell(UP)
    assert core.core.next_deadline_ms() == core.now_ms + 45_000


def test_the_limit_strikes_after_a_refusal_that_took_too_long(core: CoreHarness) -> None:
    core.order(down(1))
    core.now_ms += 61_000
    assert core.tell(TimePassed()).others == []
    core.tell(SuspendRefused(KEY, "DriverRefused", "no"))
    assert core.tell(TimePassed()).others == [StopProcess(KEY, 30_000)]


# --- ends ---


def test_what_is_suspended_is_killed_at_once_by_a_stop(suspended: CoreHarness) -> None:
    told = suspended.order(Stop(key=KEY, grace_ms=30_000, reason="cancelled"))
    assert (told.others, suspended.state(KEY)) == ([StopProcess(KEY, 0)], "stopping")
    told = suspended.tell(ProcessExited(KEY, signal=9))
    assert told.others == [UndoPartition(KEY)]
    (report,) = suspended.undo(KEY).reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.detail) == ("stopped", "cancelled")


@pytest.mark.parametrize("is_coming_back", [False, True])
def test_a_stop_on_the_way_waits_for_the_way_as_long_as_its_grace(core: CoreHarness, is_coming_back: bool) -> None:
    core.order(down(1))
    if is_coming_back:
        core.tell(DOWN)
        core.order(up(2))
    assert core.order(Stop(key=KEY, grace_ms=5_000)).others == []
    assert core.core.next_deadline_ms() == core.now_ms + 5_000
    core.now_ms += 5_000
    assert core.tell(TimePassed()).others == [StopProcess(KEY, 0)]
    assert core.tell(DOWN, UP).others == []


def test_a_stop_on_the_way_kills_what_arrives_suspended(core: CoreHarness) -> None:
    core.order(down(1))
    core.order(Stop(key=KEY, grace_ms=5_000))
    told = core.tell(DOWN)
    assert (told.others, told.reports) == ([StopProcess(KEY, 0)], [])


@pytest.mark.parametrize("event", [SuspendRefused(KEY, "DriverRefused", "no"), UP])
def test_a_stop_on_the_way_gives_what_arrives_running_the_rest_of_its_grace(core: CoreHarness, event: object) -> None:
    core.order(down(1))
    if event is UP:
        core.tell(DOWN)
        core.order(up(2))
    core.order(Stop(key=KEY, grace_ms=5_000))
    core.now_ms += 2_000
    told = core.tell(event)  # type: ignore[arg-type]
    assert (told.others, told.reports) == ([StopProcess(KEY, 3_000)], [])


def test_a_kill_on_the_way_waits_for_nothing(core: CoreHarness) -> None:
    core.order(down(1))
    assert core.order(Stop(key=KEY, grace_ms=0)).others == [StopProcess(KEY, 0)]


def test_a_stop_forbids_every_later_step(suspended: CoreHarness) -> None:
    suspended.order(Stop(key=KEY))
    assert suspended.order(up(2)).others == []


def test_an_agent_that_starts_anew_takes_over_no_card_of_one_that_left_it_and_is_being_ended(
    core: CoreHarness,
) -> None:
    """Somebody else may hold that card by now."""
    assert core.core.live[KEY].is_on_cards
    core.order(down(1))
    assert core.core.live[KEY].is_on_cards, "as long as it may still be there"
    core.tell(DOWN)
    core.order(Stop(key=KEY))
    assert (core.state(KEY), core.core.live[KEY].is_on_cards) == ("stopping", False)


def test_one_that_is_back_on_its_card_is_taken_over_there(suspended: CoreHarness) -> None:
    suspended.order(up(2))
    assert not suspended.core.live[KEY].is_on_cards
    suspended.tell(UP)
    assert suspended.core.live[KEY].is_on_cards


@pytest.mark.parametrize("is_coming_back", [False, True])
def test_what_the_driver_broke_is_killed_and_lost(core: CoreHarness, is_coming_back: bool) -> None:
    core.order(down(1))
    if is_coming_back:
        core.tell(DOWN)
        core.order(up(2))
    assert core.tell(ProcessBroken(KEY, "no way back")).others == [StopProcess(KEY, 0)]
    core.tell(ProcessExited(KEY, signal=9))
    (report,) = core.undo(KEY).reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.code, report.detail) == ("lost", "SuspendBroken", "no way back")


def test_one_that_dies_while_suspended_ends_like_any_other(suspended: CoreHarness) -> None:
    assert suspended.tell(ProcessExited(KEY, signal=9)).others == [UndoPartition(KEY)]
    told = suspended.undo(KEY)
    (report,) = told.reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.signal) == ("signalled", 9)
    assert told.others == [ForgetProcess(KEY)]


def test_a_card_that_breaks_hits_whom_it_carries_alone(suspended: CoreHarness) -> None:
    assert suspended.tell(CardBroke(CARD, "Xid 79")).others == []
    assert suspended.state(KEY) == "suspended"
    suspended.order(up(2))
    assert suspended.tell(CardBroke(CARD, "Xid 79")).others == [StopProcess(KEY, 0)]


def test_a_watchdog_ends_it_on_the_way(core: CoreHarness) -> None:
    core.order(down(1))
    verdict = Verdict(outcome="lost", code="NeighbourFault")
    assert core.tell(MustEnd(KEY, verdict)).others == [StopProcess(KEY, 0)]


# --- over a restart of the agent ---


def test_a_restarted_agent_goes_on_where_it_was(core: CoreHarness) -> None:
    found = (ProcessFound(KEY, PID, core.wall_ms),)
    core.order(down(1))
    assert core.restart(found=found).others == [ask(1)]
    core.tell(DOWN)
    assert core.restart(found=found).others == [AGAIN]
    assert core.tell(DOWN).reports == []  # it was told before
    core.order(up(2))
    assert core.restart(found=found).others == [back(2)]
    (report,) = core.tell(UP).reports
    assert isinstance(report, Resumed)
    assert (report.step, core.state(KEY)) == (2, "running")
    assert core.order(down(1), up(2)).others == []


def test_what_is_suspended_is_halted_again_when_the_launcher_was_away(suspended: CoreHarness) -> None:
    assert suspended.tell(ProcessesListed((ProcessFound(KEY, PID, 1),))).others == [AGAIN]


def test_a_suspended_process_that_the_launcher_lost_is_lost(suspended: CoreHarness) -> None:
    assert suspended.tell(ProcessesListed(())).others == [UndoPartition(KEY)]
    (report,) = suspended.undo(KEY).reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.code) == ("lost", "SupervisorLost")


def test_a_restart_of_the_node_ends_it(suspended: CoreHarness) -> None:
    suspended.restart(boot_id="boot-2")
    (report,) = suspended.undo(KEY).reports
    assert isinstance(report, Ended)
    assert report.code == "NodeRestarted"
