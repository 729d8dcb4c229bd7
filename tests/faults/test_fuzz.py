"""Whatever bytes come in, every decoder answers with the thing itself or with its one named error.

Requests, reports, orders, journal records, snapshots, ledgers, job files, context and configuration files, frames of
the supervisor's socket: each gets noise, text that nests without end, and objects whose fields are right and whose
values are anything. `FUZZ_EXAMPLES` sets how many of each (`make soak` sets more).
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpuyard
from gpuyard.requests import job_request, read_items, service_request
from gpuyard_agent import config as agent_config
from gpuyard_agent.core.model import Assignment
from gpuyard_agent.launch.messages import BadFrame, FrameBuffer, decode_answer, decode_request
from gpuyard_agent.ledger import Ledger, LedgerUnusable
from gpuyard_daemon import config as daemon_config
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.turn import Record
from gpuyard_daemon.ingress import decode_report, decode_submission
from gpuyard_daemon.snapshots import SnapshotCorrupt, SnapshotStore
from gpuyard_protocol import jobs, nodes, queries, resources, services
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.nodes import Command
from gpuyard_protocol.subjects import SUBMIT_VERBS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None)

KINDS: list[Any] = [
    kind
    for module in (jobs, nodes, queries, resources, services)
    for _, kind in sorted(vars(module).items())
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
] + [Record, cast("type", Command)]

#: Names that mean something somewhere, so that noise gets further than the first field.
_FIELDS = sorted(
    {field.encode_name for kind in KINDS if isinstance(kind, type) for field in msgspec.structs.fields(kind)}
)
_WORDS = (
    "type",
    "mode",
    "v",
    "start",
    "stop",
    "go",
    "orders",
    "sync",
    "joined",
    "ended",
    "whole",
    "mps",
    "accepted",
    "30s",
)
names = st.one_of(st.sampled_from(_FIELDS), st.sampled_from(("type", "mode")), st.text(max_size=6))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30)),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(_WORDS),
    st.sampled_from(("1.1.0", "5Gi", "1:30:00", "a.b", "GPU-1", "1g.10gb", "\x00", "é" * 9)),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6),
    max_leaves=20,
)
documents = st.dictionaries(names, values, max_size=10)
noise = st.one_of(
    st.binary(max_size=200),
    documents.map(lambda document: json.dumps(document).encode()),
    st.builds(lambda document, cut: json.dumps(document).encode()[:cut], documents, st.integers(0, 200)),
    st.builds(
        lambda text, times: text * times,
        st.sampled_from((b"[", b'{"a":', b'{"jobs":[', b"(", b"- ")),
        st.integers(1, 3000),
    ),
    st.integers(1, 6000).map(lambda digits: b"9" * digits),
)


def _of(kind: Any) -> st.SearchStrategy[bytes]:
    """Objects with the fields of this kind."""
    if not isinstance(kind, type):
        return noise
    own = [field.encode_name for field in msgspec.structs.fields(kind)] or ["v"]
    return st.one_of(noise, st.dictionaries(st.sampled_from(own), values).map(lambda found: json.dumps(found).encode()))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "__name__", "Command"))
@settings(max_examples=max(20, EXAMPLES // 3), deadline=None)
@given(data=st.data())
def test_a_message_is_read_or_malformed(kind: Any, data: st.DataObject) -> None:
    text = data.draw(_of(kind))
    complaint = _complaint(lambda: decode(kind, text), Malformed)
    if complaint is None:
        message = decode(kind, text)
        assert decode(kind, encode(message)) == message
    else:
        assert 0 < len(complaint) < 4000


@fuzzed
@given(
    verb=st.sampled_from((*SUBMIT_VERBS, "none")),
    data=noise,
    subject=st.sampled_from(("sub.acme.alice", "sub.acme", "")),
)
def test_whatever_a_tenant_submits_becomes_inputs(verb: str, data: bytes, subject: str) -> None:
    message = StoredMessage(f"{subject}.{verb}", data, 7)
    for given_input in decode_submission(message, Counter()):
        assert len(encode(given_input)) < 4 * len(data) + 4000


@fuzzed
@given(data=_of(nodes.ReportBatch), subject=st.sampled_from(("rep.n-1.report", "rep.n-1", "x")))
def test_whatever_a_node_reports_becomes_an_input_or_nothing(data: bytes, subject: str) -> None:
    decode_report(StoredMessage(subject, data, 7), Counter())


def _complaint(read: Callable[[], object], *errors: type[Exception]) -> str | None:
    """What a decoder has to say against its input; None: nothing. Any other error than its own is the test's."""
    try:
        read()
    except errors as error:
        return str(error)
    return None


