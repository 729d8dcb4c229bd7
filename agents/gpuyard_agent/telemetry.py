"""Signs of life and measurements: heartbeats each second, samples of the cards every other, and the inventory.

All of it is lossy and decides nothing here. A sample that takes longer than its interval delays the next one; samples
are never queued. The inventory goes to the core, which tells the daemon when it has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import metadata

import msgspec
import structlog

from gpuyard_agent import host
from gpuyard_agent.core import AgentCore
from gpuyard_agent.core.events import InventoryRead
from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble
from gpuyard_agent.inbox import Inbox
from gpuyard_agent.metrics import Metrics
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.nodes import Heartbeat, Inventory, Telemetry
from gpuyard_protocol.resources import Device

HEARTBEAT_S = 1.0
TELEMETRY_S = 2.0
INVENTORY_S = 30.0

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
        self, node: NodeId, instance: str, boot_id: str, core: AgentCore, backend: DeviceBackend, metrics: Metrics
    ) -> None:
        self._node = node
        self._instance = instance
        self._boot_id = boot_id
        self._core = core
        self._backend = backend
        self._metrics = metrics

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
            self._metrics.sampled(samples)
            report = Telemetry(
                node=self._node,
                at_ms=host.wall_clock_ms(),
                devices=samples,
                cpu_pct=host.cpu_pct(),
                memory_used_mib=host.memory_used_mib(),
            )
            await _send(bus, subject, encode(report))
            await asyncio.sleep(TELEMETRY_S)


async def _send(bus: Bus, subject: str, data: bytes) -> bool:
    """Now or never: the next one says more."""
    if not bus.is_connected:
        return False
    try:
        await bus.publish(subject, data)
    except BusError:
        return False
    return True


async def watch_inventory(
    inventory: Inventory, read_devices: Callable[[], Awaitable[tuple[Device, ...]]], inbox: Inbox
) -> None:
    """Read the cards anew every half minute; `inventory` is what else the node has, which does not change."""
    while True:
        await asyncio.sleep(INVENTORY_S)
        try:
            devices = await read_devices()
        except DeviceTrouble as error:
            _log.warning("cards not read", why=str(error))
            continue
        inbox.put(InventoryRead(msgspec.structs.replace(inventory, devices=devices)))
