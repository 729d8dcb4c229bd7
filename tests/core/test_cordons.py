"""Nodes that operators keep new work away from, and what becomes of what is there."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from gpuyard_daemon.core.state.facts import NodeCordoned
from gpuyard_daemon.core.state.inputs import NodeCordonAsked, NodeUncordonAsked
from gpuyard_protocol.nodes import Stop
from support.builders import CoreHarness, job, node


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness(restart_every=2)
    h.join(node("n-1", 2), node("n-2", 2))
    return h


def cordon(h: CoreHarness, name: str, *, reason: str = "", requeue: bool = False) -> None:
    h.turn(NodeCordonAsked(node=name, by="ops", reason=reason, requeue=requeue))


def test_nothing_new_goes_to_a_cordoned_node_and_what_runs_there_goes_on(yard: CoreHarness) -> None:
    first = yard.submit(job(gpus=2, nodes=("n-1",)))
    yard.started(first)
    cordon(yard, "n-1", reason="new cables")
    assert yard.state(first) == "running"
    yard.check_no_other_orders()
    yard.ended(first)
    numbers = yard.submit_many([job(gpus=1)] * 3)
    assert [yard.state(number) for number in numbers] == ["starting", "starting", "pending"]
    assert {name for number in numbers[:2] for name in yard.nodes_of(number)} == {"n-2"}
    why = yard.core.why(numbers[2], yard.now_ms)
    assert why is not None
    assert ("NodeCordoned", 1) in [(reason.reason.code, reason.nodes) for reason in why.reasons]
    yard.turn(NodeUncordonAsked(node="n-1", by="ops"))
    assert yard.nodes_of(numbers[2]) == ["n-1"]


def test_a_view_says_who_cordoned_a_node_and_why(yard: CoreHarness) -> None:
    cordon(yard, "n-1", reason="new cables")
    cordon(yard, "n-1")
    cordon(yard, "n-9")
    first, second = yard.core.node_views(None)
    assert (first.cordoned, first.reason) == (True, "cordoned by ops: new cables")
    assert (second.cordoned, second.reason) == (False, "")
    assert len(yard.facts(NodeCordoned)) == 1


def test_a_drain_requeues_what_may_be_preempted(yard: CoreHarness) -> None:
    movable = yard.submit(job(gpus=1, nodes=("n-1",)))
    fixed = yard.submit(replace(job(gpus=1, nodes=("n-1",)), preemption="never"))
    gang = yard.submit(job(gpus=1, replicas=2, nodes=("n-2",)))
    for number in (movable, fixed, gang):
        yard.run(number)
    cordon(yard, "n-1", requeue=True)
    assert yard.states(movable, fixed, gang) == ["stopping", "running", "running"]
    assert [order.key.job for order in yard.new_orders(Stop)] == [movable]
    yard.stopped(movable)
    assert yard.state(movable) == "pending"
    assert yard.view(movable).retries_left == 0
    cordon(yard, "n-1", requeue=True)
    yard.check_no_other_orders()
    yard.turn(NodeUncordonAsked(node="n-1", by="ops"))
    yard.settle(most_ms=60_000)
    assert yard.nodes_of(movable) == ["n-1"]


def test_a_node_stays_cordoned_over_a_restart_and_a_new_agent(yard: CoreHarness) -> None:
    cordon(yard, "n-1")
    yard.restart()
    yard.join(node("n-1", 2))
    assert yard.nodes_of(yard.submit(job(gpus=2))) == ["n-2"]
    assert yard.state(yard.submit(job(gpus=2))) == "pending"


def test_it_may_still_be_asked_whether_the_yard_could_ever_run_it(yard: CoreHarness) -> None:
    cordon(yard, "n-1")
    cordon(yard, "n-2")
    number = yard.submit(job(gpus=2))
    assert yard.state(number) == "pending"
    assert yard.submit(job(gpus=3)) == 0
