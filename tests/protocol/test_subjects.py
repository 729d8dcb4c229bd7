"""The subject grammar: what is built can be read, and what nobody built is poison."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_protocol import subjects
from gpuyard_protocol.names import is_name

NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)


def test_builders_follow_the_grammar() -> None:
    assert subjects.submission("acme", "alice", "submit") == "sub.acme.alice.submit"
    assert subjects.query("acme", "alice", "jobs") == "q.acme.alice.jobs"
    assert subjects.operation("olga", "nodes") == "adm.olga.nodes"
    assert subjects.load("acme", "chat") == "load.acme.chat"
    assert subjects.job_events("acme", 17) == "evt.acme.17"
    assert subjects.submission_events("acme", "s4") == "evt.acme.sub.s4"
    assert subjects.tenant_events("acme") == "evt.acme.>"
    assert subjects.commands("node-1") == "cmd.node-1"
    assert subjects.reports("node-1") == "rep.node-1.report"
    assert subjects.heartbeat("node-1") == "hb.node-1"
    assert subjects.telemetry("node-1") == "tel.node-1.devices"
    assert subjects.log("acme", 17, 0) == "log.acme.17.0"


@given(NAMES, NAMES, NAMES)
def test_what_is_built_is_read_back(tenant: str, user: str, verb: str) -> None:
    assert subjects.parse_tenant_subject(subjects.submission(tenant, user, verb)) == (tenant, user, verb)
    assert subjects.parse_tenant_subject(subjects.query(tenant, user, verb)) == (tenant, user, verb)
    assert subjects.parse_operation(subjects.operation(user, verb)) == (user, verb)
    assert subjects.parse_load(subjects.load(tenant, verb)) == (tenant, verb)
    for built in (subjects.reports(user), subjects.heartbeat(user), subjects.telemetry(user)):
        assert subjects.parse_node_subject(built) == user


POISON = [
    "",
    ".",
    "sub",
    "sub.acme",
    "sub.acme.alice",
    "sub.acme.alice.submit.now",
    "sub..alice.submit",
    "sub.acme.alice.",
    "sub.ACME.alice.submit",
    "sub.acme.al ice.submit",
    "sub.acme.*.submit",
    "sub.acme.alice.>",
    "sub.acme.alice.submit\n",
    "sub.acme.\u00e9.submit",
    "sub.acme.\ufffd.submit",
    "evt.acme.alice.submit",
    "SUB.acme.alice.submit",
]


@pytest.mark.parametrize("subject", POISON)
def test_poison_subjects_name_nobody(subject: str) -> None:
    assert subjects.parse_tenant_subject(subject) is None
    assert subjects.parse_operation(subject) is None
    assert subjects.parse_load(subject) is None
    assert subjects.parse_node_subject(subject) is None


@pytest.mark.parametrize(
    "subject", ["rep.n1", "rep.n1.report.x", "hb.n1.x", "hb", "tel.n1", "tel.N1.devices", "cmd.n1"]
)
def test_node_subjects_have_their_exact_length(subject: str) -> None:
    assert subjects.parse_node_subject(subject) is None


@given(st.text())
def test_any_subject_is_read_or_refused_without_an_error(subject: str) -> None:
    for found in (
        subjects.parse_tenant_subject(subject),
        subjects.parse_operation(subject),
        subjects.parse_load(subject),
    ):
        assert found is None or all(is_name(part) for part in found)
    node = subjects.parse_node_subject(subject)
    assert node is None or is_name(node)


@given(st.integers(1000, 2**60))
def test_the_streams_together_stay_inside_the_budget(budget_bytes: int) -> None:
    streams = subjects.streams("yard", budget_bytes)
    assert sum(spec.max_bytes for spec in streams) <= budget_bytes
    assert all(spec.max_bytes > 0 for spec in streams)


def test_streams_carry_the_name_of_the_yard() -> None:
    assert [spec.name for spec in subjects.streams("lab", 1000)] == ["SUB_lab", "REP_lab", "JRN_lab", "EVT_lab"]


def test_whoever_floods_is_refused_alone() -> None:
    streams = subjects.streams("lab", 1000)
    assert streams.submissions.discard_new_per_subject
    assert streams.reports.discard_new_per_subject
    assert not streams.journal.discard_old
