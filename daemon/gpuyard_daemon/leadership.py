"""Who leads: the leader's sign of life, its standbys' watch over it, and the hand-over between them.

Every daemon process listens on a subject of its own, `lead.<holder>`. A standby asks the leader there ten times a
second. That nobody listens any more is the server's own word that the leader's connection is gone; no answer while the
standby's connection works means a leader that hangs or is cut off; and a leader whose loop answers while its turns
stand still says so itself (`health`). Each of these lets the standby try a claim, and no more than that: whether it
leads is decided by the claim's compare-and-set in the journal, so a wrong guess here costs a change of leaders and
never two of them.

The sign of life comes from the loop that decides, on purpose: from a thread of its own it would go on while that loop
hangs, and the promise to replace a leader that hangs would have to wait for whatever such a thread still believes.

The same questions carry news the other way: the leader knows its standbys, how far they are, and from where on they
still need the journal; a standby that lacks a part of it is given the leader's newest snapshot; and either gives the
other the ended jobs that it has and the other lacks (`history_copy`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import NamedTuple

import msgspec
import structlog

from gpuyard_daemon.journal import LeaderClaim
from gpuyard_protocol.bus.base import Bus, BusError, Message, NoResponders, PermissionDenied, Unanswered
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.subjects import JOURNAL_LEADER, presence

log = structlog.get_logger("leadership")

#: How often a standby looks and asks, and how long it waits for one answer before it asks again.
ASK_INTERVAL_S = 0.1
ASK_TIMEOUT_S = 1.0
#: Nobody listens for so long: longer than a client's own reconnect takes, so that a broken connection is no death.
GONE_AFTER_S = 0.3
#: No answer for so long: longer than the longest that a loop stands still (a fork, a collection).
SILENT_AFTER_S = 3.0
#: A standby that has not asked for so long is none; …
STANDBY_FRESH_S = 2.0
#: … but what it needs of the journal is kept a while longer, over a restart of its host.
STANDBY_KEPT_S = 1800.0
#: Records that a standby may be behind and still be handed the lead.
HAND_OVER_BEHIND_MAX = 1000
HAND_OVER_TIMEOUT_S = 5.0
STANDBYS_MAX = 16
#: One piece of a snapshot on its way to a standby.
PIECE_BYTES = 512 * 1024
PIECE_TIMEOUT_S = 5.0
#: A history of millions of jobs is counted in seconds; an answer is one message, which the server takes up to 8 MB.
HISTORY_TIMEOUT_S = 30.0
HISTORY_BYTES_MAX = 8 * 1024 * 1024


class Watch(msgspec.Struct, frozen=True, tag="watch", kw_only=True):
    """A standby to its leader: do you live?"""

    holder: str
    host: str
    pid: int
    #: Journal sequence up to which the standby's state is.
    position: int
    #: The journal is needed after this sequence for the standby to start again from its own disk.
    kept: int
    v: int = 1


class ReadSnapshot(msgspec.Struct, frozen=True, tag="snapshot", kw_only=True):
    """A standby to its leader: a piece of your snapshot. `sequence` 0: of the newest one."""

    sequence: int
    offset: int
    v: int = 1


class TakeOver(msgspec.Struct, frozen=True, tag="take-over", kw_only=True):
    """The leader to a standby: I have stopped; claim in my place."""

    #: Sequence of the claim to be replaced.
    epoch: int
    v: int = 1


class CountHistory(msgspec.Struct, frozen=True, tag="history-counts", kw_only=True):
    """One daemon to another: which ended jobs does your history have?"""

    v: int = 1


class ReadHistory(msgspec.Struct, frozen=True, tag="history", kw_only=True):
    """One daemon to another: the ended jobs of your history with numbers above `after`, below `below`."""

    after: int
    below: int
    v: int = 1


Asked = Watch | ReadSnapshot | TakeOver | CountHistory | ReadHistory


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The leader's answer to `Watch`."""

    epoch: int
    #: The yard's time, Unix milliseconds.
    now_ms: int
    #: Sequence of the journal's last message.
    end: int
    v: int = 1
    #: Why it decides nothing although it answers; "" while it gets on.
    stalled: str = ""


