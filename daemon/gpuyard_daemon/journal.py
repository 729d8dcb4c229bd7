"""The journal: one writer, fenced, one append in flight.

What the daemon decides becomes real when it is stored here and not before. Every append carries two conditions that
the server checks: the newest message on `jrn.leader` is still our own claim (so a deposed leader stores nothing, even
with messages long under way), and the stream's last sequence is the one we know (so nothing stands between our memory
and the stream).

When an append's outcome is unknown, because the answer or the server was lost, nothing else is sent: the tail is read
again. If our message is there the append happened; if the stream ends where we left it, the same message is sent
again under the same id; anything else means that somebody else writes, and is `LeadershipLost`.

This file knows nothing of records: it stores bytes and gives them back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
import structlog

from gpuyard_protocol.bus.base import (
    Bus,
    BusError,
    Disconnected,
    Message,
    PermissionDenied,
    PublishRefused,
    StoredMessage,
)
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.subjects import JOURNAL_ENTRY, JOURNAL_LEADER, JOURNAL_SNAPSHOT, stream_name

log = structlog.get_logger("journal")

#: JetStream's error codes that this file tells apart.
ERROR_WRONG_LAST_SEQUENCE = 10071
ERROR_CONFLICT_IN_FLIGHT = 10164
#: After this long without an answer the tail is read. Longer than a stream leader's election in a cluster takes.
APPEND_TIMEOUT_S = 8.0
RETRY_S = 0.05
#: For so long after the server last checked our claim we act without asking again. Shorter than what a standby waits.
PROOF_S = 2.0
#: How long to wait before an append is tried again that the stream refuses for want of room.
FULL_RETRY_S = 1.0
#: One look at the tail: a stream that has no leader for a moment does not answer, and has to be asked again.
TAIL_TIMEOUT_S = 2.5
#: Readings of a tail message that the stream says it has: a replica that answers may be behind for a moment.
TAIL_READS = 20

MESSAGE_ID = "Nats-Msg-Id"


class LeadershipLost(Exception):
    """Somebody else writes this journal, or it is not the one we know: this process must not decide anything more."""


class JournalRefused(Exception):
    """The journal cannot be written at all with this key or these settings; no retry will change that."""


class LeaderClaim(msgspec.Struct, frozen=True, kw_only=True):
    """On `jrn.leader`: from here on, appends must carry this message's sequence."""

    #: Random, one per process: tells our own claim from another's.
    holder: str
    host: str
    pid: int
    #: Wall time, for people.
    at_ms: int
    v: int = 1


class SnapshotPointer(msgspec.Struct, frozen=True, kw_only=True):
    """On `jrn.snap`: a snapshot of the state after the record at `sequence` exists."""

    sequence: int
    turn: int
    file: str
    sha256: str
    size: int
    v: int = 1


