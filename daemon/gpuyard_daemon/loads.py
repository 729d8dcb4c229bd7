"""Load reports: many sources, often, and lossy; few changes for the core.

Of each source (a gateway, say) the newest report counts, for `SOURCE_EXPIRES_S`; a service's load is the sum over its
sources. The core hears of it when the sum has changed: the first change at once, since an answer to rising load is
what people wait for, further ones at most once a second and service.

Unknown services and unreadable reports are counted and dropped: load reports have no answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from gpuyard_daemon.core.state.inputs import LoadReported
from gpuyard_protocol.bus.base import Bus, Message
from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.names import ServiceName, Tenant
from gpuyard_protocol.queries import ServicesPage, ServicesQuery
from gpuyard_protocol.services import LoadReport
from gpuyard_protocol.subjects import ALL_LOADS, parse_load

SOURCE_EXPIRES_S = 30.0
CHANGE_INTERVAL_S = 1.0
#: How often sources are looked through for what expired or was held back.
TICK_S = 0.25
SOURCES_MAX = 256
SOURCE_NAME_CHARS_MAX = 128
REPORT_BYTES_MAX = 64 * 1024
LOAD_MAX = 1_000_000_000


class ServiceFacts(Protocol):
    """What this file reads of the core."""

    def has_service(self, tenant: Tenant, name: ServiceName) -> bool: ...
    def services_page(self, tenant: Tenant | None, query: ServicesQuery) -> ServicesPage: ...


class _Source(NamedTuple):
    heard_at: float
    concurrency: int
    queue_depth: int


class _Load:
    """One service's load. Times are monotonic seconds."""

    __slots__ = ("is_changed", "sources", "told", "told_at")

    def __init__(self, told: tuple[int, int], told_at: float) -> None:
        self.sources: dict[str, _Source] = {}
        #: (concurrency, queue depth) that the core was told last, and when.
        self.told = told
        self.told_at = told_at
        #: Held back, or expired: to be looked at by the next tick.
        self.is_changed = False

    def total(self) -> tuple[int, int]:
        sources = self.sources.values()
        return sum(source.concurrency for source in sources), sum(source.queue_depth for source in sources)


class Loads:
    def __init__(
        self,
        core: ServiceFacts,
        add_fact: Callable[[LoadReported], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._add_fact = add_fact
        self._monotonic = monotonic
        self._expires_at = monotonic() + SOURCE_EXPIRES_S
        # What was told before a restart stays true until its sources had time to speak again.
        self._loads = {
            (view.tenant, view.service): _Load((view.concurrency, view.queue_depth), 0.0)
            for view in core.services_page(None, ServicesQuery()).services
        }
        self._is_settling = True
        self.reports = 0
        #: Unreadable, or out of range.
        self.malformed = 0
        #: For services that do not exist.
        self.unknown = 0

    async def open(self, bus: Bus) -> None:
        await bus.subscribe(ALL_LOADS, self.on_message)

    def on_message(self, message: Message) -> None:
        key = parse_load(message.subject)
        try:
            report = decode(LoadReport, message.data, max_bytes=REPORT_BYTES_MAX)
        except Malformed:
            key = None
        if key is None or not _is_sane(report):
            self.malformed += 1
            return
        if not self._core.has_service(*key):
            self.unknown += 1
            return
        self.reports += 1
        self._take(key, report)

    def _take(self, key: tuple[Tenant, ServiceName], report: LoadReport) -> None:
        now = self._monotonic()
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load((0, 0), 0.0)
        if report.source not in load.sources and len(load.sources) >= SOURCES_MAX:
            oldest = min(load.sources, key=lambda name: (load.sources[name].heard_at, name))
            del load.sources[oldest]
        load.sources[report.source] = _Source(now, report.concurrency, report.queue_depth)
        self._tell(key, load, now)

    def _tell(self, key: tuple[Tenant, ServiceName], load: _Load, now: float) -> None:
        total = load.total()
        if total == load.told:
            load.is_changed = False
            return
        if now - load.told_at < CHANGE_INTERVAL_S and load.told_at:
            load.is_changed = True
            return
        load.told, load.told_at, load.is_changed = total, now, False
        self._add_fact(LoadReported(tenant=key[0], service=key[1], concurrency=total[0], queue_depth=total[1]))

    def tick(self) -> None:
        """Tell what was held back, and forget sources that fell silent; to be called every `TICK_S`."""
        now = self._monotonic()
        # After a start, a service without sources keeps its load until they had time to report.
        settles = self._is_settling and now >= self._expires_at
        for key, load in list(self._loads.items()):
            expired = [name for name, source in load.sources.items() if now - source.heard_at > SOURCE_EXPIRES_S]
            for name in expired:
                del load.sources[name]
            if not self._core.has_service(*key):
                del self._loads[key]
            elif load.is_changed or expired or (settles and not load.sources):
                self._tell(key, load, now)
        if settles:
            self._is_settling = False


def _is_sane(report: LoadReport) -> bool:
    return (
        report.concurrency <= LOAD_MAX
        and report.queue_depth <= LOAD_MAX
        and 0 < len(report.source) <= SOURCE_NAME_CHARS_MAX
    )
