"""Held, late, requeued: what owners do to jobs before and while they run."""

from __future__ import annotations

import pytest

from gpuyard_daemon.core.state.inputs import ServiceApplied
from gpuyard_protocol.nodes import Stop
from gpuyard_protocol.services import ServiceSpec
from support.builders import START_MS, CoreHarness, job, need, node


@pytest.fixture
def yard() -> CoreHarness:
    harness = CoreHarness(restart_every=2)
    harness.join(node("n-1", 2))
    return harness


def summary(yard: CoreHarness, number: int) -> str:
    why = yard.core.why(number, yard.now_ms)
    assert why is not None
    return why.summary


def test_a_job_submitted_held_waits_until_it_is_released(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, hold=True))
    yard.settle(most_ms=60_000)
    assert yard.state(number) == "pending"
    assert summary(yard, number) == "held by alice until it is released"
    reason = yard.view(number).reason
    assert reason is not None
    assert reason.code == "Held"
    assert yard.release(number).accepted
    assert yard.state(number) == "starting"


def test_a_waiting_job_can_be_held_and_lets_the_others_pass(yard: CoreHarness) -> None:
    running, first, second = yard.submit_many([job(gpus=2)] * 3)
    assert yard.hold(first).accepted
    assert yard.hold(first).accepted
    yard.run(running)
    yard.ended(running)
    assert yard.states(first, second) == ["pending", "starting"]
    yard.release(first)
    yard.run(second)
    yard.ended(second)
    assert yard.state(first) == "starting"


def test_what_cannot_be_held_or_released_is_refused_with_the_reason(yard: CoreHarness) -> None:
    running = yard.submit(job(gpus=1))
    assert not yard.hold(running).accepted
    assert yard.refused().code == "NotPending"
    assert not yard.release(running).accepted
    assert yard.refused().code == "NotHeld"
    assert not yard.hold(77).accepted
    assert yard.refused().code == "UnknownJob"
    waiting = yard.submit(job(gpus=2))
    assert not yard.hold(waiting, user="bob").accepted
    assert yard.refused().code == "NotYours"
    spec = ServiceSpec(name="chat", argv=("serve",), need=need(gpus=2), min_replicas=1, max_replicas=1)
    yard.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s90", spec=spec))
    assert not yard.hold(yard.core.cluster.last_job).accepted
    assert yard.refused().code == "OfService"


def test_a_held_job_can_be_cancelled(yard: CoreHarness) -> None:
    number = yard.submit(job(hold=True))
    yard.cancel(number)
    assert yard.state(number) == "cancelled"
    assert not yard.release(number).accepted
    assert yard.refused().code == "AlreadyEnded"


def test_a_job_begins_at_its_time_and_not_before(yard: CoreHarness) -> None:
    late = yard.submit(job(begin_after_ms=3_600_000))
    at_once = yard.submit(job(begin_ms=START_MS - 5))
    at_noon = yard.submit(job(begin_ms=START_MS + 7_200_000))
    assert yard.states(late, at_once, at_noon) == ["pending", "starting", "pending"]
    assert summary(yard, late) == "begins in 1h, as it was asked to"
    yard.settle(most_ms=3_600_000)
    assert yard.states(late, at_noon) == ["starting", "pending"]
    yard.settle(most_ms=3_600_000)
    assert yard.state(at_noon) == "starting"


def test_a_job_held_past_its_time_starts_when_released(yard: CoreHarness) -> None:
    number = yard.submit(job(begin_after_ms=1000, hold=True))
    yard.settle(most_ms=5000)
    assert yard.state(number) == "pending"
    yard.release(number)
    assert yard.state(number) == "starting"


def test_a_requeued_job_runs_again_uncharged_and_at_once(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=1))
    for attempt in (1, 2, 3):
        yard.run(number)
        assert yard.requeue(number).accepted
        assert [order.reason for order in yard.new_orders(Stop)] == ["requeued"]
        yard.stopped(number)
        assert yard.state(number) == "starting"
        assert (yard.view(number).attempt, yard.view(number).retries_left) == (attempt + 1, 1)


def test_a_requeue_with_a_hold_keeps_the_job_waiting(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.run(number)
    assert yard.requeue(number, hold=True).accepted
    yard.stopped(number)
    yard.settle(most_ms=60_000)
    assert yard.state(number) == "pending"
    assert summary(yard, number) == "held by alice until it is released"
    yard.release(number)
    assert yard.state(number) == "starting"


def test_a_job_that_ended_well_while_it_was_requeued_is_done(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.run(number)
    yard.requeue(number)
    yard.ended(number)
    assert yard.state(number) == "succeeded"


def test_what_does_not_run_cannot_be_requeued(yard: CoreHarness) -> None:
    running = yard.submit(job(gpus=2))
    waiting = yard.submit(job(gpus=2))
    assert not yard.requeue(waiting).accepted
    assert yard.refused().code == "NotRunning"
    yard.run(running)
    yard.cancel(running)
    assert not yard.requeue(running).accepted
    assert yard.refused().code == "AlreadyStopping"
