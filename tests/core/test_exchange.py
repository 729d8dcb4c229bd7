"""The arithmetic of the exchange: who is large enough to go for whom, at what cost, and when it has run long enough."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.queueing.prediction import gittins_ranks
from gpuyard_daemon.core.queueing.priority import LEVEL_MAX, LEVEL_UNIT, PROBE_MS, level_begins, natural_level

sizes = st.integers(0, 1 << 50)


@pytest.mark.parametrize(
    ("size", "victim_level", "cost", "may"),
    [
        (0, 1, 0, True),
        (0, 0, 0, False),  # of one level: never
        (LEVEL_UNIT, 2, 0, True),
        (LEVEL_UNIT, 1, 0, False),
        (0, 1, LEVEL_UNIT, False),  # four times its cost makes the claimant as large
        (0, 6, LEVEL_UNIT, True),
        (LEVEL_UNIT << 4, 5, 0, False),
    ],
)
def test_a_victim_is_a_level_larger_even_with_four_times_its_cost(
    size: int, victim_level: int, cost: int, may: bool
) -> None:
    assert exchange.may_take(size, natural_level(size), victim_level, cost) is may


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, st.integers(0, LEVEL_MAX), st.integers(0, 20))
def test_what_costs_more_or_is_smaller_never_goes_more_easily(size: int, cost: int, victim: int, lifted: int) -> None:
    level = natural_level(size) - lifted
    if exchange.may_take(size, level, victim, cost):
        assert exchange.may_take(size, level, victim, cost // 2)
        assert exchange.may_take(size, level, victim + 1, cost)
        assert exchange.may_take(size, level - 1, victim, cost)
        assert victim > level, "a victim's key is larger"


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, sizes)
def test_two_that_wait_never_take_each_others_place_in_turns(one: int, other: int, cost: int) -> None:
    mine, theirs = natural_level(one), natural_level(other)
    assert not (exchange.may_take(one, mine, theirs, cost) and exchange.may_take(other, theirs, mine, cost))


def test_the_top_counts_as_just_above_the_smallest() -> None:
    assert exchange.may_take(LEVEL_UNIT << 10, -64, 0, 0, at_top=True)
    assert not exchange.may_take(LEVEL_UNIT << 10, -64, -1, 0, at_top=True)
    assert not exchange.may_take(0, -64, 3, LEVEL_UNIT << 10, at_top=True), "the cost counts at the top, too"


def test_a_new_size_stays_for_ten_restarts() -> None:
    assert exchange.least_run_ms(60_000, 0) == PROBE_MS
    assert exchange.least_run_ms(60_000, 1) == 600_000
    assert exchange.least_run_ms(1000, 3) == PROBE_MS


def test_ranks_stay_level_without_a_tail_and_grow_with_one() -> None:
    """Jobs that all end soon after a border are short before it; where many go on for long, age is size."""
    levels = LEVEL_MAX + 1
    entered, ended = [0] * levels, [0] * levels
    entered[0], ended[0] = 1000, 900
    for level in range(1, 9):
        entered[level] = 100
    ended[8] = 100
    ranks = gittins_ranks(entered, ended)
    assert len(ranks) == levels
    assert ranks[0] < level_begins(2), "most end at once"
    assert ranks[1] > ranks[0] * 4, "who outlives the first level goes on for long"
    assert ranks[7] < ranks[1], "and is near its end in the seventh"
    assert all(rank > 0 for rank in ranks)