class Journal:
    """Replay, then `claim()`, then replay up to `epoch`, then `append()`.

    Every coroutine here may wait for the connection to come back; none gives up on its own.
    """

    def __init__(self, bus: Bus, yard: str, holder: str) -> None:
        self._bus = bus
        self._holder = holder
        self.stream = stream_name("JRN", yard)
        #: Sequence of our claim on `jrn.leader`; 0 before it.
        self.epoch = 0
        #: Sequence of the stream's last message, all of which we know.
        self.last_sequence = 0
        #: Why this process lost the journal; then it stores nothing any more.
        self.lost_because = ""
        self.appended_records = 0
        #: Monotonic time since when the append in flight waits; None while there is none.
        self.waiting_since: float | None = None
        self._lock = asyncio.Lock()
        #: Set when what we believe of the tail may be wrong: the connection was gone, an outcome is unknown.
        self._is_doubtful = False
        #: Boot time (it runs on while the process is suspended) at which a proof of our claim was asked for, seconds.
        self._proven_at = float("-inf")
        self._connected = asyncio.Event()
        self._connected.set()
        self._on_lost: Callable[[str], None] | None = None
        bus.on_disconnect(self._disconnected)
        bus.on_reconnect(self._reconnected)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Called with the reason when somebody else's claim is seen, possibly between two appends."""
        self._on_lost = callback

    # -- reading ------------------------------------------------------------------------------------------------------

    async def end(self) -> int:
        """Sequence of the stream's last message, 0 if it never had one."""
        return (await self._bus.stream_state(self.stream)).last_sequence

    async def replay(self, start: int, up_to: int, handler: Callable[[StoredMessage], None]) -> None:
        """Hand every message from `start` to `up_to` to `handler`, in order. There must be a message at `up_to`."""
        if start > up_to:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(messages: list[StoredMessage]) -> None:
            if done.done():
                return
            try:
                for message in messages:
                    if message.sequence <= up_to:
                        handler(message)
            except Exception as error:  # noqa: BLE001  not swallowed: it ends the replay where it was awaited
                done.set_exception(error)
                return
            if messages[-1].sequence >= up_to:
                done.set_result(None)

        reader = await self._bus.read_stream(self.stream, take, start=start, batch=512)
        try:
            await done
        finally:
            await reader.close()

    # -- leadership ---------------------------------------------------------------------------------------------------

    async def claim(self, host: str, pid: int, *, replacing: int | None = None) -> None:
        """Become the one writer. `LeadershipLost` if another process claims at the same moment and wins.

        `replacing`: sequence of the claim that is known to be given up (0: there was none); with None, whichever is
        the newest.
        """
        claim = LeaderClaim(holder=self._holder, host=host, pid=pid, at_ms=time.time_ns() // 1_000_000)
        previous = await self._newest_claim() if replacing is None else replacing
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(previous),
            MESSAGE_ID: f"claim-{self._holder}-{previous}",
        }
        try:
            ack = await self._bus.stream_publish(
                JOURNAL_LEADER, encode(claim), timeout=APPEND_TIMEOUT_S, headers=headers
            )
        except PublishRefused as refusal:
            if refusal.code in (ERROR_WRONG_LAST_SEQUENCE, ERROR_CONFLICT_IN_FLIGHT):
                raise LeadershipLost("another daemon claimed the journal at the same moment") from None
            raise JournalRefused(f"the claim on {self.stream} was refused: {refusal}") from None
        if ack.duplicate and await self._newest_claim() != ack.sequence:
            raise LeadershipLost("another daemon claimed the journal after an unanswered claim of ours")
        self.epoch = ack.sequence
        self.last_sequence = ack.sequence
        self._proven_at = _boot_s()
        await self._bus.subscribe(JOURNAL_LEADER, self._on_claim)

    async def _newest_claim(self) -> int:
        newest = await self._bus.last_message(self.stream, JOURNAL_LEADER)
        return newest.sequence if newest else 0

    async def is_ours(self) -> bool:
        """Whether this process may act on what it knows: it was proved within the last `PROOF_S`, or is proved now.

        A process that was suspended, or cut off for a while, asks here before it commands anything.
        """
        if self.lost_because:
            return False
        if _boot_s() - self._proven_at <= PROOF_S:
            return True
        asked_at = _boot_s()
        try:
            newest = await self._newest_claim()
        except BusError:
            return False
        if newest > self.epoch:
            self._lose(f"it was claimed at {newest}, ours is at {self.epoch}")
        if newest == self.epoch:
            self._proven_at = asked_at
        return newest == self.epoch

    def _on_claim(self, message: Message) -> None:
        try:
            claim = decode(LeaderClaim, message.data)
        except Malformed:
            return
        if claim.holder != self._holder:
            self._lose(f"{claim.host} (pid {claim.pid}) claimed it")

    def _lose(self, why: str) -> LeadershipLost:
        if not self.lost_because:
            self.lost_because = why
            if self._on_lost is not None:
                self._on_lost(why)
        return LeadershipLost(f"the journal {self.stream} is no longer ours: {self.lost_because}")

    # -- appending ----------------------------------------------------------------------------------------------------

    async def append(self, data: bytes, message_id: str) -> int:
        """Store one record; returns its sequence once it is durable, however long that takes."""
        sequence = await self._store(JOURNAL_ENTRY, data, message_id)
        self.appended_records += 1
        return sequence

    async def point_to_snapshot(self, pointer: SnapshotPointer) -> None:
        await self._store(JOURNAL_SNAPSHOT, encode(pointer), f"snap-{pointer.sequence}")

    async def _store(self, subject: str, data: bytes, message_id: str) -> int:
        async with self._lock:
            self.waiting_since = time.monotonic()
            try:
                while True:
                    sequence = await self._try_to_store(subject, data, message_id)
                    if sequence:
                        self.last_sequence = sequence
                        return sequence
            finally:
                self.waiting_since = None

    async def _try_to_store(self, subject: str, data: bytes, message_id: str) -> int:
        """One attempt: the sequence, or 0 if it must be tried again."""
        if self.lost_because:
            raise self._lose("")
        if self._is_doubtful:
            found = await self._find_in_tail(message_id)
            if found:
                return found
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(self.epoch),
            "Nats-Expected-Last-Subject-Sequence-Subject": JOURNAL_LEADER,
            "Nats-Expected-Last-Sequence": str(self.last_sequence),
            MESSAGE_ID: message_id,
        }
        sent_at = _boot_s()
        try:
            ack = await self._bus.stream_publish(subject, data, timeout=APPEND_TIMEOUT_S, headers=headers)
        except PublishRefused as refusal:
            return await self._after_refusal(refusal, message_id)
        except PermissionDenied as refusal:
            raise JournalRefused(str(refusal)) from None
        except BusError as error:
            if not isinstance(error, Disconnected):
                log.warning("append.unanswered", error=str(error), after=self.last_sequence)
            self._is_doubtful = True
            return 0
        if ack.sequence != self.last_sequence + 1:
            raise self._lose(f"an append went to {ack.sequence} instead of {self.last_sequence + 1}")
        self._proven_at = sent_at
        return ack.sequence

    async def _after_refusal(self, refusal: PublishRefused, message_id: str) -> int:
        """As `_try_to_store`: what a refused append means."""
        if refusal.code == ERROR_WRONG_LAST_SEQUENCE:
            # Our own message of an attempt before may be there already; otherwise the fence has spoken.
            found = await self._find_in_tail(message_id)
            if not found:
                raise self._lose("it refuses an append that fits its tail")
            return found
        if refusal.code == ERROR_CONFLICT_IN_FLIGHT:
            await asyncio.sleep(RETRY_S)
        else:
            log.error("append.refused", error=str(refusal), stream=self.stream)
            await asyncio.sleep(FULL_RETRY_S)
        return 0

    async def _find_in_tail(self, message_id: str) -> int:
        """The sequence of our message if the stream ends with it, 0 if the stream ends where we left it.

        Waits for a connection. Raises `LeadershipLost` if the stream holds anything that we did not write, or less.
        """
        while True:
            await self._connected.wait()
            self._is_doubtful = False
            try:
                async with asyncio.timeout(TAIL_TIMEOUT_S):
                    end = await self.end()
                    claim = await self._bus.last_message(self.stream, JOURNAL_LEADER)
                    tail = await self._read_tail(self.last_sequence + 1) if end > self.last_sequence else None
                break
            except (BusError, TimeoutError) as error:
                log.warning("journal.tail-unreadable", error=str(error) or "no answer")
                self._is_doubtful = True
                await asyncio.sleep(RETRY_S)
        if claim is not None and claim.sequence < self.epoch:
            # A replica that has not caught up yet answered.
            await asyncio.sleep(RETRY_S)
            return await self._find_in_tail(message_id)
        if claim is None or claim.sequence != self.epoch:
            raise self._lose(f"its newest claim is at {claim.sequence if claim else 0}, ours is at {self.epoch}")
        if end == self.last_sequence:
            return 0
        if end == self.last_sequence + 1 and tail is not None and tail.headers.get(MESSAGE_ID) == message_id:
            return end
        raise self._lose(f"it ends at {end}, and we know it up to {self.last_sequence}")

    async def _read_tail(self, sequence: int) -> StoredMessage | None:
        for _ in range(TAIL_READS):
            message = await self._bus.get_message(self.stream, sequence)
            if message is not None:
                return message
            await asyncio.sleep(RETRY_S)
        return None

    # -- pruning ------------------------------------------------------------------------------------------------------

    async def prune(self, up_to: int) -> None:
        """Drop what snapshots made superfluous. Our own claim stays, whatever `up_to` is: the fence rests on it."""
        await self._bus.purge_stream(self.stream, up_to=up_to, subject=JOURNAL_ENTRY)
        await self._bus.purge_stream(self.stream, up_to=up_to, subject=JOURNAL_SNAPSHOT)
        await self._bus.purge_stream(self.stream, up_to=min(up_to, self.epoch - 1), subject=JOURNAL_LEADER)

    # -- connection ---------------------------------------------------------------------------------------------------

    def _disconnected(self) -> None:
        self._connected.clear()
        self._is_doubtful = True
        self._proven_at = float("-inf")

    def _reconnected(self) -> None:
        self._connected.set()


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
