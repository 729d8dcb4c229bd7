"""Taking back what others borrowed, played to its end in every order: it ends, and everybody has what is its own.

Queues of one yard, all cards held by somebody, and each wants more than it has. As long as the rule lets anybody take a
card from anybody, some such move is made, whichever hypothesis likes best.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.preempting.reclaim import Reclaim
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy
from gpuyard_daemon.core.tenants.quota import Amounts, QuotaTree

CARD: Amounts = {("H100", "whole"): 1000}


@settings(max_examples=120, deadline=None)
@given(
    nominal=st.lists(st.integers(0, 4), min_size=2, max_size=4),
    weights=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    first=st.lists(st.integers(0, 3), min_size=10, max_size=10),
    wishes=st.lists(st.integers(0, 10), min_size=4, max_size=4),
    choices=st.lists(st.integers(0, 1000), max_size=200),
)
def test_it_ends_and_everybody_has_what_is_its_own(
    nominal: list[int], weights: list[int], first: list[int], wishes: list[int], choices: list[int]
) -> None:
    names = [f"q{number}" for number in range(len(nominal))]
    queues = tuple(
        QueuePolicy(name, weight=weights[at], grants=(Grant(nominal_milli=1000 * nominal[at]),))
        for at, name in enumerate(names)
    )
    cards = max(1, sum(nominal))
    tree = QuotaTree()
    tree.set_policy(Policy(queues=queues), {"H100": 1000 * cards})
    held = dict.fromkeys(names, 0)
    for at in range(cards):
        holder = names[first[at % len(first)] % len(names)]
        held[holder] += 1
        tree.take(holder, CARD)
    wanted = {name: max(held[name], wishes[at]) for at, name in enumerate(names)}
    turns = iter(choices)
    for move in range(20 * cards + 100):
        moves = [
            (taker, giver)
            for taker in names
            for giver in names
            if taker != giver and held[giver] and held[taker] < wanted[taker]
            if Reclaim(tree, taker, CARD).may_take(giver, CARD)
        ]
        if not moves:
            break
        taker, giver = moves[next(turns, move) % len(moves)]
        assert held[giver] > nominal[names.index(giver)], "nobody loses what is its own"
        tree.give(giver, CARD)
        tree.take(taker, CARD)
        held[giver], held[taker] = held[giver] - 1, held[taker] + 1
    else:
        raise AssertionError(f"they take from each other for ever: {held}")
    for at, name in enumerate(names):
        assert held[name] >= min(nominal[at], wanted[name]), f"{name} was refused what is its own: {held}"
