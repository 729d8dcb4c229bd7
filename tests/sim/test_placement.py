"""Filling and churning a small cluster: what fits, what the measures say, and what the core's scoring prefers."""

import pytest

from gpuyard_daemon.core.fragmentation import ONE, Demand, DemandMix, gap_values
from gpuyard_daemon.core.scoring import best_choice
from gpuyard_daemon.sim.churn import Churn
from gpuyard_daemon.sim.fill import arrivals, fill
from gpuyard_daemon.sim.openb import Ask, HostShape
from gpuyard_daemon.sim.placing import PLACEMENT_POLICIES, mix_of, placement_policy
from gpuyard_daemon.sim.typical import TypicalTasks

HOSTS = tuple([HostShape(f"host-{n}", 32_000, 131_072, 4, "T4" if n % 2 else "V100") for n in range(8)])
ASKS = (
    *[Ask(4000, 8192, 1, 1000, ())] * 40,
    *[Ask(2000, 4096, 1, 810, ())] * 20,
    *[Ask(2000, 4096, 1, 470, ("T4",))] * 20,
    *[Ask(16_000, 8192, 4, 1000, ())] * 4,
    *[Ask(6000, 4096, 0, 0, ())] * 10,
)


@pytest.mark.parametrize("policy", PLACEMENT_POLICIES)
def test_a_fill_never_holds_more_than_there_is_and_repeats_itself(policy):
    typical, mix = TypicalTasks(ASKS), mix_of(ASKS)
    results = [fill(HOSTS, ASKS, placement_policy(policy, typical, mix, 3), 3, typical=typical) for _ in range(2)]
    assert results[0].allocation == results[1].allocation
    assert list(results[0].allocation) == sorted(results[0].allocation)
    assert 50 < results[0].allocation[-1] <= 100
    assert 0 <= results[0].fragmentation <= 100 - results[0].allocation[-1] + 1e-9


def test_arrivals_ask_for_130_percent():
    demand = sum(ask.total_milli for ask in arrivals(ASKS, 32_000, seed=1))
    assert 1.3 * 32_000 <= demand <= max(1.3 * 32_000 + 4000, sum(ask.total_milli for ask in ASKS))


def test_churn_with_room_for_all_blocks_nobody():
    typical = TypicalTasks(ASKS)
    result = Churn(HOSTS, ASKS, placement_policy("gpuyard", typical, mix_of(ASKS), 0), 0.3, 5).run(typical)
    assert result.blocked_pct < 1.0
    assert result.moves_per_100 == 0


def test_everything_idle_is_unusable_for_work_without_gpus():
    mix = DemandMix([Demand(1000, 0, 0, (), 10)])
    assert mix.unusable("T4", 32_000, (1000, 400)) == 1400 * ONE


def test_a_gap_that_fits_is_not_unusable():
    mix = DemandMix([Demand(1000, 1, 500, (), 10)])
    assert mix.unusable("T4", 1000, (500, 499)) == 499 * ONE
    assert mix.unusable("T4", 999, (500, 499)) == 999 * ONE


def test_the_price_of_a_share_that_nothing_fits_beside_is_a_whole_card():
    prices, values = gap_values({810: 100, 470: 100})
    assert prices[810] == pytest.approx(ONE, rel=0.02)
    assert prices[470] == pytest.approx(ONE / 2, rel=0.02)
    assert values[19] == 0
    assert values[100] == pytest.approx(ONE, rel=0.02)


def test_a_share_goes_into_the_gap_it_completes():
    mix = DemandMix([Demand(1000, 1, 500, (), 50), Demand(1000, 1, 1000, (), 50)])
    assert best_choice(mix, "T4", 32_000, (1000, 500), 1000, 1, 500).cards == (1,)
    opened = best_choice(mix, "T4", 32_000, (1000, 1000), 1000, 1, 500)
    completed = best_choice(mix, "T4", 32_000, (1000, 500), 1000, 1, 500)
    assert completed.score < opened.score
