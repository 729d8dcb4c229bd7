"""A real agent process: how soon an ordered process runs, how many in a second, and what that and idling cost.

    python -m bench.agent --json [--jobs N] [--simulate CARDS] [--launcher supervisor|systemd]

The benchmark is the daemon: orders over a real NATS server with the yard's accounts, reports read from the stream.
Latency is taken from outside, from just before the order is sent to the stamp that the started program (`/bin/date`)
makes, so NATS and the program's own start are in it. CPU time is the agent's and its supervisor's, read from /proc; the
started programs are not counted.

Unless one launcher is asked for, both are measured: the supervisor, and beside it under `systemd` the path by transient
services. That takes root and a systemd as PID 1: this host's, or else one in a container (systemd-nspawn), whose own
PID 1 and message bus count as the supervisor does. Where neither can be had, `systemd` says why. What is being measured
is said on standard error; both take a minute and a half together on two quiet cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from tests.support import nspawn
from tests.support.agents import AgentProcess, AgentRoom, Commander, agent_room, start_order, until_file

from gpuyard_agent.launch.choose import LauncherChoice
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Joined

IDLE_S = 5.0
#: After the last end was told: what is kept of ended jobs is still being put away, which counts to their cost.
SETTLE_S = 3.0
PACED_PER_S = 200
ADOPTED = 500
_BATCH = 4
_DEADLINE_S = 120.0


class AgentCost:
    """CPU seconds of the agent and of what starts processes for it, without their children."""

    def __init__(self, room: AgentRoom, agent: AgentProcess, launcher: LauncherChoice) -> None:
        self._processes = [psutil.Process(agent.pid), *room.supervisors()]
        if launcher == "systemd":
            buses = [one for one in psutil.process_iter() if one.name() == "dbus-daemon" and one.ppid() == 1]
            self._processes += [psutil.Process(1), *buses]

    def cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)

    def rss_mib(self) -> float:
        return self._processes[0].memory_info().rss / 2**20


async def _measure_latency(room: AgentRoom, commander: Commander, first: int, jobs: int) -> list[float]:
    """Milliseconds from order to the program's own stamp, one job after another."""
    latencies = []
    for job in range(first, first + jobs):
        start = start_order(job, "/bin/date", "+%s%N")
        ordered_ns = time.time_ns()
        await commander.order(start)
        await commander.ended(start.key)
        text = await until_file(room.state / "jobs" / str(job) / "1" / "0.out")
        latencies.append((int(text) - ordered_ns) / 1e6)
    return latencies


async def _run_many(commander: Commander, first: int, jobs: int, per_s: float | None) -> float:
    """Order `/bin/true` `jobs` times, in batches; seconds until every end is reported."""
    before = commander.count(Ended)
    began_s = time.perf_counter()
    for index in range(0, jobs, _BATCH):
        if per_s is not None:
            due_s = began_s + index / per_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        keys = range(first + index, first + min(index + _BATCH, jobs))
        await commander.order(*(start_order(job, "/bin/true", "x") for job in keys))
    await commander.until(lambda: commander.count(Ended) >= before + jobs, _DEADLINE_S)
    return time.perf_counter() - began_s


async def _measure_adoption(
    room: AgentRoom, commander: Commander, agent: AgentProcess, first: int, launcher: LauncherChoice
) -> float:
    """Seconds from the start of a new agent process until it has reported that it holds everything."""
    for index in range(0, ADOPTED, 50):
        await commander.order(*(start_order(first + index + job, "/bin/sleep", "1000") for job in range(50)))
    await commander.started(AssignmentKey(first + ADOPTED - 1, 1, 0), _DEADLINE_S)
    await agent.kill()
    joined = commander.count(Joined)
    began_s = time.perf_counter()
    await room.start_agent("--launcher", launcher)
    held = (await commander.joined(joined + 1)).held
    if len(held) != ADOPTED:
        raise SystemExit(f"{len(held)} of {ADOPTED} assignments were taken over")
    took_s = time.perf_counter() - began_s
    ended = commander.count(Ended)
    await commander.sync()  # nothing is wanted any more: services would outlive this benchmark
    await commander.until(lambda: commander.count(Ended) >= ended + ADOPTED, _DEADLINE_S)
    return took_s


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2)}


