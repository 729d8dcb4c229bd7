"""What must not change when something else does: names, units, an idle node more, who asked first of equals."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.queueing import priority
from gpuyard_daemon.core.state.facts import JobPlaced
from gpuyard_daemon.core.state.inputs import JobSubmitted, PolicyChanged, ReleaseRequested
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness, job, node
from support.mixed_yard import POLICIES, MixedYard, spec_of, story

whole = st.lists(
    st.builds(
        lambda gpus, replicas, chosen: job(gpus=gpus, replicas=replicas, priority=chosen),
        st.sampled_from((1, 1, 2, 4)),
        st.sampled_from((1, 1, 1, 2, 3)),
        st.integers(-1, 1),
    ),
    min_size=1,
    max_size=8,
)


def submissions(specs: list[JobSpec], tenants: list[str]) -> list[JobSubmitted]:
    return [
        JobSubmitted(tenant=tenants[at % len(tenants)], user="alice", submission_id=f"m{at}", spec=spec)
        for at, spec in enumerate(specs)
    ]


def started(cards: list[int], asked: list[JobSpec]) -> tuple[set[int], int]:
    """Which of those who ask in one turn start in it, and who of them all goes first."""
    h = CoreHarness()
    h.join(*[node(f"n-{number}", count) for number, count in enumerate(cards, 1)])
    requests = submissions([msgspec.structs.replace(spec, allow_pending=True) for spec in asked], ["acme"])
    h.turn(*[msgspec.structs.replace(each, spec=msgspec.structs.replace(each.spec, hold=True)) for each in requests])
    jobs = h.core.cluster.jobs.values()
    first = min(jobs, key=lambda each: h.core.cluster.ranking.rank_of(each, h.now_ms)).id
    h.turn(*[ReleaseRequested(tenant="acme", user="alice", submission_id=f"r{each.id}", job=each.id) for each in jobs])
    return {fact.job for fact in h.new_facts(JobPlaced)}, first


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=3), whole)
def test_an_idle_node_more_does_not_keep_the_first_from_starting(cards: list[int], asked: list[JobSpec]) -> None:
    """Others it may: a gang that goes before them fits then, and did not before."""
    (before, first), (after, _) = started(cards, asked), started([*cards, 4], asked)
    assert first not in before or first in after
    assert not before or after


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=3), whole)
def test_an_idle_node_more_keeps_no_job_of_one_card_from_starting(cards: list[int], asked: list[JobSpec]) -> None:
    singles = [job(gpus=1, priority=spec.priority) for spec in asked]
    assert started(cards, singles)[0] <= started([*cards, 4], singles)[0]


SWAP = {"acme": "umbrella", "umbrella": "acme"}


def _renamed(plain: Any, names: dict[str, str]) -> Any:
    match plain:
        case dict():
            return {_renamed(key, names): _renamed(value, names) for key, value in plain.items()}
        case ["shifted", *tenants]:
            # It names them in the order of their names.
            return ["shifted", *[sorted(_renamed(each, names)) for each in tenants]]
        case list() | tuple():
            return [_renamed(each, names) for each in plain]
        case str():
            return names.get(plain, plain)
        case _:
            return plain


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_tenants_may_change_names(seed: int) -> None:
    """The same story under other names leads to the same decisions under those names."""
    told = []
    for names in ({}, SWAP):
        h = CoreHarness()
        h.join(node("n-1", 4), node("n-2", 4))
        for _, a, b in story(seed, 25):
            tenant = ("acme", "umbrella")[b % 2]
            h.submit(spec_of(a), tenant=names.get(tenant, tenant))
            h.settle(most_ms=(b % 7) * 60_000)
            for number in [each.id for each in h.core.cluster.jobs.values() if each.state == "starting"]:
                h.run(number)
        told.append([_renamed(msgspec.to_builtins(fact), names) for record in h.records for fact in record.facts])
    assert told[0] == told[1]


@settings(max_examples=100, deadline=None)
@given(st.integers(priority.LEVEL_UNIT, 2**55), st.integers(1, 8))
def test_sizes_in_other_units_keep_their_order(size: int, octaves: int) -> None:
    level = priority.natural_level(size)
    scaled = priority.natural_level(size << octaves)
    assert scaled == min(priority.LEVEL_MAX, level + priority.PER_OCTAVE * octaves)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 64), st.integers(1, 30))
def test_twice_the_cards_wait_half_as_long_at_most_for_a_lift(level: int, gpus: int, lifts: int) -> None:
    lifts = min(lifts, level + 1)
    one = priority.lift_after_ms(level, gpus * 1000, lifts)
    two = priority.lift_after_ms(level, gpus * 2000, lifts)
    assert two <= one
    assert 2 * two + lifts >= one or two >= priority.LIFT_MIN_MS * lifts


@settings(max_examples=40, deadline=None)
@given(st.permutations(["acme", "umbrella", "zed"]), st.sampled_from((1, 2)), st.integers(2, 9))
def test_it_does_not_matter_whose_equal_request_came_first(order: list[str], gpus: int, count: int) -> None:
    """Equal jobs of one turn get the same places, one after the other, whoever asks."""
    found = []
    for tenants in (["acme", "umbrella", "zed"], list(order)):
        h = CoreHarness()
        h.join(node("n-1", 4), node("n-2", 2), node("n-3", 8))
        h.turn(*submissions([job(gpus=gpus)] * count, tenants))
        found.append([fact.placements for fact in h.facts(JobPlaced)])
    assert found[0] == found[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 500), st.integers(1, 600))
def test_an_estimate_changes_nobody_elses_band(policy: int, seed: int, minutes: int) -> None:
    bands = []
    for estimate in (0, minutes * 60_000):
        yard = MixedYard(CoreHarness())
        yard.harness.turn(PolicyChanged(policy=POLICIES[policy]))
        mine = msgspec.structs.replace(job(gpus=1), estimate_ms=estimate)
        yard.harness.submit(mine, tenant="acme")
        for _, a, b in story(seed, 5):
            yard.harness.submit(spec_of(a), tenant=("umbrella", "zed")[b % 2])
        ranking = yard.harness.core.cluster.ranking
        bands.append(
            [ranking.band_of(each) for each in yard.harness.core.cluster.jobs.values() if each.tenant != "acme"]
        )
    assert bands[0] == bands[1]
