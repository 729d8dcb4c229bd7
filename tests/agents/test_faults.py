"""When a card that failed is fenced, told, probed and given back."""

from __future__ import annotations

from gpuyard_agent.devices.base import DeviceFault
from gpuyard_agent.devices.faults import QUARANTINE_S_MAX, FaultBook

CARD = "GPU-1"


def fault(detail: str = "Xid 79", mig_uuid: str = "") -> DeviceFault:
    return DeviceFault(device=CARD, kind="xid", detail=detail, mig_uuid=mig_uuid)


def test_a_fault_is_news_once_and_the_card_is_due_after_a_pause() -> None:
    book = FaultBook(quarantine_s=30, probe_s=10)
    assert book.report(fault(), 0)
    assert not book.report(fault("Xid 48"), 1)
    assert book.fault(CARD) == "Xid 48"
    assert book.due(9) == ()
    assert book.due(10) == (CARD,)
    assert book.due(11) == ()
    assert book.due(20) == (CARD,)


def test_it_returns_when_it_was_quiet_and_well_for_long_enough() -> None:
    book = FaultBook(quarantine_s=30, probe_s=10)
    book.report(fault(), 0)
    assert not book.probed(CARD, "", 20)
    assert not book.probed(CARD, "needs a reset", 25)
    assert book.fault(CARD) == "needs a reset"
    assert not book.probed(CARD, "", 40), "the quarantine counts from the end of the trouble"
    assert book.probed(CARD, "", 55)
    assert book.fault(CARD) == ""
    assert not book.probed(CARD, "", 60), "once"


def test_each_further_fault_doubles_the_quarantine_up_to_an_hour_and_a_quiet_day_forgets() -> None:
    book = FaultBook(quarantine_s=30, probe_s=10)
    now, lengths = 0.0, []
    for _ in range(10):
        assert book.report(fault(), now)
        began = now
        while not book.probed(CARD, "", now):
            now += 10
        lengths.append(now - began)
        now += 100
    assert lengths == [min(QUARANTINE_S_MAX, 30.0 * 2**n) for n in range(10)]
    now += 90_000
    book.report(fault(), now)
    assert book.probed(CARD, "", now + 30)


def test_events_of_one_moment_are_one_fault() -> None:
    book = FaultBook(quarantine_s=30, probe_s=10)
    for moment in (0, 1, 2, 3):
        book.report(fault(), moment)
    assert book.probed(CARD, "", 33)


def test_another_instance_of_a_fenced_card_is_news_of_its_own() -> None:
    book = FaultBook()
    assert book.report(fault(mig_uuid="MIG-a"), 0)
    assert not book.report(fault(mig_uuid="MIG-a"), 1)
    assert book.report(fault(mig_uuid="MIG-b"), 2)
    assert book.report(fault(), 3)
