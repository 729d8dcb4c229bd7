"""The audit's writer: what tenants and operators did and what became of it, into a stream that only grows.

It stands beside the scheduling loop, never in its way: a turn leaves its inputs and facts here by reference, and they
are told apart, joined and sent within the second. What would be the same entry again (one user's thousand accepted
jobs) becomes one entry with a count. Operators' actions are sent at once. Whoever acts right after connecting may do so
before it is heard from where: such an entry waits until it is, a few seconds at most, and then says `unknown`. What
waits is bounded; what is dropped at the bound is counted, and the count is in the next batch.

A daemon that is killed takes the last second with it (of those whose address is not known yet, the last three). What
it decided is in the journal all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import structlog

from gpuyard_daemon.core.state.facts import AnswerRepeated, Fact, JobAccepted, RequestAnswered
from gpuyard_daemon.core.state.inputs import (
    CancelRequested,
    HoldRequested,
    Input,
    JobSubmitted,
    ReleaseRequested,
    RequestMalformed,
    RequestRefused,
    RequeueRequested,
    ResumeRequested,
    RolloutAsked,
    ScaleRequested,
    ServiceApplied,
    ServiceDeleted,
    ServiceScaleAsked,
    SuspendRequested,
)
from gpuyard_daemon.recovery import ERROR_NO_ROOM, StartRefused
from gpuyard_protocol.audit import (
    AUDIT_DAEMON,
    AUDIT_HEAD,
    AuditBatch,
    AuditEntry,
    AuditPage,
    AuditQuery,
    audit_stream,
)
from gpuyard_protocol.bus.base import Bus, BusError, PublishRefused, StoredMessage, StreamUnavailable
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.jobs import SubmissionAnswer

log = structlog.get_logger("audit")

FLUSH_S = 1.0
#: How long an entry waits for its address, and how often it is looked whether that has come.
WHERE_WAIT_S = 3.0
WHERE_LOOK_S = 0.1
#: Said instead of an address that nobody knows.
UNKNOWN = "unknown"
#: Facts of turns that wait to be told apart.
FACTS_MAX = 100_000
#: Entries (after joining) that wait to be sent.
ENTRIES_MAX = 10_000
#: Of one message; an entry is 300 bytes at most, a message 1 MiB.
BATCH_ENTRIES_MAX = 2000
#: Facts told apart before the loop gets a turn.
SLICE_FACTS = 500
TEXT_MAX = 120
BATCH_BYTES_MAX = 1024 * 1024

_AboutJob = (
    CancelRequested
    | HoldRequested
    | ReleaseRequested
    | RequeueRequested
    | ScaleRequested
    | SuspendRequested
    | ResumeRequested
)
_AboutService = ServiceDeleted | ServiceScaleAsked | RolloutAsked
_Request = JobSubmitted | _AboutJob | ServiceApplied | _AboutService | RequestMalformed | RequestRefused
_VERBS: dict[type[_Request], str] = {
    JobSubmitted: "submit",
    CancelRequested: "cancel",
    HoldRequested: "hold",
    ReleaseRequested: "release",
    SuspendRequested: "suspend",
    ResumeRequested: "resume",
    RequeueRequested: "requeue",
    ScaleRequested: "scale",
    ServiceScaleAsked: "scale",
    RolloutAsked: "rollout",
    ServiceApplied: "apply",
    ServiceDeleted: "delete",
    RequestMalformed: "request",
    RequestRefused: "submit",
}


class Where(Protocol):
    """Who knows from where people act (`whereabouts`)."""

    def of(self, who: str, at: float | None = None) -> str:
        """From where somebody was connected at a monotonic time; "" where it is not known."""

    def seek(self, who: str) -> bool:
        """It should be found out: `of` will be asked again. False: it cannot be."""


class _Nowhere:
    """For a log on its own."""

    def of(self, who: str, at: float | None = None) -> str:
        return ""

    def seek(self, who: str) -> bool:
        return False


class _Run:
    """Entries alike but for what they are about. `noted_at`: monotonic."""

    def __init__(self, entry: AuditEntry, noted_at: float) -> None:
        self.first = entry
        self.last = entry
        self.count = 1
        self.noted_at = noted_at

    def add(self, entry: AuditEntry, count: int = 1) -> None:
        self.last = entry
        self.count += count

    def joined(self) -> AuditEntry:
        if self.count == 1:
            return self.first
        first = self.first
        return AuditEntry(
            at_ms=first.at_ms,
            who=first.who,
            what=first.what,
            outcome=first.outcome,
            where=first.where,
            about=first.about,
            count=self.count,
            until=self.last.about,
        )


class _Turn(NamedTuple):
    at_ms: int
    #: Monotonic.
    noted_at: float
    inputs: Sequence[Input]
    facts: Sequence[Fact]


async def open_audit(bus: Bus, yard: str, budget_bytes: int, replicas: int = 1) -> None:
    """Make the stream, or bring its settings up to date; `StartRefused` if the server has no room for it."""
    spec = audit_stream(yard, budget_bytes, replicas)
    try:
        await bus.ensure_stream(spec)
    except StreamUnavailable as error:
        if ERROR_NO_ROOM not in str(error):
            raise
        raise StartRefused(
            f"the NATS server has no room for {spec.name} ({spec.max_bytes // 2**20} MiB beside the yard's streams): "
            "set `budget` in [journal] to less, or the server's `max_file` to more"
        ) from None


class AuditLog:
    def __init__(self, bus: Bus, now_ms: Callable[[], int], where: Where | None = None) -> None:
        self._bus = bus
        self._where = where or _Nowhere()
        self._now_ms = now_ms
        self._turns: deque[_Turn] = deque()
        self._facts = 0
        self._runs: dict[tuple[str, str, str, str], _Run] = {}
        #: Those whose address is still to be found; in the order of their first entries.
        self._unplaced: dict[tuple[str, str, str, str], _Run] = {}
        #: A batch that is on its way, with its id: sent again unchanged until its outcome is known.
        self._batch: tuple[bytes, str] | None = None
        self._unsaid_lost = 0
        self._wake = asyncio.Event()
        #: Entries sent, and dropped because too many waited or the stream refused them.
        self.written = 0
        self.lost = 0

    # -- what happened -------------------------------------------------------------------------------------------------

    def decided(self, at_ms: int, inputs: Sequence[Input], facts: Sequence[Fact]) -> None:
        """A turn is in the journal. Nothing is done with it here."""
        self._turns.append(_Turn(at_ms, time.monotonic(), inputs, facts))
        self._facts += len(facts)
        while self._facts > FACTS_MAX and len(self._turns) > 1:
            dropped = len(self._turns.popleft().facts)
            self._facts -= dropped
            self._drop(dropped)

    def acted(self, who: str, what: str, outcome: str, *, about: str = "", where: str = "") -> None:
        """Somebody did, or tried, what is not a tenant's request; sent at once."""
        texts = (who[:TEXT_MAX], what[:TEXT_MAX], outcome[:TEXT_MAX])
        entry = AuditEntry(
            at_ms=self._now_ms(),
            who=texts[0],
            what=texts[1],
            outcome=texts[2],
            about=about[:TEXT_MAX],
            where=where[:TEXT_MAX],
        )
        self._add(entry, time.monotonic(), {})
        self._wake.set()

    def _add(self, entry: AuditEntry, noted_at: float, told: dict[str, str]) -> None:
        """`told`: addresses of the last second, for those who ask five hundred times in it."""
        where = entry.where or told.get(entry.who) or self._where.of(entry.who, noted_at)[:TEXT_MAX]
        if where:
            told[entry.who] = where
        elif not self._where.seek(entry.who):
            where = UNKNOWN
        runs = self._runs if where else self._unplaced
        key = (entry.who, entry.what, entry.outcome, where)
        if (run := runs.get(key)) is not None:
            run.add(entry)
        elif len(self._runs) + len(self._unplaced) < ENTRIES_MAX:
            runs[key] = _Run(msgspec.structs.replace(entry, where=where), noted_at)
        else:
            self._drop(1)

    def _place(self, *, is_last: bool) -> None:
        """Tell the addresses that have been found since, and let go what has waited long enough."""
        now = time.monotonic()
        for key, run in list(self._unplaced.items()):
            who, what, outcome, _ = key
            where = self._where.of(who, run.noted_at)[:TEXT_MAX]
            may_wait = not is_last and now - run.noted_at < WHERE_WAIT_S
            if not where and may_wait and self._where.seek(who):
                continue
            del self._unplaced[key]
            run.first = msgspec.structs.replace(run.first, where=where or UNKNOWN)
            placed = (who, what, outcome, run.first.where)
            if (later := self._runs.get(placed)) is not None:
                run.add(later.last, later.count)
            self._runs[placed] = run

    def _drop(self, entries: int) -> None:
        self.lost += entries
        self._unsaid_lost += entries

    # -- telling it apart ----------------------------------------------------------------------------------------------

    async def _digest(self) -> None:
        done, since, told = 0, float("-inf"), dict[str, str]()
        while self._turns:
            turn = self._turns.popleft()
            self._facts -= len(turn.facts)
            if turn.noted_at - since > FLUSH_S:
                since, told = turn.noted_at, {}
            asked = {(found.tenant, found.submission_id): found for found in turn.inputs if isinstance(found, _Request)}
            for fact in turn.facts:
                entry = _entry(turn.at_ms, fact, asked)
                if entry is not None:
                    self._add(entry, turn.noted_at, told)
            done += len(turn.facts)
            if done >= SLICE_FACTS:
                done = 0
                await asyncio.sleep(0)

    # -- sending -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: what happened, once a second or sooner."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WHERE_LOOK_S if self._unplaced else FLUSH_S):
                    await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self, *, is_last: bool = False) -> None:
        """Send what waits; what cannot be sent now waits on. `is_last`: nor for an address any more."""
        await self._digest()
        self._place(is_last=is_last)
        while self._bus.is_connected and (self._batch is not None or self._runs):
            if self._batch is None:
                self._batch = self._next_batch()
            data, batch_id = self._batch
            try:
                await self._bus.stream_publish(AUDIT_DAEMON, data, headers={"Nats-Msg-Id": batch_id})
            except PublishRefused as error:
                log.error("audit.refused", error=str(error))
                self._drop(1)
            except BusError as error:
                log.warning("audit.waits", error=str(error))
                return
            self._batch = None

    def _next_batch(self) -> tuple[bytes, str]:
        keys = list(self._runs)[:BATCH_ENTRIES_MAX]
        entries = tuple(self._runs.pop(key).joined() for key in keys)
        lost, self._unsaid_lost = self._unsaid_lost, 0
        self.written += len(entries)
        return encode(AuditBatch(entries=entries, lost=lost)), secrets.token_hex(12)


