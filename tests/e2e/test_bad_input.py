"""What bad input gets, over real NATS and through the real command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from gpuyard_protocol import subjects
from gpuyard_protocol.bus import Message
from gpuyard_protocol.codec import decode
from gpuyard_protocol.jobs import SubmissionAnswer
from support.wire import publish_raw
from support.yard import Yard, running_yard


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB") as yard:
        yield yard


async def _answer(yard: Yard, payload: bytes, verb: str = "submit") -> SubmissionAnswer:
    """What a bare message gets on its submission's event subject."""
    context = gpuyard.load_context(yard.context)
    bus = await yard.tenant_bus()
    try:
        arrived: asyncio.Queue[Message] = asyncio.Queue()
        await bus.subscribe(subjects.tenant_events(context.tenant), arrived.put_nowait)
        ack = await bus.stream_publish(subjects.submission(context.tenant, context.user, verb), payload)
        wanted = {subjects.submission_events(context.tenant, f"s{ack.sequence}")}
        async with asyncio.timeout(10):
            while True:
                message = await arrived.get()
                if message.subject in wanted:
                    return decode(SubmissionAnswer, message.data)
    finally:
        await bus.close()


MALFORMED = {
    "an unknown field": (b'{"command": ["true"], "gpuz": 1}', "$.gpuz", "gpu"),
    "a wrong unit": (b'{"command": ["true"], "gpu_memory": "5 parsecs"}', "$.gpu_memory", "5Gi"),
    "a bare number where the unit would be a guess": (b'{"command": ["true"], "gpu_memory": 5}', "$.gpu_memory", "5Gi"),
    "a wrong type": (b'{"command": ["true"], "replicas": "two"}', "$.replicas", "int"),
    "no JSON": (b"submit this", "$", "JSON"),
    "bytes that are no text": (b"\xff\xfe\x00\x01", "$", "JSON"),
    "deep nesting": (b"[" * 50_000, "$", ""),
    "nothing": (b"", "$", "JSON"),
    "fields that exclude each other": (b'{"command": ["true"], "gpus": 1, "gpu": 0.5}', "$.gpu", "exclude"),
    "a directory in place of its content": (b'{"command": ["true"], "upload": "data"}', "$.upload", "sha256:"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_is_rejected_with_the_path_and_what_was_expected(yard: Yard, name: str) -> None:
    payload, path, expected = MALFORMED[name]
    answer = await _answer(yard, payload)
    assert not answer.accepted
    assert answer.reason is not None
    assert answer.reason.code == "Malformed"
    assert answer.path == path
    assert expected in answer.expected


async def test_poison_in_subject_reply_and_header_harms_nobody(yard: Yard) -> None:
    """The bus refuses to send such bytes, so they are written to the socket by hand; the yard goes on afterwards."""
    context = gpuyard.load_context(yard.context)
    subject = subjects.submission(context.tenant, context.user, "submit").encode()
    seed = Path(context.key).read_text().strip()
    for frame in (
        b"PUB " + subject + b"\xff\xfe 2\r\n{}\r\n",
        b"PUB " + subject + b" reply\xff\xfe 2\r\n{}\r\n",
        b"HPUB " + subject + b" 16 18\r\nNATS/1.0 \xff\xfe\r\n\r\n\r\n{}\r\n",
        b"HPUB " + subject + b" 4 6\r\nNATS{}\r\n",
    ):
        await publish_raw(context.url, seed, frame)
    async with yard.connect() as client:
        job = await client.submit(command=["true"])
        assert (await job.wait()).state == "succeeded"


IMPOSSIBLE = {
    "no such model": ({"gpus": 1, "gpu_model": "B300"}, "H100"),
    "more cards than any node has": ({"gpus": 5}, "4"),
    "more card memory than any card has": ({"gpu_memory": "200Gi"}, "Gi"),
    "no such MIG profile": ({"mig": "1g.11gb"}, "1g.10gb"),
    "more CPUs than any node has": ({"cpus": 1000}, "64"),
    "a gang larger than the pool": ({"gpus": 4, "replicas": 3}, "2"),
    "no such node": ({"nodes": ["node-9"]}, "node-"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
async def test_an_impossible_request_is_rejected_at_once_naming_what_exists(yard: Yard, name: str) -> None:
    fields, exists = IMPOSSIBLE[name]
    async with yard.connect() as client:
        with pytest.raises(gpuyard.Rejected) as refused:
            await client.submit(command=["true"], **fields)
        assert refused.value.reason == "Impossible"
        assert exists in str(refused.value)


async def test_allow_pending_keeps_an_impossible_request_waiting_with_its_reason(yard: Yard) -> None:
    async with yard.connect() as client:
        job = await client.submit(command=["true"], gpus=1, gpu_model="B300", allow_pending=True)
        assert (await client.job(job.number)).state == "pending"
        why = await client.why(job.number)
        assert any("B300" in reason.reason.text for reason in why.reasons)
        await client.cancel(job.number)


async def test_a_duplicate_submission_gets_the_first_ones_answer_and_one_run(yard: Yard) -> None:
    out = yard.scratch / "duplicate"
    async with yard.connect() as client:
        first = await client.submit(command=f"echo run >> {out}", submission_id="nightly-7")
        second = await client.submit(command=f"echo other >> {out}", submission_id="nightly-7")
        assert first.number == second.number
        assert (await first.wait()).state == "succeeded"
    assert out.read_text() == "run\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("cancel", "999999"), "999999"),
        (("job", "show", "999999"), "999999"),
        (("why", "999999"), "999999"),
        (("logs", "999999"), "999999"),
        (("nodes", "node-11"), "node-1"),
        (("services", "chta"), "chat"),
        (("delete", "chta"), "chat"),
    ],
)
async def test_an_unknown_name_in_a_command_exits_with_1_and_names_the_nearest(
    yard: Yard, arguments: tuple[str, ...], hint: str
) -> None:
    async with yard.connect() as client:
        await client.apply(name="chat", command=["sleep", "600"], min_replicas=0, max_replicas=1)
    done = await asyncio.to_thread(yard.cli, *arguments)
    assert done.returncode == 1, done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_message_beyond_its_size_is_refused_to_the_submitter(yard: Yard) -> None:
    async with yard.connect() as client:
        with pytest.raises(gpuyard.GpuyardError, match=r"(?i)size|bytes|large"):
            await client.submit(command=["true"], env={"BIG": "x" * 2_000_000})


async def test_every_read_prints_json(yard: Yard) -> None:
    for arguments in (("jobs",), ("nodes",), ("services",), ("stats",)):
        done = await asyncio.to_thread(yard.cli, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
