"""The published runs' generator against numbers that are well known, and what is drawn from it."""

from __future__ import annotations

from collections import Counter

from gpuyard_daemon.sim.openb import Ask, HostShape
from gpuyard_daemon.sim.published_draws import Draws, published_run

HOSTS = tuple([HostShape(f"n{number}", 64_000, 262_144, 4, "T4") for number in range(20)])


def test_the_first_numbers_of_seed_one():
    draws = Draws(1)
    assert [draws.bits() for _ in range(3)] == [5577006791947779410, 8674665223082153551, 6129484611666145821]


def test_the_first_numbers_below_a_hundred():
    draws = Draws(1)
    assert [draws.below(100) for _ in range(10)] == [81, 87, 47, 59, 81, 18, 25, 40, 56, 0]


def test_what_is_shuffled_and_ranked_stays_complete():
    draws = Draws(7)
    asks = [Ask(cpu, 0, 0, 0, ()) for cpu in range(50)]
    assert sorted(draws.shuffled(asks)) == asks
    assert sorted(draws.ranks(50)) == list(range(50))


def test_pods_are_added_until_enough_is_asked_for():
    asks = [Ask(1000, 1024, 1, 250, ()), Ask(2000, 1024, 1, 1000, ())]
    order, hosts = published_run(asks, HOSTS, 42)
    assert sorted(hosts) == sorted(HOSTS)
    assert set(order[:2]) == set(asks)
    # 130 % of 80 cards; one more pod of those drawn was too much.
    assert 104_000 - 1000 < sum(ask.total_milli for ask in order) <= 104_000
    assert (order, hosts) == published_run(asks, HOSTS, 42)
    assert order != published_run(asks, HOSTS, 43)[0]


def test_pods_are_removed_where_too_much_is_asked_for():
    asks = [Ask(cpu, 1024, 1, 1000, ()) for cpu in range(200)]
    order, _ = published_run(asks, HOSTS, 42)
    assert len(order) == 104
    assert not Counter(order) - Counter(asks)