class SnapshotPiece(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ReadSnapshot`; sequence 0: there is no snapshot (yet)."""

    sequence: int
    turn: int = 0
    size: int = 0
    data: bytes = b""
    v: int = 1


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """The standby's answer to `TakeOver`. Not taken: `why`."""

    epoch: int = 0
    why: str = ""
    v: int = 1


class HistoryCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `CountHistory`: for each stretch of job numbers (`history.SPAN_JOBS`) that has any ended jobs, its
    number, how many there are, and the sum of their numbers."""

    spans: tuple[tuple[int, int, int], ...] = ()
    v: int = 1


class HistoryRows(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ReadHistory`: the first of them, as `JobView` each, and whether these are all."""

    views: tuple[msgspec.Raw, ...] = ()
    #: Number of the last job looked at.
    last: int = 0
    is_all: bool = True
    v: int = 1


class Claim(NamedTuple):
    """A claim on the journal as it stands there."""

    sequence: int
    by: LeaderClaim

    @property
    def who(self) -> str:
        return f"{self.by.host} (pid {self.by.pid})"


class Standby(NamedTuple):
    """A standby as its leader knows it."""

    said: Watch
    #: Monotonic time of it.
    at: float


class Presence:
    """This process's own subject: what others ask of it, whether it leads or stands by."""

    def __init__(self, bus: Bus, holder: str) -> None:
        self._bus = bus
        self.holder = holder
        self.host = socket.gethostname()
        self.pid = os.getpid()
        #: False: the server's configuration knows nothing of this subject, so nobody can stand by.
        self.is_open = False
        #: Set while this process leads: the answer to `Watch`.
        self.alive: Callable[[], Alive] | None = None
        #: Set while this process leads: the answer to `ReadSnapshot`.
        self.piece: Callable[[ReadSnapshot], Coroutine[None, None, SnapshotPiece]] | None = None
        #: Answers `CountHistory` and `ReadHistory`, whether this process leads or stands by.
        self.history: Callable[[CountHistory | ReadHistory], Coroutine[None, None, object]] | None = None
        #: Set while this process stands by: called with the claim to replace and with whom to answer.
        self.take_over: Callable[[int, Callable[[Taken], None]], None] | None = None
        self._standbys: dict[str, Standby] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        try:
            await self._bus.subscribe(presence(self.holder), self._on_message)
            self.is_open = True
        except PermissionDenied:
            log.warning("standby.unavailable", why="the server's configuration is older than this daemon")

    def close(self) -> None:
        self.alive = self.piece = self.take_over = self.history = None
        for task in self._tasks:
            task.cancel()

    # -- what others ask -----------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        try:
            asked: Asked = decode(Asked, message.data)  # type: ignore[arg-type]  # a union, which `decode` takes
        except Malformed as error:
            log.warning("presence.malformed", error=str(error))
            return
        match asked:
            case Watch():
                self._note(asked)
                if self.alive is not None:
                    self._answer(message.reply, self.alive())
            case ReadSnapshot():
                if self.piece is not None:
                    self._spawn(self._send_when_there(message.reply, self.piece(asked)))
            case CountHistory() | ReadHistory():
                if self.history is not None:
                    self._spawn(self._send_when_there(message.reply, self.history(asked)))
            case TakeOver(epoch=epoch):
                if self.take_over is None:
                    self._answer(message.reply, Taken(why="it does not stand by"))
                else:
                    self.take_over(epoch, lambda taken: self._answer(message.reply, taken))

    def _note(self, said: Watch) -> None:
        if said.holder not in self._standbys:
            log.info("standby.appeared", host=said.host, pid=said.pid, position=said.position)
            while len(self._standbys) >= STANDBYS_MAX:
                del self._standbys[next(iter(self._standbys))]
        self._standbys.pop(said.holder, None)
        self._standbys[said.holder] = Standby(said, time.monotonic())

    def _answer(self, reply: str, answer: object) -> None:
        if reply:
            self._spawn(self._publish(reply, encode(answer)))

    async def _send_when_there(self, reply: str, coming: Coroutine[None, None, object]) -> None:
        answer = await coming
        if answer is not None:
            await self._publish(reply, encode(answer))

    async def _publish(self, reply: str, data: bytes) -> None:
        try:
            await self._bus.publish(reply, data)
        except BusError as error:
            log.warning("presence.unsent", error=str(error))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="presence")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def counts_of(self, holder: str) -> HistoryCounts:
        """What another daemon's history has. `BusError`, `Malformed`."""
        reply = await self._bus.request(presence(holder), encode(CountHistory()), timeout=HISTORY_TIMEOUT_S)
        return decode(HistoryCounts, reply.data, max_bytes=HISTORY_BYTES_MAX)

    async def rows_of(self, holder: str, after: int, below: int) -> HistoryRows:
        """Ended jobs from another daemon's history. `BusError`, `Malformed`."""
        question = ReadHistory(after=after, below=below)
        reply = await self._bus.request(presence(holder), encode(question), timeout=HISTORY_TIMEOUT_S)
        return decode(HistoryRows, reply.data, max_bytes=HISTORY_BYTES_MAX)

    # -- for the leader ------------------------------------------------------------------------------------------------

    def standbys(self) -> list[Watch]:
        """Those that are there now, the furthest first."""
        since = time.monotonic() - STANDBY_FRESH_S
        fresh = [standby.said for standby in self._standbys.values() if standby.at >= since]
        return sorted(fresh, key=lambda said: (-said.position, said.holder))

    def needed_after(self) -> int | None:
        """The journal is needed after this sequence by a standby's disk; None: by nobody's."""
        since = time.monotonic() - STANDBY_KEPT_S
        needs: dict[str, int] = {}
        for standby in self._standbys.values():
            if standby.at >= since:
                # One host's newest process speaks for its disk.
                needs[standby.said.host] = standby.said.kept
        return min(needs.values(), default=None)

    async def hand_over(self, epoch: int, end: int) -> str:
        """Let the furthest standby claim; who it is. A `BusError` if there is none or it did not."""
        heir = self.heir(end)
        if heir is None:
            raise BusError("no standby is there and up to date")
        reply = await self._bus.request(
            presence(heir.holder), encode(TakeOver(epoch=epoch)), timeout=HAND_OVER_TIMEOUT_S
        )
        try:
            taken = decode(Taken, reply.data)
        except Malformed as error:
            raise BusError(f"{heir.host} (pid {heir.pid}) answers what cannot be read: {error}") from None
        if not taken.epoch:
            raise BusError(f"{heir.host} (pid {heir.pid}) did not take over: {taken.why}")
        return f"{heir.host} (pid {heir.pid})"

    def heir(self, end: int) -> Watch | None:
        """The standby that would be handed the lead now."""
        return next((said for said in self.standbys() if end - said.position <= HAND_OVER_BEHIND_MAX), None)

    # -- for a standby -------------------------------------------------------------------------------------------------

    async def ask(self, claim: Claim, position: int, kept: int) -> Alive:
        """The leader's sign of life; `NoResponders` or `Unanswered` for what they say, `Disconnected` for nothing."""
        said = Watch(holder=self.holder, host=self.host, pid=self.pid, position=position, kept=kept)
        reply = await self._bus.request(presence(claim.by.holder), encode(said), timeout=ASK_TIMEOUT_S)
        return decode(Alive, reply.data)

    async def snapshot_of(self, claim: Claim) -> tuple[int, int, bytes] | None:
        """The leader's newest snapshot: sequence, turn, state; None if it has none (yet). `BusError`, `Malformed`."""
        subject = presence(claim.by.holder)
        pieces: list[bytes] = []
        sequence = received = 0
        while True:
            question = ReadSnapshot(sequence=sequence, offset=received)
            reply = await self._bus.request(subject, encode(question), timeout=PIECE_TIMEOUT_S)
            piece = decode(SnapshotPiece, reply.data, max_bytes=4 * PIECE_BYTES)
            if not piece.sequence:
                return None
            sequence = piece.sequence
            pieces.append(piece.data)
            received += len(piece.data)
            if received >= piece.size or not piece.data:
                return sequence, piece.turn, b"".join(pieces)


