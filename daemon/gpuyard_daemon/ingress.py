"""From stored messages to inputs.

Tenants' requests are decoded by the types of the protocol; one that can be attributed to a tenant but not understood
becomes `RequestMalformed` and is answered like any other. What cannot be attributed at all (a subject that is none of
ours, a report that is not its node's) is poison: counted, logged, dropped, and the cursor moves past it. Who asks is
read from the subject alone.

Nothing in here decides about a request; nothing in here can raise on account of its bytes.

A place in a stream means something only while the stream goes on from there. A server that lost a stream's files goes
on from 1, and acknowledges new requests under numbers that were given before: they would be passed over here, and
whoever asks for one would be told of an old one. So after each reconnect nothing is purged and nobody is answered
before both streams are known to be as long as they were; one that is not ends the daemon, as it would at a start.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import structlog

from gpuyard_daemon.core.state.inputs import (
    CancelRequested,
    HoldRequested,
    Input,
    JobSubmitted,
    NodeReported,
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
from gpuyard_daemon.inbox import Inbox, Line, Waiting
from gpuyard_daemon.rates import Rates
from gpuyard_protocol.bus.base import Bus, BusError, StoredMessage, StreamReader, StreamUnavailable
from gpuyard_protocol.codec import MAX_BATCH_BYTES, MAX_REQUEST_BYTES, Malformed, RequestVersion, decode
from gpuyard_protocol.directives import CancelRequest, HoldRequest, RequeueRequest
from gpuyard_protocol.jobs import JobRequest, Why
from gpuyard_protocol.names import (
    NAME_EXPECTED,
    SUBMISSION_EXPECTED,
    SubmissionId,
    given_submission_id,
    is_name,
    is_submission_id,
    nearest,
)
from gpuyard_protocol.nodes import ReportBatch
from gpuyard_protocol.scaling import RolloutRequest, ScaleRequest
from gpuyard_protocol.services import DeleteRequest, ServiceRequest
from gpuyard_protocol.subjects import (
    SUBMIT_VERBS,
    Caller,
    parse_node_subject,
    parse_tenant_subject,
    stream_name,
)
from gpuyard_protocol.units import format_ms

log = structlog.get_logger("ingress")

#: How long a stream may look shorter than it was where several servers keep it: one that has just been elected may not
#: have applied yet what it has. Where one server keeps it, the first look counts.
ELECTED_LATELY_S = 5.0
#: How long it may be unknown to a server that has just started.
STARTED_LATELY_S = 10.0
LOOK_AGAIN_S = 0.1
ERROR_NO_STREAM = "JetStream error 10059"

#: Jobs in one `submit-many`.
BATCH_JOBS_MAX = 1000
#: What an element of an array counts for in a turn: two of the longest arrays do not go into one.
ELEMENT_BYTES = 16
#: What an agent may send in one batch of reports.
REPORT_BYTES_MAX = 1024 * 1024


class _Batch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`BatchRequest`, with each job left for later: one that is wrong must not spoil the others."""

    jobs: list[msgspec.Raw]
    v: RequestVersion = 1
    submission_id: str | None = None


class _Identified(msgspec.Struct):
    """The one field that a malformed request is answered under."""

    submission_id: str = ""


