"""Time limits of replicas that take turns: the time in which they were halted is not their own."""

from __future__ import annotations

from gpuyard_agent.core.actions import StopProcess
from gpuyard_agent.core.events import PartitionReady, ProcessFound, ProcessStarted, TimeHalted, TimePassed
from gpuyard_protocol.names import AssignmentKey
from support.agent_core import CoreHarness
from support.agents import start_order

KEY = AssignmentKey(1, 1, 0)


def running(core: CoreHarness, time_limit_ms: int) -> None:
    core.order(start_order(1, "true", time_limit_ms=time_limit_ms, stop_grace_ms=3_000))
    core.tell(PartitionReady(KEY))
    core.tell(ProcessStarted(KEY, 100, core.wall_ms))


def test_halted_time_moves_the_limit_and_is_counted_once() -> None:
    core = CoreHarness()
    running(core, 60_000)
    began = core.now_ms
    for total_ms in (5_000, 5_000, 4_000, 12_000):
        core.tell(TimeHalted(KEY, total_ms))
    assert core.core.next_deadline_ms() == began + 72_000
    core.now_ms = began + 60_000
    assert core.tell(TimePassed()).actions == []
    core.now_ms = began + 72_000
    assert core.tell(TimePassed()).actions == [StopProcess(KEY, 3_000)]


def test_what_has_no_limit_gets_none() -> None:
    core = CoreHarness()
    running(core, 0)
    core.tell(TimeHalted(KEY, 5_000))
    assert core.core.next_deadline_ms() is None
    core.tell(TimeHalted(AssignmentKey(9, 1, 0), 5_000))


def test_it_is_known_after_a_restart_of_the_agent() -> None:
    core = CoreHarness()
    running(core, 60_000)
    began = core.now_ms
    core.tell(TimeHalted(KEY, 5_000))
    core.restart(found=(ProcessFound(KEY, 100, core.wall_ms),))
    core.tell(TimeHalted(KEY, 5_000))
    assert core.core.next_deadline_ms() == began + 65_000
