"""Jobs that start after others, or never."""

from __future__ import annotations

import pytest

from gpuyard_protocol.jobs import DependencyKind
from support.builders import CoreHarness, job, node


@pytest.fixture
def yard() -> CoreHarness:
    harness = CoreHarness(restart_every=2)
    harness.join(node("n-1", 8))
    return harness


@pytest.mark.parametrize(
    ("kind", "exit_code", "state"),
    [
        ("afterok", 0, "starting"),
        ("afterok", 1, "cancelled"),
        ("afternotok", 0, "cancelled"),
        ("afternotok", 1, "starting"),
        ("afterany", 0, "starting"),
        ("afterany", 1, "starting"),
    ],
)
def test_a_job_follows_the_end_of_another(yard: CoreHarness, kind: DependencyKind, exit_code: int, state: str) -> None:
    first = yard.submit()
    second = yard.submit(job(depends_on=[(kind, first)]))
    assert yard.state(second) == "pending"
    why = yard.core.why(second)
    assert why is not None
    assert why.summary.startswith(f"waits for job {first} (starting) to ")
    yard.run(first)
    yard.ended(first, exit_code)
    assert yard.state(second) == state
    if state == "cancelled":
        reason = yard.view(second).reason
        assert reason is not None
        assert reason.code == "DependencyNeverSatisfied"


def test_all_dependencies_must_be_fulfilled_and_some_on_one_job_count_each(yard: CoreHarness) -> None:
    one, two = yard.submit(), yard.submit()
    last = yard.submit(job(depends_on=[("afterok", one), ("afterany", one), ("afterok", two)]))
    for number in (one, two):
        assert yard.state(last) == "pending"
        yard.run(number)
        yard.ended(number)
    assert yard.state(last) == "starting"


def test_a_retry_of_the_first_is_not_its_end(yard: CoreHarness) -> None:
    first = yard.submit(job(retries=1))
    second = yard.submit(job(depends_on=[("afterok", first)]))
    yard.run(first)
    yard.ended(first, 1)
    yard.settle(most_ms=5000)
    assert yard.states(first, second) == ["starting", "pending"]
    yard.run(first)
    yard.ended(first)
    assert yard.state(second) == "starting"


def test_what_can_never_be_takes_its_own_dependents_with_it(yard: CoreHarness) -> None:
    first = yard.submit()
    chain = [first]
    for _ in range(3):
        chain.append(yard.submit(job(depends_on=[("afterok", chain[-1])])))
    rescue = yard.submit(job(depends_on=[("afternotok", chain[2])]))
    yard.cancel(first)
    yard.stopped(first)
    assert yard.states(*chain[1:], rescue) == ["cancelled"] * 3 + ["starting"]


def test_a_dependency_on_what_does_not_exist_is_refused_with_the_nearest(yard: CoreHarness) -> None:
    other = yard.submit(tenant="umbrella")
    mine = yard.submit()
    assert not yard.submit(job(depends_on=[("afterok", 99)]))
    assert yard.refused().code == "UnknownJob"
    assert f"did you mean {mine}" in yard.refused().text
    assert not yard.submit(job(depends_on=[("afterok", other)]))
    assert yard.refused().code == "UnknownJob"
    assert not yard.submit(job(depends_on=[("afterok", yard.core.cluster.last_job + 1)]))


def test_a_dependency_on_what_has_ended_already_is_met_or_refused(yard: CoreHarness) -> None:
    done = yard.submit()
    yard.run(done)
    yard.ended(done)
    assert yard.state(yard.submit(job(depends_on=[("afterok", done)]))) == "starting"
    assert not yard.submit(job(depends_on=[("afternotok", done)]))
    assert yard.refused().code == "DependencyNeverSatisfied"


def test_singletons_go_one_after_the_other(yard: CoreHarness) -> None:
    plain = yard.submit(job(name="train"))
    turns = yard.submit_many([job(name="train", singleton=True)] * 3)
    others = yard.submit(job(name="train", singleton=True), user="bob")
    assert yard.states(plain, *turns, others) == ["starting", "pending", "pending", "pending", "starting"]
    why = yard.core.why(turns[1])
    assert why is not None
    assert "also named 'train'" in why.summary
    yard.cancel(turns[1])
    for number, then in ((plain, turns[0]), (turns[0], turns[2])):
        yard.run(number)
        yard.ended(number, 1)
        assert yard.state(then) == "starting"


def test_a_dependent_outlives_the_putting_away_of_what_it_waited_for(yard: CoreHarness) -> None:
    first = yard.submit()
    second = yard.submit(job(depends_on=[("afterok", first)], hold=True))
    yard.run(first)
    yard.ended(first)
    yard.settle(most_ms=2 * 3_600_000)
    assert yard.state(first) == "gone"
    yard.restart()
    yard.release(second)
    assert yard.state(second) == "starting"
