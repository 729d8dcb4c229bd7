"""Leases in the agent's core, and in the records of the supervisor: what counts from when, and what is refused."""

from __future__ import annotations

import itertools

import pytest

from gpuyard_agent.core.actions import RenewLeases, StartProcess, UndoPartition
from gpuyard_agent.core.events import OrdersReceived, PartitionReady, ProcessExited, ProcessStarted, RenewalReceived
from gpuyard_agent.launch.leases import Lease, Leases
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, OrderBatch, Renew
from support.agent_core import INSTANCE, NODE, CoreHarness, Told
from support.agents import start_order

LEASE_MS = 60_000
START = start_order(1, "x", lease_ms=LEASE_MS)
KEY = START.key


@pytest.fixture
def core() -> CoreHarness:
    return CoreHarness()


def renew(core: CoreHarness, clock_ms: int, *, instance: str = INSTANCE, epoch: int = 7) -> Told:
    return core.tell(RenewalReceived(1, Renew(node=NODE, instance=instance, epoch=epoch, clock_ms=clock_ms)))


def renewals(told: Told) -> list[int]:
    return [action.renewed_ms for action in told.others if isinstance(action, RenewLeases)]


# --- the agent's core ---


def test_a_start_says_from_when_its_lease_counts(core: CoreHarness) -> None:
    renew(core, core.now_ms)
    heard_ms = core.now_ms
    core.now_ms += 5_000
    core.order(START)
    (start,) = core.tell(PartitionReady(KEY)).others
    assert start == StartProcess(KEY, START.launch, None, 0, heard_ms)


def test_a_batch_brings_its_own_renewal(core: CoreHarness) -> None:
    renew(core, core.now_ms)
    core.now_ms += LEASE_MS
    batch = OrderBatch(node=NODE, instance=INSTANCE, epoch=7, first=1, orders=(START,), clock_ms=core.now_ms - 1_000)
    core.tell(OrdersReceived(1, batch))
    (start,) = core.tell(PartitionReady(KEY)).others
    assert isinstance(start, StartProcess)
    assert start.renewed_ms == core.now_ms - 1_000


def test_old_orders_read_by_a_node_that_slept_start_nothing(core: CoreHarness) -> None:
    renew(core, core.now_ms)
    core.now_ms += LEASE_MS
    core.order(START, start_order(2, "x"))
    assert core.tell(PartitionReady(KEY)).others == [UndoPartition(KEY)]
    (report,) = core.undo(KEY).reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.code, report.node_fault) == ("refused", "LeaseExpired", True)
    (start,) = core.tell(PartitionReady(AssignmentKey(2, 1, 0))).others
    assert isinstance(start, StartProcess), "without a lease nothing runs out"


def test_the_launcher_is_told_now_and_then(core: CoreHarness) -> None:
    core.order(START)
    core.tell(PartitionReady(KEY))
    core.tell(ProcessStarted(KEY, 100, core.wall_ms))
    began_ms = core.now_ms
    told = []
    for _ in range(30):
        core.now_ms += 2_000
        told += renewals(renew(core, core.now_ms - 100))
    assert len(told) == 10
    assert told[0] - began_ms <= LEASE_MS // 10
    assert all(later - earlier <= LEASE_MS // 10 for earlier, later in itertools.pairwise(told))


def test_nobody_is_told_where_nothing_has_a_lease(core: CoreHarness) -> None:
    core.order(start_order(2, "x"))
    core.now_ms += 100_000
    assert renewals(renew(core, core.now_ms)) == []


def test_what_was_long_under_way_or_is_not_meant_for_us_renews_nothing(core: CoreHarness) -> None:
    core.order(START)
    core.tell(PartitionReady(KEY))
    core.now_ms += 20_000
    assert renewals(renew(core, core.now_ms - 100)) == [core.now_ms - 100]
    core.now_ms += 20_000
    assert renewals(renew(core, core.now_ms - 30_000)) == []
    told = renew(core, core.now_ms, instance="another")
    assert (renewals(told), told.answers[0].status) == ([], "wrong-instance")
    told = renew(core, core.now_ms, epoch=6)
    assert (renewals(told), told.answers[0].status) == ([], "stale")
    told = renew(core, core.now_ms + 1_000_000)
    assert renewals(told) == [core.now_ms], "no clock runs ahead of our own"
    assert told.answers[0].status == "ok"


def test_one_whose_lease_ran_out_is_lost(core: CoreHarness) -> None:
    core.run(START)
    core.tell(ProcessExited(KEY, signal=15, expired=True))
    (report,) = core.undo(KEY).reports
    assert isinstance(report, Ended)
    assert (report.outcome, report.code) == ("lost", "LeaseExpired")


# --- the table of leases ---


def test_leases_run_out_by_the_common_clock_each_once() -> None:
    leases, short, long = Leases(1_000), AssignmentKey(1, 1, 0), AssignmentKey(2, 1, 0)
    leases.hold(short, Lease(10_000, 5))
    leases.hold(long, Lease(20_000, 6))
    leases.hold(AssignmentKey(3, 1, 0), Lease(0, 0))
    assert leases.run_out(10_999) == ()
    assert leases.run_out(11_000) == ((short, 5),)
    assert leases.run_out(12_000) == ()
    assert leases.renew(15_000)
    assert not leases.renew(14_000)
    assert leases.run_out(34_999) == ()
    assert leases.is_over(short), "what is over stays over: it may run elsewhere"
    assert leases.waits
    assert leases.run_out(35_000) == ((long, 6),)
    assert not leases.waits
    leases.drop(long)
    leases.drop(short)
    assert len(leases) == 0
