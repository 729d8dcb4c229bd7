"""What the documents show people to write is what the yard takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuyard_protocol import asyncapi
from gpuyard_protocol.codec import decode, from_plain
from gpuyard_protocol.jobs import JobRequest, SubmissionAnswer
from gpuyard_protocol.services import LoadReport, ServiceRequest

ROOT = Path(__file__).parents[2]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "messages.md")}
PAYLOADS = {
    (channel.address.split(".")[0], channel.address.split(".")[-1]): channel.payloads[0]
    for channel in asyncapi.every_channel()
    if channel.payloads
}


def sent(pattern: str) -> list[tuple[str, str]]:
    """(subject, payload) of every shell command in the documents that sends a message."""
    return [found for text in TEXTS.values() for found in re.findall(pattern, text, re.DOTALL)]


REQUESTS = sent(r"nats req (\S+) '(\{.*?\})'\n")


@pytest.mark.parametrize(("subject", "payload"), REQUESTS, ids=lambda text: text[:30])
def test_requests_by_hand_are_requests(subject: str, payload: str) -> None:
    parts = subject.split(".")
    message = decode(PAYLOADS[parts[0], parts[-1]], payload.encode())
    if isinstance(message, JobRequest | ServiceRequest):
        message.specify()


def test_there_are_requests_to_check() -> None:
    verbs = {subject.split(".")[-1] for subject, _ in REQUESTS}
    assert {"submit", "apply", "submission", "job", "why", "logs"} <= verbs


def test_a_load_report_by_hand_is_one() -> None:
    reports = sent(r"nats pub (load\.\S+) '(\{.*?\})'")
    assert [decode(LoadReport, payload.encode()).concurrency for _, payload in reports] == [40]


def test_the_shown_refusal_is_one() -> None:
    shown = re.findall(r"```json\n(\{\"submission_id\".*?\})\n```", TEXTS["messages.md"], re.DOTALL)
    assert [decode(SubmissionAnswer, text.encode()).path for text in shown] == ["$.gpu_memory"]


def test_the_files_in_the_readme_are_a_job_and_a_service() -> None:
    job = re.findall(r"```yaml\n(name: train.*?)```", TEXTS["README.md"], re.DOTALL)
    service = re.findall(r"\$ cat chat.yaml\n(.*?)\n\$", TEXTS["README.md"], re.DOTALL)
    assert from_plain(JobRequest, yaml.safe_load(job[0])).specify().need.gpus == 2
    assert from_plain(ServiceRequest, yaml.safe_load(service[0])).specify().max_replicas == 8


def table_fields() -> set[str]:
    table = TEXTS["messages.md"].split("### What a job may ask for")[1].split("###")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_honoured_field_of_a_job_is_in_the_table() -> None:
    notes: dict[str, Any] = asyncapi.field_notes(JobRequest)
    honoured = {
        field
        for field in JobRequest.__struct_fields__
        if not notes.get(field, "").startswith("Not honoured") and field not in ("v", "submission_id", "name")
    }
    assert table_fields() == honoured
