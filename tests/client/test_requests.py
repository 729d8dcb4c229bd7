"""Job and service files, and what people hand in made into requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuyard.errors import GpuyardError, Rejected
from gpuyard.requests import BATCH_BYTES_MAX, BATCH_JOBS_MAX, batches, job_request, read_items
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobRequest


def items(tmp_path: Path, text: str, name: str = "jobs.yaml", key: str = "jobs") -> list[dict[str, Any]]:
    path = tmp_path / name
    path.write_text(text)
    return read_items(path, key)


def test_one_job_in_yaml_and_in_toml_are_the_same(tmp_path: Path) -> None:
    yaml = items(tmp_path, "command: [python, train.py]\ngpu: 0.3\ntime_limit: 1:30:00\n")
    toml = items(tmp_path, 'command = ["python", "train.py"]\ngpu = 0.3\ntime_limit = "1:30:00"\n', "job.toml")
    assert yaml == toml == [{"command": ["python", "train.py"], "gpu": 0.3, "time_limit": "1:30:00"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.yaml", "- {command: a}\n- {command: b}\n"),
        ("documents.yaml", "command: a\n---\ncommand: b\n"),
        ("named.yaml", "jobs:\n  - command: a\n  - command: b\n"),
        ("tables.toml", '[[jobs]]\ncommand = "a"\n[[jobs]]\ncommand = "b"\n'),
    ],
)
def test_many_jobs_in_one_file(tmp_path: Path, name: str, text: str) -> None:
    assert items(tmp_path, text, name) == [{"command": "a"}, {"command": "b"}]


def test_yaml_is_read_without_the_guesses_of_its_first_version(tmp_path: Path) -> None:
    [item] = items(tmp_path, "a: no\nb: 1-12:00:00\nc: 2026-01-31\nd: 010\ne: true\nf: 12\ng: 0.5\nh: ~\n")
    assert item == {
        "a": "no", "b": "1-12:00:00", "c": "2026-01-31", "d": "010", "e": True, "f": 12, "g": 0.5, "h": None
    }  # fmt: skip


def test_numbers_in_env_are_text(tmp_path: Path) -> None:
    [item] = items(tmp_path, "command: a\nenv: {PORT: 80, NAME: x}\n")
    assert item["env"] == {"PORT": "80", "NAME": "x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty: expected jobs"),
        ("just words", "found 'just words'"),
        ("jobs: []\nowner: me\n", "'owner' stands beside 'jobs'"),
        ("a: [", r"jobs\.yaml is no YAML: line 1, column 5: .*while parsing a flow .* that began in line 1"),
    ],
)
def test_a_file_that_holds_no_jobs_says_so(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(GpuyardError, match=says):
        items(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpuyardError, match=r"cannot read .*none\.yaml: No such file"):
        read_items(tmp_path / "none.yaml", "jobs")


def test_fields_stand_above_the_request() -> None:
    base = JobRequest(command=["a"], gpus=1)
    assert job_request(base, {"gpus": 2}).gpus == 2
    assert job_request({"command": "a", "gpu": "30%"}, {}).gpu == 300
    assert job_request(base, {}) is base


def test_a_misspelt_field_is_rejected_with_the_nearest() -> None:
    with pytest.raises(Rejected) as caught:
        job_request(None, {"command": "a", "gpu_mem": "4Gi"})
    assert (caught.value.reason, caught.value.path, caught.value.nearest) == ("Malformed", "$.gpu_mem", "gpu_memory")


def test_batches_respect_count_and_size() -> None:
    small = [JobRequest(command=["true"]) for _ in range(BATCH_JOBS_MAX * 2 + 1)]
    assert [len(group) for group in batches(small)] == [BATCH_JOBS_MAX, BATCH_JOBS_MAX, 1]
    large = [JobRequest(script="x" * 200_000) for _ in range(9)]
    groups = list(batches(large))
    assert sum(map(len, groups)) == 9
    assert all(sum(len(encode(job)) for job in group) <= BATCH_BYTES_MAX for group in groups)
