"""Keeps jobs inside their partition where the card does not: memory and number of processes, on shared cards.

Time-slice has no memory limit at all, and the limit of MPS is one process's, so a job with more processes than it
declared could take a multiple of its share. The driver's list of processes is read every other second, each process is
counted to its assignment, and what is over its limit in two looks in a row is ended as a whole: its own failure, with
`OutOfPartitionMemory` or `TooManyGpuProcesses`. Whole cards and MIG instances without MPS end at their own edge and are
not looked at; a node without shares asks the driver nothing.

A limit is exceeded beyond a grace, since what the driver counts includes contexts, which no program asked for. This is
no wall: between two looks a job may take what is left of the card, and a neighbour that allocates just then fails.

`MemoryWatch` judges and is pure; `Watchdog` reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import structlog

from gpuyard_agent.core.events import Event, MustEnd
from gpuyard_agent.core.model import Assignment, Verdict
from gpuyard_agent.declared_use import DeclaredUse
from gpuyard_agent.devices.base import DeviceBackend, DeviceProcess, DeviceTrouble
from gpuyard_agent.owners import owners_of
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import MigInstance, MpsShare, TimeSliceShare

WATCH_S = 2.0
#: Looks in a row over the limit.
STRIKES = 2
#: Beyond the limit: the larger of both. A CUDA context alone takes some hundred MiB.
GRACE_PCT = 5
GRACE_MIB = 512
OUT_OF_MEMORY = "OutOfPartitionMemory"
TOO_MANY = "TooManyGpuProcesses"

_log = structlog.get_logger("gpuyard_agent.watchdog")


class Limit(NamedTuple):
    """What an assignment may hold on its card."""

    memory_mib: int
    #: 0: any number.
    processes: int = 0


class Use(NamedTuple):
    """What it holds."""

    memory_mib: int
    processes: int


def limit_of(assignment: Assignment) -> Limit | None:
    """None: its card keeps the limit by itself."""
    match assignment.start.partition:
        case MpsShare(memory_mib=memory_mib, processes=processes):
            return Limit(memory_mib, processes)
        case TimeSliceShare(memory_mib=memory_mib):
            return Limit(memory_mib)
        case MigInstance(memory_mib=memory_mib, processes=processes) if processes:
            return Limit(memory_mib, processes)
        case _:
            return None


class MemoryWatch:
    """Remembers who was over which limit in the last look."""

    def __init__(self) -> None:
        self._strikes: dict[tuple[AssignmentKey, str], int] = {}

    def judge(
        self, uses: Mapping[AssignmentKey, Use], limits: Mapping[AssignmentKey, Limit]
    ) -> dict[AssignmentKey, Verdict]:
        """Who must end, after this look. Those in `limits` alone were not seen this time: nothing changes for them."""
        verdicts: dict[AssignmentKey, Verdict] = {}
        for key, use in sorted(uses.items()):
            for code, detail in _breaches(use, limits[key]):
                strikes = self._strikes[key, code] = self._strikes.get((key, code), 0) + 1
                if strikes >= STRIKES and key not in verdicts:
                    verdicts[key] = Verdict(outcome="signalled", code=code, detail=detail)
        over = {(key, code) for key, use in uses.items() for code, _ in _breaches(use, limits[key])}
        self._strikes = {
            mark: count
            for mark, count in self._strikes.items()
            if mark[0] in limits and (mark in over or mark[0] not in uses)
        }
        return verdicts


def _breaches(use: Use, limit: Limit) -> Iterable[tuple[str, str]]:
    """(code, in words)."""
    if limit.processes and use.processes > limit.processes:
        yield TOO_MANY, f"{use.processes} processes on the card, {limit.processes} declared"
    if use.memory_mib > limit.memory_mib + max(GRACE_MIB, limit.memory_mib * GRACE_PCT // 100):
        yield OUT_OF_MEMORY, f"{use.memory_mib} MiB on the card, its partition has {limit.memory_mib}"


class Watchdog:
    """`live`: the core's assignments."""

    def __init__(
        self,
        backend: DeviceBackend,
        declared: DeclaredUse,
        *,
        emit: Callable[[Event], None],
        live: Callable[[], Mapping[AssignmentKey, Assignment]],
    ) -> None:
        self._backend = backend
        self._declared = declared
        self._emit = emit
        self._live = live
        self._watch = MemoryWatch()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await self.look()

    async def look(self) -> None:
        """One look at every shared card."""
        running = {key: found for key, found in self._live().items() if found.state == "running" and found.pid}
        limits = {key: limit for key, found in running.items() if (limit := limit_of(found)) is not None}
        by_card: dict[DeviceUuid, list[AssignmentKey]] = {}
        for key in limits:
            partition = running[key].start.partition
            if isinstance(partition, MpsShare | MigInstance | TimeSliceShare):
                by_card.setdefault(partition.device, []).append(key)
        uses: dict[AssignmentKey, Use] = {}
        for device, keys in sorted(by_card.items()):
            try:
                processes = await self._backend.processes(device)
            except DeviceTrouble as error:
                _log.warning("processes not read", device=device, why=str(error))
                continue
            uses.update(self._count(processes, {running[key].pid: key for key in keys}))
        for key, verdict in self._watch.judge(uses, limits).items():
            _log.warning("over its partition", assignment=str(key), code=verdict.code, detail=verdict.detail)
            self._emit(MustEnd(key, verdict))

    def _count(
        self, processes: Iterable[DeviceProcess], mains: Mapping[int, AssignmentKey]
    ) -> dict[AssignmentKey, Use]:
        held = {process.pid: process.memory_mib or 0 for process in processes}
        owners = owners_of(held, mains)
        uses: dict[AssignmentKey, Use] = {}
        for key in mains.values():
            mine = {pid: held[pid] for pid, owner in owners.items() if owner == key}
            if self._backend.simulated:
                said = self._declared.of(key)
                mine = {pid: one.memory_mib for pid, one in said.items()} or mine
            uses[key] = Use(sum(mine.values()), len(mine))
        return uses
