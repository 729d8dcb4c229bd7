"""What an owner says about the size of an elastic job: down at once, up as far as there is room, cost what it may."""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.state.facts import JobResizing
from gpuyard_daemon.core.state.inputs import ScaleRequested
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness, job, node


def elastic(least: int, most: int) -> JobSpec:
    """One that saves nothing, and so never grows by itself."""
    return msgspec.structs.replace(job(replicas=most, gpus=1), min_replicas=least, preemption="requeue")


def harness(gpus: int) -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", gpus))
    return h


def scale(h: CoreHarness, number: int, replicas: int) -> None:
    name = f"scale-{len(h.records)}"
    request = ScaleRequested(tenant="acme", user="alice", submission_id=name, job=number, replicas=replicas)
    h.turn(request)
    assert h.answers[-1].accepted


def sizes(h: CoreHarness) -> list[int]:
    """Of every attempt that was ended for another size, the next one's."""
    return [len(fact.placements) for fact in h.facts(JobResizing)]


def test_it_grows_at_once_and_shrinks_at_once() -> None:
    h = harness(8)
    number = h.submit(elastic(1, 2))
    h.run(number)
    scale(h, number, 6)
    assert sizes(h) == [6]
    h.stopped(number)
    h.run(number)
    scale(h, number, 3)
    assert sizes(h) == [6, 3]
    h.stopped(number)
    h.run(number)
    h.settle(most_ms=7_200_000)
    assert h.view(number).size == 3
    assert sizes(h) == [6, 3]


def test_what_is_said_while_it_is_starting_holds_once_it_runs() -> None:
    h = harness(8)
    number = h.submit(elastic(1, 2))
    scale(h, number, 6)
    assert h.state(number) == "starting"
    h.run(number)
    h.settle(most_ms=20_000)
    assert sizes(h) == [6]


def test_fewer_said_while_it_is_starting_it_gives_the_others_back_once_it_runs() -> None:
    h = harness(8)
    number = h.submit(elastic(1, 8))
    assert h.view(number).size == 8
    scale(h, number, 3)
    h.run(number)
    h.settle(most_ms=20_000)
    assert sizes(h) == [3]


def test_said_again_it_grows_into_what_has_become_free_since() -> None:
    h = harness(8)
    other = h.submit(job(gpus=4))
    h.run(other)
    number = h.submit(elastic(1, 2))
    h.run(number)
    scale(h, number, 8)
    assert sizes(h) == [4]
    h.stopped(number)
    h.run(number)
    h.ended(other)
    h.settle(most_ms=7_200_000)
    assert sizes(h) == [4], "by itself it never gives up its whole run for more replicas"
    scale(h, number, 8)
    assert sizes(h) == [4, 8]
