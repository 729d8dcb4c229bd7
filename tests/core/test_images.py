"""Jobs in container images: which nodes can run them, and what is said where none can."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_protocol.jobs import JobRequest, JobSpec
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.units import Share
from support.builders import CoreHarness, node


def request(**fields: object) -> JobSpec:
    return JobRequest(command=["train"], image="registry/train:1", **fields).specify()  # type: ignore[arg-type]


def able(name: str, engine: str) -> Inventory:
    return msgspec.structs.replace(node(name, 2), container_engine=engine)


def test_it_goes_where_an_engine_is_and_takes_its_image_along() -> None:
    h = CoreHarness(restart_every=2)
    h.join(able("n-1", ""))
    h.join(able("n-2", "podman"))
    job = h.submit(request(gpus=1))
    assert h.nodes_of(job) == ["n-2"]
    _, wanted = h.core.desired("n-2")
    assert [each.start.launch.image for each in wanted] == ["registry/train:1"]


def test_where_no_node_has_an_engine_it_is_refused_by_that_name() -> None:
    h = CoreHarness()
    h.join(able("n-1", ""))
    assert h.submit(request(gpus=1)) == 0
    answer = h.answers[-1]
    assert (answer.path, answer.accepted) == ("$.image", False)
    assert answer.reason is not None
    assert "no node runs container images" in answer.reason.text


@pytest.mark.parametrize(("engine", "runs"), [("podman", True), ("docker", False)])
def test_turns_on_a_card_need_containers_that_can_be_halted(engine: str, runs: bool) -> None:
    h = CoreHarness()
    h.join(able("n-1", engine))
    assert bool(h.submit(request(gpu=Share(500), isolation="none"))) == runs
    assert h.submit(request(gpus=1)), "a whole card can be had under either"
