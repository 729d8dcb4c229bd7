"""Snapshots, archive and pruning: what keeps a restart short and the journal small.

When enough has come since the last snapshot, one is made by a forked child, at a moment when the core's state is the
journal's. Once it is on disk, a pointer goes into the journal; then everything below the *older* of the two kept
snapshots is archived and pruned, so that a broken newest snapshot costs a longer replay and nothing else. Failures
are logged and tried again with the next snapshot: nothing here may hold up a turn.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

import structlog

from gpuyard_daemon.announce import Announcer
from gpuyard_daemon.archive import Archive
from gpuyard_daemon.config import JournalConfig
from gpuyard_daemon.history import History
from gpuyard_daemon.journal import Journal, JournalRefused, LeadershipLost, SnapshotPointer
from gpuyard_daemon.snapshots import SnapshotCorrupt, SnapshotStore, start_child, wait_for_child
from gpuyard_protocol.bus.base import BusError

log = structlog.get_logger("upkeep")

_MIB = 1024 * 1024
#: How long a snapshot waits for events of its time to be told; after that they count as lost.
TELLING_S = 30.0


class Upkeep:
    def __init__(
        self,
        config: JournalConfig,
        journal: Journal,
        store: SnapshotStore,
        archive: Archive,
        history: History,
        announcer: Announcer,
        state: Callable[[], bytes],
        turn: Callable[[], int],
        replayed: int,
        needed_after: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._store = store
        self._archive = archive
        self._history = history
        self._announcer = announcer
        self._state = state
        self._turn = turn
        #: After which sequence a standby's disk needs the journal; None: no standby needs any of it.
        self._needed_after = needed_after
        #: Records since the last snapshot; those replayed at the start count, so that they need no replay again.
        self._records = replayed
        self._bytes = 0
        self._last_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._last_entry = 0
        self._is_hastened = False
        self.snapshots_made = 0
        self.snapshots_failed = 0
        #: How long the loop stood still for the last fork, seconds.
        self.fork_s = 0.0

    def record_stored(self, sequence: int, size: int) -> None:
        self._records += 1
        self._bytes += size
        self._last_entry = sequence

    def hasten(self) -> None:
        """The journal fills: do not wait for the next snapshot's time."""
        self._is_hastened = True

    def settled(self) -> None:
        """The core's state is the journal's right now: begin a snapshot if one is due."""
        if self._task is None and self._is_due():
            self._begin()

    def _is_due(self) -> bool:
        if self._records == 0 or self._last_entry == 0:
            return False
        return (
            self._is_hastened
            or self._records >= self._config.snapshot_records
            or self._bytes >= int(self._config.snapshot_size) * _MIB
            or (time.monotonic() - self._last_at) * 1000 >= self._config.snapshot_after
        )

    def _begin(self) -> None:
        sequence, turn = self._last_entry, self._turn()
        self._records = self._bytes = 0
        self._is_hastened = False
        self._last_at = time.monotonic()
        try:
            child = start_child(self._store, sequence, turn, self._state)
        except OSError as error:
            log.error("snapshot.failed", error=str(error))
            self.snapshots_failed += 1
            return
        self.fork_s = time.monotonic() - self._last_at
        self._task = asyncio.get_running_loop().create_task(self._finish(child, sequence), name="snapshot")
        self._task.add_done_callback(self._forget_task)

    def _forget_task(self, _: asyncio.Task[None]) -> None:
        self._task = None

    async def _finish(self, child: int, sequence: int) -> None:
        if not await wait_for_child(child):
            self.snapshots_failed += 1
            log.error("snapshot.failed", sequence=sequence)
            return
        self.snapshots_made += 1
        # What lives now will mostly go on living: the collector need not look at it again.
        gc.freeze()
        try:
            # A restart tells again what the records after the snapshot had to tell, and no others.
            await self._announcer.until_told(sequence, TELLING_S)
            header = await asyncio.to_thread(self._store.reveal, sequence)
            await self._journal.point_to_snapshot(
                SnapshotPointer(
                    sequence=sequence,
                    turn=header.turn,
                    file=self._store.path_of(sequence).name,
                    sha256=header.sha256,
                    size=header.size,
                )
            )
            log.info("snapshot.made", sequence=sequence, bytes=header.size, fork_ms=round(self.fork_s * 1000, 1))
            await self._prune()
        except (BusError, OSError, SnapshotCorrupt) as error:
            log.warning("upkeep.postponed", error=str(error))
        except (LeadershipLost, JournalRefused) as error:
            # The turns will meet the same, and end the process.
            log.error("upkeep.stopped", error=str(error))

    async def _prune(self) -> None:
        for path in self._store.forget_old():
            await asyncio.to_thread(self._archive.take_snapshot, path)
        kept = self._store.paths()
        if len(kept) < 2:
            return
        await self._history.flush()
        up_to = min(kept[-1][0], self._history.through)
        others = self._needed_after()
        if others is not None:
            up_to = min(up_to, others)
        if up_to <= 0:
            return
        await self._archive.keep(self._journal, 1, up_to)
        await self._journal.prune(up_to)
        await asyncio.to_thread(self._archive.forget_old)
        log.info("journal.pruned", up_to=up_to)

    async def close(self) -> None:
        """Wait for a snapshot under way: its child must not outlive the daemon."""
        if self._task is not None:
            await self._task
