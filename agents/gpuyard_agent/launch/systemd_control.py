"""What is done to a unit that runs: signals, halting, the limit of its memory.

Where systemd cannot freeze control groups, found by asking it once, trees are halted by signals.
"""

from __future__ import annotations

import signal

import structlog

from gpuyard_agent.launch.systemd_bus import (
    NO_SUCH_PROCESS,
    NO_SUCH_UNIT,
    NOT_SUPPORTED,
    SERVICE,
    SystemdManager,
    SystemdRefused,
)
from gpuyard_agent.launch.systemd_units import NO_LIMIT

_log = structlog.get_logger("gpuyard_agent.launch")


class UnitControl:
    """None of it raises where the unit is gone or systemd will not."""

    def __init__(self) -> None:
        self._freezes = True

    async def signal(self, manager: SystemdManager, unit: str, number: signal.Signals) -> None:
        """To everything in it."""
        try:
            await manager.call("KillUnit", "ssi", [unit, "all", int(number)])
        except SystemdRefused as error:
            if error.name not in (NO_SUCH_UNIT, NO_SUCH_PROCESS):
                _log.warning("systemd would not signal", unit=unit, why=str(error))

    async def limit_memory(self, manager: SystemdManager, unit: str, memory_mib: int) -> None:
        """Of a unit that has a limit."""
        try:
            (present,) = await manager.get(unit, SERVICE, ("MemoryMax",))
            if present != NO_LIMIT:
                await manager.set_property(unit, ("MemoryMax", "t", memory_mib * 2**20))
        except SystemdRefused as error:
            _log.warning("systemd would not change a limit", unit=unit, why=str(error))

    async def freeze(self, manager: SystemdManager, unit: str) -> None:
        if self._freezes:
            try:
                await manager.call("FreezeUnit", "s", [unit])
                return
            except SystemdRefused as error:
                if error.name != NOT_SUPPORTED:
                    _log.warning("systemd would not freeze", unit=unit, why=str(error))
                    return
                self._freezes = False
        await self.signal(manager, unit, signal.SIGSTOP)

    async def thaw(self, manager: SystemdManager, unit: str) -> None:
        if self._freezes:
            try:
                await manager.call("ThawUnit", "s", [unit])
                return
            except SystemdRefused as error:
                if error.name != NOT_SUPPORTED:
                    return  # not frozen, or gone
                self._freezes = False
        await self.signal(manager, unit, signal.SIGCONT)
