"""Turns on time-sliced cards: the decision alone, on a clock that the test turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_agent.partitions.turns import Party, Turns, TurnSettings
from gpuyard_protocol.names import AssignmentKey

SETTINGS = TurnSettings(quantum_ms=5_000, shortest_ms=1_000, idle_ms=2_000)


def key(job: int, replica: int = 0) -> AssignmentKey:
    return AssignmentKey(job, 1, replica)


def party(job: int) -> Party:
    return (job, 1)


def play(
    turns: Turns, until_ms: int, start_ms: int = 0, watch: Callable[[int, frozenset[Party]], None] | None = None
) -> Counter[Party]:
    """Let time pass as the shell would; how long each party ran."""
    had: Counter[Party] = Counter()
    now = start_ms
    while now < until_ms:
        decision = turns.decide(now)
        if watch is not None:
            watch(now, decision.running)
        following = min(until_ms, decision.next_ms if decision.next_ms is not None else until_ms)
        assert following > now, "time goes on"
        for one in decision.running:
            had[one] += following - now
        now = following
    return had


def with_parties(weights: dict[int, int], card: str = "GPU-a") -> Turns:
    turns = Turns(SETTINGS)
    for job, weight in weights.items():
        turns.join(key(job), card, weight, 0)
    return turns


def test_who_is_alone_is_never_halted() -> None:
    turns = with_parties({1: 300})
    assert turns.decide(0).running == {party(1)}
    assert turns.decide(0).next_ms is None
    assert not turns.is_contended
    turns.note(party(1), 0, works=False)
    assert turns.decide(600_000).running == {party(1)}


def test_exactly_one_has_the_card() -> None:
    turns = with_parties({1: 500, 2: 300, 3: 200})
    play(turns, 120_000, watch=lambda now, running: pytest.fail(f"{running} at {now}") if len(running) != 1 else None)


@pytest.mark.parametrize(
    "weights", [{1: 500, 2: 500}, {1: 700, 2: 300}, {1: 800, 2: 100, 3: 100}, {1: 333, 2: 250, 3: 417}]
)
def test_weights_hold_within_a_twentieth_over_a_minute(weights: dict[int, int]) -> None:
    had = play(with_parties(weights), 60_000)
    for job, weight in weights.items():
        assert abs(had[party(job)] / 60_000 - weight / sum(weights.values())) < 0.05


def test_small_weights_get_turns_that_are_long_enough_to_be_worth_it() -> None:
    turns = with_parties({1: 990, 2: 10})
    changes: list[tuple[int, frozenset[Party]]] = []
    play(turns, 600_000, watch=lambda now, running: changes.append((now, running)))
    starts = [now for now, running in changes if running == {party(2)}]
    assert starts
    had = play(with_parties({1: 990, 2: 10}), 600_000)
    assert 0.005 < had[party(2)] / 600_000 < 0.02


def test_who_ends_gives_its_turn_away_at_once() -> None:
    turns = with_parties({1: 500, 2: 500})
    assert turns.decide(0).running == {party(1)}
    turns.leave(key(1), 1_000)
    assert turns.decide(1_000).running == {party(2)}
    assert turns.decide(1_000).next_ms is None


def test_who_comes_to_a_card_that_one_has_had_alone_has_the_next_turn() -> None:
    turns = with_parties({1: 500})
    turns.decide(0)
    turns.join(key(2), "GPU-a", 500, 100_000)
    assert turns.decide(100_001).running == {party(2)}
    had = play(turns, 160_001, 100_001)
    assert abs(had[party(1)] - had[party(2)]) <= 5_000, "and what the first had alone is not held against it"


def test_who_does_nothing_rests_and_comes_back_when_it_works() -> None:
    turns = with_parties({1: 500, 2: 500})
    turns.decide(0)
    turns.note(party(1), 0, works=False)
    assert turns.decide(1_999).running == {party(1)}
    both = turns.decide(2_000).running
    assert both == {party(1), party(2)}, "who rests is not halted: it could not wake up"
    assert not play(turns, 60_000, 2_000).keys() ^ both
    turns.note(party(1), 60_000, works=True)
    had = play(turns, 120_000, 60_000)
    assert abs(had[party(1)] - 30_000) <= 5_000, "no claim for the time it slept"


def test_a_short_pause_is_no_rest() -> None:
    turns = with_parties({1: 500, 2: 500})
    turns.decide(0)
    turns.note(party(1), 0, works=False)
    turns.note(party(1), 1_500, works=True)
    turns.note(party(1), 1_750, works=False)
    assert turns.decide(2_100).running == {party(1)}


def test_a_gang_runs_as_a_whole_or_not_at_all() -> None:
    turns = Turns(SETTINGS)
    turns.join(key(1, 0), "GPU-a", 500, 0)
    turns.join(key(1, 1), "GPU-b", 500, 0)
    turns.join(key(2), "GPU-a", 500, 0)
    turns.join(key(3), "GPU-b", 500, 0)

    def watch(now: int, running: frozenset[Party]) -> None:
        assert running in ({party(1)}, {party(2), party(3)}), f"{running} at {now}"

    had = play(turns, 120_000, watch=watch)
    assert abs(had[party(1)] - 60_000) <= 5_000
    assert turns.members(party(1)) == (key(1, 0), key(1, 1))


def test_a_gang_is_not_starved_by_cards_whose_turns_end_apart() -> None:
    turns = Turns(SETTINGS)
    turns.join(key(2), "GPU-a", 700, 0)
    turns.join(key(3), "GPU-a", 300, 0)
    turns.join(key(4), "GPU-b", 500, 0)
    turns.join(key(5), "GPU-b", 500, 0)
    turns.decide(0)
    turns.join(key(1, 0), "GPU-a", 500, 3_000)
    turns.join(key(1, 1), "GPU-b", 500, 3_000)
    had = play(turns, 303_000, 3_000)
    assert had[party(1)] > 300_000 * 0.2


def test_cards_do_not_wait_for_each_other() -> None:
    turns = Turns(SETTINGS)
    for job, card in ((1, "GPU-a"), (2, "GPU-a"), (3, "GPU-b")):
        turns.join(key(job), card, 500, 0)
    had = play(turns, 60_000)
    assert had[party(3)] == 60_000


events = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "works", "idle", "pass"]),
        st.integers(1, 5),
        st.integers(0, 1),
        st.sampled_from(["GPU-a", "GPU-b", "GPU-c"]),
        st.integers(1, 1000),
        st.integers(0, 7_000),
    ),
    max_size=40,
)


@given(events)
def test_whatever_happens_no_card_has_two_and_none_is_left_free(
    history: list[tuple[str, int, int, str, int, int]],
) -> None:
    turns = Turns(SETTINGS)
    cards: dict[AssignmentKey, str] = {}
    now = 0
    resting_allowed: set[Party] = set()
    for what, job, replica, card, weight, pause in history:
        match what:
            case "join" if key(job, replica) not in cards:
                cards[key(job, replica)] = card
                turns.join(key(job, replica), card, weight, now)
            case "leave":
                cards.pop(key(job, replica), None)
                turns.leave(key(job, replica), now)
            case "works" | "idle":
                turns.note(party(job), now, works=what == "works")
                resting_allowed.add(party(job))
        now += pause
        decision = turns.decide(now)
        assert decision == turns.decide(now), "the same question has the same answer"
        assert decision.next_ms is None or decision.next_ms > now or resting_allowed
        users: dict[str, list[Party]] = {}
        for one, its in cards.items():
            users.setdefault(its, []).append((one.job, one.attempt))
        for its, everybody in users.items():
            running = {one for one in everybody if one in decision.running and one not in resting_allowed}
            assert len(running) <= 1, f"{running} on {its}"
        waiting = {one for everybody in users.values() for one in everybody} - decision.running
        for one in waiting:
            mine = {its for its, everybody in users.items() if one in everybody}
            assert any(set(users[its]) & decision.running for its in mine), f"{one} waits for nobody"
