"""Ended jobs that another daemon knows and this one does not: asked for, stretch by stretch.

A history is fed from the journal, and the journal is pruned. So a standby that first follows today, or was away for
long, lacks what ended before; and a leader that took over early may lack what its predecessor, now its standby, has.
Each of the two compares what it has with what the other has, by how many jobs there are in each stretch of numbers,
and asks for the stretches that differ, newest first. Rows that are here already stay as they are: the view of an ended
job never changes. Nothing waits for this, and it takes its time: a standby is one long before it is through.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque

import msgspec
import structlog

from gpuyard_daemon.history import SPAN_JOBS, History
from gpuyard_daemon.leadership import CountHistory, HistoryCounts, HistoryRows, Presence, ReadHistory
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.codec import Malformed

log = structlog.get_logger("history")

#: Views of one answer: some hundred jobs. With the pause between two, 10 MB a second at most: nobody's turn waits.
ANSWER_BYTES = 512 * 1024
PAUSE_S = 0.05
RETRY_S = 10.0
#: Processes remembered whose history is here: one forgotten costs a comparison of counts.
DONE_MAX = 64


class HistoryCopy:
    def __init__(self, history: History, presence: Presence) -> None:
        self._history = history
        self._presence = presence
        #: Processes whose history this one has.
        self._done: deque[str] = deque(maxlen=DONE_MAX)
        presence.history = self.answer

    async def answer(self, asked: CountHistory | ReadHistory) -> HistoryCounts | HistoryRows | None:
        """What this history has; None where its disk gives nothing: whoever asked asks again."""
        try:
            if isinstance(asked, CountHistory):
                return HistoryCounts(spans=tuple(await self._history.counts()))
            views, last = await self._history.stored(asked.after, asked.below, ANSWER_BYTES)
        except sqlite3.Error as error:
            log.error("history.unreadable", error=str(error))
            return None
        return HistoryRows(views=tuple(map(msgspec.Raw, views)), last=last, is_all=last >= asked.below)

    async def copy_from(self, holder: str) -> bool:
        """Take over what that process has; whether that is done. Again and again costs nothing once it is."""
        if holder in self._done:
            return True
        began, copied = time.monotonic(), 0
        try:
            theirs = (await self._presence.counts_of(holder)).spans
            own = {span: (count, total) for span, count, total in await self._history.counts()}
            for span, count, total in reversed(theirs):
                if own.get(span) != (count, total):
                    copied += await self._copy_span(holder, span)
        except (BusError, Malformed, sqlite3.Error) as error:
            log.warning("history.uncopied", holder=holder, copied=copied, error=str(error))
            return False
        self._done.append(holder)
        log.info("history.copied", holder=holder, jobs=copied, seconds=round(time.monotonic() - began, 1))
        return True

    async def _copy_span(self, holder: str, span: int) -> int:
        after, below, copied = span * SPAN_JOBS - 1, (span + 1) * SPAN_JOBS, 0
        while True:
            rows = await self._presence.rows_of(holder, after, below)
            oldest_ms = time.time_ns() // 1_000_000 - self._history.keep_ms
            copied += await self._history.copy([bytes(view) for view in rows.views], oldest_ms)
            if rows.is_all or rows.last <= after:
                return copied
            after = rows.last
            await asyncio.sleep(PAUSE_S)

    async def follow_standbys(self) -> None:
        """For ever, while this process leads: what its standbys know and it does not."""
        while True:
            for standby in self._presence.standbys():
                await self.copy_from(standby.holder)
            await asyncio.sleep(RETRY_S)

    async def follow_leader(self, holder: str) -> None:
        """Until it is all here."""
        done = await self.copy_from(holder)
        while not done:
            await asyncio.sleep(RETRY_S)
            done = await self.copy_from(holder)