def _tell(what: str) -> None:
    """On standard error, with the time."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")


async def measure(jobs: int, simulate: str, launcher: LauncherChoice) -> dict[str, object]:
    async with agent_room() as room:
        commander = await room.commander()
        agent = await room.start_agent("--log-level", "warning", "--launcher", launcher, simulate=simulate)
        await commander.joined()
        await commander.sync()
        _tell(f"{launcher}: {jobs} starts, one after another")
        await _measure_latency(room, commander, 1, 20)  # warm
        cost = AgentCost(room, agent, launcher)

        latencies = await _measure_latency(room, commander, 1_000, jobs)
        _tell(f"{launcher}: {jobs} starts, {PACED_PER_S} in a second")
        cpu_s = cost.cpu_s()
        await _run_many(commander, 10_000, jobs, PACED_PER_S)
        await asyncio.sleep(SETTLE_S)
        cpu_ms_per_start = (cost.cpu_s() - cpu_s) * 1000 / jobs
        many = jobs * 2
        _tell(f"{launcher}: {many} starts, as fast as they go")
        seconds = await _run_many(commander, 20_000, many, None)

        _tell(f"{launcher}: idle")
        await asyncio.sleep(SETTLE_S)
        cpu_s, began_s = cost.cpu_s(), time.perf_counter()
        await asyncio.sleep(IDLE_S)
        idle_cpu_pct = (cost.cpu_s() - cpu_s) * 100 / (time.perf_counter() - began_s)
        rss_mib = cost.rss_mib()
        _tell(f"{launcher}: {ADOPTED} running jobs, taken over by another agent")
        adopt_s = await _measure_adoption(room, commander, agent, 50_000, launcher)
    return {
        "n": jobs,
        "order_to_running_ms": _quantiles(latencies),
        "starts_per_s": round(many / seconds, 1),
        "cpu_ms_per_start": round(cpu_ms_per_start, 2),
        "idle_cpu_pct": round(idle_cpu_pct, 2),
        "idle_rss_mib": round(rss_mib, 1),
        "adopt_500_s": round(adopt_s, 2),
    }


def _measure_systemd(jobs: int, simulate: str) -> dict[str, object]:
    """On this host or on a machine in a container; where that cannot be, why."""
    if Path("/run/systemd/system").is_dir() and os.geteuid() == 0:
        return asyncio.run(measure(jobs, simulate, "systemd"))
    if lacking := nspawn.missing():
        return {"not_measured": f"systemd is not PID 1 here, and a machine in a container needs {lacking}"}
    with nspawn.machine() as machine:
        machine.start()
        options = ("--json", "--launcher", "systemd", "--jobs", str(jobs), "--simulate", simulate)
        done = machine.run(nspawn.PYTHON, "-m", "bench.agent", *options, timeout_s=600, shows_errors=True)
        return {"where": "a container", **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--simulate", default="8xH100-80GB")
    parser.add_argument("--launcher", choices=("supervisor", "systemd"), help="this one alone; default: both")
    given = parser.parse_args()
    result = asyncio.run(measure(given.jobs, given.simulate, given.launcher or "supervisor"))
    if given.launcher is None:
        result["systemd"] = _measure_systemd(given.jobs, given.simulate)
    if given.json:
        print(json.dumps(result))
        return
    beside = result.pop("systemd", {})
    assert isinstance(beside, dict)
    sys.stdout.write(f"{'':20} {given.launcher or 'supervisor':36}{'systemd' if beside else ''}\n")
    for name, value in result.items():
        sys.stdout.write(f"{name:20} {value!s:36}{beside.get(name, '')}\n")
    if problem := beside.get("not_measured"):
        sys.stdout.write(f"not measured with systemd: {problem}\n")


if __name__ == "__main__":
    main()
