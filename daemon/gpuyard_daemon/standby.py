"""Standing by: a second daemon that has the leader's state and waits for its place.

The journal is read as it grows and applied to a core of this process's own, so that nothing is left to replay when
the leader is gone. This file decides nothing about jobs and sends nothing to nodes; it makes its own snapshots and
history, so that it can also start again from its own disk. A standby that was away too long finds that the journal
begins after its newest snapshot; it is given the leader's, and the ended jobs that it has not heard of.

The way to the lead: read the journal to its end, claim in the place of the claim that was watched (another standby
may be quicker: then that one is watched from now on), read up to the own claim. Nobody else can append after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from gpuyard_daemon import recovery
from gpuyard_daemon.clock import YardClock, boot_elapsed_ns
from gpuyard_daemon.config import DaemonConfig
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.health import Health
from gpuyard_daemon.history import History
from gpuyard_daemon.history_copy import HistoryCopy
from gpuyard_daemon.journal import Journal, LeadershipLost
from gpuyard_daemon.leadership import (
    ASK_INTERVAL_S,
    Claim,
    Presence,
    Taken,
    Vigil,
    newest_claim,
    read_claim,
)
from gpuyard_daemon.recovery import PartMissing, Replay, StartLater, StartRefused
from gpuyard_daemon.snapshots import SnapshotStore, start_child, wait_for_child
from gpuyard_protocol.bus.base import Bus, BusError, NoResponders, StoredMessage, StreamReader
from gpuyard_protocol.codec import Malformed
from gpuyard_protocol.service.sd_notify import Notifier
from gpuyard_protocol.subjects import JOURNAL_ENTRY, JOURNAL_LEADER, stream_name

log = structlog.get_logger("standby")

#: Messages applied before the loop gets a turn: a record of a thousand jobs takes some tens of milliseconds.
BATCH = 16
#: Derived lists of the core, the history, a snapshot that is due: looked at this often.
UPKEEP_S = 2.0
#: How long to wait before the leader is asked again for a snapshot that it has not made yet.
NO_SNAPSHOT_S = 2.0


@dataclass(slots=True)
class Ground:
    """What a daemon stands on before it leads."""

    config: DaemonConfig
    health: Health
    bus: Bus
    history: History
    store: SnapshotStore
    presence: Presence
    notifier: Notifier
    copies: HistoryCopy | None = None


@dataclass(slots=True)
class Succession:
    """What a standby that took over begins with."""

    core: Scheduler
    journal: Journal
    replay: Replay
    clock: YardClock | None


class Follower:
    """The journal applied to a core as it grows, from a snapshot on."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        restored = recovery.restore(ground.store)
        settings = ground.config.scheduler
        self.core = Scheduler(settings) if restored.state is None else Scheduler.restore(restored.state, settings)
        self.replay = Replay(self.core, ground.history, restored.sequence)
        self._start = min(restored.sequence, ground.history.through) + 1
        #: Everything up to this sequence is in the core.
        self.position = self._start - 1
        #: Of the last record, the place a snapshot made now would stand for.
        self._last_entry = restored.sequence
        #: The newest claim seen in the journal.
        self.claim: Claim | None = None
        self._records_at_snapshot = 0
        self._snapshot_at = time.monotonic()
        self._snapshot: asyncio.Task[None] | None = None
        self._reader: StreamReader | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        #: Why nothing more can be applied.
        self.failure: asyncio.Future[StartRefused] = asyncio.get_running_loop().create_future()
        self.snapshots_made = 0
        #: The journal is needed after this sequence to start again from this disk.
        self.kept = self._oldest_snapshot()

    @property
    def stream(self) -> str:
        return stream_name("JRN", self._ground.config.yard)

    async def open(self) -> None:
        self._reader = await self._ground.bus.read_stream(self.stream, self._take, start=self._start, batch=BATCH)

    async def close(self) -> None:
        """Nothing is applied any more when this returns; a snapshot under way is given up."""
        if self._reader is not None:
            await self._reader.close()
        if self._snapshot is not None:
            self._snapshot.cancel()
            await asyncio.gather(self._snapshot, return_exceptions=True)

    def _take(self, messages: list[StoredMessage]) -> None:
        if self.failure.done():
            return
        try:
            for message in messages:
                if message.subject == JOURNAL_LEADER and (self.claim is None or message.sequence > self.claim.sequence):
                    self.claim = read_claim(message.sequence, message.data)
                self.replay.take(message)
                if message.subject == JOURNAL_ENTRY:
                    self._last_entry = max(self._last_entry, message.sequence)
                self.position = message.sequence
        except StartRefused as refusal:
            self.failure.set_result(refusal)
            return
        for sequence, reached in self._waiting:
            if sequence <= self.position and not reached.done():
                reached.set_result(None)

    async def reach(self, sequence: int) -> None:
        """Return when everything up to a sequence is applied; there must be a message at or after it."""
        if self.position < sequence:
            reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((sequence, reached))
            both: list[asyncio.Future[Any]] = [reached, self.failure]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            self._waiting.remove((sequence, reached))
        if self.failure.done():
            raise self.failure.result()

    # -- its own disk --------------------------------------------------------------------------------------------------

    def _oldest_snapshot(self) -> int:
        paths = self._ground.store.paths()
        return paths[-1][0] if paths else 0

    def look_after(self) -> None:
        """Now and then: keep what the core derives ready for its first turn, begin a snapshot that is due."""
        self.core.warm()
        if self._snapshot is None and self._is_snapshot_due():
            self._snapshot_at = time.monotonic()
            self._records_at_snapshot = self.replay.records
            self._snapshot = asyncio.get_running_loop().create_task(self._make_snapshot(), name="snapshot")
            self._snapshot.add_done_callback(self._forget_snapshot)

    def _is_snapshot_due(self) -> bool:
        new = self.replay.records - self._records_at_snapshot
        if not new or not self._last_entry:
            return False
        journal = self._ground.config.journal
        waited_ms = (time.monotonic() - self._snapshot_at) * 1000
        return not self._ground.store.paths() or new >= journal.snapshot_records or waited_ms >= journal.snapshot_after

    def _forget_snapshot(self, task: asyncio.Task[None]) -> None:
        self._snapshot = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("snapshot.failed", error=str(error))

    async def _make_snapshot(self) -> None:
        store, sequence = self._ground.store, self._last_entry
        if await wait_for_child(start_child(store, sequence, self.core.turn, self.core.snapshot)):
            gc.freeze()
            await asyncio.to_thread(store.reveal, sequence)
            for path in store.forget_old():
                path.unlink(missing_ok=True)
            self.snapshots_made += 1
            self.kept = self._oldest_snapshot()
            log.info("snapshot.made", sequence=sequence)


