"""How full the streams are, and the disk under them: watched, so that nobody learns it from a refused message.

At `ALARM_PART` of a stream's bound, or of the disk, it is said once in the log and shown in metrics, in `gpuyard stats`
and `gpuyard nodes`, until it is over. A journal that full also gets its next snapshot early, since that is what empties
it.

When the journal or the disk has hardly any room left, the stream of submissions is closed: whoever submits is refused
at once and knows that nothing was stored, instead of waiting for an answer that a full disk cannot give. What is there
already is decided. The stream is opened again when there is room.

The disk is only watched where the server's store is on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import structlog

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.subjects import Streams
from gpuyard_protocol.units import format_mib

log = structlog.get_logger("levels")

ALARM_PART = 0.8
#: Parts of the journal's bound at which submissions are refused, and taken again.
CLOSE_PART, OPEN_PART = 0.95, 0.9
#: Free space on the disk below which submissions are refused, at most a tenth of a small disk; and how often that much
#: must be free before they are taken again.
CLOSE_FREE_BYTES = 192 * 1024**2
OPEN_FREE_TIMES = 2
#: How often the disk is looked at, and every how many looks the server is asked.
INTERVAL_S = 2.0
LOOKS_PER_ASKING = 5


class Disk(NamedTuple):
    free_bytes: int
    total_bytes: int

    @property
    def used_part(self) -> float:
        return 1 - self.free_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def close_bytes(self) -> int:
        return min(CLOSE_FREE_BYTES, self.total_bytes // 10)


def disk_at(path: Path) -> Disk:
    """As far as this account may fill it; `OSError` if it is not there."""
    found = os.statvfs(path)
    # What is kept for root counts as used.
    free, used = found.f_bavail, found.f_blocks - found.f_bfree
    return Disk(free * found.f_frsize, (free + used) * found.f_frsize)


class StreamLevels:
    """`disk`: reads how full the store's disk is; None: it is not on this machine."""

    def __init__(
        self,
        bus: Bus,
        names: Streams,
        on_full_journal: Callable[[], None],
        *,
        disk: Callable[[], Disk] | None = None,
    ) -> None:
        self._bus = bus
        self._names = names
        self._on_full_journal = on_full_journal
        self._read_disk = disk
        #: Part of its bound that each stream uses, by name; and the messages it holds.
        self.used_part: dict[str, float] = {}
        self.messages: dict[str, int] = {}
        self.disk: Disk | None = None
        #: Submissions are refused for want of room.
        self.is_closed = False
        #: What is wrong, in words, by stream or "disk".
        self._alarms: dict[str, str] = {}
        self._looks = 0

    @property
    def alarms(self) -> tuple[str, ...]:
        """What a person should do something about."""
        closed = ("submissions are refused until there is room",) if self.is_closed else ()
        return (*(self._alarms[name] for name in sorted(self._alarms)), *closed)

    async def look(self) -> None:
        """To be called every `INTERVAL_S`. Without an answer the last figures stand."""
        self._look_at_disk()
        if self._looks % LOOKS_PER_ASKING == 0:
            await self._ask()
        self._looks += 1
        await self._close_or_open()

    def _look_at_disk(self) -> None:
        if self._read_disk is None:
            return
        try:
            self.disk = self._read_disk()
        except OSError as error:
            log.warning("disk.unknown", error=str(error))
            return
        free = format_mib(self.disk.free_bytes // 1024**2)
        text = f"the disk of the NATS server is {self.disk.used_part:.0%} full ({free} free)"
        self._judge("disk", self.disk.used_part, text)

    async def _ask(self) -> None:
        for spec in self._names:
            if not self._bus.is_connected:
                return
            try:
                state = await self._bus.stream_state(spec.name)
            except BusError as error:
                log.warning("level.unknown", stream=spec.name, error=str(error))
                continue
            self.messages[spec.name] = state.messages
            # Against the bound it was made with, not the one it has while it is closed.
            part = self.used_part[spec.name] = state.bytes / spec.max_bytes if spec.max_bytes else 0.0
            # Events make room for themselves: the oldest go.
            if not spec.discard_old:
                self._judge(spec.name, part, f"stream {spec.name} is {part:.0%} full")
        if self.used_part.get(self._names.journal.name, 0.0) >= ALARM_PART:
            self._on_full_journal()

    def _judge(self, name: str, part: float, text: str) -> None:
        if part < ALARM_PART:
            self._alarms.pop(name, None)
            return
        if name not in self._alarms:
            log.error("store.filling", what=name, used_pct=round(part * 100), said=text)
        self._alarms[name] = text

    # -- no room ------------------------------------------------------------------------------------------------------

    async def _close_or_open(self) -> None:
        if self._must_be_closed() == self.is_closed or not self._bus.is_connected:
            return
        spec = self._names.submissions
        try:
            if self.is_closed:
                await self._bus.ensure_stream(spec)
            else:
                # What is there stays: with `discard: new` a bound takes nothing away.
                await self._bus.ensure_stream(replace(spec, max_bytes=1))
        except BusError as error:
            log.error("submissions.not-changed", error=str(error))
            return
        self.is_closed = not self.is_closed
        log.error("submissions.closed" if self.is_closed else "submissions.open", alarms=self.alarms)

    def _must_be_closed(self) -> bool:
        journal = self.used_part.get(self._names.journal.name, 0.0)
        if journal >= (OPEN_PART if self.is_closed else CLOSE_PART):
            return True
        if self.disk is None:
            return False
        return self.disk.free_bytes < self.disk.close_bytes * (OPEN_FREE_TIMES if self.is_closed else 1)
