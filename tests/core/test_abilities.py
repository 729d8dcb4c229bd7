"""Agents of an older version: jobs that ask for what those do not know go past them."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_protocol.jobs import JobRequest, JobSpec
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import ABILITIES
from support.builders import CoreHarness, node

ASKING = {"secrets": ["TOKEN"], "upload": "sha256:" + "0" * 64, "launcher": "torchrun"}


def request(field: str) -> JobSpec:
    return JobRequest(command=["train"], gpus=1, **{field: ASKING[field]}).specify()  # type: ignore[arg-type]


def knowing(name: str, *abilities: str) -> Inventory:
    return msgspec.structs.replace(node(name, 2), abilities=abilities)


@pytest.mark.parametrize("field", ASKING)
def test_a_job_goes_to_an_agent_that_knows_what_it_asks(field: str) -> None:
    h = CoreHarness(restart_every=2)
    h.join(knowing("n-1"))
    h.join(knowing("n-2", *ABILITIES, "what-comes-later"))
    assert [h.nodes_of(h.submit(request(field))) for _ in range(2)] == [["n-2"], ["n-2"]]
    waits = h.submit(request(field))
    assert h.nodes_of(waits) == [], "n-1 has two free cards, and would run it without"


@pytest.mark.parametrize("field", ASKING)
def test_where_every_agent_is_older_it_is_refused_with_the_field(field: str) -> None:
    h = CoreHarness()
    h.join(knowing("n-1"))
    assert h.submit(request(field)) == 0
    answer = h.answers[-1]
    assert answer.path == f"$.{field}"
    assert answer.reason is not None
    assert f"does not know '{field}'" in answer.reason.text


def test_agents_that_know_one_thing_each_are_too_old_for_both() -> None:
    h = CoreHarness()
    h.join(knowing("n-1", "secrets"))
    h.join(knowing("n-2", "upload"))
    spec = JobRequest(command=["train"], gpus=1, secrets=["TOKEN"], upload=ASKING["upload"]).specify()  # type: ignore[arg-type]
    assert h.submit(spec) == 0


def test_what_asks_for_none_of_it_runs_anywhere() -> None:
    h = CoreHarness()
    h.join(knowing("n-1"))
    assert h.nodes_of(h.submit(JobRequest(command=["train"], gpus=1).specify())) == ["n-1"]