class Ingress:
    """Readers of SUB and REP that fill the inbox, and the purge of what the journal has taken in."""

    def __init__(self, bus: Bus, yard: str, inbox: Inbox, rates: Rates | None = None, *, replicas: int = 1) -> None:
        self._bus = bus
        self._inbox = inbox
        self.rates = rates or Rates()
        self._patience_s = 0.0 if replicas == 1 else ELECTED_LATELY_S
        self._submissions = stream_name("SUB", yard)
        self._reports = stream_name("REP", yard)
        self._readers: list[StreamReader] = []
        #: Up to where each stream was purged by this process.
        self._purged = {self._submissions: 0, self._reports: 0}
        #: Both streams are known to go on where they were left; False from a disconnect until it was looked at.
        self.is_verified = True
        self.on_verified: Callable[[], None] = lambda: None
        #: Called with what happened when a stream was set back.
        self.on_set_back: Callable[[str], None] = lambda why: None
        self._verifying: asyncio.Task[None] | None = None
        #: Messages by what was wrong with them: `poison_submission`, `poison_report`, `malformed`.
        self.counts: Counter[str] = Counter()

    async def open(self) -> None:
        self._readers = [
            await self._bus.read_stream(
                self._submissions, self._take_submissions, start=self._inbox.submissions.position + 1
            ),
            await self._bus.read_stream(self._reports, self._take_reports, start=self._inbox.reports.position + 1),
        ]
        for reader, line in zip(self._readers, (self._inbox.submissions, self._inbox.reports), strict=True):
            _connect_flow(reader, line)
        self._bus.on_disconnect(self._disconnected)
        self._bus.on_reconnect(self._reconnected)

    async def close(self) -> None:
        if self._verifying is not None:
            self._verifying.cancel()
        for reader in self._readers:
            await reader.close()

    async def purge(self, submissions: int, reports: int) -> None:
        """Drop what the journal has taken in. A failure is nothing: the next second does it."""
        if not self.is_verified:
            return
        for stream, up_to in ((self._submissions, submissions), (self._reports, reports)):
            if up_to <= self._purged[stream] or not self._bus.is_connected:
                continue
            try:
                await self._bus.purge_stream(stream, up_to=up_to)
                self._purged[stream] = up_to
            except BusError as error:
                log.warning("purge.failed", stream=stream, error=str(error))

    # -- the streams' ends ------------------------------------------------------------------------------------------

    def _disconnected(self) -> None:
        self.is_verified = False
        if self._verifying is not None:
            self._verifying.cancel()

    def _reconnected(self) -> None:
        self._verifying = asyncio.get_running_loop().create_task(self._verify(), name="verify the streams")

    async def _verify(self) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        while self._bus.is_connected:
            try:
                why, patience_s = await self._set_back()
            except BusError as error:
                log.warning("streams.unverified", error=str(error))
            else:
                if not why:
                    self.is_verified = True
                    self.on_verified()
                    return
                if now() - began >= patience_s:
                    self.on_set_back(why)
                    return
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _set_back(self) -> tuple[str, float]:
        """What is wrong with where the streams end, and how long that may be a server's first moments; "": nothing."""
        patience_s = self._patience_s
        for reader, stream in zip(self._readers, (self._submissions, self._reports), strict=True):
            read = reader.position
            try:
                end = (await self._bus.stream_state(stream)).last_sequence
            except StreamUnavailable as error:
                if ERROR_NO_STREAM not in str(error):
                    raise
                end, patience_s = 0, STARTED_LATELY_S
            if end < read:
                return (
                    f"the stream {stream} ends at {end}, and was read up to {read}: the NATS server lost its files. "
                    "What it acknowledged since, and what was in it unread, may be lost. Restore the NATS store"
                ), patience_s
        return "", 0.0

    # -- what arrives ----------------------------------------------------------------------------------------------

    def _take_submissions(self, messages: list[StoredMessage]) -> None:
        came_at = time.monotonic()
        for message in messages:
            try:
                inputs = tuple([self._within_rate(found, message) for found in decode_submission(message, self.counts)])
            except Exception:  # a stored message that trips us up would do so again at every start, for ever
                log.exception("submission.undecodable", sequence=message.sequence, subject=message.subject[:120])
                inputs = _given_up(message, self.counts)
            size = len(message.data) + _weight(inputs)
            self._inbox.submissions.put(Waiting(message.sequence, size, inputs, came_at))
        self._inbox.arrived()

    def _within_rate(self, found: Input, message: StoredMessage) -> Input:
        """The input, or its refusal where its tenant hands in too many."""
        if not isinstance(found, JobSubmitted | ServiceApplied):
            return found
        retry_after_ms = self.rates.take(found.tenant, message.stored_ms)
        if not retry_after_ms:
            return found
        self.counts["rate_limited"] += 1
        text = (
            f"tenant {found.tenant} may hand in {self.rates.describe(found.tenant)}: "
            f"try again in {format_ms(retry_after_ms)}, send many jobs as an array, or ask the yard's operator"
        )
        return RequestRefused(
            tenant=found.tenant,
            user=found.user,
            submission_id=found.submission_id,
            reason=Why("RateLimited", text),
            retry_after_ms=retry_after_ms,
        )

    def _take_reports(self, messages: list[StoredMessage]) -> None:
        came_at = time.monotonic()
        for message in messages:
            report = decode_report(message, self.counts)
            inputs = () if report is None else (report,)
            self._inbox.reports.put(Waiting(message.sequence, len(message.data), inputs, came_at))
        self._inbox.arrived()


def _connect_flow(reader: StreamReader, line: Line) -> None:
    line.pause, line.resume = reader.pause, reader.resume


