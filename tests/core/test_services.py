"""Services: as many replicas as the load asks for, up at once and down late, healed and replaced."""

from __future__ import annotations

from typing import Any

import pytest

from gpuyard_daemon.core.handling.services import desired_replicas
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.facts import LoadTaken, ServiceScaled
from gpuyard_daemon.core.state.inputs import (
    LoadReported,
    NodeLost,
    NodeReturned,
    RequeueAll,
    ServiceApplied,
    ServiceDeleted,
)
from gpuyard_protocol.nodes import Ended, Stop
from gpuyard_protocol.queries import ServicesQuery
from gpuyard_protocol.services import ServiceSpec, ServiceView
from support.builders import CoreHarness, job, need, node


def service(low: int = 1, high: int = 4, *, target: int = 10, version: str = "1", **fields: Any) -> ServiceSpec:
    return ServiceSpec(
        name="chat",
        argv=("/bin/serve",),
        need=need(**(fields or {"gpus": 1})),
        version=version,
        min_replicas=low,
        max_replicas=high,
        target_concurrency=target,
        scale_down_after_ms=60_000,
    )


def apply(h: CoreHarness, spec: ServiceSpec, *, user: str = "alice", submission_id: str = "s900") -> None:
    h.turn(ServiceApplied(tenant="acme", user=user, submission_id=submission_id, spec=spec))


def load(h: CoreHarness, concurrency: int, queue_depth: int = 0, *, after_ms: int = 0) -> None:
    report = LoadReported(tenant="acme", service="chat", concurrency=concurrency, queue_depth=queue_depth)
    h.turn(report, after_ms=after_ms)


def view(h: CoreHarness) -> ServiceView:
    (found,) = h.core.services_page("acme", ServicesQuery()).services
    return found


def run_all(h: CoreHarness) -> None:
    """Every replica that has been placed starts to run."""
    for number in view(h).jobs:
        if h.state(number) == "starting":
            h.started(number, port=29_600)


def stop_all(h: CoreHarness) -> None:
    for number in list(h.core.cluster.jobs):
        if h.state(number) == "stopping":
            h.stopped(number)


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    return h


@pytest.mark.parametrize(
    ("concurrency", "queue", "expected"), [(0, 0, 1), (10, 0, 1), (11, 0, 2), (15, 10, 3), (30, 0, 3), (999, 0, 4)]
)
def test_replicas_follow_the_load_between_min_and_max(concurrency: int, queue: int, expected: int) -> None:
    assert desired_replicas(service(), concurrency, queue) == expected


def test_a_service_starts_with_its_minimum(yard: CoreHarness) -> None:
    apply(yard, service(2))
    assert yard.answers[-1].accepted
    assert yard.answers[-1].service == "chat"
    found = view(yard)
    assert (found.wanted, found.starting, found.running) == (2, 2, 0)
    run_all(yard)
    found = view(yard)
    assert (found.running, found.endpoints) == (2, ("10.0.0.1:29600", "10.0.0.2:29600"))
    assert yard.core.has_service("acme", "chat")
    assert not yard.core.has_service("umbrella", "chat")


def test_load_brings_replicas_in_the_same_turn(yard: CoreHarness) -> None:
    apply(yard, service())
    load(yard, 35)
    assert (view(yard).wanted, view(yard).starting) == (4, 4)
    assert yard.new_facts(ServiceScaled) == [ServiceScaled("acme", "chat", 4)]


def test_scale_to_zero_and_back(yard: CoreHarness) -> None:
    apply(yard, service(0))
    assert view(yard).jobs == ()
    load(yard, 1)
    assert view(yard).starting == 1
    run_all(yard)
    load(yard, 0)
    yard.settle(most_ms=60_000)
    assert [stop.reason for stop in yard.orders["n-1"] if isinstance(stop, Stop)] == ["scaled-down"]
    stop_all(yard)
    assert (view(yard).wanted, view(yard).jobs) == (0, ())


