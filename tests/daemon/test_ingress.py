"""From bytes to inputs: whatever is stored in SUB and REP becomes an input, an answer, or a counted drop."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_daemon.core.state.inputs import (
    CancelRequested,
    HoldRequested,
    Input,
    JobSubmitted,
    NodeReported,
    ReleaseRequested,
    RequestMalformed,
    RequeueRequested,
    ServiceApplied,
    ServiceDeleted,
)
from gpuyard_daemon.ingress import BATCH_JOBS_MAX, decode_report, decode_submission
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import ReportBatch, Started


def take(verb: str, payload: object, *, subject: str = "", counts: Counter[str] | None = None) -> list[Input]:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    message = StoredMessage(subject or f"sub.acme.alice.{verb}", data, 17)
    return decode_submission(message, Counter() if counts is None else counts)


def test_who_asks_is_read_from_the_subject_and_the_id_is_given() -> None:
    (job,) = take("submit", {"command": ["true"]})
    assert isinstance(job, JobSubmitted)
    assert (job.tenant, job.user, job.submission_id, job.chosen_id) == ("acme", "alice", "s17", False)


def test_a_chosen_id_is_kept_and_said_to_be_chosen() -> None:
    (job,) = take("submit", {"command": ["true"], "submission_id": "night-1"})
    assert isinstance(job, JobSubmitted)
    assert (job.submission_id, job.chosen_id) == ("night-1", True)


def test_each_verb_becomes_its_input() -> None:
    assert isinstance(take("cancel", {"job": 3})[0], CancelRequested)
    assert isinstance(take("hold", {"job": 3, "array": True})[0], HoldRequested)
    assert isinstance(take("release", {"job": 3})[0], ReleaseRequested)
    assert isinstance(take("requeue", {"job": 3, "hold": True})[0], RequeueRequested)
    assert isinstance(take("apply", {"name": "chat", "command": "serve"})[0], ServiceApplied)
    assert isinstance(take("delete", {"service": "chat"})[0], ServiceDeleted)


@pytest.mark.parametrize(
    ("verb", "payload", "path", "near"),
    [
        ("submit", {"command": ["true"], "gpu_memroy": "5Gi"}, "$.gpu_memroy", "gpu_memory"),
        ("submit", {"command": ["true"], "gpu_memory": "5"}, "$.gpu_memory", ""),
        ("submit", {"command": ["true"], "queue": "No Name"}, "$.queue", ""),
        ("submit-many", {"jobs": [{"command": ["true"], "array": "1-5"}]}, "$.jobs[0].array", ""),
        ("hold", {"job": 1, "for": "ever"}, "$.for", ""),
        ("submit", b"\xff\x00 no JSON", "$", ""),
        ("submti", {"command": ["true"]}, "subject", "submit"),
        ("cancel", {"job": -1}, "$.job", ""),
        ("cancel", {"job": 1, "submission_id": "S 1"}, "$.submission_id", ""),
        ("delete", {"service": "No Name"}, "$.service", ""),
        ("submit-many", {"jobs": [{"command": ["true"]}] * (BATCH_JOBS_MAX + 1)}, "$.jobs", ""),
    ],
)
def test_what_cannot_be_understood_is_answered(verb: str, payload: object, path: str, near: str) -> None:
    counts = Counter[str]()
    (refused,) = take(verb, payload, counts=counts)
    assert isinstance(refused, RequestMalformed)
    name = "s17-0" if path.startswith("$.jobs[") else "s17"
    assert (refused.submission_id, refused.path, refused.nearest) == (name, path, near)
    assert counts == {"malformed": 1}


def test_a_malformed_request_is_answered_under_the_id_it_chose() -> None:
    for payload in ({"submission_id": "mine", "gpus": "two"}, b'{"submission_id": "mine", "gpus": 2'):
        (refused,) = take("submit", payload)
        assert isinstance(refused, RequestMalformed)
        assert refused.submission_id == "mine"


def test_a_batch_is_taken_apart_and_one_wrong_job_spoils_no_other() -> None:
    jobs = [{"command": ["a"]}, {"command": ["b"], "gpus": -1}, {"command": ["c"], "submission_id": "own"}]
    first, second, third = take("submit-many", {"jobs": jobs, "submission_id": "night"})
    assert isinstance(first, JobSubmitted)
    assert (first.submission_id, first.chosen_id) == ("night-0", True)
    assert isinstance(second, RequestMalformed)
    assert (second.submission_id, second.path) == ("night-1", "$.jobs[1].gpus")
    assert isinstance(third, JobSubmitted)
    assert third.submission_id == "own"


def test_a_batch_without_an_id_gives_each_job_its_place() -> None:
    inputs = take("submit-many", {"jobs": [{"command": ["a"]}, {"command": ["b"]}]})
    assert [given.submission_id for given in inputs if isinstance(given, JobSubmitted)] == ["s17-0", "s17-1"]


@pytest.mark.parametrize("subject", ["sub.acme.alice", "sub.ac me.alice.submit", "sub.acme.al\\xffice.submit", "x"])
def test_what_belongs_to_nobody_is_counted_and_dropped(subject: str) -> None:
    counts = Counter[str]()
    assert take("", {"command": ["true"]}, subject=subject, counts=counts) == []
    assert counts == {"poison_submission": 1}


@given(st.sampled_from(["submit", "submit-many", "cancel", "apply", "delete", "x"]), st.binary(max_size=200))
def test_no_bytes_raise(verb: str, data: bytes) -> None:
    (refused,) = take(verb, data)
    assert isinstance(refused, RequestMalformed)


_KEYS = st.sampled_from(["command", "gpus", "gpu", "env", "jobs", "submission_id", "job", "service", "name", "v", "x"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(["submit", "submit-many", "cancel", "apply", "delete"]), st.dictionaries(_KEYS, _JSON))
def test_no_document_raises(verb: str, payload: dict[str, object]) -> None:
    take(verb, payload)


def report(node: str, subject: str, first: int = 1) -> NodeReported | None:
    batch = ReportBatch(
        node=node, instance="i", boot_id="b", first=first, reports=(Started(key=AssignmentKey(1, 1, 0), at_ms=1),)
    )
    return decode_report(StoredMessage(subject, encode(batch), 5), Counter())


def test_a_report_speaks_for_the_node_of_its_subject_alone() -> None:
    assert isinstance(report("n-1", "rep.n-1.report"), NodeReported)
    assert report("n-2", "rep.n-1.report") is None
    assert report("n-1", "rep.n-1") is None
    assert report("n-1", "rep.n-1.report", first=0) is None
    assert decode_report(StoredMessage("rep.n-1.report", b"\xff", 5), Counter()) is None
