"""Decoding is validation: every malformed message says where, what was found and what was expected."""

from __future__ import annotations

import contextlib
import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_protocol import jobs, nodes, queries, services
from gpuyard_protocol.codec import (
    MAX_REQUEST_BYTES,
    Malformed,
    decode,
    encode,
    from_plain,
    json_schemas,
    to_plain,
)
from gpuyard_protocol.directives import CancelRequest
from gpuyard_protocol.jobs import BatchRequest, JobRequest
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Command, OrderBatch, ReportBatch
from gpuyard_protocol.queries import JobsQuery, LogsQuery
from gpuyard_protocol.services import LoadReport, ServiceRequest
from gpuyard_protocol.units import Cpus, Duration, GpuWish, Memory, MigProfile, Share

SHARE = "a fraction of one GPU between 0.001 and 1, such as 0.3 or '30%'"


@pytest.mark.parametrize(
    ("kind", "data", "path", "found", "expected"),
    [
        (JobRequest, b"[]", "$", "[]", "an object"),
        (JobRequest, b"null", "$", "null", "an object"),
        (JobRequest, b'{"gpu": 2}', "$.gpu", "2", SHARE),
        (JobRequest, b'{"gpu": true}', "$.gpu", "True", SHARE),
        (JobRequest, b'{"gpu": []}', "$.gpu", "[]", SHARE),
        (JobRequest, b'{"gpu_memory": 5}', "$.gpu_memory", "5", Memory.EXPECTED),
        (JobRequest, b'{"mig": "1g"}', "$.mig", "'1g'", MigProfile.EXPECTED),
        (JobRequest, b'{"gpu_model": "4"}', "$.gpu_model", "'4'", GpuWish.EXPECTED),
        (JobRequest, b'{"cpus": "four"}', "$.cpus", "'four'", Cpus.EXPECTED),
        (JobRequest, b'{"time_limit": 90}', "$.time_limit", "90", Duration.EXPECTED),
        (JobRequest, b'{"time_limit": "9999999w"}', "$.time_limit", "'9999999w'", "at most 36525d"),
        (JobRequest, b'{"replicas": "3"}', "$.replicas", '"3"', "an integer"),
        (JobRequest, b'{"replicas": 1.5}', "$.replicas", "1.5", "an integer"),
        (JobRequest, b'{"command": 5}', "$.command", "5", "text or a list or null"),
        (JobRequest, b'{"command": ["a", 1]}', "$.command[1]", "1", "text"),
        (JobRequest, b'{"env": {"A": 1}}', "$.env[...]", '{"A":1}', "text"),
        (JobRequest, b'{"allow_pending": "yes"}', "$.allow_pending", '"yes"', "true or false"),
        (JobRequest, b'{"v": 2}', "$.v", "2", "one of: 1"),
        (ServiceRequest, b'{"command": "x"}', "$.name", "nothing", "a value: the field is required"),
        (CancelRequest, b"{}", "$.job", "nothing", "a value: the field is required"),
        (CancelRequest, b'{"job": -1}', "$.job", "-1", "an integer >= 0"),
        (CancelRequest, b'{"job": 9007199254740992}', "$.job", "9007199254740992", "an integer <= 9007199254740991"),
        (LoadReport, b'{"concurrency": -1}', "$.concurrency", "-1", "an integer >= 0"),
        (LogsQuery, b'{"job": 1, "offset": -1e300}', "$.offset", "-1e300", "an integer"),
        (JobRequest, b"", "$", "", "JSON text in UTF-8"),
        (JobRequest, b'{"gpu": 0.3', "$", '{"gpu": 0.3', "JSON text in UTF-8"),
        (JobRequest, b'{"gpu": 0.3} x', "$", '{"gpu": 0.3} x', "JSON text in UTF-8"),
        (JobRequest, b'{"gpu": NaN}', "$", '{"gpu": NaN}', "JSON text in UTF-8"),
        (JobRequest, b"\xff\xfe\x00", "$", "\\xff\\xfe\N{REPLACEMENT CHARACTER}", "JSON text in UTF-8"),
        (JobRequest, b'{"name": "\xff"}', "$", '{"name": "\\xff"}', "JSON text in UTF-8"),
        (Command, b"{}", "$.type", "nothing", "a value: the field is required"),
        (Command, b'{"type": "explode"}', "$.type", '"explode"', "a value the field can hold"),
        (Command, b'{"type": "orders"}', "$.node", "nothing", "a value: the field is required"),
    ],
)  # fmt: skip
def test_malformed_says_where_what_and_what_instead(
    kind: type[Any], data: bytes, path: str, found: str, expected: str
) -> None:
    with pytest.raises(Malformed) as caught:
        decode(kind, data)
    error = caught.value
    assert (error.path, error.found) == (path, found)
    assert error.expected.startswith(expected)
    assert str(error).startswith(f"{path}: found {found}; expected {expected}")


