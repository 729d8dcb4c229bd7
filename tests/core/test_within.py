"""Gangs that must be together on one node, in one rack or under one spine."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.resources import Within
from support.builders import CoreHarness, job, node

RACKS = {"n-1": ("s1", "r1"), "n-2": ("s1", "r2"), "n-3": ("s1", "r1"), "n-4": ("s2", "r1")}


def harness(*gpus: int) -> CoreHarness:
    """n-1 and n-3 share a rack, n-2 is under the same spine, n-4 under another; the rest say nothing."""
    h = CoreHarness()
    for number, count in enumerate(gpus, 1):
        spine, rack = RACKS.get(f"n-{number}", ("", ""))
        labels = {"spine": spine, "rack": rack} if rack else {}
        h.join(node(f"n-{number}", count, labels=labels))
    return h


def gang(replicas: int, within: Within, **fields: object) -> JobSpec:
    spec = job(replicas=replicas, gpus=4)
    return msgspec.structs.replace(spec, need=msgspec.structs.replace(spec.need, within=within), **fields)


def test_a_gang_in_one_rack_waits_for_a_rack_though_there_is_room_elsewhere() -> None:
    h = harness(4, 4, 4, 4)
    h.run(h.submit(msgspec.structs.replace(job(gpus=4, nodes=("n-1",)), preemption="never")))
    number = h.submit(gang(2, "rack"))
    assert h.state(number) == "pending"
    why = h.core.why(number, h.now_ms)
    assert why is not None
    assert why.summary == "2 replicas start together or not at all: there is room for 1 now"
    under = h.submit(gang(2, "spine"))
    assert sorted(h.nodes_of(under)) == ["n-2", "n-3"]
    anywhere = h.submit(gang(1, ""))
    assert h.nodes_of(anywhere) == ["n-4"]


def test_it_starts_in_the_rack_that_has_the_room() -> None:
    h = harness(4, 4, 4, 4)
    assert sorted(h.nodes_of(h.submit(gang(2, "rack")))) == ["n-1", "n-3"]


def test_a_gang_on_one_node_takes_no_two() -> None:
    h = harness(4, 4, 8)
    first = h.submit(gang(2, "node"))
    assert h.nodes_of(first) == ["n-3", "n-3"]
    assert h.state(h.submit(gang(2, "node"))) == "pending"


def test_nodes_that_do_not_say_stand_alone() -> None:
    h = harness(4, 4, 4, 4, 4, 4, 8)
    h.run(h.submit(msgspec.structs.replace(job(gpus=4, nodes=("n-1",)), preemption="never")))
    number = h.submit(gang(2, "rack"))
    assert h.nodes_of(number) == ["n-7", "n-7"]


@pytest.mark.parametrize(("within", "most"), [("node", 1), ("rack", 2), ("spine", 3)])
def test_what_no_rack_could_ever_hold_is_refused(within: Within, most: int) -> None:
    h = harness(4, 4, 4, 4)
    assert h.submit(gang(most + 1, within)) == 0
    answer = h.answers[-1]
    assert answer.reason is not None
    assert (answer.path, answer.nearest) == ("$.replicas", str(most) if most > 1 else "1")
    assert f"one {within} of the yard holds at most {most} replicas" in answer.reason.text
    assert h.state(h.submit(gang(most, within))) == "starting"


def test_those_who_give_way_for_it_do_so_in_one_rack() -> None:
    h = harness(4, 4, 4, 4)
    running = [h.submit(msgspec.structs.replace(job(gpus=4), preemption="checkpoint")) for _ in range(4)]
    for number in running:
        h.run(number)
    h.settle(most_ms=6 * 3_600_000)
    number = h.submit(gang(2, "rack", estimate_ms=60_000))
    going = {h.nodes_of(each)[0] for each in running if h.state(each) == "stopping"}
    assert going == {"n-1", "n-3"}
    for each in running:
        if h.state(each) == "stopping":
            h.stopped(each)
    assert sorted(h.nodes_of(number)) == ["n-1", "n-3"]


def test_an_elastic_gang_grows_in_its_rack_alone() -> None:
    h = harness(4, 4, 4, 4)
    number = h.submit(msgspec.structs.replace(gang(4, "rack"), min_replicas=1))
    assert sorted(h.nodes_of(number)) in (["n-1", "n-3"], ["n-2"], ["n-4"])
