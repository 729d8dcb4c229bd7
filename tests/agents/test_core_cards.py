"""The agent's core and its cards: what is told of them, and what becomes of jobs when one breaks."""

from __future__ import annotations

from gpuyard_agent.core.actions import (
    StopProcess,
    UndoPartition,
)
from gpuyard_agent.core.events import (
    CardBroke,
    CardReturned,
    InventoryRead,
    ProcessExited,
    ReportsDelivered,
    UndoFailed,
)
from gpuyard_protocol.nodes import (
    Ended,
    Inventory,
    Joined,
)
from gpuyard_protocol.resources import Device, MigInstance, WholeCards
from support.agent_core import KEY, START, CoreHarness
from support.agents import start_order

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
