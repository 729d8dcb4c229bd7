"""`python -m gpuyard_agent.launch.lease_keeper --node NODE --file FILE`: ends services whose lease has run out.

Under systemd nobody of ours stands between the agent and its jobs, so a service of its own keeps their leases; systemd
starts it again when it dies. The agent writes the file, whole, whenever a lease begins, ends or is renewed; the keeper
looks at it and at the clock once a second, and talks to systemd only when something has run out. It marks the unit, so
that the next agent knows why it ended, sends SIGTERM, and after the grace SIGKILL. It ends when there has been nothing
to keep for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import gpuyard_agent
import gpuyard_protocol
from gpuyard_agent.launch import kernel
from gpuyard_agent.launch.leases import LOOK_S, Lease, Leases, boot_clock_ms
from gpuyard_agent.launch.systemd_units import OVER, unit_name, unit_prefix
from gpuyard_protocol.names import AssignmentKey

_IDLE_S = 60.0
_RESTART_US = 500_000


class LeaseFile(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent says of its leases."""

    boot_id: str
    renewed_ms: int
    leases: dict[str, Lease]


def write(path: Path, leases: Leases) -> None:
    """Whole or not at all. Raises `OSError`."""
    held = {str(key): lease for key, lease in leases.items()}
    content = LeaseFile(boot_id=kernel.boot_id(), renewed_ms=leases.renewed_ms, leases=held)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(content))
    os.replace(fresh, path)


def read(path: Path) -> Leases:
    """Empty where there is no file, or one of another boot."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=LeaseFile)
        found = {AssignmentKey.parse(text): lease for text, lease in content.leases.items()}
    except (OSError, ValueError, msgspec.MsgspecError):
        return Leases()
    if content.boot_id != kernel.boot_id():
        return Leases()
    leases = Leases(content.renewed_ms)
    for key, lease in found.items():
        leases.hold(key, lease)
    return leases


def keeper_unit(node: str) -> str:
    return f"{unit_prefix(node)}leases.service"


def keeper_properties(node: str, path: Path, bus_address: str | None) -> list[tuple[str, str, object]]:
    """Of the service that runs this module."""
    roots = [str(Path(next(iter(package.__path__))).parent) for package in (gpuyard_agent, gpuyard_protocol)]
    roots += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    command = [sys.executable, "-m", "gpuyard_agent.launch.lease_keeper", "--node", node, "--file", str(path)]
    command += ["--bus", bus_address] if bus_address else []
    return [
        ("Description", "s", f"gpuyard: leases of node {node}"),
        ("Type", "s", "exec"),
        ("ExecStart", "a(sasb)", [[sys.executable, command, False]]),
        ("Environment", "as", [f"PYTHONPATH={os.pathsep.join(dict.fromkeys(roots))}"]),
        ("Restart", "s", "on-failure"),
        ("RestartUSec", "t", _RESTART_US),
        ("StartLimitIntervalUSec", "t", 0),
        ("OOMScoreAdjust", "i", -900),
        ("CollectMode", "s", "inactive-or-failed"),
    ]


class Keeper:
    """Looks at the file and the clock."""

    def __init__(self, node: str, path: Path, bus_address: str | None = None) -> None:
        self._node = node
        self._path = path
        self._bus_address = bus_address
        self._leases = Leases()
        self._stamp = (0, 0)
        #: When SIGKILL follows, by unit, on the monotonic clock.
        self._kills: dict[str, float] = {}

    async def run(self) -> None:
        quiet_since = time.monotonic()
        while True:
            self._look_at_file()
            for key, grace_ms in self._leases.run_out(boot_clock_ms()):
                self._kills[unit_name(self._node, key)] = time.monotonic() + grace_ms / 1000
                await self._end(unit_name(self._node, key))
            for unit in [unit for unit, at_s in self._kills.items() if at_s <= time.monotonic()]:
                del self._kills[unit]
                await self._signal(unit, signal.SIGKILL)
            if len(self._leases) or self._kills:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > _IDLE_S:
                return
            await asyncio.sleep(LOOK_S)

    def _look_at_file(self) -> None:
        try:
            status = self._path.stat()
        except OSError:
            return
        if (stamp := (status.st_mtime_ns, status.st_ino)) == self._stamp:
            return
        self._stamp = stamp
        fresh = read(self._path)
        for key in self._leases.over():
            fresh.mark_over(key)
        self._leases = fresh

    async def _end(self, unit: str) -> None:
        sys.stdout.write(f"{unit}: its lease has run out\n")
        sys.stdout.flush()
        key = unit.removeprefix(unit_prefix(self._node)).removesuffix(".service")
        await self._ask(unit, "SetUnitProperties", description=f"gpuyard replica {key}{OVER}")
        await self._ask(unit, "ThawUnit")
        await self._signal(unit, signal.SIGTERM)
        await self._signal(unit, signal.SIGCONT)

    async def _signal(self, unit: str, number: signal.Signals) -> None:
        await self._ask(unit, "KillUnit", number=number)

    async def _ask(self, unit: str, method: str, *, description: str = "", number: int = 0) -> None:
        """The library is loaded when it is needed: most keepers never do."""
        from gpuyard_agent.launch.systemd_bus import SystemdManager, SystemdRefused

        manager = SystemdManager(self._bus_address, lambda unit: None, lambda: None)
        await manager.open(unit_prefix(self._node))  # LauncherGone ends the keeper; systemd starts it again
        try:
            with contextlib.suppress(SystemdRefused):  # gone, or cannot be frozen
                if description:
                    await manager.describe(unit, description)
                elif number:
                    await manager.call(method, "ssi", [unit, "all", int(number)])
                else:
                    await manager.call(method, "s", [unit])
        finally:
            await manager.close()


def main(arguments: Sequence[str] | None = None) -> None:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="gpuyard_agent.launch.lease_keeper", description=description)
    parser.add_argument("--node", required=True)
    parser.add_argument("--file", type=Path, required=True, help="what the agent says of its leases")
    parser.add_argument("--bus", help="address of another bus than the system's")
    options = parser.parse_args(arguments)
    asyncio.run(Keeper(options.node, options.file, options.bus).run())


if __name__ == "__main__":
    main()
