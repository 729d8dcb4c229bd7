"""How full the streams are: watched, so that nobody learns it from a refused message.

At `ALARM_PART` of a stream's bound it is said once in the log and shown in the metrics until it is over; a journal
that full also gets its next snapshot early, since that is what empties it.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.subjects import Streams

log = structlog.get_logger("levels")

ALARM_PART = 0.8
#: How often the server is asked.
INTERVAL_S = 10.0


class StreamLevels:
    def __init__(self, bus: Bus, names: Streams, on_full_journal: Callable[[], None]) -> None:
        self._bus = bus
        self._names = names
        self._on_full_journal = on_full_journal
        #: Part of its bound that each stream uses, by name; and the messages it holds.
        self.used_part: dict[str, float] = {}
        self.messages: dict[str, int] = {}
        self._alarmed: set[str] = set()

    async def look(self) -> None:
        """Ask the server once. Without an answer the last figures stand."""
        for spec in self._names:
            if not self._bus.is_connected:
                return
            try:
                state = await self._bus.stream_state(spec.name)
            except BusError as error:
                log.warning("level.unknown", stream=spec.name, error=str(error))
                continue
            self.messages[spec.name] = state.messages
            self.used_part[spec.name] = state.bytes / state.max_bytes if state.max_bytes else 0.0
            # Events make room for themselves: the oldest go.
            if not spec.discard_old:
                self._judge(spec.name)

    def _judge(self, stream: str) -> None:
        part = self.used_part[stream]
        if part < ALARM_PART:
            self._alarmed.discard(stream)
            return
        if stream not in self._alarmed:
            self._alarmed.add(stream)
            log.error("stream.filling", stream=stream, used_pct=round(part * 100))
        if stream == self._names.journal.name:
            self._on_full_journal()