def test_down_only_after_the_load_was_lower_all_the_time(yard: CoreHarness) -> None:
    apply(yard, service())
    load(yard, 40)
    load(yard, 5)
    yard.settle(most_ms=59_000)
    assert view(yard).wanted == 4
    load(yard, 40)
    load(yard, 5)
    yard.settle(most_ms=59_000)
    assert view(yard).wanted == 4
    yard.settle(most_ms=1_000)
    assert view(yard).wanted == 1


def test_down_to_the_peak_of_the_waiting_time_first(yard: CoreHarness) -> None:
    apply(yard, service())
    load(yard, 40)
    load(yard, 5)
    load(yard, 25, after_ms=20_000)
    load(yard, 5, after_ms=20_000)
    yard.settle(most_ms=20_000)
    assert view(yard).wanted == 3
    yard.settle(most_ms=60_000)
    assert view(yard).wanted == 1


def test_the_youngest_go_first_and_waiting_ones_before_running_ones(yard: CoreHarness) -> None:
    apply(yard, service(0, 12))
    load(yard, 90)
    run_all(yard)
    assert (view(yard).running, view(yard).pending) == (8, 1)
    load(yard, 70)
    yard.settle(most_ms=60_000)
    assert [yard.state(number) for number in (1, 7, 8, 9)] == ["running", "running", "stopping", "cancelled"]


def test_an_unchanged_load_and_one_of_an_unknown_service_are_nothing(yard: CoreHarness) -> None:
    apply(yard, service())
    load(yard, 12)
    load(yard, 12)
    assert yard.new_facts(LoadTaken) == []
    yard.turn(LoadReported(tenant="umbrella", service="chat", concurrency=5))
    assert yard.new_facts(LoadTaken) == []


def test_a_replica_that_ends_by_itself_is_replaced_later_each_time(yard: CoreHarness) -> None:
    apply(yard, service())
    waits = []
    for number in (1, 2, 3):
        yard.ended(number, exit_code=1)
        assert yard.state(number) == "failed"
        due = yard.core.next_deadline_ms()
        assert due is not None
        waits.append(due - yard.now_ms)
        yard.settle(most_ms=waits[-1])
        assert yard.state(number + 1) == "starting"
    assert waits == [1000, 2000, 4000]
    run_all(yard)
    yard.now_ms += 60_000
    yard.ended(4, exit_code=1)
    due = yard.core.next_deadline_ms()
    assert due is not None
    assert due - yard.now_ms == 1000


def test_a_service_says_how_its_last_replica_ended_until_it_is_applied_anew(yard: CoreHarness) -> None:
    apply(yard, service(low=1))
    number = view(yard).jobs[0]
    yard.run(number)
    yard.ended(number, 127)
    now = view(yard)
    assert (now.running, now.crashes, now.crashed_job) == (0, 1, number)
    assert now.crash is not None
    assert now.crash.text == "replica 0 on n-1 exited with code 127"
    yard.settle(most_ms=10_000)
    assert view(yard).crashed_job == number  # the wait is over: how it ended is still to be read
    restored = Scheduler.restore(yard.core.snapshot(), yard.core.settings)
    assert restored.services_page("acme", ServicesQuery()).services == (view(yard),)
    apply(yard, service(low=1, version="2"), submission_id="s901")
    assert view(yard).crash is None


def test_a_lost_nodes_replicas_are_replaced_at_once_and_stopped_when_it_returns(yard: CoreHarness) -> None:
    apply(yard, service())
    run_all(yard)
    assert yard.nodes_of(1) == ["n-1"]
    yard.turn(NodeLost(node="n-1"))
    assert yard.states(1, 2) == ["stopping", "starting"]
    assert yard.nodes_of(2) == ["n-2"]
    assert view(yard).wanted == 1
    _, (wanted,) = yard.core.desired("n-1")
    assert wanted.stop is not None
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    yard.stopped(1)
    assert yard.states(1, 2) == ["cancelled", "starting"]


def test_a_changed_service_goes_over_one_by_one(yard: CoreHarness) -> None:
    apply(yard, service(2, 2))
    run_all(yard)
    apply(yard, service(2, 2, version="2"))
    assert yard.states(1, 2, 3, 4) == ["running", "running", "starting", "starting"]
    yard.started(3)
    assert yard.states(1, 2) == ["running", "stopping"]
    yard.started(4)
    assert yard.states(1, 2) == ["stopping", "stopping"]
    stop_all(yard)
    assert view(yard).jobs == (3, 4)


