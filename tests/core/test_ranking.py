"""Keys of jobs: levels by size, what lifts and sinks them, and the bound on the way to the top."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_daemon.core.queueing import priority
from gpuyard_daemon.core.queueing.fairness import HALF_LIFE_MS, OWED_PERIOD_MS
from gpuyard_daemon.core.queueing.fixedpoint import decayed, exp2_parts, log2_parts
from gpuyard_daemon.core.queueing.ranking import LIFT_GRID_MS, TOP_LEVEL, RankTerms
from gpuyard_daemon.core.state.facts import SizesLearnt, TenantsShifted
from gpuyard_daemon.core.state.inputs import ServiceApplied
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId
from gpuyard_protocol.nodes import Ended
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, job, need, node

HOUR = 3_600_000
sizes = st.integers(0, 1 << 50)
widths = st.integers(1, 64_000)


def yard(gpus: int = 8, nodes: int = 1) -> CoreHarness:
    harness = CoreHarness(restart_every=3)
    for number in range(1, nodes + 1):
        harness.join(node(f"n-{number}", gpus))
    return harness


def told(hours: float, **fields: int) -> JobSpec:
    return msgspec.structs.replace(job(**({"gpus": 1} | fields)), estimate_ms=int(hours * HOUR))


def terms(h: CoreHarness, number: JobId) -> RankTerms:
    return h.core.cluster.ranking.terms_of(h.core.cluster.jobs[number], h.now_ms)


def order(h: CoreHarness, running: JobId, *waiting: JobId) -> list[JobId]:
    """In which order jobs for the one place start, each ending at once."""
    found = []
    while len(found) < len(waiting):
        h.run(running)
        h.ended(running)
        (running,) = [number for number in waiting if h.state(number) == "starting"]
        found.append(running)
    return found


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_levels_are_half_octaves() -> None:
    unit = priority.LEVEL_UNIT
    found = [priority.natural_level(size) for size in (0, unit - 1, unit, unit * 7 // 5, unit * 3 // 2, 2 * unit)]
    assert found == [0, 0, 1, 1, 2, 3]
    for level in range(1, priority.LEVEL_MAX):
        begins = priority.level_begins(level)
        assert (priority.natural_level(begins - 1), priority.natural_level(begins)) == (level - 1, level)


@given(sizes, sizes, st.integers(0, 20))
def test_scaling_all_sizes_and_the_unit_keeps_the_order(one: int, other: int, octaves: int) -> None:
    """Metamorphic: levels move together, so that who goes first does not."""
    unit = priority.LEVEL_UNIT
    one, other = max(unit, one), max(unit, other)
    before = priority.natural_level(one) - priority.natural_level(other)
    after = priority.natural_level(one << octaves) - priority.natural_level(other << octaves)
    if priority.natural_level(max(one, other) << octaves) < priority.LEVEL_MAX:
        assert before == after


@given(sizes, widths)
def test_a_job_reaches_the_top_within_a_bound_of_its_own_size(size: int, width: int) -> None:
    level = priority.natural_level(size)
    after_ms = priority.top_after_ms(level, width)
    bound = 7 * priority.LIFT_FACTOR * size * 1000 // (4 * width) + priority.LIFT_MIN_MS * (level + 1)
    assert after_ms <= bound
    assert priority.lifts(level, width, after_ms) == (level + 1, True)
    assert not priority.lifts(level, width, after_ms - 1)[1]


@given(sizes, widths, st.integers(0, 1 << 50))
def test_lifts_and_their_moments_agree(size: int, width: int, waited_ms: int) -> None:
    level = priority.natural_level(size)
    lifted, at_top = priority.lifts(level, width, waited_ms)
    assert priority.lift_after_ms(level, width, lifted) <= waited_ms
    assert at_top or waited_ms < priority.lift_after_ms(level, width, lifted + 1)


@given(st.integers(1, 1 << 60))
def test_logarithms_come_back(value: int) -> None:
    found = exp2_parts(log2_parts(value))
    assert value * 99 // 100 - 2 <= found <= value


@given(st.integers(0, 1 << 60), st.integers(0, 40 * HALF_LIFE_MS), st.integers(0, 40 * HALF_LIFE_MS))
def test_decay_goes_on_where_it_stopped(value: int, first_ms: int, second_ms: int) -> None:
    at_once = decayed(value, first_ms + second_ms, HALF_LIFE_MS)
    in_turns = decayed(decayed(value, first_ms, HALF_LIFE_MS), second_ms, HALF_LIFE_MS)
    assert abs(at_once - in_turns) <= 2 + (value >> 24)
    assert decayed(value, HALF_LIFE_MS, HALF_LIFE_MS) == value // 2


@pytest.mark.parametrize(
    ("usage", "share", "shift"), [(1, 1, 0), (2, 1, 4), (1, 4, -8), (10**9, 1, 24), (1, 10**9, -24)]
)
def test_a_tenant_sinks_by_two_octaves_for_each_of_its_usage(usage: int, share: int, shift: int) -> None:
    assert priority.tenant_shift(usage, share, 0, 0) == shift
    assert priority.tenant_shift(usage, share, 0, shift) == shift


def test_a_shift_holds_until_it_is_three_quarters_off() -> None:
    assert priority.tenant_shift(113, 100, 0, 0) == 0
    assert priority.tenant_shift(120, 100, 0, 0) == 1


def test_what_lasts_is_added_to_a_shift_by_the_hour() -> None:
    assert priority.drift(2, 1, HOUR, 0) == priority.drift(2, 1, HOUR, 60_000) == 2000
    assert priority.drift(1, 4, HOUR // 2, 0) == -2000
    assert priority.drift(5, 5, HOUR, 0) == 0
    assert priority.drift(2, 1, HOUR, 600_000) == 200  # who follows it restarts for it
    assert priority.tenant_shift(1, 1, 6000, 0) == 6
    assert priority.tenant_shift(1, 4, 6000, 0) == -2


@pytest.mark.parametrize("shift", range(-priority.SHIFT_MAX, priority.SHIFT_MAX + 1))
def test_small_jobs_are_shifted_less_and_never_fall_behind_larger_ones_of_their_tenant(shift: int) -> None:
    levels = [priority.shifted(level, shift) for level in range(-8, priority.LEVEL_MAX + 1)]
    assert levels == sorted(levels)
    assert priority.shifted(0, shift) == 0
    assert priority.shifted(-3, shift) == -3
    assert priority.shifted(priority.SHIFT_MAX, shift) == priority.SHIFT_MAX + shift
    assert priority.shifted(priority.LEVEL_MAX, shift) == priority.LEVEL_MAX + shift


# --- order -----------------------------------------------------------------------------------------------------------


def test_small_goes_before_large_and_equals_as_they_came() -> None:
    h = yard(1)
    running = h.submit(told(1))
    large, small, middle, as_small = (h.submit(told(hours)) for hours in (100, 1, 10, 1))
    assert order(h, running, large, small, middle, as_small) == [small, as_small, middle, large]


def test_size_counts_cards_and_not_time_alone() -> None:
    h = yard(4)
    running = h.submit(told(1, gpus=4))
    wide, long = h.submit(told(2, gpus=4)), h.submit(told(4, gpus=1))
    h.run(running)
    h.ended(running)
    assert h.states(wide, long) == ["pending", "starting"]
    assert terms(h, wide).size_gpu_ms == 8 * HOUR


def test_a_class_goes_before_what_is_four_times_smaller_and_costs_double() -> None:
    h = yard(1)
    running = h.submit(told(1))
    small, urgent = h.submit(told(1)), h.submit(told(3.9, priority=1))
    far_smaller = h.submit(told(0.2))
    assert order(h, running, small, urgent, far_smaller) == [far_smaller, small, urgent]
    assert terms(h, urgent).level - terms(h, small).level <= 0
    rates = yard(2)
    rates.submit(job(gpus=1))
    rates.submit(job(gpus=1, priority=1), tenant="umbrella")
    assert rates.core.cluster.fairness.rates() == {"acme": 4000, "umbrella": 8000}


def test_a_job_of_unknown_length_probes_first_and_then_counts_by_what_it_had() -> None:
    h = yard(1)
    number = h.submit(job(gpus=1))
    h.run(number)
    assert (terms(h, number).size_from, terms(h, number).level) == ("probe", 0)
    h.now_ms += 119_000
    assert terms(h, number).level == 0
    h.now_ms += 3_600_000
    found = terms(h, number)
    assert (found.size_from, found.attained_gpu_ms) == ("attained", 3_719_000)
    assert found.level == priority.natural_level(3_719_000)


def test_an_expected_size_stands_still_until_it_is_clearly_wrong() -> None:
    h = yard(1)
    number = h.submit(told(1))
    h.run(number)
    before = terms(h, number)
    h.now_ms += HOUR * 5 // 4 - 1
    assert terms(h, number).level == before.level
    h.now_ms += 1
    assert terms(h, number).size_from == "attained"


def test_attempts_add_up_and_a_requeue_keeps_what_was_had() -> None:
    h = yard(1)
    number = h.submit(job(gpus=1))
    for _ in range(2):
        h.run(number)
        h.now_ms += HOUR
        (assignment,) = h.core.cluster.jobs[number].assignments
        h.report("n-1", Ended(key=assignment.key, outcome="lost", at_ms=0, code="NodeRestarted"))
        h.settle(most_ms=10_000)
    assert terms(h, number).attained_gpu_ms >= 2 * HOUR


def test_waiting_lifts_by_steps_up_to_the_top_and_time_alone_does_it() -> None:
    h = yard(1)
    running = h.submit(told(1000))
    waiting = h.submit(told(0.5))
    cluster = h.core.cluster
    level = terms(h, waiting).level
    assert level == terms(h, waiting).natural > 0
    h.settle(most_ms=priority.lift_after_ms(level, 1000, 1) + LIFT_GRID_MS)
    assert terms(h, waiting).level == level - 1
    h.settle(most_ms=priority.top_after_ms(level, 1000) + LIFT_GRID_MS)
    assert terms(h, waiting).at_top
    assert terms(h, waiting).level == TOP_LEVEL
    tiny = h.submit(told(0.001))
    assert cluster.ranking.rank_of(cluster.jobs[waiting], h.now_ms) < cluster.ranking.rank_of(
        cluster.jobs[tiny], h.now_ms
    )
    assert order(h, running, waiting, tiny) == [waiting, tiny]


def test_what_lifted_a_job_holds_while_it_runs_until_it_outgrew_its_size() -> None:
    h = yard(1)
    running = h.submit(told(1000))
    waiting = h.submit(told(0.5))
    h.settle(most_ms=priority.top_after_ms(terms(h, waiting).level, 1000) + LIFT_GRID_MS)
    h.run(running)
    h.ended(running)
    h.run(waiting)
    assert terms(h, waiting).at_top
    h.now_ms += HOUR
    assert not terms(h, waiting).at_top


def test_a_held_job_does_not_age() -> None:
    h = yard(1)
    h.submit(told(1000))
    waiting = h.submit(msgspec.structs.replace(told(0.5), hold=True))
    h.settle(most_ms=100 * HOUR)
    assert terms(h, waiting).aging == 0


def test_services_stand_before_all_batch_work_of_their_band_and_floors_before_everything() -> None:
    h = yard(8)
    spec = ServiceSpec(name="chat", argv=("/bin/serve",), need=need(gpus=1), min_replicas=1, max_replicas=2)
    h.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s-chat", spec=spec))
    number = next(iter(h.core.cluster.jobs))
    assert terms(h, number).band == 0
    assert (terms(h, number).size_from, terms(h, number).level) == ("service", 0)


# --- tenants ---------------------------------------------------------------------------------------------------------


def test_who_used_much_sinks_and_renaming_tenants_renames_that_only() -> None:
    found = []
    for heavy, light in (("acme", "umbrella"), ("umbrella", "acme")):
        h = yard(8)
        first = h.submit(msgspec.structs.replace(told(100, gpus=8), preemption="never"), tenant=heavy)
        h.run(first)
        h.now_ms += 20 * HOUR
        rest = [h.submit(told(2, gpus=8), tenant=tenant) for tenant in (heavy, light)]
        h.now_ms += 60_000
        h.ended(first)
        assert h.states(*rest) == ["pending", "starting"]
        shifts = {tenant: h.core.cluster.fairness.shift(tenant) for tenant in (heavy, light)}
        assert shifts[heavy] > 0 > shifts[light]
        found.append((shifts[heavy], shifts[light]))
        assert h.facts(TenantsShifted)
    assert found[0] == found[1]


def test_what_a_restart_takes_is_known_by_the_cards_that_are_held() -> None:
    h = yard(8)

    def restart_ms() -> int:
        return h.core.cluster.fairness.restart_ms

    assert restart_ms() == 0
    slow = h.submit(msgspec.structs.replace(told(1, gpus=6), restart_ms=400_000))
    h.run(slow)
    assert restart_ms() == 400_000
    h.run(h.submit(told(1, gpus=2), tenant="umbrella"))
    assert restart_ms() == 300_000
    h.restart()
    assert restart_ms() == 300_000
    h.ended(slow)
    assert restart_ms() == 0


def test_charges_lose_half_their_weight_in_a_day() -> None:
    h = yard(8)
    number = h.submit(job(gpus=8))
    h.run(number)
    h.now_ms += HOUR
    h.ended(number)
    fairness = h.core.cluster.fairness
    before = fairness.charged("acme", h.now_ms)
    assert 0 <= 8000 * 4 * HOUR - before <= before // 50
    assert abs(fairness.charged("acme", h.now_ms + HALF_LIFE_MS) * 2 - before) <= before // 50


def test_who_waits_under_its_share_is_owed_more_by_the_hour_and_half_of_it_is_forgotten_in_two_days() -> None:
    h = yard(8)
    first = h.submit(msgspec.structs.replace(told(100, gpus=8), preemption="never"), tenant="acme")
    h.run(first)
    waiting = h.submit(told(2, gpus=8), tenant="umbrella")
    found = []
    for _ in range(5):
        for _ in range(6):
            h.turn(after_ms=OWED_PERIOD_MS)
        fairness = h.core.cluster.fairness
        found.append((fairness.owed("acme", h.now_ms), -fairness.owed("umbrella", h.now_ms)))
    assert all(a < b for a, b in pairwise(found)), "both go on"
    assert found[0][0] > 0 < found[0][1]
    h.cancel(waiting)
    before = found[-1][0]
    h.turn(after_ms=2 * HALF_LIFE_MS)
    assert abs(2 * h.core.cluster.fairness.owed("acme", h.now_ms) - before) <= before // 10, "nobody waits any more"


def test_of_levels_that_a_shift_made_one_whoever_came_first_goes_first() -> None:
    h = yard(8)
    first = h.submit(msgspec.structs.replace(told(100, gpus=8), preemption="never"), tenant="acme")
    h.run(first)
    large, small = (h.submit(told(hours, gpus=8), tenant="umbrella") for hours in (0.3, 0.2))
    assert terms(h, large).natural == terms(h, small).natural + 1
    for _ in range(60):
        h.turn(after_ms=OWED_PERIOD_MS)
        if h.core.cluster.fairness.shift("umbrella") == -priority.SHIFT_MAX:
            break
    assert [terms(h, number).level for number in (large, small)] == [0, 0]
    h.ended(first)
    assert h.states(large, small) == ["starting", "pending"]


def test_shifts_are_looked_at_once_a_minute_and_leave_no_fact_where_nothing_moved() -> None:
    h = yard(8)
    h.submit(job(gpus=1))
    h.submit(job(gpus=1), tenant="umbrella")
    facts = len(h.facts(TenantsShifted))
    for _ in range(5):
        h.turn(after_ms=60_000)
    assert len(h.facts(TenantsShifted)) == facts


# --- learning --------------------------------------------------------------------------------------------------------


def test_like_jobs_teach_how_long_the_next_will_run() -> None:
    h = yard(1)
    for run in range(3):
        number = h.submit(job(gpus=1, name=f"train-{run}"))
        assert not h.core.cluster.jobs[number].expected_ms
        h.run(number)
        h.now_ms += HOUR
        h.ended(number)
    number = h.submit(job(gpus=1, name="train-99"))
    assert terms(h, number).size_from == "probe"
    h.run(number)
    h.now_ms += priority.PROBE_MS
    found = terms(h, number)
    assert found.size_from == "history"
    assert abs(found.size_gpu_ms - HOUR) < HOUR // 50
    stranger = h.submit(job(gpus=1, name="train-99"), user="bob")
    assert not h.core.cluster.jobs[stranger].expected_ms


def test_runs_that_are_all_different_teach_nothing() -> None:
    h = yard(1)
    for minutes in (1, 600, 3, 6000, 2):
        number = h.submit(job(gpus=1, name="x"))
        h.run(number)
        h.now_ms += minutes * 60_000
        h.ended(number)
    assert not h.core.cluster.jobs[h.submit(job(gpus=1, name="x"))].expected_ms


def test_an_estimate_is_taken_at_its_word_until_its_owner_has_been_far_off_often() -> None:
    h = yard(1)
    for _ in range(10):
        number = h.submit(told(10))
        assert h.core.cluster.jobs[number].expected_ms == 10 * HOUR
        h.run(number)
        h.now_ms += HOUR
        h.ended(number)
    expected = h.core.cluster.jobs[h.submit(told(10))].expected_ms
    assert abs(expected - HOUR) < HOUR // 50


def test_ranks_are_learnt_from_ends_by_a_fact() -> None:
    h = yard(1)
    number = h.submit(job(gpus=1))
    h.run(number)
    h.now_ms += HOUR
    h.ended(number)
    assert len(h.facts(SizesLearnt)) == 1
    assert len(h.core.cluster.lore.sizes.ranks) == priority.LEVEL_MAX + 1


def test_cancelled_jobs_and_services_teach_nothing() -> None:
    h = yard(1)
    number = h.submit(job(gpus=1, name="x"))
    h.run(number)
    h.now_ms += HOUR
    h.cancel(number)
    h.stopped(number)
    assert not h.core.cluster.lore.kinds
    assert not h.facts(SizesLearnt)