def _entry(at_ms: int, fact: Fact, asked: dict[tuple[str, str], _Request]) -> AuditEntry | None:
    """What a fact says about a tenant's request; None for facts about other things."""
    if type(fact) is JobAccepted:
        who, what, about, outcome = f"{fact.tenant}/{fact.user}", "submit", f"job {fact.job}", "accepted"
    elif type(fact) is RequestAnswered:
        answer = fact.answer
        request = asked.get((fact.tenant, answer.submission_id))
        who, what = _asker(fact.tenant, request)
        about = _about(answer, request)
        outcome = "accepted" if answer.accepted else answer.reason.code if answer.reason else "rejected"
    elif type(fact) is AnswerRepeated:
        who, what = _asker(fact.tenant, asked.get((fact.tenant, fact.submission_id)))
        about, outcome = f"submission {fact.submission_id}", "repeated"
    else:
        return None
    return AuditEntry(at_ms=at_ms, who=f"user {who}", what=what, outcome=outcome, about=about)


def _asker(tenant: str, request: _Request | None) -> tuple[str, str]:
    return (f"{tenant}/{request.user}", _VERBS[type(request)]) if request is not None else (f"{tenant}/?", "request")


def _about(answer: SubmissionAnswer, request: _Request | None) -> str:
    if isinstance(request, _AboutJob):
        return f"job {request.job}"
    if answer.service:
        return f"service {answer.service}"
    return f"job {answer.job}" if answer.job else f"submission {answer.submission_id}"


