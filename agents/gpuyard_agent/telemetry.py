"""Signs of life and measurements: heartbeats each second, samples of the cards every other.

All of it is lossy and decides nothing here. A sample that takes longer than its interval delays the next one; samples
are never queued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

import structlog

from gpuyard_agent import host
from gpuyard_agent.core import AgentCore
from gpuyard_agent.core.events import Event, MustEnd, SeenIdle
from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble
from gpuyard_agent.idle import IdleWatch
from gpuyard_agent.job_use import JobUse
from gpuyard_agent.metrics import Metrics
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import DeviceSample, Heartbeat, Telemetry
from gpuyard_protocol.units import format_ms

HEARTBEAT_S = 1.0
TELEMETRY_S = 2.0

_log = structlog.get_logger("gpuyard_agent.telemetry")


def agent_version() -> str:
    """Of the installed distribution; "" when run from a source tree."""
    try:
        return metadata.version("gpuyard")
    except metadata.PackageNotFoundError:
        return ""


class Pulse:
    """Heartbeats and telemetry of one agent, once it is connected."""

    def __init__(
        self,
        node: NodeId,
        instance: str,
        boot_id: str,
        core: AgentCore,
        backend: DeviceBackend,
        metrics: Metrics,
        use: JobUse,
        idle: IdleWatch,
        emit: Callable[[Event], None],
        on_mig: Callable[[str], Iterable[AssignmentKey]],
    ) -> None:
        """`on_mig`: who holds a MIG instance."""
        self._node = node
        self._instance = instance
        self._boot_id = boot_id
        self._core = core
        self._backend = backend
        self._metrics = metrics
        self._use = use
        self._idle = idle
        self._emit = emit
        self._on_mig = on_mig

    async def beat(self, bus: Bus) -> None:
        subject = subjects.heartbeat(self._node)
        while True:
            counters = self._core.counters
            beat = Heartbeat(
                node=self._node,
                instance=self._instance,
                boot_id=self._boot_id,
                applied=counters.applied,
                reported=counters.reported,
                running=self._core.running,
                clock_ms=host.node_clock_ms(),
            )
            if await _send(bus, subject, encode(beat)):
                self._metrics.heartbeats.inc()
            await asyncio.sleep(HEARTBEAT_S)

    async def measure(self, bus: Bus) -> None:
        subject = subjects.telemetry(self._node)
        host.cpu_pct()  # the first reading has nothing to compare with
        while True:
            try:
                samples = await self._backend.samples()
            except DeviceTrouble as error:
                _log.warning("cards not measured", why=str(error))
                samples = ()
            await self._use.look(self._core.live)
            self._metrics.samples, self._metrics.uses = samples, self._use.samples
            self._look_for_idle(samples)
            report = Telemetry(
                node=self._node,
                at_ms=host.wall_clock_ms(),
                devices=samples,
                cpu_pct=host.cpu_pct(),
                memory_used_mib=host.memory_used_mib(),
                jobs=self._use.samples,
            )
            await _send(bus, subject, encode(report))
            await asyncio.sleep(TELEMETRY_S)

    def _look_for_idle(self, samples: Sequence[DeviceSample]) -> None:
        if not samples:
            return
        live = self._core.live
        of_instances = {
            key: instance.utilization_pct
            for sample in samples
            for instance in sample.instances
            for key in self._on_mig(instance.mig_uuid)
        }
        steps, verdicts = self._idle.look(samples, live, host.node_clock_ms(), self._use.samples, of_instances)
        self._metrics.idle_assignments.set(self._idle.idle)
        for step in steps:
            idle = format_ms(step.idle_ms)
            _log.warning("holds cards and computes nothing", assignment=str(step.key), idle=idle, stage=step.stage)
            self._emit(SeenIdle(step.key, step.idle_ms, step.stage, step.release_ms))
        for key, verdict in verdicts.items():
            self._emit(MustEnd(key, verdict, live[key].start.launch.stop_grace_ms))


async def _send(bus: Bus, subject: str, data: bytes) -> bool:
    """Now or never: the next one says more."""
    if not bus.is_connected:
        return False
    try:
        await bus.publish(subject, data)
    except BusError:
        return False
    return True
