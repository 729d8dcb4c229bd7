"""The audit's writer: what is joined, what is bounded, and what a lost connection or a full queue does to it."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_daemon import audit
from gpuyard_daemon.audit import AuditLog, open_audit, read_audit
from gpuyard_daemon.core.state.facts import AnswerRepeated, RequestAnswered
from gpuyard_daemon.core.state.inputs import CancelRequested, JobSubmitted, RequestMalformed
from gpuyard_protocol.audit import AuditEntry, AuditQuery
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.jobs import JobRequest, SubmissionAnswer, Why


def answered(tenant: str, submission: str, *, code: str = "", job: int = 0) -> RequestAnswered:
    reason = Why(code=code, text=code) if code else None
    answer = SubmissionAnswer(submission_id=submission, accepted=not code, job=job, reason=reason)
    return RequestAnswered(tenant, answer, 0, False)


def cancel(user: str, submission: str, job: int) -> CancelRequested:
    return CancelRequested(tenant="acme", user=user, submission_id=submission, job=job)


class Rig:
    def __init__(self) -> None:
        self.bus = MemoryBus(MemoryBroker())
        self.log = AuditLog(self.bus, lambda: 1000)

    async def open(self) -> Rig:
        await open_audit(self.bus, "lab", 2**30)
        return self

    async def entries(self, **query: int) -> list[AuditEntry]:
        await self.log.flush()
        return list((await read_audit(self.bus, "lab", AuditQuery(**query))).entries)


@pytest.fixture
async def rig() -> Rig:
    return await Rig().open()


async def test_who_what_about_and_outcome(rig: Rig) -> None:
    malformed = RequestMalformed(tenant="acme", user="bob", submission_id="s3", path="$", found="x", expected="y")
    spec = JobRequest(command="true").specify()
    again = JobSubmitted(tenant="acme", user="alice", submission_id="mine", spec=spec, chosen_id=True)
    rig.log.decided(
        500,
        [cancel("alice", "s1", 17), cancel("alice", "s2", 18), malformed, again],
        [
            answered("acme", "s1"),
            answered("acme", "s2", code="UnknownJob"),
            answered("acme", "s3", code="Malformed"),
            AnswerRepeated("acme", "mine"),
        ],
    )
    rig.log.acted("operator olga", "shutdown", "ok")
    newest_first = await rig.entries()
    assert [(entry.who, entry.what, entry.outcome, entry.about) for entry in reversed(newest_first)] == [
        ("operator olga", "shutdown", "ok", ""),
        ("user acme/alice", "cancel", "accepted", "job 17"),
        ("user acme/alice", "cancel", "UnknownJob", "job 18"),
        ("user acme/bob", "request", "Malformed", "submission s3"),
        ("user acme/alice", "submit", "repeated", "submission mine"),
    ]
    assert newest_first[-1].at_ms == 1000
    assert newest_first[0].at_ms == 500


async def test_a_run_of_equal_decisions_is_one_entry(rig: Rig) -> None:
    jobs = range(1, 1001)
    rig.log.decided(5, [cancel("alice", f"s{job}", job) for job in jobs], [answered("acme", f"s{job}") for job in jobs])
    (entry,) = await rig.entries()
    assert (entry.count, entry.about, entry.until) == (1000, "job 1", "job 1000")


async def test_what_waits_is_bounded_and_what_is_dropped_is_said(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "ENTRIES_MAX", 3)
    monkeypatch.setattr(audit, "FACTS_MAX", 10)
    for number in range(5):
        rig.log.acted(f"operator o{number}", "shutdown", "ok")
    for turn in range(3):
        rig.log.decided(turn, [], [answered("acme", f"s{turn}")] * 6)
    entries = await rig.entries()
    # Two of five operators did not fit; two of three turns were let go; the third's six found no room either.
    assert rig.log.lost == 2 + 12 + 6
    assert (entries[-1].what, entries[-1].count) == ("dropped", 20)
    assert len(entries) == 4


async def test_pages_lead_back_to_the_first_entry(rig: Rig) -> None:
    for number in range(7):
        rig.log.acted(f"operator o{number}", "shutdown", "ok")
        await rig.log.flush()
    seen, cursor = [], 0
    while True:
        page = await read_audit(rig.bus, "lab", AuditQuery(limit=3, cursor=cursor))
        seen += [entry.who for entry in page.entries]
        cursor = page.next
        if not cursor:
            break
    assert seen == [f"operator o{number}" for number in reversed(range(7))]


async def test_long_texts_are_cut(rig: Rig) -> None:
    rig.log.acted("operator olga", "x" * 5000, "ok", where="h" * 5000)
    (entry,) = await rig.entries()
    assert len(msgspec.json.encode(entry)) < 1000
