"""What each replica does on its cards, by the driver's list of processes: memory, load, how many processes.

One look at every card on which something runs. What the driver tells of a process belongs to the replica in whose tree
it is (`owners`). Load is told by process only outside MIG and MPS; everywhere else it is None, and whoever asks has to
judge by the whole card.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import structlog

from gpuyard_agent.core.model import Assignment
from gpuyard_agent.declared_use import DeclaredUse
from gpuyard_agent.devices.base import DeviceBackend, DeviceProcess, DeviceTrouble
from gpuyard_agent.owners import owners_of
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.nodes import JobSample
from gpuyard_protocol.resources import MigInstance, MpsShare, devices_of

#: How long a look says something of now.
FRESH_S = 3.0

_log = structlog.get_logger("gpuyard_agent.job_use")


class JobUse:
    """The newest look."""

    def __init__(self, backend: DeviceBackend, declared: DeclaredUse | None = None) -> None:
        """`declared`: on modelled cards what jobs say of themselves goes before what the model says."""
        self._backend = backend
        self._declared = declared if backend.simulated else None
        self._samples: dict[AssignmentKey, JobSample] = {}
        self._looked_s = 0.0

    @property
    def samples(self) -> tuple[JobSample, ...]:
        return tuple(sample for _, sample in sorted(self._samples.items()))

    def get(self, key: AssignmentKey) -> JobSample | None:
        return self._samples.get(key)

    def is_busy(self, key: AssignmentKey) -> bool | None:
        """True: it computes on its card, however little CPU it needs for that. None: not seen to; a replica that has
        just been let go is not idle because it did nothing while it was halted."""
        sample = self._samples.get(key)
        is_fresh = time.monotonic() - self._looked_s <= FRESH_S
        return True if is_fresh and sample is not None and sample.utilization_pct else None

    async def look(self, live: Mapping[AssignmentKey, Assignment]) -> None:
        running = {key: found for key, found in live.items() if found.state == "running" and found.pid}
        on_cards: dict[DeviceUuid, dict[int, AssignmentKey]] = {}
        for key, found in running.items():
            for device in devices_of(found.start.partition):
                on_cards.setdefault(device, {})[found.pid] = key
        seen: dict[AssignmentKey, list[DeviceProcess]] = {
            key: [] for mains in on_cards.values() for key in mains.values()
        }
        for device, mains in sorted(on_cards.items()):
            try:
                processes = {one.pid: one for one in await self._backend.processes(device)}
            except DeviceTrouble as error:
                _log.debug("processes not read", device=device, why=str(error))
                continue
            for pid, key in owners_of(processes, mains).items():
                seen[key].append(processes[pid])
        if self._declared is not None:
            seen.update(_say_themselves(self._declared, running))
        self._samples = {key: _sum_up(key, running[key], processes) for key, processes in seen.items()}
        self._looked_s = time.monotonic()


def _say_themselves(
    declared: DeclaredUse, running: Mapping[AssignmentKey, Assignment]
) -> dict[AssignmentKey, list[DeviceProcess]]:
    return {
        key: [
            DeviceProcess(device=device, pid=pid, memory_mib=one.memory_mib, utilization_pct=one.utilization_pct)
            for device in devices_of(found.start.partition)[:1]
            for pid, one in said.items()
        ]
        for key, found in running.items()
        if (said := declared.of(key))
    }


def _sum_up(key: AssignmentKey, assignment: Assignment, processes: list[DeviceProcess]) -> JobSample:
    partition = assignment.start.partition
    loads = [one.utilization_pct for one in processes]
    told = [load for load in loads if load is not None]
    is_told = bool(told) and len(told) == len(loads) and not isinstance(partition, MpsShare | MigInstance)
    return JobSample(
        key=key,
        memory_mib=sum(one.memory_mib or 0 for one in processes),
        utilization_pct=min(100, sum(told) // len(devices_of(partition))) if is_told else None,
        processes=len({one.pid for one in processes}),
    )