@pytest.mark.parametrize(
    ("kind", "data", "path", "near", "known"),
    [
        (JobRequest, b'{"comand": "x"}', "$.comand", "command", "on_node_lost"),
        (JobRequest, b'{"gpu-memory": "5Gi"}', "$.gpu-memory", "gpu_memory", "gpus"),
        (ServiceRequest, b'{"replica": {"isolate": 1}}', "$.replica.isolate", "isolation", "gpus"),
        (BatchRequest, b'{"jobs": [{}, {"retry": 1}]}', "$.jobs[1].retry", "retries", "command"),
        (JobsQuery, b'{"zzzzzz": 1}', "$.zzzzzz", "", "cursor"),
    ],
)  # fmt: skip
def test_an_unknown_field_of_a_request_is_refused_with_the_nearest_known(
    kind: type[Any], data: bytes, path: str, near: str, known: str
) -> None:
    with pytest.raises(Malformed) as caught:
        decode(kind, data)
    error = caught.value
    assert (error.path, error.found, error.nearest) == (path, "an unknown field", near)
    assert error.expected.startswith("one of: ")
    assert known in error.expected.split(": ")[1].split(", ")


@pytest.mark.parametrize(
    ("kind", "data", "path"),
    [
        (JobRequest, b'{"isolation": "sof"}', "$.isolation"),
        (ServiceRequest, b'{"name": "a", "command": "x", "replica": {"isolation": "sof"}}', "$.replica.isolation"),
    ],
)
def test_a_word_that_is_not_allowed_is_answered_with_those_that_are(kind: type[Any], data: bytes, path: str) -> None:
    with pytest.raises(Malformed) as caught:
        decode(kind, data)
    error = caught.value
    assert (error.path, error.found, error.expected, error.nearest) == (
        path, '"sof"', "one of: hard, none, soft", "soft"
    )  # fmt: skip


def test_unknown_fields_between_daemon_and_agents_are_skipped() -> None:
    """Neighbours in version understand each other."""
    data = b'{"type": "orders", "node": "n", "instance": "i", "epoch": 1, "first": 1, "orders": [], "later": {"x": 1}}'
    assert decode(Command, data) == OrderBatch(node="n", instance="i", epoch=1, first=1, orders=())


def test_a_message_above_its_limit_is_refused_unread() -> None:
    with pytest.raises(Malformed, match=r"\$: found 262145 bytes; expected at most 262144 bytes"):
        decode(JobRequest, b"x" * (MAX_REQUEST_BYTES + 1))


def test_what_a_sender_wrote_reaches_no_log_unshortened_or_unprintable() -> None:
    for data in (
        b'{"gpu": "' + b"x" * 10_000 + b'"}',
        b'{"' + b"x" * 10_000 + b'": 1}',
        b'{"gpu": "\\u001b[31m"}',
        b'{"\\u001b[31m\\n": 1}',
        b"\x1b[31m",
    ):
        with pytest.raises(Malformed) as caught:
            decode(JobRequest, data)
        assert str(caught.value).isprintable()
        assert len(caught.value.path) <= 90
        assert len(caught.value.found) <= 80


def test_a_text_that_looks_like_a_path_does_not_move_the_blame() -> None:
    with pytest.raises(Malformed) as caught:
        decode(JobRequest, b'{"gpu": "x - at `$.name`"}')
    assert caught.value.path == "$.gpu"