# --- reading ----------------------------------------------------------------------------------------------------------


async def read_audit(bus: Bus, yard: str, query: AuditQuery) -> AuditPage:
    """The newest entries, or those before the cursor. Whole messages: a page may be a little longer than asked for."""
    stream = audit_stream(yard).name
    newest = [await bus.last_message(stream, subject) for subject in (AUDIT_DAEMON, AUDIT_HEAD)]
    sequence = max((message.sequence for message in newest if message is not None), default=0)
    if query.cursor:
        sequence = min(sequence, query.cursor)
    entries: list[AuditEntry] = []
    while sequence > 0 and len(entries) < query.limit:
        message = await bus.get_message(stream, sequence)
        if message is None:
            return AuditPage(entries=tuple(entries))  # the oldest are gone
        entries.extend(reversed(_entries(message)))
        sequence -= 1
    return AuditPage(entries=tuple(entries), next=sequence)


def _entries(message: StoredMessage) -> Sequence[AuditEntry]:
    try:
        batch = decode(AuditBatch, message.data, max_bytes=BATCH_BYTES_MAX)
    except Malformed:
        return [AuditEntry(at_ms=message.stored_ms, who="?", what="unreadable", outcome=message.subject)]
    if batch.lost:
        lost = AuditEntry(at_ms=message.stored_ms, who="daemon", what="dropped", outcome="lost", count=batch.lost)
        return [lost, *batch.entries]
    return batch.entries
