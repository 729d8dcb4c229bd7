"""A card in pieces is kept free for whoever needs it whole: when it is worth it, seldom, and no longer than that."""

from __future__ import annotations

from typing import Any

import msgspec

from gpuyard_daemon.core.preempting.draining import PATIENCE_MS, REST_MS
from gpuyard_daemon.core.state.facts import ClaimDropped
from gpuyard_daemon.core.state.model import Claim
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId
from gpuyard_protocol.resources import MigInstance, WholeCards, devices_of
from support.builders import CoreHarness, job, node

MINUTE = 60_000


def fixed(minutes: int = 0, **fields: Any) -> JobSpec:
    """A job that nobody may stop, and about how long it will run; 0: nobody knows."""
    spec = job(**fields)
    return msgspec.structs.replace(spec, preemption="never", estimate_ms=minutes * MINUTE)


def drains(h: CoreHarness) -> list[Claim]:
    return [claim for claim in h.core.cluster.claims if claim.kind == "drain"]


def in_pieces(*minutes: int, cards: int = 2) -> tuple[CoreHarness, list[JobId]]:
    """Cards with one instance of 3g each in their upper half, which ends after so many minutes."""
    h = CoreHarness()
    h.join(node("n-1", cards))
    found = []
    for each in minutes:
        number = h.submit(fixed(each, mig="4g.40gb"))
        h.run(number)
        small = h.submit(fixed(each, mig="2g.20gb"))
        h.run(small)
        found.append(small)
    for number in [number for number in h.core.cluster.jobs if number not in found]:
        h.ended(number)
    return h, found