def _written(data: bytes, suffix: str, read: Callable[[Path], object], *errors: type[Exception]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"file{suffix}"
        path.write_bytes(data)
        assert _complaint(lambda: read(path), *errors) != ""


#: What a person's editor, or somebody who means ill, leaves in a file.
texts = st.one_of(
    noise,
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.builds(lambda name, value: f"{name}: {json.dumps(value)}\n".encode(), st.sampled_from(_FIELDS), values),
    st.builds(lambda name, value: f"{name} = {json.dumps(value)}\n".encode(), st.sampled_from(_FIELDS), scalars),
    st.sampled_from(
        (b"a: &x [*x]", b"? [a]\n: b", b"!!python/object:os.system x", b"a: *b", b"<<: [1]", b"%YAML 9.9\n--- a")
    ),
)
#: Nine levels of ten aliases each: a gigabyte, if it is unfolded.
BOMB = b"".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}' if level else 'x'] * 10)}]\n".encode() for level in range(9)
)


def _jobs_of(path: Path) -> None:
    for item in read_items(path, "jobs"):
        job_request(item, {}).specify()
    for item in read_items(path, "services"):
        service_request(item, {}).specify()


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
@fuzzed
@example(data=b"a: 1\n" + b"9" * 6000)
@example(data=b"x: " + b"[" * 3000)
@example(data=b"x = " + b"[" * 3000)
@example(data=b"\xff\xfe")
@given(data=texts)
def test_a_job_file_is_read_or_refused_by_name(suffix: str, data: bytes) -> None:
    _written(data, suffix, _jobs_of, gpuyard.GpuyardError, Malformed)


def test_a_file_of_aliases_does_not_unfold() -> None:
    tracemalloc.start()
    try:
        _written(BOMB, ".yaml", _jobs_of, gpuyard.GpuyardError, Malformed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024


@fuzzed
@example(data=b"x = " + b"[" * 3000)
@given(data=texts)
def test_a_context_file_is_read_or_refused_by_name(data: bytes) -> None:
    _written(data, ".toml", gpuyard.load_context, gpuyard.GpuyardError)


@fuzzed
@example(data=b"x = " + b"[" * 3000)
@given(data=texts)
def test_a_configuration_file_is_read_or_refused_by_name(data: bytes) -> None:
    _written(data, ".toml", lambda path: daemon_config.load(path, {}), daemon_config.BadConfig)
    _written(data, ".toml", lambda path: agent_config.load(path, {}), agent_config.BadConfig)


@fuzzed
@given(data=st.one_of(noise, st.just(Scheduler().snapshot())), cut=st.integers(0, 400), put=st.binary(max_size=4))
def test_a_snapshot_is_restored_or_refused(data: bytes, cut: int, put: bytes) -> None:
    torn = data[:cut] + put + data[cut + len(put) :]
    assert _complaint(lambda: Scheduler.restore(torn), ValueError) != ""


@fuzzed
@given(state=noise, cut=st.integers(0, 600), put=st.binary(min_size=1, max_size=4))
def test_a_snapshot_file_is_whole_or_corrupt(state: bytes, cut: int, put: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = SnapshotStore(Path(directory), "lab")
        store.write(7, 3, state)
        store.reveal(7)
        path = store.path_of(7)
        whole = path.read_bytes()
        torn = whole[:cut] + put + whole[cut + len(put) :]
        path.write_bytes(torn)
        complaint = _complaint(lambda: store.read(path), SnapshotCorrupt)
        assert complaint != ""
        if complaint is None:
            assert store.read(path)[1] == state


@fuzzed
@given(
    data=st.lists(
        st.one_of(noise, st.builds(lambda size, body: size.to_bytes(4, "big") + body, st.integers(0, 90), noise)),
        max_size=4,
    )
)
def test_frames_of_the_supervisor_are_read_or_end_the_connection(data: list[bytes]) -> None:
    buffer = FrameBuffer()

    def feed() -> None:
        for piece in data:
            for body in buffer.feed(piece):
                for read in (decode_request, decode_answer):
                    assert _complaint(lambda read=read, body=body: read(body), BadFrame) != ""  # type: ignore[misc]  # defaults bind now

    assert _complaint(feed, BadFrame) != ""


@settings(max_examples=max(10, EXAMPLES // 6), deadline=None)
@example(body=b"[" * 3000, key="1.1.0", meta=1)
@given(body=st.none() | _of(Assignment), key=st.text(max_size=8) | st.just("1.1.0"), meta=values)
def test_a_ledger_is_loaded_or_unusable(body: bytes | None, key: str, meta: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.sqlite"
        Ledger(path, "n-1").close()
        database = sqlite3.connect(path)
        with database:
            if body is not None:
                database.execute("INSERT INTO assignments VALUES ('1.1.0', 'running', 1, 0, 'b', ?)", (body,))
            database.execute("INSERT INTO ended VALUES (?, ?)", (key, meta if isinstance(meta, str) else 3))
            database.execute("INSERT INTO meta VALUES ('applied', ?)", (repr(meta),))
        database.close()
        ledger = Ledger(path, "n-1")
        complaint = _complaint(lambda: ledger.load(0), LedgerUnusable)
        ledger.close()
        assert complaint is None or str(path) in complaint


@fuzzed
@given(data=st.binary(max_size=4096))
def test_a_ledger_file_of_noise_is_unusable(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.sqlite"
        path.write_bytes(b"SQLite format 3\x00" + data if len(data) % 2 else data)
        complaint = _complaint(lambda: Ledger(path, "n-1").close(), LedgerUnusable)
        assert complaint is None or str(path) in complaint