async def stand_by(ground: Ground, claim: Claim) -> Succession:
    """Follow the leader until this process has taken its place. `StartRefused` if it never can."""
    log.info("standing-by", leader=claim.who, epoch=claim.sequence)
    follower = Follower(ground)
    follower.claim = claim
    while True:
        await follower.open()
        watching = Watching(ground, follower)
        try:
            return await watching.until_ours()
        except PartMissing as missing:
            await follower.close()
            await _fetch_snapshot(ground, await newest_claim(ground.bus, follower.stream) or claim, missing)
            follower = Follower(ground)
            follower.claim = await newest_claim(ground.bus, follower.stream)
        except BaseException:
            await follower.close()
            raise
        finally:
            watching.close()


async def _fetch_snapshot(ground: Ground, claim: Claim, missing: PartMissing) -> None:
    """Put the leader's newest snapshot onto our disk. `StartLater` if the leader ends meanwhile."""
    ground.health.standby_of = f"{claim.who}, waiting for its snapshot"
    newest = max((sequence for sequence, _ in ground.store.paths()), default=0)
    while True:
        try:
            found = await ground.presence.snapshot_of(claim)
        except NoResponders:
            raise StartLater(f"the leader ended before it could lend its snapshot; {missing}") from None
        except (BusError, Malformed) as error:
            log.warning("snapshot.unfetched", error=str(error))
            found = None
        if found is not None and found[0] > newest:
            sequence, turn, state = found
            await asyncio.to_thread(ground.store.write, sequence, turn, state)
            await asyncio.to_thread(ground.store.reveal, sequence)
            # What was broken or too old must not be taken for the older of two good ones.
            for older, path in ground.store.paths():
                if older != sequence:
                    path.unlink(missing_ok=True)
            log.info("snapshot.fetched", sequence=sequence, bytes=len(state), leader=claim.who)
            return
        await asyncio.sleep(NO_SNAPSHOT_S)


