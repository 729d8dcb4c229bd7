"""How well weights hold on a time-sliced card, with CPU-bound stand-ins for programs that use it.

    python -m bench.timeslice --json [--seconds 60] [--weights 700,300] [--quantum-ms 5000]

Each job spins; what it got is its CPU time, counted by the kernel. The error is the largest distance, in percentage
points, between a job's part of all CPU time used and its part of all weights. `overlap_pct`: CPU time used beyond one
CPU, which is what exclusive turns must not show; `lost_pct`: the part of the time in which nobody ran.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from gpuyard_agent.launch.accounts import AccountPolicy
from gpuyard_agent.launch.base import ProcessSpec, Started
from gpuyard_agent.launch.choose import LauncherChoice, choose
from gpuyard_agent.launch.limits import probe_supervisor
from gpuyard_agent.launch.turn_taking import TurnTakingLauncher
from gpuyard_agent.launch.usage import cpu_ms_of_tree
from gpuyard_agent.partitions.turns import TurnSettings
from gpuyard_protocol.names import AssignmentKey


def _clock_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


async def _spin(launcher: TurnTakingLauncher, root: Path, job: int, weight: int) -> int:
    """Start one; its pid."""
    key, job_dir = AssignmentKey(job, 1, 0), root / "jobs" / str(job)
    spec = ProcessSpec(
        key=key,
        argv=("/bin/sh", "-c", "while :; do :; done"),
        env={"PATH": "/usr/bin:/bin"},
        account=AccountPolicy().resolve("bench", "bench"),
        job_dir=str(job_dir),
        stdout=str(job_dir / "0.out"),
        stderr=str(job_dir / "0.err"),
    )
    launcher.admit(key, "GPU-bench", weight)
    (result,) = await launcher.start([spec])
    if not isinstance(result, Started):
        raise SystemExit(f"not started: {result}")
    return result.pid


async def measure(
    root: Path, choice: LauncherChoice, weights: list[int], seconds: float, quantum_ms: int
) -> dict[str, object]:
    inner = await choose(choice, "bench", root)
    settings = TurnSettings(quantum_ms=quantum_ms, shortest_ms=quantum_ms // 5)
    launcher = TurnTakingLauncher(inner, settings, clock_ms=_clock_ms, wall_ms=_wall_ms)
    await launcher.open()
    keys = [AssignmentKey(job, 1, 0) for job in range(len(weights))]
    try:
        pids = [await _spin(launcher, root, job, weight) for job, weight in enumerate(weights)]
        before, began = [cpu_ms_of_tree(pid) for pid in pids], time.monotonic()
        own_before = time.process_time()
        await asyncio.sleep(seconds)
        had = [cpu_ms_of_tree(pid) - then for pid, then in zip(pids, before, strict=True)]
        wall_ms = (time.monotonic() - began) * 1000
        own_s = time.process_time() - own_before
    finally:
        for key in keys:
            await launcher.stop(key, 0)
        exits = launcher.exits()
        ended = [(await anext(exits)).key for _ in keys]
        await launcher.forget(ended)
        await launcher.close()
    parts = [ms / sum(had) for ms in had]
    wanted = [weight / sum(weights) for weight in weights]
    return {
        "weights": weights,
        "parts": [round(part, 4) for part in parts],
        "error_pct": round(100 * max(abs(part - due) for part, due in zip(parts, wanted, strict=True)), 2),
        "overlap_pct": round(max(0.0, 100 * (sum(had) / wall_ms - 1)), 2),
        "lost_pct": round(max(0.0, 100 * (1 - sum(had) / wall_ms)), 2),
        "agent_cpu_pct": round(100 * own_s / (wall_ms / 1000), 2),
        "seconds": round(wall_ms / 1000, 1),
        "quantum_ms": quantum_ms,
        "freeze": probe_supervisor().freeze if choice == "supervisor" else "systemd",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.timeslice", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--weights", default="700,300", help="in thousandths of a card")
    parser.add_argument("--quantum-ms", type=int, default=5_000)
    parser.add_argument("--launcher", choices=("supervisor", "systemd"), default="supervisor")
    given = parser.parse_args()
    # Not below the caller's directory: the jobs' account may not enter that.
    root = Path(tempfile.mkdtemp(prefix="gpuyard-bench-"))
    root.chmod(0o711)
    try:
        weights = [int(text) for text in given.weights.split(",")]
        found = asyncio.run(measure(root, given.launcher, weights, given.seconds, given.quantum_ms))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if given.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:>14}  {value}")
    sys.exit(0)


if __name__ == "__main__":
    main()