@given(st.binary(max_size=400))
def test_random_bytes_are_a_message_or_malformed(data: bytes) -> None:
    for kind in (JobRequest, ServiceRequest, LoadReport, ReportBatch, nodes.Command):
        with contextlib.suppress(Malformed):
            decode(kind, data)  # type: ignore[arg-type]  # a union of structs is a type to msgspec


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
REQUESTS = (JobRequest, ServiceRequest, BatchRequest, LoadReport, JobsQuery, LogsQuery)


@given(
    st.sampled_from(REQUESTS),
    st.lists(st.tuples(st.integers(0, 60), JSON_VALUES), max_size=5),
    st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=1),
)
def test_any_values_in_known_fields_are_a_message_or_malformed(
    kind: type[Any], chosen: list[tuple[int, Any]], other: dict[str, Any]
) -> None:
    """Also through `specify`: whatever a tenant writes, the journal can hold what it means."""
    fields = kind.__struct_fields__
    plain = other | {fields[index % len(fields)]: value for index, value in chosen}
    try:
        message = decode(kind, json.dumps(plain).encode())
        if isinstance(message, JobRequest | ServiceRequest):
            encode(message.specify())
    except Malformed as error:
        refusal = error
    else:
        return
    assert refusal.path.startswith("$")
    assert str(refusal).isprintable()


def test_deep_nesting_is_malformed_and_no_crash() -> None:
    for data in (b"[" * 100_000, b'{"env":' * 30_000, b'{"zzz":' + b"[" * 100_000):
        with pytest.raises(Malformed):
            decode(JobRequest, data)


def test_equal_messages_give_equal_bytes_whatever_the_order_they_were_built_in() -> None:
    one = JobRequest(command="x", gpu=Share(300), name="n")
    other = JobRequest(name="n", gpu=Share(300), command="x")
    assert encode(one) == encode(other) == b'{"name":"n","command":"x","gpu":"0.3"}'


def test_requests_survive_the_wire_with_their_units() -> None:
    request = JobRequest(
        command=["a", "b"], gpu=Share(300), gpu_memory=Memory(5120), mig=None, gpu_model=GpuWish("A100:80GB"),
        cpus=Cpus(500), time_limit=Duration(90_000), env={"A": "1"},
    )  # fmt: skip
    again = decode(JobRequest, encode(request))
    assert again == request
    assert [type(value) for value in (again.gpu, again.gpu_memory, again.gpu_model, again.cpus, again.time_limit)] == [
        Share, Memory, GpuWish, Cpus, Duration
    ]  # fmt: skip
    assert from_plain(JobRequest, to_plain(request)) == request


def test_orders_and_reports_survive_the_wire() -> None:
    key = AssignmentKey(17, 1, 0)
    batch = OrderBatch(node="n", instance="i", epoch=9, first=3, orders=(nodes.Stop(key=key, reason="preempted"),))
    assert decode(Command, encode(batch)) == batch
    report = ReportBatch(
        node="n", instance="i", boot_id="b", first=1, reports=(nodes.Ended(key=key, outcome="exited", at_ms=5),)
    )
    assert decode(ReportBatch, encode(report)) == report


@pytest.mark.parametrize("plain", [{"name": {1, 2}}, {("a",): 1}, {"name": object()}, {"name": "\ud800"}])
def test_what_json_cannot_say_is_malformed(plain: object) -> None:
    with pytest.raises(Malformed):
        from_plain(JobRequest, plain)


def test_a_structure_that_holds_itself_is_malformed() -> None:
    plain: dict[str, object] = {}
    plain["env"] = plain
    with pytest.raises(Malformed):
        from_plain(JobRequest, plain)


def test_every_message_type_has_a_schema() -> None:
    kinds = [
        kind
        for module in (jobs, services, nodes, queries)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
    ]
    references, schemas = json_schemas([*kinds, *get_args(Command)])
    assert len(references) == len(kinds) + len(get_args(Command))
    assert {kind.__name__ for kind in kinds} <= set(schemas)
