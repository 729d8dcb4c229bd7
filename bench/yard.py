"""A whole yard for a benchmark: `gpuyard up` in a directory of its own, and what its processes cost.

Not the benchmarks' own measure of anything: it starts, connects, adds up CPU time and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import gpuyard

_READY_S = 60.0


@dataclass
class BenchYard:
    """A running yard, a client of it, and its directory (readable and writable by every job)."""

    client: gpuyard.Client
    state: Path
    scratch: Path
    up: asyncio.subprocess.Process

    def processes(self) -> list[psutil.Process]:
        """nats-server, daemon, agents and supervisors: everything that belongs to this yard."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if any(str(self.state) in part for part in command) and process.pid != os.getpid():
                    found.append(process)
        return found

    def cpu_s(self) -> float:
        """CPU seconds spent so far by the yard's processes; finished jobs are not in it."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextlib.asynccontextmanager
async def running_yard(
    *, nodes: int, gpus_per_node: int, http: bool = False, standby: bool = False
) -> AsyncIterator[BenchYard]:
    """`gpuyard up` with simulated cards, and a connected client; stopped and removed at the end."""
    with tempfile.TemporaryDirectory(prefix="gpuyard-bench-") as directory:
        state, scratch = Path(directory) / "state", Path(directory) / "scratch"
        Path(directory).chmod(0o755)
        scratch.mkdir()
        scratch.chmod(0o777)
        arguments = ["up", "--state", str(state), "--port", "0"]
        arguments += ["--nodes", str(nodes), "--simulate", f"{gpus_per_node}xH100-80GB"]
        arguments += ["--standby"] if standby else []
        with (Path(directory) / "up.log").open("wb") as log:
            up = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gpuyard.cli",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            try:
                await _until_ready(up, state, nodes, Path(directory) / "up.log")
                async with gpuyard.connect(context=state / "context.toml") as client:
                    yield BenchYard(client, state, scratch, up)
            finally:
                if up.returncode is None:
                    up.send_signal(signal.SIGTERM)
                    await up.wait()


async def _until_ready(up: asyncio.subprocess.Process, state: Path, nodes: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if up.returncode is not None:
            break
        if (state / "context.toml").exists():
            with contextlib.suppress(gpuyard.GpuyardError):
                async with gpuyard.connect(context=state / "context.toml") as client:
                    if sum(node.state == "ready" for node in await client.nodes()) >= nodes:
                        return
        await asyncio.sleep(0.2)
    raise SystemExit(f"the yard did not become ready:\n{log.read_text(errors='replace')[-4000:]}")


def percentile(values: Sequence[float], share: float) -> float:
    """`sorted[int(share * n)]`, as the published figures use it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def fsync_ms_p50(directory: Path, rounds: int = 50) -> float:
    """What one durable 600-byte write costs on this disk."""
    times = []
    path = directory / "fsync-probe"
    with path.open("wb", buffering=0) as file:
        for _ in range(rounds):
            began = time.perf_counter()
            file.write(b"x" * 600)
            os.fsync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    path.unlink()
    return statistics.median(times)


def report(result: dict[str, object], *, as_json: bool) -> None:
    """One JSON object, or a line per figure."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value}")