# --- submissions -----------------------------------------------------------------------------------------------------


def decode_submission(message: StoredMessage, counts: Counter[str]) -> list[Input]:
    """What a message of SUB says: one input, for `submit-many` one per job, none if it is poison."""
    caller = parse_tenant_subject(message.subject)
    if caller is None:
        counts["poison_submission"] += 1
        log.warning("poison.submission", sequence=message.sequence, subject=message.subject[:120])
        return []
    try:
        if caller.verb == "submit-many":
            return _batch(caller, message, counts)
        return [_single(caller, message)]
    except Malformed as error:
        counts["malformed"] += 1
        given = given_submission_id(message.sequence)
        return [_malformed(caller, _chosen_id(message.data) or given, error)]


def _weight(inputs: tuple[Input, ...]) -> int:
    """What inputs count for beside their bytes, so that a turn takes few long arrays."""
    return sum(
        [
            given.spec.array.count * ELEMENT_BYTES
            for given in inputs
            if isinstance(given, JobSubmitted) and given.spec.array is not None
        ]
    )


def _given_up(message: StoredMessage, counts: Counter[str]) -> tuple[Input, ...]:
    """The answer to a request that tripped up the decoding itself: a fault of ours, told as what it is."""
    counts["malformed"] += 1
    caller = parse_tenant_subject(message.subject)
    if caller is None:
        return ()
    error = Malformed("$", "a request that this daemon fails to read", "another way of putting it (see its log)")
    return (_malformed(caller, given_submission_id(message.sequence), error),)


_ABOUT_JOB: dict[str, type[HoldRequested | ReleaseRequested | SuspendRequested | ResumeRequested]] = {
    "hold": HoldRequested, "release": ReleaseRequested, "suspend": SuspendRequested, "resume": ResumeRequested,
}  # fmt: skip


def _single(caller: Caller, message: StoredMessage) -> Input:
    tenant, user, verb = caller
    given = given_submission_id(message.sequence)
    match verb:
        case "submit":
            job = decode(JobRequest, message.data)
            return JobSubmitted(
                tenant=tenant,
                user=user,
                submission_id=job.submission_id or given,
                spec=job.specify(),
                chosen_id=job.submission_id is not None,
            )
        case "cancel":
            cancel = decode(CancelRequest, message.data)
            return CancelRequested(
                tenant=tenant,
                user=user,
                submission_id=_checked_id(cancel.submission_id) or given,
                job=cancel.job,
                array=cancel.array,
            )
        case "hold" | "release" | "suspend" | "resume":
            held = decode(HoldRequest, message.data)
            return _ABOUT_JOB[verb](
                tenant=tenant,
                user=user,
                submission_id=_checked_id(held.submission_id) or given,
                job=held.job,
                array=held.array,
            )
        case "requeue":
            again = decode(RequeueRequest, message.data)
            return RequeueRequested(
                tenant=tenant,
                user=user,
                submission_id=_checked_id(again.submission_id) or given,
                job=again.job,
                hold=again.hold,
                array=again.array,
            )
        case "apply":
            service = decode(ServiceRequest, message.data)
            return ServiceApplied(
                tenant=tenant, user=user, submission_id=service.submission_id or given, spec=service.specify()
            )
        case "scale" | "rollout":
            return _scaling(caller, message, given)
        case "delete":
            delete = decode(DeleteRequest, message.data)
            if not is_name(delete.service):
                raise Malformed("$.service", repr(delete.service)[:80], NAME_EXPECTED)
            return ServiceDeleted(
                tenant=tenant,
                user=user,
                submission_id=_checked_id(delete.submission_id) or given,
                service=delete.service,
            )
        case _:
            verbs = ", ".join(SUBMIT_VERBS)
            raise Malformed("subject", repr(verb), f"one of the verbs {verbs}", nearest(verb, SUBMIT_VERBS))


