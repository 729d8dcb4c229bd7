"""Cards go into MIG mode and out of it when work needs it: not for nothing, and not back and forth."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard_daemon.core.placing.switching import KEEPS_FACTOR
from gpuyard_daemon.core.state.facts import CardSettled, CardSwitched
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Mode, devices_of
from support.builders import CoreHarness, gpu, job, node

#: Ampere, whose cards are reset.
SWITCH_MS = 10_000
SECOND = 1_000


def slow_node(name: str = "n-1", cards: int = 1, modes: tuple[Mode, ...] = ("whole", "mig", "mps")) -> Inventory:
    devices = [
        msgspec.structs.replace(gpu(index, node=name, modes=modes), mig_switch_ms=SWITCH_MS) for index in range(cards)
    ]
    return node(name, devices=devices)


def yard(*cards: int) -> CoreHarness:
    h = CoreHarness()
    h.join(*[slow_node(f"n-{number}", count) for number, count in enumerate(cards, 1)])
    return h


def done(h: CoreHarness, **wants: Any) -> int:
    """A job that ran and has ended."""
    number = h.submit(job(**wants))
    h.run(number)
    h.ended(number)
    return number


def test_a_card_may_switch_when_it_has_not_done_so_lately() -> None:
    h = yard(1)
    done(h, gpus=1)
    assert h.facts(CardSwitched) == []
    done(h, mig="1g.10gb")
    (fact,) = h.facts(CardSwitched)
    assert (fact.in_mig, fact.until_ms) == (True, h.now_ms + KEEPS_FACTOR * SWITCH_MS)


def test_it_keeps_its_mode_for_ten_times_what_the_switch_took() -> None:
    h = yard(1)
    done(h, mig="1g.10gb")
    whole, small = h.submit(job(gpus=1)), h.submit(job(mig="2g.20gb"))
    assert h.states(whole, small) == ["pending", "starting"]
    h.run(small)
    h.ended(small)
    answer = h.core.why(whole, h.now_ms + 30 * SECOND)
    assert answer is not None
    assert [each.reason.code for each in answer.reasons] == ["ModeSwitchCoolDown"]
    assert [each.reason.code for each in answer.cards] == ["ModeSwitchCoolDown"]
    assert answer.estimate is not None
    assert answer.estimate.at_ms == h.now_ms + KEEPS_FACTOR * SWITCH_MS
    assert "the first for 1m10s" in answer.reasons[0].reason.text
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS - 1)
    assert h.state(whole) == "pending"
    h.settle(most_ms=1)
    assert h.state(whole) == "starting"
    assert [fact.in_mig for fact in h.facts(CardSwitched)] == [True, False]
    assert len(h.facts(CardSettled)) == 1


def test_the_other_way_round_too() -> None:
    h = yard(1)
    done(h, mig="1g.10gb")
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS)
    done(h, gpus=1)
    small, share = h.submit(job(mig="1g.10gb")), h.submit(job(share_milli=300))
    assert h.states(small, share) == ["pending", "starting"]
    h.run(share)
    h.ended(share)
    answer = h.core.why(small, h.now_ms)
    assert answer is not None
    assert [each.reason.code for each in answer.reasons] == ["ModeSwitchCoolDown"]
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS)
    assert h.state(small) == "starting"


def test_alternating_demand_does_not_make_a_card_flap() -> None:
    h = yard(1)
    for _ in range(60):
        for wants in ({"gpus": 1}, {"mig": "1g.10gb"}):
            number = h.submit(job(**wants))
            h.settle(most_ms=5 * SECOND)
            if h.state(number) == "starting":
                h.run(number)
                h.ended(number)
    switches = len(h.facts(CardSwitched))
    assert 1 <= switches <= 60 * 10 * SECOND // (KEEPS_FACTOR * SWITCH_MS) + 1


def test_of_equal_cards_one_is_taken_that_need_not_switch() -> None:
    h = yard(2)
    done(h, mig="1g.10gb")
    (switched,) = h.facts(CardSwitched)
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS)
    whole, small = h.submit(job(gpus=1)), h.submit(job(mig="1g.10gb"))
    assert devices_of(h.partitions_of(small)[0]) == (switched.card,)
    assert devices_of(h.partitions_of(whole)[0]) != (switched.card,)
    assert len(h.facts(CardSwitched)) == 1


def test_of_equal_nodes_too() -> None:
    h = yard(1, 1)
    done(h, mig="1g.10gb")
    (switched,) = h.facts(CardSwitched)
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS)
    whole = h.submit(job(gpus=1))
    assert h.nodes_of(whole) != [switched.node]
    h.ended(whole)
    small = h.submit(job(mig="1g.10gb"))
    assert h.nodes_of(small) == [switched.node]
    assert len(h.facts(CardSwitched)) == 1


def test_a_switch_is_made_rather_than_that_somebody_waits() -> None:
    h = yard(1)
    done(h, mig="1g.10gb")
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS)
    whole = h.submit(job(gpus=1))
    assert h.state(whole) == "starting"


@pytest.mark.parametrize(("modes", "wants"), [(("whole", "mps"), {"mig": "1g.10gb"}), (("mig",), {"gpus": 1})])
def test_a_card_that_its_agent_may_not_switch_is_never_asked_to(modes: tuple[Mode, ...], wants: dict[str, Any]) -> None:
    h = CoreHarness()
    h.join(slow_node(modes=modes))
    number = h.submit(job(allow_pending=True, **wants))
    h.settle(most_ms=3_600 * SECOND)
    assert h.state(number) == "pending"
    assert h.facts(CardSwitched) == []


def test_modelled_cards_switch_at_once() -> None:
    h = CoreHarness()
    h.join(node("n-1", 1))
    for _ in range(3):
        done(h, mig="1g.10gb")
        done(h, gpus=1)
    assert h.facts(CardSwitched) == []


def test_a_restored_core_remembers_and_switches_at_the_same_moment() -> None:
    h = yard(1)
    done(h, mig="1g.10gb")
    whole = h.submit(job(gpus=1))
    h.restart()
    h.settle(most_ms=KEEPS_FACTOR * SWITCH_MS - 1)
    assert h.state(whole) == "pending"
    h.restart()
    h.settle(most_ms=1)
    assert h.state(whole) == "starting"


def test_an_inventory_told_again_changes_nothing() -> None:
    h = yard(1)
    done(h, mig="1g.10gb")
    h.join(msgspec.structs.replace(slow_node(), cpu_milli=64_000))
    whole = h.submit(job(gpus=1))
    assert h.state(whole) == "pending"


def test_operators_see_which_cards_keep_their_mode() -> None:
    h = yard(2)
    done(h, mig="1g.10gb")
    (view,) = h.core.node_views(None)
    notes = [(card.note, card.keeps_mode_until_ms) for card in view.cards]
    assert sorted(notes) == [("", 0), ("in MIG mode, for now", h.now_ms + KEEPS_FACTOR * SWITCH_MS)]
