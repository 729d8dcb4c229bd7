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


class Known:
    """Who knows some addresses, and learns others when it is asked to."""

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}
        self.sought: list[str] = []
        self.asked = 0
        self.is_blind = False

    def of(self, who: str, at: float | None = None) -> str:
        self.asked += 1
        return self.hosts.get(who, "")

    def seek(self, who: str) -> bool:
        self.sought.append(who)
        return not self.is_blind


@pytest.fixture
async def sited() -> tuple[Rig, Known]:
    rig, known = Rig(), Known()
    rig.log = AuditLog(rig.bus, lambda: 1000, known)
    return await rig.open(), known


async def test_an_entry_waits_for_its_address_and_others_do_not(sited: tuple[Rig, Known]) -> None:
    rig, known = sited
    known.hosts["operator olga"] = "10.0.0.1"
    rig.log.decided(5, [cancel("alice", "s1", 1), cancel("alice", "s2", 2)], [answered("acme", "s1")])
    rig.log.acted("operator olga", "cordon", "ok")
    assert [(entry.who, entry.where) for entry in await rig.entries()] == [("operator olga", "10.0.0.1")]
    assert set(known.sought) == {"user acme/alice"}
    known.hosts["user acme/alice"] = "10.0.0.2"
    rig.log.decided(6, [cancel("alice", "s2", 2)], [answered("acme", "s2")])
    newest, _ = await rig.entries()
    assert (newest.where, newest.count, newest.about, newest.until) == ("10.0.0.2", 2, "job 1", "job 2")


async def test_an_address_that_nobody_finds_is_said_to_be_unknown(
    sited: tuple[Rig, Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, known = sited
    rig.log.acted("operator olga", "cordon", "ok")
    assert await rig.entries() == []
    monkeypatch.setattr(audit, "WHERE_WAIT_S", 0.0)
    assert [entry.where for entry in await rig.entries()] == ["unknown"]
    monkeypatch.undo()
    rig.log.acted("operator olga", "drain", "ok")
    await rig.log.flush(is_last=True)
    known.is_blind = True
    rig.log.acted("operator olga", "uncordon", "ok")
    assert [(entry.what, entry.where) for entry in await rig.entries()] == [
        ("uncordon", "unknown"),
        ("drain", "unknown"),
        ("cordon", "unknown"),
    ]


async def test_who_acts_often_is_looked_up_once_a_second(sited: tuple[Rig, Known]) -> None:
    rig, known = sited
    known.hosts["user acme/alice"] = "10.0.0.2"
    for turn in range(50):
        name = f"s{turn}"
        rig.log.decided(turn, [cancel("alice", name, 1)], [answered("acme", name)])
    (entry,) = await rig.entries()
    assert (entry.count, entry.where, known.asked) == (50, "10.0.0.2", 1)
