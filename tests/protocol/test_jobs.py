"""From what people write to what the core schedules: defaults, and every refusal by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.jobs import DEFAULT_STOP_GRACE_MS, JobRequest, JobSpec
from gpuyard_protocol.resources import ResourceNeed


def specify(**fields: Any) -> JobSpec:
    """As a tenant would send it: through JSON."""
    return decode(JobRequest, msgspec.json.encode({"command": ["true"]} | fields)).specify()


def refused(**fields: Any) -> Malformed:
    with pytest.raises(Malformed) as caught:
        specify(**fields)
    return caught.value


def test_defaults_are_filled_in() -> None:
    assert specify() == JobSpec(
        argv=("true",),
        replicas=1,
        need=ResourceNeed(cpu_milli=1000, memory_mib=1024, isolation="soft"),
        stop_grace_ms=DEFAULT_STOP_GRACE_MS,
        preemption="requeue",
    )


def test_every_honoured_field_reaches_the_specification() -> None:
    spec = specify(
        name="train", command="echo hi", replicas=3, gpu=0.3, gpu_memory="5Gi", isolation="none", gpu_processes=2,
        gpu_model="A100:40GB", cpus="500m", memory="2Gi", node_labels={"zone": "b", "arch": "x"}, nodes=["n2", "n1"],
        priority=-2, time_limit="1h", stop_grace="5s", retries=3, env={"B": "2", "A": "1"}, cwd="/srv",
        preemption="never", allow_pending=True, hold=True, begin="2030-01-01T01:00:00+01:00",
        depends_on=["afterok:17", "afternotok:18", "afterany:19", "afterok:17", "singleton"],
    )  # fmt: skip
    assert spec == JobSpec(
        argv=("/bin/sh", "-c", "echo hi"),
        name="train",
        replicas=3,
        need=ResourceNeed(
            share_milli=300,
            share_memory_mib=5120,
            isolation="none",
            gpu_processes=2,
            models=("A100",),
            card_memory_mib=38_147,
            cpu_milli=500,
            cpu_asked=True,
            memory_asked=True,
            memory_mib=2048,
            node_labels=(("arch", "x"), ("zone", "b")),
            nodes=("n1", "n2"),
        ),
        priority=-2,
        time_limit_ms=3_600_000,
        stop_grace_ms=5000,
        retries=3,
        env=(("A", "1"), ("B", "2")),
        cwd="/srv",
        allow_pending=True,
        preemption="never",
        hold=True,
        begin_ms=1_893_456_000_000,
        depends_on=(("afterok", 17), ("afternotok", 18), ("afterany", 19)),
        singleton=True,
    )
    assert specify(begin="+2h").begin_after_ms == 7_200_000


@pytest.mark.parametrize(
    ("fields", "need"),
    [
        ({"gpus": 2}, ResourceNeed(gpus=2)),
        ({"gpus": 0}, ResourceNeed()),
        ({"gpu": "30%"}, ResourceNeed(share_milli=300)),
        ({"gpu_memory": "5Gi"}, ResourceNeed(share_memory_mib=5120)),
        ({"mig": "1g.10gb"}, ResourceNeed(mig="1g.10gb")),
        ({"mig": "1g.10gb", "isolation": "hard"}, ResourceNeed(mig="1g.10gb", isolation="hard")),
        ({"gpu_model": "H100:4"}, ResourceNeed(gpus=4, models=("H100",))),
        ({"gpus": 4, "gpu_model": "H100:4"}, ResourceNeed(gpus=4, models=("H100",))),
        ({"gpus": 1, "gpu_model": "H100|A100"}, ResourceNeed(gpus=1, models=("A100", "H100"))),
        ({"gpus": 1, "gpu_model": "A100:40GB"}, ResourceNeed(gpus=1, models=("A100",), card_memory_mib=38_147)),
        ({"cpus": 0, "memory": "0Mi"}, ResourceNeed(cpu_milli=0, memory_mib=0, cpu_asked=True, memory_asked=True)),
    ],
)  # fmt: skip
def test_resources_become_one_kind_of_need(fields: dict[str, Any], need: ResourceNeed) -> None:
    assert specify(**fields).need == need


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"command": None}, "$.command"),
        ({"command": []}, "$.command"),
        ({"command": ""}, "$.command"),
        ({"command": ["a\0b"]}, "$.command"),
        ({"command": "echo", "script": "#!/bin/sh\n"}, "$.command"),
        ({"command": None, "script": "a\0b"}, "$.script"),
        ({"v": 2}, "$.v"),
        ({"submission_id": ""}, "$.submission_id"),
        ({"submission_id": "s17"}, "$.submission_id"),
        ({"submission_id": "A"}, "$.submission_id"),
        ({"name": "x" * 129}, "$.name"),
        ({"name": "a\nb"}, "$.name"),
        ({"replicas": 0}, "$.replicas"),
        ({"replicas": 1025}, "$.replicas"),
        ({"replicas": 10**30}, "$.replicas"),
        ({"gpus": -1}, "$.gpus"),
        ({"gpus": 65}, "$.gpus"),
        ({"gpus": 2, "gpu": 0.5}, "$.gpu"),
        ({"gpus": 2, "mig": "1g.10gb"}, "$.mig"),
        ({"gpus": 2, "gpu_memory": "5Gi"}, "$.gpu_memory"),
        ({"mig": "1g.10gb", "gpu_memory": "5Gi"}, "$.gpu_memory"),
        ({"gpu": 0.5, "mig": "1g.10gb"}, "$.mig"),
        ({"gpu_memory": "0Gi"}, "$.gpu_memory"),
        ({"gpu_model": "H100"}, "$.gpu_model"),
        ({"gpu_model": "H100:2", "gpu": 0.5}, "$.gpu_model"),
        ({"gpus": 1, "gpu_model": "H100:2"}, "$.gpus"),
        ({"mig": "1g.10gb", "isolation": "none"}, "$.isolation"),
        ({"gpu": 0.5, "gpu_processes": 0}, "$.gpu_processes"),
        ({"gpu": 0.5, "gpu_processes": 49}, "$.gpu_processes"),
        ({"mig": "2g.20gb", "gpu_processes": 3}, "$.gpu_processes"),
        ({"gpu": 0.5, "mps": True}, "$.mps"),
        ({"mig": "2g.20gb", "mps": True, "image": "python:3"}, "$.image"),
        ({"node_labels": {"a b": "x"}}, "$.node_labels.a b"),
        ({"node_labels": {"a": "x\n"}}, "$.node_labels.a"),
        ({"priority": 3}, "$.priority"),
        ({"priority": -3}, "$.priority"),
        ({"time_limit": "0s"}, "$.time_limit"),
        ({"retries": -1}, "$.retries"),
        ({"retries": 101}, "$.retries"),
        ({"env": {"A B": "x"}}, "$.env.A B"),
        ({"env": {"A": "x\0"}}, "$.env.A"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "$.env.CUDA_VISIBLE_DEVICES"),
        ({"env": {"CUDA_MPS_PIPE_DIRECTORY": "/tmp"}}, "$.env.CUDA_MPS_PIPE_DIRECTORY"),
        ({"env": {"GPUYARD_JOB": "1"}}, "$.env.GPUYARD_JOB"),
        ({"env": {"LD_PRELOAD": "x.so"}}, "$.env.LD_PRELOAD"),
        ({"begin": "2030-01-01T00:00:00"}, "$.begin"),
        ({"begin": "tomorrow"}, "$.begin"),
        ({"begin": "+tomorrow"}, "$.begin"),
        ({"begin": 5}, "$.begin"),
        ({"depends_on": ["17"]}, "$.depends_on[0]"),
        ({"depends_on": ["afterok:1", "after:17"]}, "$.depends_on[1]"),
        ({"depends_on": ["afterok:0"]}, "$.depends_on[0]"),
        ({"depends_on": ["singleton"]}, "$.depends_on[0]"),
        ({"depends_on": ["afterok:1"] * 257}, "$.depends_on"),
        ({"array": ""}, "$.array"),
        ({"array": "a-b"}, "$.array"),
        ({"array": "9-0"}, "$.array"),
        ({"array": "0-9:0"}, "$.array"),
        ({"array": "0-9%0"}, "$.array"),
        ({"array": "0-10000"}, "$.array"),
        ({"array": "0-9,5"}, "$.array"),
        ({"array": "1000000"}, "$.array"),
        ({"cwd": "srv"}, "$.cwd"),
        ({"cwd": "/srv\0"}, "$.cwd"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_path(fields: dict[str, Any], path: str) -> None:
    error = refused(**fields)
    assert error.path == path
    assert error.found
    assert error.expected


def test_no_field_is_accepted_and_then_ignored() -> None:
    """Each field of a request changes the specification, or names the submission."""
    samples: dict[str, Any] = {
        "command": ["false"], "script": "#!/bin/sh\n", "name": "x", "replicas": 2, "gpus": 1, "gpu": 0.5,
        "gpu_memory": "5Gi", "mig": "1g.10gb", "isolation": "hard", "gpu_model": "H100:1", "gpu_processes": 2,
        "cpus": 2, "memory": "2Gi", "node_labels": {"a": "b"}, "nodes": ["n"], "priority": 1, "time_limit": "1h",
        "stop_grace": "1s", "retries": 1, "env": {"A": "1"}, "cwd": "/", "preemption": "never", "allow_pending": True,
        "hold": True, "begin": "+2h", "depends_on": ["afterok:1"], "array": "0-9%2",
        "on_node_lost": "restart", "lease": "10m", "image": "busybox:1",
        "restart_time": "5m", "queue": "night", "estimate": "1h",
    }  # fmt: skip
    only_names = {"v", "submission_id"}  # one value, or read before the core
    # What makes no sense alone.
    beside: dict[str, dict[str, Any]] = {"deadline": {"estimate": "1h"}, "gpu_load": {"gpu": 0.5}}
    beside["mps"] = {"mig": "2g.20gb"}
    beside["min_replicas"] = {"replicas": 4}
    samples["mps"] = True
    samples["min_replicas"] = 2
    beside["topology"] = {"replicas": 4}
    beside["share_domain"] = {"gpu": 0.3}
    samples |= {
        "upload": "sha256:" + "0" * 64,
        "share_domain": "team",
        "topology": "rack",
        "total_gpus": 12,
        "launcher": "torchrun",
        "secrets": ["TOKEN"],
    }
    samples["gpu_load"] = "memory"
    samples["throughput"] = {"T4": 0.5}
    samples["deadline"] = "+8h"
    for field in JobRequest.__struct_fields__:
        if field in only_names:
            continue
        others = beside.get(field, {})
        assert specify(**{field: samples[field]}, **others) != specify(**others), field


@pytest.mark.parametrize("image", ["--privileged", "a b", "", "x" * 300])
def test_an_image_is_a_name_and_never_an_option(image: str) -> None:
    assert refused(image=image).path == "$.image"


def test_a_share_under_mps_is_not_used_from_a_container() -> None:
    assert refused(image="x", gpu=0.5).path == "$.image"
    assert refused(image="x", gpu_memory="5Gi", isolation="soft").path == "$.image"
    shares = [{"gpu": 0.5, "isolation": isolation} for isolation in ("hard", "none")]
    for fields in (*shares, {"mig": "1g.10gb"}, {"gpus": 1}):
        spec = specify(image="registry/x:1", **fields)
        assert (spec.image, spec.need.containers) == ("registry/x:1", True)


def test_a_deadline_says_how_long_the_job_runs() -> None:
    assert refused(deadline="+2h").path == "$.deadline"
    assert specify(deadline="+2h", time_limit="1h").deadline_after_ms == 7_200_000
    assert specify(deadline="2030-01-01T00:00:00Z", estimate="1h").deadline_ms == 1_893_456_000_000
    assert refused(estimate="0s").path == "$.estimate"
    assert refused(queue="Night shift").path == "$.queue"


def test_a_lease_asks_for_a_restart_and_what_contradicts_it_is_refused() -> None:
    assert (specify(lease="10m").on_node_lost, specify(lease="10m").lease_ms) == ("restart", 600_000)
    assert (specify(on_node_lost="wait").on_node_lost, specify().on_node_lost) == ("wait", "")
    assert refused(lease="10m", on_node_lost="wait").path == "$.lease"
    assert "10s and 7d" in refused(lease="5s").expected


def test_a_refusal_does_not_carry_the_senders_whole_message() -> None:
    for fields in (
        {"queue": "x" * 100_000},
        {"env": {"CUDA_VISIBLE_DEVICES": "x" * 100_000}},
        {"env": {"=" * 9999: ""}},
    ):
        error = refused(**fields)
        assert len(error.found) <= 80
        assert len(error.path) <= 80
        assert str(error).isprintable()


@given(
    st.integers(1, 1024), st.integers(-2, 2), st.integers(0, 100), st.dictionaries(st.sampled_from("ABC"), st.just("x"))
)
def test_the_order_of_writing_changes_nothing(replicas: int, priority: int, retries: int, env: dict[str, str]) -> None:
    fields = {"replicas": replicas, "priority": priority, "retries": retries, "env": env}
    backwards = dict(reversed(fields.items())) | {"env": dict(reversed(env.items()))}
    assert specify(**fields) == specify(**backwards)


@pytest.mark.parametrize(
    ("text", "indices", "at_once"),
    [
        ("0-3", [0, 1, 2, 3], 0),
        ("7", [7], 0),
        ("0-20:10%2", [0, 10, 20], 2),
        ("1, 3, 10-11", [1, 3, 10, 11], 0),
        ("0-9999", list(range(10_000)), 0),
    ],
)
def test_an_array_has_the_elements_it_says(text: str, indices: list[int], at_once: int) -> None:
    array = specify(array=text).array
    assert array is not None
    assert (array.indices(), array.count, array.at_once) == (indices, len(indices), at_once)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"total_gpus": 0}, "$.total_gpus"),
        ({"total_gpus": 8, "gpus": 4}, "$.total_gpus"),
        ({"total_gpus": 8, "replicas": 2}, "$.total_gpus"),
        ({"topology": "rack"}, "$.topology"),
        ({"topology": "room", "replicas": 2}, "$.topology"),
        ({"share_domain": "team", "gpus": 1}, "$.share_domain"),
        ({"share_domain": "team", "gpu": 0.5, "isolation": "hard"}, "$.share_domain"),
        ({"share_domain": "a/b", "gpu": 0.5}, "$.share_domain"),
        ({"upload": "data"}, "$.upload"),
        ({"launcher": "mpirun"}, "$.launcher"),
        ({"launcher": "bin/torchrun"}, "$.launcher"),
        ({"secrets": ["a b"]}, "$.secrets[0]"),
        ({"secrets": ["A", "GPUYARD_JOB"]}, "$.secrets[1]"),
        ({"secrets": ["A"], "env": {"A": "1"}}, "$.secrets[0]"),
        ({"min_replicas": 0, "replicas": 2}, "$.min_replicas"),
        ({"min_replicas": 3, "replicas": 2}, "$.min_replicas"),
    ],
)
def test_what_makes_no_gang_is_refused(fields: dict[str, Any], path: str) -> None:
    assert refused(**fields).path == path


def test_cards_in_all_may_be_of_a_model() -> None:
    spec = specify(total_gpus=12, gpu_model="H100", launcher="/opt/venv/bin/torchrun")
    assert (spec.total_gpus, spec.need.gpus, spec.need.models) == (12, 1, ("H100",))
