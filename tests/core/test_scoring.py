"""The score of a node: what the mix could not use, what a share destroys, and which of equal nodes drains."""

from __future__ import annotations

import pytest

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Shape, carve_from
from gpuyard_daemon.core.placing.fragmentation import ONE, Demand, DemandMix, free_of, gap_values, usable_by
from gpuyard_daemon.core.placing.partitions import NO_ROOM, Card
from gpuyard_daemon.core.placing.scoring import choose
from gpuyard_daemon.core.state.model import Node
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import MigInstance, MpsShare, WholeCards
from support.builders import gpu, need, node


def space_of(inventory: Inventory, pool: Pool | None = None) -> NodeSpace:
    pool = pool or Pool()
    made = Node(inventory.hostname, len(pool.spaces) + 1, state="ready", inventory=inventory)
    space = pool.add(made)
    pool.refit(space, 0, 0)
    return space


def share(space: NodeSpace, card: int, milli: int, memory_mib: int, key: int = 1) -> None:
    partition = MpsShare(space.cards[card].device.uuid, milli, memory_mib)
    space.take(AssignmentKey(key, 1, card), partition, "acme", 1000, 1024)


def score_of(mix: DemandMix, space: NodeSpace, wish: Shape) -> int:
    choice = choose(mix, space, wish)
    assert choice is not None
    return choice.score


def shape(**fields: object) -> Shape:
    return Shape(need(**fields), 1, "acme", "alice")


def rooms(space: NodeSpace) -> list[int]:
    return [card.room for card in space.cards]


# --- what the mix could not use --------------------------------------------------------------------------------------


def test_everything_idle_is_unusable_for_work_without_gpus() -> None:
    space = space_of(node(gpus=2))
    share(space, 1, 600, 48_691)
    mix = DemandMix([Demand(need(), 10)])
    assert mix.unusable(32_000, 1 << 20, rooms(space)) == 1400 * ONE


def test_a_gap_that_fits_is_not_unusable_and_a_node_without_cpus_is() -> None:
    space = space_of(node(gpus=2))
    share(space, 0, 500, 40_576)
    share(space, 1, 501, 40_600)
    mix = DemandMix([Demand(need(share_milli=500, cpu_milli=1000), 10)])
    assert mix.unusable(1000, 1 << 20, rooms(space)) == 499 * ONE
    assert mix.unusable(999, 1 << 20, rooms(space)) == 999 * ONE
    assert mix.unusable(1000, 1023, rooms(space)) == 999 * ONE


def test_the_smaller_of_compute_and_memory_is_what_a_share_leaves() -> None:
    space = space_of(node(gpus=1))
    share(space, 0, 100, 73_036)
    assert free_of(space.cards[0].room) == 100
    assert usable_by(need(share_milli=101), space.cards[0].room) == 0
    assert usable_by(need(share_milli=500, share_memory_mib=8000), space.cards[0].room) == 100


def test_whole_cards_count_only_where_there_are_enough_of_them() -> None:
    space = space_of(node(gpus=3))
    mix = DemandMix([Demand(need(gpus=2), 1)])
    assert mix.unusable(8000, 1 << 20, rooms(space)) == 0
    space.take(AssignmentKey(1, 1, 0), WholeCards((space.cards[0].device.uuid,)), "acme", 0, 0)
    assert mix.unusable(8000, 1 << 20, rooms(space)) == 0
    space.take(AssignmentKey(2, 1, 0), WholeCards((space.cards[1].device.uuid,)), "acme", 0, 0)
    assert mix.unusable(8000, 1 << 20, rooms(space)) == 1000 * ONE


def test_mig_counts_the_instances_that_still_go_on_a_card() -> None:
    card = Card(gpu(0), 0)
    # 3g at 4: four slices are left at 0, which hold one more 3g and four 1g.
    card.take(AssignmentKey(1, 1, 0), MigInstance(card.device.uuid, "3g.40gb", 4, 4, 40_448, 3), "acme")
    assert free_of(card.room) == 500
    assert usable_by(need(mig="3g.40gb"), card.room) == 500
    assert usable_by(need(mig="1g.10gb"), card.room) == 500
    assert usable_by(need(mig="7g.80gb"), card.room) == 0
    card.take(AssignmentKey(2, 1, 0), MigInstance(card.device.uuid, "1g.10gb", 1, 1, 9_984, 1), "acme")
    # The largest hole is two slices now, at 2.
    assert usable_by(need(mig="3g.40gb"), card.room) == 0
    assert usable_by(need(mig="2g.20gb"), card.room) == 250


