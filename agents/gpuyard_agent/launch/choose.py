"""Which launcher a node uses: systemd where it is PID 1 and we are root, else the supervisor process.

One exception: where a supervisor of this node still answers, it is used, since it may have jobs; it ends when the last
of them has ended and its agent leaves, and the next agent chooses anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Literal, TypeAlias

from gpuyard_agent.launch.base import Launcher
from gpuyard_agent.launch.client import SupervisorLauncher
from gpuyard_agent.launch.supervisor import socket_address
from gpuyard_agent.launch.systemd import SystemdLauncher

LauncherChoice: TypeAlias = Literal["auto", "systemd", "supervisor"]

#: systemd makes it when it boots, and only then (sd_booted(3)).
_BOOTED = Path("/run/systemd/system")
_SYSTEM_BUS = Path("/run/dbus/system_bus_socket")


def systemd_is_there() -> bool:
    """systemd is PID 1, its bus can be reached, and it would do what we ask."""
    return _BOOTED.is_dir() and _SYSTEM_BUS.exists() and os.geteuid() == 0


async def choose(choice: LauncherChoice, node: str, state: Path) -> Launcher:
    """`state`: the agent's directory, with the supervisor's socket and records in it."""
    socket = state / "supervisor.sock"
    if choice == "auto":
        choice = "systemd" if systemd_is_there() and not await _answers(socket) else "supervisor"
    leases = state / "leases.json"
    return SystemdLauncher(node, leases=leases) if choice == "systemd" else SupervisorLauncher(socket, state)


async def _answers(socket: Path) -> bool:
    try:
        with socket_address(socket) as address:
            _, writer = await asyncio.open_unix_connection(address)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