class Watching:
    """One standby's eye on its leader, until this process leads."""

    def __init__(self, ground: Ground, follower: Follower) -> None:
        self._ground = ground
        self._follower = follower
        self._vigil = Vigil()
        #: Journal sequence that the leader said it is at, now and when it was first asked.
        self._end = 0
        self._first_end: int | None = None
        #: The leader's clock when it last answered, and this host's boot time then; nanoseconds.
        self._heard: tuple[int, int] | None = None
        #: The leader's own word that this process is to take over, and whom to tell.
        self._asked: tuple[int, Callable[[Taken], None]] | None = None
        self._wake = asyncio.Event()
        #: Sequence of the claim whose holder the vigil is about.
        self._watched = 0
        #: The question that has no answer yet.
        self._asking: asyncio.Task[None] | None = None
        self._is_told = False
        self._flushing: asyncio.Task[None] | None = None
        #: What the leader knows of ended jobs, on its way here; and which leader that is.
        self._copying: asyncio.Task[None] | None = None
        self._copying_from = ""
        ground.bus.on_disconnect(self._broke)
        ground.presence.take_over = self._take_over

    def close(self) -> None:
        self._ground.presence.take_over = None
        for task in (self._asking, self._copying):
            if task is not None:
                task.cancel()

    def _broke(self) -> None:
        """Our own connection ended: what was seen so far may have been its fault."""
        self._vigil.answered()

    def _take_over(self, epoch: int, answer: Callable[[Taken], None]) -> None:
        self._asked = (epoch, answer)
        self._wake.set()

    async def until_ours(self) -> Succession:
        loop = asyncio.get_running_loop()
        looked_after_at = looked_at = loop.time()
        while True:
            passed_s, looked_at = loop.time() - looked_at, loop.time()
            if self._follower.failure.done():
                raise self._follower.failure.result()
            if self._asked is not None:
                succession = await self._obey(*self._asked)
            else:
                self._look(passed_s)
                succession = await self._claim_if_gone()
            if succession is not None:
                return succession
            if loop.time() - looked_after_at >= UPKEEP_S:
                looked_after_at = loop.time()
                self._follower.look_after()
                # Not waited for: a disk that hangs must not blind the watch.
                if self._flushing is None or self._flushing.done():
                    self._flushing = loop.create_task(self._ground.history.flush(), name="history")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_INTERVAL_S):
                    await self._wake.wait()
            self._wake.clear()

    # -- the leader ----------------------------------------------------------------------------------------------------

    def _look(self, passed_s: float) -> None:
        """Ask if nothing is asked; else count the time without an answer, as far as this loop was there to hear it."""
        claim = self._follower.claim
        if claim is None or not self._ground.bus.is_connected:
            return
        if claim.sequence != self._watched:
            # Somebody else leads now: what was seen of the one before says nothing about it.
            self._watched = claim.sequence
            self._vigil.answered()
        if self._asking is not None and not self._asking.done():
            self._vigil.silent(passed_s)
        else:
            self._asking = asyncio.get_running_loop().create_task(self._ask(claim, passed_s), name="ask the leader")
        self._tell(claim)

    async def _ask(self, claim: Claim, passed_s: float) -> None:
        follower = self._follower
        try:
            alive = await self._ground.presence.ask(claim, follower.position, follower.kept)
        except NoResponders:
            if claim.sequence == self._watched:
                self._vigil.absent(passed_s)
        except (BusError, Malformed):
            return  # The time without an answer is counted where it passes.
        else:
            self._vigil.answered(alive.stalled)
            self._heard = (alive.now_ms * 1_000_000, boot_elapsed_ns())
            self._end = alive.end
            if self._first_end is None:
                self._first_end = alive.end

    def _tell(self, claim: Claim) -> None:
        """Say how things stand, for health and for systemd."""
        behind = max(0, self._end - self._follower.position)
        self._ground.health.standby_of = f"{claim.who}, {behind} messages behind"
        self._ground.health.standby_behind = behind
        if not self._is_told and self._first_end is not None and self._follower.position >= self._first_end:
            self._is_told = True
            self._follower.core.warm()
            gc.collect()
            gc.freeze()
            log.info("standby.up-to-date", leader=claim.who, position=self._follower.position)
            self._ground.notifier.ready(f"standby of {claim.who}")
        if self._is_told and self._ground.copies is not None and claim.by.holder != self._copying_from:
            self._copying_from = claim.by.holder
            if self._copying is not None:
                self._copying.cancel()
            self._copying = asyncio.get_running_loop().create_task(
                self._ground.copies.follow_leader(claim.by.holder), name="history of the leader"
            )

    # -- taking over ---------------------------------------------------------------------------------------------------

    async def _claim_if_gone(self) -> Succession | None:
        claim, verdict = self._follower.claim, self._vigil.verdict
        if not verdict:
            return None
        log.warning("leader.gone", leader=claim.who if claim else "?", why=verdict)
        try:
            return await self._take_place(claim.sequence if claim else 0)
        except (LeadershipLost, BusError) as error:
            log.warning("claim.failed", error=str(error))
            self._vigil.answered()
            self._follower.claim = await self._newest() or claim
            return None

    async def _obey(self, epoch: int, answer: Callable[[Taken], None]) -> Succession | None:
        self._asked = None
        try:
            succession = await self._take_place(epoch)
        except (LeadershipLost, BusError) as error:
            answer(Taken(why=str(error)))
            return None
        answer(Taken(epoch=succession.journal.epoch))
        return succession

    async def _newest(self) -> Claim | None:
        try:
            return await newest_claim(self._ground.bus, self._follower.stream)
        except BusError:
            return None

    async def _take_place(self, replaced: int) -> Succession:
        began = time.monotonic()
        ground, follower = self._ground, self._follower
        journal = Journal(ground.bus, ground.config.yard, ground.presence.holder)
        await follower.reach(await journal.end())
        await journal.claim(ground.presence.host, ground.presence.pid, replacing=replaced)
        await follower.reach(journal.epoch)
        await follower.close()
        log.warning(
            "took-over", epoch=journal.epoch, turn=follower.core.turn, claim_ms=round((time.monotonic() - began) * 1e3)
        )
        return Succession(follower.core, journal, follower.replay, self._clock())

    def _clock(self) -> YardClock | None:
        """The leader's time, gone on: two hosts need not agree on the wall clock."""
        if self._heard is None:
            return None
        now_ns, at_ns = self._heard
        start_ns = max(self._follower.core.now_ms * 1_000_000, now_ns + boot_elapsed_ns() - at_ns)
        return YardClock(start_ns, wall_ns=time.time_ns, elapsed_ns=boot_elapsed_ns)