def _scaling(caller: Caller, message: StoredMessage, given: SubmissionId) -> Input:
    tenant, user, verb = caller
    if verb == "rollout":
        rollout = decode(RolloutRequest, message.data)
        if not is_name(rollout.service):
            raise Malformed("$.service", repr(rollout.service)[:80], NAME_EXPECTED)
        return RolloutAsked(
            tenant=tenant,
            user=user,
            submission_id=_checked_id(rollout.submission_id) or given,
            service=rollout.service,
            undo=rollout.action == "undo",
        )
    scale = decode(ScaleRequest, message.data)
    scale.check()
    submission_id = _checked_id(scale.submission_id) or given
    if scale.service is not None:
        return ServiceScaleAsked(
            tenant=tenant,
            user=user,
            submission_id=submission_id,
            service=scale.service,
            min_replicas=scale.replicas,
            max_replicas=scale.replicas if scale.max_replicas is None else scale.max_replicas,
        )
    return ScaleRequested(
        tenant=tenant, user=user, submission_id=submission_id, job=scale.job or 0, replicas=scale.replicas
    )


def _batch(caller: Caller, message: StoredMessage, counts: Counter[str]) -> list[Input]:
    batch = decode(_Batch, message.data, max_bytes=MAX_BATCH_BYTES)
    if len(batch.jobs) > BATCH_JOBS_MAX:
        raise Malformed("$.jobs", f"{len(batch.jobs)} jobs", f"at most {BATCH_JOBS_MAX} jobs in one message")
    prefix = _checked_id(batch.submission_id)
    if prefix is not None and len(prefix) > 60:
        raise Malformed("$.submission_id", repr(prefix), "at most 60 characters: each job's place is appended to it")
    inputs: list[Input] = []
    for index, raw in enumerate(batch.jobs):
        of_batch = f"{prefix}-{index}" if prefix is not None else given_submission_id(message.sequence, index)
        try:
            job = decode(JobRequest, bytes(raw))
            if job.array is not None:
                raise Malformed("$.array", repr(job.array)[:80], "no value here: an array travels alone, by `submit`")
            inputs.append(
                JobSubmitted(
                    tenant=caller.tenant,
                    user=caller.user,
                    submission_id=job.submission_id or of_batch,
                    spec=job.specify(),
                    chosen_id=job.submission_id is not None or prefix is not None,
                )
            )
        except Malformed as error:
            counts["malformed"] += 1
            path = f"$.jobs[{index}]{error.path.removeprefix('$')}"
            placed = Malformed(path, error.found, error.expected, error.nearest)
            inputs.append(_malformed(caller, _chosen_id(bytes(raw)) or of_batch, placed))
    return inputs


def _checked_id(submission_id: str | None) -> SubmissionId | None:
    if submission_id is not None and not is_submission_id(submission_id):
        raise Malformed("$.submission_id", repr(submission_id)[:80], SUBMISSION_EXPECTED)
    return submission_id


_IDENTIFIED = msgspec.json.Decoder(_Identified)
_ID_IN_TEXT = re.compile(rb'"submission_id"\s*:\s*"([a-z0-9-]{1,64})"')


def _chosen_id(data: bytes) -> SubmissionId:
    """The id that a malformed request chose, so that whoever waits for its answer gets it; "" for none."""
    if len(data) > MAX_BATCH_BYTES:
        return ""
    try:
        found = _IDENTIFIED.decode(data).submission_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        # Not even JSON, or an id of another type: the text may still say whom to answer.
        match = _ID_IN_TEXT.search(data[:MAX_REQUEST_BYTES])
        found = match[1].decode() if match else ""
    return found if is_submission_id(found) else ""


def _malformed(caller: Caller, submission_id: SubmissionId, error: Malformed) -> RequestMalformed:
    return RequestMalformed(
        tenant=caller.tenant,
        user=caller.user,
        submission_id=submission_id,
        path=error.path[:200],
        found=error.found[:200],
        expected=error.expected[:1000],
        nearest=error.nearest,
    )


# --- reports ---------------------------------------------------------------------------------------------------------


def decode_report(message: StoredMessage, counts: Counter[str]) -> NodeReported | None:
    """What a message of REP says; None if it is poison: unreadable, or about another node than its subject's."""
    node = parse_node_subject(message.subject)
    try:
        batch = decode(ReportBatch, message.data, max_bytes=REPORT_BYTES_MAX)
        if node is None or batch.node != node or batch.first < 1:
            raise Malformed("$.node", repr(batch.node)[:80], f"the node of the subject {message.subject[:80]}")
    except Malformed as error:
        counts["poison_report"] += 1
        log.warning("poison.report", sequence=message.sequence, subject=message.subject[:120], error=str(error))
        return None
    return NodeReported(
        node=batch.node,
        instance=batch.instance,
        boot_id=batch.boot_id,
        first=batch.first,
        reports=batch.reports,
        ledger=batch.ledger,
    )