def test_the_slices_beside_those_who_end_soonest_are_kept_for_a_whole_card() -> None:
    h, (longer, shorter) = in_pieces(9, 5)
    whole = h.submit(fixed(gpus=1))
    h.settle(most_ms=PATIENCE_MS // 2)
    assert drains(h) == []
    h.settle(most_ms=2 * PATIENCE_MS)
    (claim,) = drains(h)
    assert claim.job == whole
    assert isinstance(claim.placements[0].partition, WholeCards)
    assert devices_of(claim.placements[0].partition) == devices_of(h.partitions_of(shorter)[0])
    # Nothing new goes there, though there is room; the other card takes it.
    small = h.submit(fixed(mig="1g.10gb"))
    assert devices_of(h.partitions_of(small)[0]) == devices_of(h.partitions_of(longer)[0])
    h.ended(shorter)
    assert h.state(whole) == "starting"
    assert drains(h) == []


def test_only_the_slices_of_the_place_are_kept_for_an_instance() -> None:
    h = CoreHarness()
    h.join(node("n-1", 1))
    at = {}
    for number in h.submit_many([fixed(5, mig="2g.20gb")] * 3):
        h.run(number)
        (partition,) = h.partitions_of(number)
        assert isinstance(partition, MigInstance)
        at[partition.start] = number
    h.ended(at[2])
    wide = h.submit(fixed(mig="3g.40gb"))
    h.settle(most_ms=2 * PATIENCE_MS)
    (claim,) = drains(h)
    (place,) = [each.partition for each in claim.placements]
    assert claim.job == wide
    assert isinstance(place, MigInstance)
    # The upper half has a slice that nobody could use for compute: what is idle there costs the same, it comes second.
    assert (place.start, place.size) == (0, 4)
    beside, inside = h.submit_many([fixed(mig="1g.10gb")] * 2)
    assert h.states(beside, inside) == ["starting", "pending"]
    h.ended(at[0])
    assert h.state(wide) == "starting"


def test_a_place_that_nobody_has_in_pieces_is_not_kept() -> None:
    h = CoreHarness()
    h.join(node("n-1", 1))
    h.run(h.submit(fixed(5, mig="7g.80gb")))
    h.submit(fixed(gpus=1))
    h.settle(most_ms=3 * MINUTE)
    assert drains(h) == []


def test_no_card_is_kept_free_for_longer_than_it_is_worth() -> None:
    h, _ = in_pieces(6 * 60, 6 * 60, 6 * 60, cards=3)
    h.settle(most_ms=60 * MINUTE)
    h.submit(fixed(gpus=1))
    h.settle(most_ms=10 * MINUTE)
    assert drains(h) == []
    # Many who wait for the same are worth more.
    h.submit_many([fixed(gpus=1)] * 31)
    h.settle(most_ms=10 * MINUTE)
    assert drains(h) != []


def test_nothing_is_kept_for_who_waits_no_more() -> None:
    h, _ = in_pieces(9, 9)
    whole = h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    assert [claim.job for claim in drains(h)] == [whole]
    h.cancel(whole)
    assert drains(h) == []
    assert all(not space.claims for space in h.core.cluster.pool.spaces.values())


def test_one_card_in_a_hundred_at_once() -> None:
    h, _ = in_pieces(9, 9, 9, cards=3)
    h.submit_many([fixed(gpus=1)] * 3)
    h.settle(most_ms=3 * MINUTE)
    assert len(drains(h)) == 1


def test_a_card_rests_after_it_was_kept_free() -> None:
    h, _ = in_pieces(9, 9)
    first = h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    (kept,) = drains(h)
    h.cancel(first)
    second = h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    # The other card, which would have been free no sooner.
    (again,) = drains(h)
    assert devices_of(again.placements[0].partition) != devices_of(kept.placements[0].partition)
    h.cancel(second)
    h.submit(fixed(gpus=1))
    h.settle(most_ms=kept.since_ms + REST_MS - h.now_ms - 1)
    assert drains(h) == []


def test_a_place_is_given_up_when_those_on_it_outlive_what_was_known_of_them() -> None:
    h, numbers = in_pieces(5, 5)
    for number in numbers:
        assert h.core.cluster.jobs[number].spec.time_limit_ms == 0
    whole = h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    assert len(drains(h)) == 1
    h.settle(most_ms=5 * MINUTE)
    assert drains(h) == []
    assert h.facts(ClaimDropped)[0].why.code == "DrainTooDear"
    assert h.states(*numbers, whole) == ["running", "running", "pending"]
    assert h.state(h.submit(fixed(mig="4g.40gb"))) == "starting"


def test_nobody_is_waited_for_of_whom_nothing_is_known() -> None:
    h, _ = in_pieces(0, 0)
    h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    assert drains(h) == []


def test_who_goes_first_is_not_kept_from_slices_that_are_free() -> None:
    h, _ = in_pieces(9, 9)
    whole = h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    assert [claim.job for claim in drains(h)] == [whole]
    while h.state(h.submit(fixed(9, mig="1g.10gb"))) == "starting":
        pass
    urgent = h.submit(msgspec.structs.replace(fixed(mig="1g.10gb"), priority=2))
    h.settle(most_ms=MINUTE)
    assert drains(h) == []
    assert h.state(urgent) == "starting"
    assert h.facts(ClaimDropped)[0].why.code == "DrainOvertaken"


def test_why_says_what_it_waits_for() -> None:
    h, _ = in_pieces(9, 9)
    whole = h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    answer = h.core.why(whole, h.now_ms)
    assert answer is not None
    assert "n-1" in answer.summary
    assert "kept" in answer.summary
    (view,) = h.core.node_views(None)
    assert [card.note for card in view.cards].count(f"kept free for job {whole} while those on it run out") == 1
    (other,) = h.core.node_views("umbrella")
    assert all(str(whole) not in card.note for card in other.cards)


def test_a_restored_core_keeps_the_same_cards_free() -> None:
    h, (small, _) = in_pieces(9, 9)
    h.submit(fixed(gpus=1))
    h.settle(most_ms=2 * PATIENCE_MS)
    h.restart()
    assert len(drains(h)) == 1
    assert h.core.cluster.nodes["n-1"].pasts[devices_of(h.partitions_of(small)[0])[0]].drained_ms