class Vigil:
    """What a standby makes of the leader's answers: how long nobody listens, how long nobody answers.

    Time counts only as far as this process was there to hear an answer, over a connection that held: a standby that was
    itself suspended, busy or cut off has seen nothing. What it did not see of a long pause is told by the next looks.
    """

    def __init__(self) -> None:
        self.gone_s = 0.0
        self.silent_s = 0.0
        #: The leader's own word that it decides nothing; "" while it does.
        self.stalled = ""

    def answered(self, stalled: str = "") -> None:
        self.gone_s = self.silent_s = 0.0
        self.stalled = stalled

    def absent(self, passed_s: float) -> None:
        """Nobody listens; the look before was so long ago."""
        self.gone_s += min(passed_s, 2 * ASK_INTERVAL_S)

    def silent(self, passed_s: float) -> None:
        """A question waits for its answer since the last look, so long ago."""
        self.silent_s += min(passed_s, 2 * ASK_INTERVAL_S)

    @property
    def verdict(self) -> str:
        """Why the leader counts as gone; "" while it does not."""
        if self.gone_s >= GONE_AFTER_S:
            return "its connection is gone"
        if self.silent_s >= SILENT_AFTER_S:
            return f"it has not answered for {self.silent_s:.1f} s"
        if self.stalled:
            return f"it answers and decides nothing: {self.stalled}"
        return ""


async def find_leader(bus: Bus, stream: str, own: Presence) -> tuple[Claim | None, bool]:
    """The journal's newest claim (None: there is none), and whether whoever made it may be alive."""
    claim = await newest_claim(bus, stream)
    if claim is None or not own.is_open or claim.by.holder == own.holder:
        return claim, False
    vigil = Vigil()
    while not vigil.verdict:
        try:
            await own.ask(claim, 0, 0)
            return claim, True
        except NoResponders:
            if claim.by.host == own.host and not _runs(claim.by.pid):
                return claim, False
            vigil.absent(ASK_INTERVAL_S)
        except PermissionDenied:
            return claim, False
        except (Unanswered, Malformed):
            return claim, True
        await asyncio.sleep(ASK_INTERVAL_S)
    return claim, False


async def newest_claim(bus: Bus, stream: str) -> Claim | None:
    newest = await bus.last_message(stream, JOURNAL_LEADER)
    return read_claim(newest.sequence, newest.data) if newest is not None else None


def read_claim(sequence: int, data: bytes) -> Claim:
    """A claim, whoever made it and however badly: what counts is its place in the stream."""
    try:
        return Claim(sequence, decode(LeaderClaim, data))
    except Malformed:
        return Claim(sequence, LeaderClaim(holder="", host="?", pid=0, at_ms=0))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