def test_a_changed_service_without_room_makes_room_of_its_own() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2))
    apply(h, service(2, 2))
    run_all(h)
    apply(h, service(2, 2, version="2"))
    assert h.states(1, 2, 3, 4) == ["running", "stopping", "pending", "pending"]
    h.stopped(2)
    assert h.states(1, 3, 4) == ["running", "starting", "pending"]
    h.started(3)
    assert h.state(1) == "stopping"
    h.stopped(1)
    assert h.states(3, 4) == ["running", "starting"]


def test_applying_again_with_other_bounds_replaces_nothing(yard: CoreHarness) -> None:
    apply(yard, service(1, 4))
    run_all(yard)
    apply(yard, service(3, 8))
    assert yard.states(1, 2, 3) == ["running", "starting", "starting"]
    apply(yard, service(1, 1))
    assert yard.states(1, 2, 3) == ["running", "stopping", "stopping"]


def test_a_deleted_service_stops_its_replicas_and_is_forgotten(yard: CoreHarness) -> None:
    apply(yard, service(2))
    run_all(yard)
    yard.turn(ServiceDeleted(tenant="acme", user="alice", submission_id="s901", service="chat"))
    assert yard.answers[-1].accepted
    assert yard.states(1, 2) == ["stopping", "stopping"]
    assert not yard.core.has_service("acme", "chat")
    stop_all(yard)
    assert yard.states(1, 2) == ["cancelled", "cancelled"]
    apply(yard, service(1))
    assert view(yard).jobs == (3,)


def test_services_belong_to_their_user_and_unknown_ones_are_told_with_the_nearest(yard: CoreHarness) -> None:
    apply(yard, service())
    apply(yard, service(2), user="bob")
    assert yard.refused().code == "NotYours"
    yard.turn(ServiceDeleted(tenant="acme", user="bob", submission_id="s902", service="chat"))
    assert yard.refused().code == "NotYours"
    yard.turn(ServiceDeleted(tenant="acme", user="alice", submission_id="s903", service="chad"))
    assert (yard.refused().code, yard.answers[-1].nearest) == ("UnknownService", "chat")


def test_an_impossible_replica_is_refused(yard: CoreHarness) -> None:
    apply(yard, service(gpus=9))
    answer = yard.answers[-1]
    assert (answer.accepted, answer.path, answer.nearest) == (False, "$.replica.gpus", "4")


def test_applying_under_a_chosen_id_is_done_once(yard: CoreHarness) -> None:
    apply(yard, service(1), submission_id="deploy-1")
    apply(yard, service(3), submission_id="deploy-1")
    assert view(yard).wanted == 1
    assert yard.answers[-1] == yard.answers[-2]


def test_cancelling_a_replica_gets_another(yard: CoreHarness) -> None:
    apply(yard, service())
    run_all(yard)
    assert yard.cancel(1).accepted
    assert yard.states(1, 2) == ["stopping", "starting"]


def test_a_stopping_yard_requeues_replicas_like_jobs(yard: CoreHarness) -> None:
    apply(yard, service(2))
    run_all(yard)
    yard.turn(RequeueAll())
    stop_all(yard)
    assert yard.states(1, 2) == ["pending", "pending"]
    load(yard, 40)
    assert len(view(yard).jobs) == 2


def test_a_replica_lost_with_its_process_starts_again(yard: CoreHarness) -> None:
    apply(yard, service())
    run_all(yard)
    (assignment,) = yard.core.cluster.jobs[1].assignments
    yard.report("n-1", Ended(key=assignment.key, outcome="lost", at_ms=0, code="NodeRestarted"))
    assert yard.view(1).attempt == 2
    assert view(yard).jobs == (1,)


def test_replicas_compete_by_priority_like_jobs(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=1)] * 8)
    apply(yard, service(1))
    assert view(yard).pending == 1
