"""Reports on their way to the reports' stream: in order, each until it is stored.

The ledger holds them before they come here, so nothing is lost with the process. Everything that waits goes out as one
batch, one batch at a time: the first report of a quiet moment goes at once, and under load batches grow by themselves.
A batch whose storage was not confirmed is sent again unchanged: the daemon recognises it by its numbers. It has no
message id: ids are one stream's, so another node could guess it, send it first, and have ours taken for a repetition.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

import msgspec
import structlog

from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, BusError, Unanswered
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import NodeId

#: Of one batch; well under what a turn of the daemon takes.
BATCH_REPORTS_MAX = 200
BATCH_BYTES_MAX = 128 * 1024
#: Between tries while the bus or the stream refuses; a reconnect ends the pause.
PAUSE_S = 0.05
PAUSE_S_MAX = 1.0

_log = structlog.get_logger("gpuyard_agent.outbox")


class _EncodedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """`ReportBatch` with reports that are encoded already."""

    node: NodeId
    instance: str
    boot_id: str
    first: int
    reports: list[msgspec.Raw]
    ledger: str
    v: int = 1


class Outbox:
    """`waiting` are (number, encoded report) with dense numbers; `on_delivered` is told the last number stored."""

    def __init__(
        self,
        node: NodeId,
        instance: str,
        boot_id: str,
        waiting: Iterable[tuple[int, bytes]],
        on_delivered: Callable[[int], None],
        *,
        ledger: str = "",
    ) -> None:
        """`ledger`: identity of the ledger that the numbers belong to."""
        self._node = node
        self._ledger = ledger
        self._instance = instance
        self._boot_id = boot_id
        self._waiting = deque(waiting)
        self._on_delivered = on_delivered
        self._wake = asyncio.Event()
        self._is_back = asyncio.Event()

    @property
    def depth(self) -> int:
        """Reports not known to be stored."""
        return len(self._waiting)

    def add(self, reports: Iterable[tuple[int, bytes]]) -> None:
        """Durable reports, numbered on from the last."""
        self._waiting.extend(reports)
        self._wake.set()

    async def run(self, bus: Bus) -> None:
        bus.on_reconnect(self._is_back.set)
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            first, count, data = self._batch()
            await self._deliver(bus, first, count, data)
            for _ in range(count):
                self._waiting.popleft()
            self._on_delivered(first + count - 1)

    def _batch(self) -> tuple[int, int, bytes]:
        first, size = self._waiting[0][0], 0
        reports: list[msgspec.Raw] = []
        for _, body in self._waiting:
            size += len(body)
            if reports and (size > BATCH_BYTES_MAX or len(reports) == BATCH_REPORTS_MAX):
                break
            reports.append(msgspec.Raw(body))
        batch = _EncodedBatch(
            node=self._node,
            instance=self._instance,
            boot_id=self._boot_id,
            first=first,
            reports=reports,
            ledger=self._ledger,
        )
        return first, len(reports), encode(batch)

    async def _deliver(self, bus: Bus, first: int, count: int, data: bytes) -> None:
        subject = subjects.reports(self._node)
        pause_s = PAUSE_S
        while True:
            self._is_back.clear()
            try:
                await bus.stream_publish(subject, data)
                return
            except Unanswered as error:
                _log.warning("reports unanswered", first=first, count=count, why=str(error))
            except BusError as error:
                _log.warning("reports not delivered", first=first, count=count, why=str(error))
                await self._pause(pause_s)
                pause_s = min(pause_s * 2, PAUSE_S_MAX)

    async def _pause(self, seconds: float) -> None:
        """Until the time is over or the bus is back."""
        try:
            async with asyncio.timeout(seconds):
                await self._is_back.wait()
        except TimeoutError:
            return