def test_a_card_that_is_taken_whole_or_broken_has_no_room() -> None:
    assert Card(gpu(0, healthy=False), 0).room == NO_ROOM
    card = Card(gpu(0), 0)
    card.take(AssignmentKey(1, 1, 0), WholeCards((card.device.uuid,)), "acme")
    assert card.room == NO_ROOM


def test_the_price_of_a_share_that_nothing_fits_beside_is_a_whole_card() -> None:
    prices, values = gap_values({810: 100, 470: 100})
    assert prices[810] == pytest.approx(ONE, rel=0.02)
    assert prices[470] == pytest.approx(ONE / 2, rel=0.02)
    assert values[19] == 0
    assert values[100] == pytest.approx(ONE, rel=0.02)


# --- which way, which node -------------------------------------------------------------------------------------------


def test_a_share_goes_into_the_gap_it_completes() -> None:
    mix = DemandMix([Demand(need(share_milli=500), 50), Demand(need(gpus=1), 50)])
    opened, completed = space_of(node(gpus=2)), space_of(node(gpus=2))
    share(completed, 1, 500, 40_576)
    half = shape(share_milli=500)
    chosen = choose(mix, completed, half)
    assert chosen is not None
    assert chosen.cards == (1,)
    assert chosen.score < score_of(mix, opened, half)


def test_work_without_gpus_leaves_the_cpus_that_cards_need() -> None:
    mix = DemandMix([Demand(need(gpus=1, cpu_milli=8000), 9), Demand(need(cpu_milli=8000), 1)])
    tight, roomy = space_of(node(gpus=1, cpu_milli=8000)), space_of(node(gpus=1, cpu_milli=16_000))
    assert score_of(mix, roomy, shape(cpu_milli=8000)) < score_of(mix, tight, shape(cpu_milli=8000))


def test_of_nodes_that_lose_alike_the_fuller_one_goes_first() -> None:
    mix = DemandMix([Demand(need(gpus=1), 1)])
    full, empty = space_of(node(gpus=8)), space_of(node(gpus=8))
    full.take(AssignmentKey(1, 1, 0), WholeCards((full.cards[0].device.uuid,)), "acme", 0, 0)
    assert score_of(mix, full, shape(gpus=1)) < score_of(mix, empty, shape(gpus=1))


def test_promising_more_compute_than_there_is_comes_last() -> None:
    mix = DemandMix([Demand(need(gpus=1), 1)])
    space = space_of(node(gpus=2))
    wish = shape(share_milli=800, share_memory_mib=1000, isolation="none")
    first = choose(mix, space, wish)
    assert first is not None
    space.take(AssignmentKey(1, 1, 0), carve_from(space, wish, first.cards), "acme", 0, 0)
    second = choose(mix, space, wish)
    assert second is not None
    assert second.cards != first.cards


def test_nothing_is_chosen_where_nothing_fits() -> None:
    mix = DemandMix([Demand(need(gpus=1), 1)])
    assert choose(mix, space_of(node(gpus=1)), shape(gpus=2)) is None


def test_equal_conditions_score_alike_whichever_cards_are_taken() -> None:
    mix = DemandMix([Demand(need(gpus=2), 3), Demand(need(share_milli=300), 5)])
    one, other = space_of(node("n-1", gpus=4)), space_of(node("n-2", gpus=4))
    share(one, 0, 300, 24_345)
    share(other, 3, 300, 24_345)
    assert one.condition == other.condition
    for wish in (shape(gpus=2), shape(share_milli=300), shape()):
        assert score_of(mix, one, wish) == score_of(mix, other, wish)


def test_a_slower_model_costs_what_is_lost_on_it() -> None:
    fast = space_of(node("n-1", devices=[gpu(0, node="n-1")]))
    slow = space_of(node("n-2", devices=[gpu(0, node="n-2", model="NVIDIA T4")]))
    alike = DemandMix([Demand(need(gpus=1), 1)])
    told = DemandMix([Demand(need(gpus=1), 1)], [("T4", 200)])
    assert score_of(alike, fast, shape(gpus=1)) == score_of(alike, slow, shape(gpus=1))
    assert score_of(told, fast, shape(gpus=1)) < score_of(told, slow, shape(gpus=1))
    assert told.slowness(slow.cards[0].kind) == 800
