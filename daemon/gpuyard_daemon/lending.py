"""The leader's newest snapshot, lent piece by piece to a standby that lacks a part of the journal.

Read from the disk once and kept while pieces of it are asked for, so that a standby gets one whole snapshot even when
the leader makes newer ones meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import structlog

from gpuyard_daemon.leadership import PIECE_BYTES, ReadSnapshot, SnapshotPiece
from gpuyard_daemon.snapshots import SnapshotCorrupt, SnapshotStore

log = structlog.get_logger("lending")

#: A snapshot that nobody has asked about for so long is let go of.
KEPT_S = 30.0


class _Lent(NamedTuple):
    sequence: int
    turn: int
    state: bytes


class SnapshotLender:
    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._lent: _Lent | None = None
        #: Monotonic time of the last question.
        self._asked_at = 0.0

    async def piece(self, asked: ReadSnapshot) -> SnapshotPiece:
        self._asked_at = time.monotonic()
        if self._lent is None or asked.sequence not in (0, self._lent.sequence):
            self._lent = await asyncio.to_thread(self._newest)
        lent = self._lent
        if lent is None or asked.sequence not in (0, lent.sequence) or asked.offset < 0:
            return SnapshotPiece(sequence=0)
        data = lent.state[asked.offset : asked.offset + PIECE_BYTES]
        return SnapshotPiece(sequence=lent.sequence, turn=lent.turn, size=len(lent.state), data=data)

    def forget(self) -> None:
        """Now and then: let go of what nobody asks for any more."""
        if self._lent is not None and time.monotonic() - self._asked_at > KEPT_S:
            self._lent = None

    def _newest(self) -> _Lent | None:
        for sequence, path in self._store.paths():
            try:
                header, state = self._store.read(path)
            except (SnapshotCorrupt, OSError) as error:
                log.error("snapshot.unreadable", file=str(path), error=str(error))
                continue
            return _Lent(sequence, header.turn, state)
        return None
