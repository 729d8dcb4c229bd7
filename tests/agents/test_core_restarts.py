"""The agent's core after a restart of the agent or the node: what is taken over, started, ended, lost."""

from __future__ import annotations

from gpuyard_agent.core.actions import (
    Answer,
    ForgetProcess,
    StartProcess,
    StopProcess,
    UndoPartition,
)
from gpuyard_agent.core.events import (
    PartitionFailed,
    PartitionReady,
    PortFree,
    ProcessesListed,
    ProcessExited,
    ProcessFound,
    ReportsDelivered,
    TimePassed,
)
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    Started,
    Stop,
)
from support.agent_core import GANG, GO, KEY, START, CoreHarness
from support.agents import start_order


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


# --- without a daemon ---


def test_an_hour_without_a_daemon_stops_nothing_and_what_ended_in_it_is_told_once(core: CoreHarness) -> None:
    """With an agent that dies in the middle of it. One job ends each minute, half of them go on."""
    jobs = [start_order(number, "true") for number in range(1, 121)]
    pids = {start.key: 1_000 + start.key.job for start in jobs}
    for start in jobs:
        core.run(start, pids[start.key])
    core.tell(ReportsDelivered(len(core.reports)))
    delivered = len(core.reports)
    for minute in range(60):
        core.now_ms += 60_000
        assert not any(isinstance(action, StopProcess) for action in core.tell(TimePassed()).actions)
        core.tell(ProcessExited(jobs[minute].key, exit_code=0))
        core.undo(jobs[minute].key)
        if minute == 30:
            core.restart(found=[ProcessFound(key, pids[key], 1) for key in core.core.live])
    ends = [report.key for report in core.reports[delivered:] if isinstance(report, Ended)]
    assert ends == [start.key for start in jobs[:60]]
    # The daemon is back, and believes what it believed an hour ago.
    told = core.sync(*(Desired(start=start) for start in jobs))
    assert [type(action) for action in told.actions] == [Answer]
    assert [report for report in told.reports if isinstance(report, Ended)] == []
    assert set(core.core.live) == {start.key for start in jobs[60:]}
