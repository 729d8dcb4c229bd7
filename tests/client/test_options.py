"""The flags that describe a job: each field of a request can be said with one, and says what it was told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gpuyard.cli.options import JobOptions, flag_of
from gpuyard_protocol.jobs import JobRequest

#: What a command line says otherwise: the command itself, a script (a job file, `sbatch`), and the form of the message.
_NO_FLAG = {"command", "script", "v"}


def test_every_field_of_a_request_has_a_flag() -> None:
    flags = {flag_of(field.name) for field in dataclasses.fields(JobOptions)}
    assert [
        name for name in JobRequest.__struct_fields__ if flag_of(name) not in flags | {*map(flag_of, _NO_FLAG)}
    ] == []


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"preemption": "suspend"}, "preemption", "suspend"),
        ({"restart_time": "5m"}, "restart_time", "5m"),
        ({"stop_grace": "1m"}, "stop_grace", "1m"),
        ({"gpu_processes": 2}, "gpu_processes", 2),
        ({"gpu_load": "memory"}, "gpu_load", "memory"),
        ({"mps": True}, "mps", True),
        ({"time": "90"}, "time_limit", "90m"),
        ({"label": ["zone=b"]}, "node_labels", {"zone": "b"}),
    ],
)
def test_a_flag_says_its_field(given: dict[str, Any], field: str, value: object) -> None:
    [request] = JobOptions(**given, cwd="").requests(["true"])
    assert request == {"command": ["true"], field: value}
