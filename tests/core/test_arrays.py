"""Arrays: many jobs of one request."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_daemon.core.state.facts import ArrayAccepted, ArrayCancelled
from gpuyard_daemon.core.state.inputs import CancelRequested, HoldRequested, ReleaseRequested, RequeueRequested
from gpuyard_protocol.jobs import JobSpec, parse_array
from gpuyard_protocol.nodes import Start
from gpuyard_protocol.queries import JobsQuery
from support.builders import CoreHarness, job, node


@pytest.fixture
def yard() -> CoreHarness:
    harness = CoreHarness(restart_every=2)
    harness.join(node("n-1", 8))
    return harness


def array(text: str, spec: JobSpec | None = None) -> JobSpec:
    return msgspec.structs.replace(spec or job(gpus=1), array=parse_array(text))


def of_array(number: int, kind: type[CancelRequested | HoldRequested | ReleaseRequested], name: str) -> object:
    return kind(tenant="acme", user="alice", submission_id=name, job=number, array=True)


def test_an_array_is_one_fact_and_one_answer_and_its_elements_are_jobs(yard: CoreHarness) -> None:
    first = yard.submit(array("10-20:5"))
    assert len(yard.facts(ArrayAccepted)) == 1
    assert (first, yard.answers[-1].elements) == (1, 3)
    assert yard.states(1, 2, 3) == ["starting"] * 3
    assert [(yard.view(n).array, yard.view(n).array_index) for n in (1, 2, 3)] == [(1, 10), (1, 15), (1, 20)]
    launches = [order.launch for order in yard.new_orders(Start)]
    assert [(each.array_job, each.array_index, each.array_count) for each in launches] == [
        (1, 10, 3),
        (1, 15, 3),
        (1, 20, 3),
    ]
    assert yard.submit() == 4


def test_elements_share_their_specification_in_memory_and_in_snapshots(yard: CoreHarness) -> None:
    script = "#!/bin/sh\n" + "x" * 50_000
    yard.submit(array("0-999", msgspec.structs.replace(job(gpus=8), script=script)))
    assert len(yard.core.snapshot()) < 300_000
    yard.restart()
    specs = {id(known.spec) for known in yard.core.cluster.jobs.values()}
    assert len(specs) == 1
    assert len(msgspec.json.encode(yard.records[-1])) < 100_000


def test_only_so_many_elements_go_at_once(yard: CoreHarness) -> None:
    yard.submit(array("0-5%2"))
    assert yard.states(*range(1, 7)) == ["starting"] * 2 + ["pending"] * 4
    why = yard.core.why(4)
    assert why is not None
    assert why.summary == "2 elements of array 1 go at once, and others are first"
    for number in range(1, 7):
        live = [n for n in range(1, 7) if yard.state(n) in ("starting", "running")]
        assert len(live) == min(2, 7 - number)
        yard.run(number)
        yard.ended(number)
    assert yard.states(*range(1, 7)) == ["succeeded"] * 6


def test_an_element_that_waits_for_its_retry_makes_room_for_the_next(yard: CoreHarness) -> None:
    yard.submit(array("0-2%1", job(gpus=1, retries=1)))
    yard.run(1)
    yard.ended(1, 1)
    assert yard.states(1, 2, 3) == ["pending", "starting", "pending"]
    yard.settle(most_ms=5000)
    assert yard.states(1, 2, 3) == ["pending", "starting", "pending"]
    yard.run(2)
    yard.ended(2)
    assert yard.states(1, 2, 3) == ["starting", "succeeded", "pending"]


def test_a_held_element_lets_the_next_go(yard: CoreHarness) -> None:
    blocker = yard.submit(job(gpus=8))
    yard.submit(array("0-2%1"))
    yard.hold(2)
    yard.run(blocker)
    yard.ended(blocker)
    assert yard.states(2, 3, 4) == ["pending", "starting", "pending"]
    yard.release(2)
    assert yard.state(2) == "pending"
    yard.run(3)
    yard.ended(3)
    assert yard.states(2, 3, 4) == ["starting", "succeeded", "pending"]


def test_a_whole_array_is_cancelled_with_one_fact_for_all_that_wait(yard: CoreHarness) -> None:
    yard.submit(array("0-99"))
    yard.turn(of_array(5, CancelRequested, "s50"))  # type: ignore[arg-type]  # one of the three kinds
    assert yard.answers[-1].accepted
    assert len(yard.facts(ArrayCancelled)) == 1
    assert yard.states(1, 8, 9, 100) == ["stopping", "stopping", "cancelled", "cancelled"]
    for number in range(1, 9):
        yard.stopped(number)
    assert {view.state for view in (yard.view(n) for n in range(1, 101))} == {"cancelled"}
    yard.turn(of_array(5, CancelRequested, "s51"))  # type: ignore[arg-type]
    assert yard.refused().code == "AlreadyEnded"


def test_one_element_is_cancelled_alone(yard: CoreHarness) -> None:
    yard.submit(array("0-2", job(gpus=8)))
    yard.cancel(2)
    assert yard.states(1, 2, 3) == ["starting", "cancelled", "pending"]


def test_what_is_no_array_is_not_cancelled_as_one(yard: CoreHarness) -> None:
    number = yard.submit()
    yard.turn(of_array(number, CancelRequested, "s50"))  # type: ignore[arg-type]
    assert yard.refused().code == "NoArray"


def test_a_whole_array_is_held_and_released(yard: CoreHarness) -> None:
    yard.submit(array("0-3%2", job(gpus=1, hold=True)))
    assert yard.states(1, 2, 3, 4) == ["pending"] * 4
    yard.turn(of_array(1, ReleaseRequested, "s50"))  # type: ignore[arg-type]
    assert yard.states(1, 2, 3, 4) == ["starting", "starting", "pending", "pending"]
    yard.turn(of_array(1, HoldRequested, "s51"))  # type: ignore[arg-type]
    for number in (1, 2):
        yard.run(number)
        yard.ended(number)
    assert yard.states(3, 4) == ["pending", "pending"]
    yard.turn(of_array(3, ReleaseRequested, "s52"))  # type: ignore[arg-type]
    assert yard.states(3, 4) == ["starting", "starting"]


def test_a_dependency_on_an_array_waits_for_all_of_it(yard: CoreHarness) -> None:
    yard.submit(array("0-1"))
    good, bad = yard.submit(job(depends_on=[("afterok", 1)])), yard.submit(job(depends_on=[("afternotok", 1)]))
    last = yard.submit(job(depends_on=[("afterany", 1)]))
    yard.run(1)
    yard.ended(1)
    assert yard.states(good, bad, last) == ["pending", "cancelled", "pending"]
    yard.run(2)
    yard.ended(2)
    assert yard.states(good, last) == ["starting", "starting"]


def test_one_failed_element_is_enough_to_end_who_wanted_all_to_succeed(yard: CoreHarness) -> None:
    yard.submit(array("0-1"))
    follower = yard.submit(array("0-4", job(depends_on=[("afterok", 1)])))
    yard.run(2)
    yard.ended(2, 1)
    assert yard.states(*range(follower, follower + 5)) == ["cancelled"] * 5
    assert not yard.submit(job(depends_on=[("afterok", 1)]))
    assert yard.refused().code == "DependencyNeverSatisfied"


def test_many_that_can_never_start_end_over_several_turns(yard: CoreHarness) -> None:
    yard.submit()
    yard.submit(array("0-4999", job(depends_on=[("afterok", 1)])))
    yard.cancel(1)
    assert yard.stopped(1).unfinished
    yard.restart()
    while yard.turn().unfinished:
        pass
    assert yard.core.cluster.lists["acme"].counts["cancelled"] == 5001


def test_waiting_elements_are_one_row_of_a_list(yard: CoreHarness) -> None:
    yard.submit(array("0-99%3"))
    other = yard.submit(job(gpus=8))
    page = yard.core.jobs_page("acme", JobsQuery(fold=True, limit=3))
    assert [(view.job, view.elements) for view in page.jobs] == [(other, 0), (100, 97), (3, 0)]
    rest = yard.core.jobs_page("acme", JobsQuery(fold=True, cursor=page.next))
    assert [view.job for view in rest.jobs] == [2, 1]
    assert len(yard.core.jobs_page("acme", JobsQuery(limit=200)).jobs) == 101


def test_an_array_counts_by_its_elements_against_the_limit_of_jobs(yard: CoreHarness) -> None:
    yard.limit("acme", jobs=10)
    assert not yard.submit(array("0-10"))
    assert "and this is 11 more" in yard.refused().text
    assert yard.submit(array("0-9"))


def test_an_array_leaves_with_its_last_element(yard: CoreHarness) -> None:
    yard.submit(array("0-1"))
    for number in (1, 2):
        yard.run(number)
        yard.ended(number)
    yard.settle(most_ms=2 * 3_600_000)
    assert not yard.core.cluster.jobs
    assert not yard.core.cluster.arrays.records


def requeue_array(number: int, name: str, *, hold: bool = False) -> RequeueRequested:
    return RequeueRequested(tenant="acme", user="alice", submission_id=name, job=number, hold=hold, array=True)


def test_the_running_elements_of_an_array_are_requeued_together(yard: CoreHarness) -> None:
    yard.submit(array("0-3%2"))
    yard.started(1)
    yard.started(2)
    yard.turn(requeue_array(3, "again"))
    assert yard.answers[-1].accepted
    assert yard.states(1, 2, 3, 4) == ["stopping", "stopping", "pending", "pending"]
    yard.stopped(1)
    yard.stopped(2)
    yard.settle(most_ms=120_000)
    assert sorted(yard.states(1, 2, 3, 4)) == ["pending", "pending", "starting", "starting"]
    yard.turn(requeue_array(1, "twice"))
    assert yard.answers[-1].accepted


def test_an_array_requeued_with_a_hold_starts_nothing_until_it_is_released(yard: CoreHarness) -> None:
    yard.submit(array("0-3%2"))
    yard.turn(requeue_array(1, "hold", hold=True))
    yard.stopped(1)
    yard.stopped(2)
    yard.settle(most_ms=120_000)
    assert yard.states(1, 2, 3, 4) == ["pending"] * 4
    yard.turn(requeue_array(1, "nothing-runs"))
    assert yard.refused().code == "NotRunning"
    yard.turn(of_array(2, ReleaseRequested, "go"))
    assert yard.states(1, 2, 3, 4) == ["starting", "starting", "pending", "pending"]


def test_a_job_of_no_array_is_not_requeued_as_one(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.turn(requeue_array(number, "alone"))
    assert yard.refused().code == "NoArray"
