"""Faults of modelled cards, said in a file: what a card that breaks does to a yard, tried out where none can break.

`simulated-faults.toml` in the agent's state directory names cards by index or UUID and what is wrong with each:

    0 = "Xid 79: fallen off the bus"
    GPU-1c0e…  = "row remapping failed"

It is read every other second. A card in it is broken, one that is no longer in it (or an empty file, or none) is whole
again. The agent does for such a card what it does for a real one; only the news of it comes from here. A file that
cannot be read changes nothing and is warned of once.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import structlog

from gpuyard_agent.devices.simulated import SimulatedBackend
from gpuyard_protocol.names import DeviceUuid
from gpuyard_protocol.resources import Device

FAULTS_FILE = "simulated-faults.toml"

_log = structlog.get_logger("gpuyard_agent.drill")


class FaultDrill:
    """Brings the modelled cards to what the file says."""

    def __init__(self, path: Path, backend: SimulatedBackend) -> None:
        self._path = path
        self._backend = backend
        self._faults: dict[DeviceUuid, str] = {}
        #: (time of change in ns, size) of the file as last read; None: there was none.
        self._seen: tuple[int, int] | None = None

    async def read(self) -> None:
        """Look for what has changed since the last call; the backend tells its listener."""
        try:
            status = self._path.stat()
            seen: tuple[int, int] | None = (status.st_mtime_ns, status.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            wanted = _parse(self._path.read_text() if seen else "", await self._backend.inventory())
        except (OSError, ValueError) as error:
            _log.warning("drill not read", file=str(self._path), why=str(error))
            return
        for device in sorted(wanted.keys() | self._faults.keys()):
            self._backend.set_fault(device, wanted.get(device, ""))
        self._faults = wanted


def _parse(text: str, devices: tuple[Device, ...]) -> dict[DeviceUuid, str]:
    """`ValueError` says what is wrong with the text."""
    names = {str(device.index): device.uuid for device in devices} | {device.uuid: device.uuid for device in devices}
    faults: dict[DeviceUuid, str] = {}
    for name, fault in tomllib.loads(text).items():
        if name not in names:
            raise ValueError(f"found {name!r}; expected the index or UUID of a card of this node")
        if not isinstance(fault, str) or not fault:
            raise ValueError(f"{name}: found {fault!r}; expected what is wrong, in words")
        faults[names[name]] = fault
    return faults
