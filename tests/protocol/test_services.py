"""Services: the same resource words as a job's, and refusals by path."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.resources import ResourceNeed
from gpuyard_protocol.services import DEFAULT_SCALE_DOWN_AFTER_MS, ServiceRequest, ServiceSpec


def specify(**fields: Any) -> ServiceSpec:
    return decode(ServiceRequest, msgspec.json.encode({"name": "chat", "command": ["serve"]} | fields)).specify()


def refused(**fields: Any) -> Malformed:
    with pytest.raises(Malformed) as caught:
        specify(**fields)
    return caught.value


def test_defaults_are_filled_in() -> None:
    assert specify() == ServiceSpec(
        name="chat",
        argv=("serve",),
        need=ResourceNeed(isolation="hard"),
        min_replicas=1,
        max_replicas=1,
        target_concurrency=1,
        scale_down_after_ms=DEFAULT_SCALE_DOWN_AFTER_MS,
        stop_grace_ms=30_000,
    )


def test_every_honoured_field_reaches_the_specification() -> None:
    spec = specify(
        model="llama", version="2", command="exec serve", replica={"gpu": 0.5, "isolation": "soft"}, min_replicas=0,
        max_replicas=8, target_concurrency=16, scale_down_after="5m", stop_grace="10s", env={"B": "2", "A": "1"},
        cwd="/srv", priority=1,
    )  # fmt: skip
    assert spec == ServiceSpec(
        name="chat",
        model="llama",
        version="2",
        argv=("/bin/sh", "-c", "exec serve"),
        need=ResourceNeed(share_milli=500, isolation="soft"),
        min_replicas=0,
        max_replicas=8,
        target_concurrency=16,
        scale_down_after_ms=300_000,
        stop_grace_ms=10_000,
        env=(("A", "1"), ("B", "2")),
        cwd="/srv",
        priority=1,
    )


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"name": "Chat"}, "$.name"),
        ({"name": ""}, "$.name"),
        ({"name": "a.b"}, "$.name"),
        ({"name": "chat\n"}, "$.name"),
        ({"submission_id": "s1"}, "$.submission_id"),
        ({"command": []}, "$.command"),
        ({"command": ""}, "$.command"),
        ({"command": ["a\0"]}, "$.command"),
        ({"model": "x" * 129}, "$.model"),
        ({"version": "a\n"}, "$.version"),
        ({"min_replicas": -1}, "$.min_replicas"),
        ({"min_replicas": 1025}, "$.min_replicas"),
        ({"max_replicas": 0}, "$.max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "$.max_replicas"),
        ({"max_replicas": 1025}, "$.max_replicas"),
        ({"target_concurrency": 0}, "$.target_concurrency"),
        ({"target_concurrency": 10**30}, "$.target_concurrency"),
        ({"priority": 3}, "$.priority"),
        ({"cwd": "srv"}, "$.cwd"),
        ({"env": {"A B": "x"}}, "$.env.A B"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "$.env.CUDA_VISIBLE_DEVICES"),
        ({"env": {"LD_PRELOAD": "x.so"}}, "$.env.LD_PRELOAD"),
        ({"env": {"GPUYARD_SERVICE": "x"}}, "$.env.GPUYARD_SERVICE"),
        ({"replica": {"gpus": 1, "gpu": 0.5}}, "$.replica.gpu"),
        ({"replica": {"gpus": 65}}, "$.replica.gpus"),
        ({"replica": {"gpu": 0.5, "gpu_processes": 0}}, "$.replica.gpu_processes"),
        ({"replica": {"gpu_memory": "0Mi"}}, "$.replica.gpu_memory"),
        ({"replica": {"gpu_model": "H100"}}, "$.replica.gpu_model"),
        ({"replica": {"mig": "1g.10gb", "isolation": "none"}}, "$.replica.isolation"),
        ({"replica": {"node_labels": {"a": "b c"}}}, "$.replica.node_labels.a"),
        ({"replica": {"gpu": 7}}, "$.replica.gpu"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_path(fields: dict[str, Any], path: str) -> None:
    assert refused(**fields).path == path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_qps", 5),
        ("target_queue", 5),
        ("latency_slo", "200ms"),
        ("traffic", {"1": 90, "2": 10}),
        ("tiers", ["warm"]),
        ("image", "busybox"),
    ],
)
def test_a_field_that_is_not_honoured_yet_is_refused_by_name(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert error.path == f"$.{field}"
    assert "not honoured yet" in error.expected
