"""Starts per second of the supervisor process, and what one costs it.

    python -m bench.supervisor --json [--jobs N] [--account NAME]

Each job is a real `/bin/true`, its end reported and forgotten. Two ways of asking: one start after another (latency),
and all at once (throughput). CPU time is the supervisor's own, read from /proc, children not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from gpuyard_agent.launch.accounts import AccountPolicy
from gpuyard_agent.launch.base import Account, ProcessSpec
from gpuyard_agent.launch.client import SupervisorLauncher
from gpuyard_protocol.names import AssignmentKey

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _specs(root: Path, first: int, count: int, account: Account) -> list[ProcessSpec]:
    specs = []
    for job in range(first, first + count):
        job_dir = root / "jobs" / str(job) / "1"
        specs.append(
            ProcessSpec(
                key=AssignmentKey(job, 1, 0),
                argv=("/bin/true",),
                env={"PATH": "/usr/bin:/bin", "GPUYARD_JOB": str(job)},
                account=account,
                job_dir=str(job_dir),
                stdout=str(job_dir / "0.out"),
                stderr=str(job_dir / "0.err"),
            )
        )
    return specs


async def _gather_exits(launcher: SupervisorLauncher, count: int) -> None:
    exits = launcher.exits()
    for _ in range(count):
        ended = await anext(exits)
        if ended.exit_code or ended.signal or ended.lost:
            raise SystemExit(f"a job ended as {ended}")
        await launcher.forget([ended.key])


async def measure(root: Path, jobs: int, account: Account) -> dict[str, float | int | str]:
    launcher = SupervisorLauncher(root / "supervisor.sock", root / "state")
    await launcher.open()
    await launcher.start(_specs(root, 1, 20, account))  # first starts warm up
    await _gather_exits(launcher, 20)

    singles = min(jobs, 200)
    latencies = []
    for spec in _specs(root, 1000, singles, account):
        began = time.perf_counter()
        await launcher.start([spec])
        latencies.append((time.perf_counter() - began) * 1000)
    await _gather_exits(launcher, singles)
    latencies.sort()

    specs = _specs(root, 10_000, jobs, account)
    cpu, began = _cpu_s(launcher.supervisor_pid), time.perf_counter()
    ending = asyncio.create_task(_gather_exits(launcher, jobs))
    await launcher.start(specs)
    started = time.perf_counter() - began
    await ending
    ended = time.perf_counter() - began
    cpu = _cpu_s(launcher.supervisor_pid) - cpu
    await launcher.close()
    while Path(f"/proc/{launcher.supervisor_pid}").exists():  # it removes its socket as the last thing it does
        await asyncio.sleep(0.01)
    return {
        "jobs": jobs,
        "account": account.name,
        "starts_per_s": round(jobs / started),
        "start_to_end_per_s": round(jobs / ended),
        "cpu_ms_per_job": round(cpu / jobs * 1000, 3),
        "single_start_ms_p50": round(latencies[len(latencies) // 2], 3),
        "single_start_ms_p99": round(latencies[len(latencies) * 99 // 100], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--account", default="", help="run jobs as this account (default: the policy's)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    account = AccountPolicy(options.account).resolve("bench", "bench")
    root = Path(tempfile.mkdtemp(prefix="gpuyard-bench-"))
    root.chmod(0o711)
    try:
        result = asyncio.run(measure(root, options.jobs, account))
    finally:
        shutil.rmtree(root)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
