"""Where one particular job would rather be: replicas apart, and back to where it ran."""

from __future__ import annotations

from gpuyard_daemon.core.state.inputs import ServiceApplied
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, gpu, job, need, node


def harness(*inventories: Inventory) -> CoreHarness:
    h = CoreHarness()
    h.join(*inventories)
    return h


def serve(h: CoreHarness, replicas: int) -> list[int]:
    spec = ServiceSpec(
        name="chat", argv=("/bin/serve",), need=need(gpus=1), min_replicas=replicas, max_replicas=replicas
    )
    h.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s900", spec=spec))
    return [number for number, each in sorted(h.core.cluster.jobs.items()) if each.service]


def test_replicas_of_a_service_go_to_different_nodes_while_there_are_any() -> None:
    h = harness(node("n-1", 4), node("n-2", 4), node("n-3", 4))
    replicas = serve(h, 4)
    nodes = [h.nodes_of(number)[0] for number in replicas]
    assert sorted(nodes[:3]) == ["n-1", "n-2", "n-3"]
    assert nodes[3] in nodes[:3]


def test_a_job_that_starts_again_goes_back_to_where_it_ran() -> None:
    h = harness(node("n-1", 2), node("n-2", 2))
    first = h.submit(job(gpus=2))
    number = h.submit(job(gpus=1, retries=1))
    assert h.nodes_of(number) == ["n-2"]
    h.run(first)
    h.ended(first)
    h.run(number)
    h.ended(number, exit_code=1)
    h.turn(after_ms=5000)
    assert h.nodes_of(number) == ["n-2"]


def test_a_share_goes_back_into_the_gap_that_it_left() -> None:
    h = harness(node("n-1", devices=[gpu(0, node="n-1")]), node("n-2", devices=[gpu(0, node="n-2")]))
    half = h.submit(job(share_milli=500))
    number = h.submit(job(share_milli=500, retries=1))
    assert h.nodes_of(half) == h.nodes_of(number) == ["n-1"]
    whole = h.submit(job(share_milli=900))
    assert h.nodes_of(whole) == ["n-2"]
    for each in (half, number, whole):
        h.run(each)
    h.ended(number, exit_code=1)
    h.ended(whole)
    h.turn(after_ms=5000)
    assert h.nodes_of(number) == ["n-1"]
