"""A busy day for the daemon alone: heartbeats and telemetry of many nodes, and submissions at a steady rate.

The nodes run nothing (`bench.fleet`), but say all that real ones say: a heartbeat and a sample of eight cards each
second, and for each job its start and its end. Submissions come one by one, as many a second as asked for. What is
measured: the daemon's CPU time, whether anything is left waiting, and how long decisions take, against the same yard
with its nodes and no submissions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import uvloop

from bench.fleet import FakeAgent
from bench.turns import start_daemon, start_nats, until_serving
from gpuyard_protocol.bus.base import Bus
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.bus.publisher import WindowedPublisher
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.nodes import DeviceSample, Telemetry
from gpuyard_protocol.subjects import submission, telemetry

GPUS = 8
#: Submissions are sent in as many slices a second.
SLICES = 50
USERS = 8
#: Between two looks at what waits: few, since each costs the daemon the making of its whole page.
LOOK_S = 5.0
_BUCKET = re.compile(r'gpuyard_decision_latency_seconds_bucket\{le="([^"]+)"\} (\S+)')
_WAITING = re.compile(r"^gpuyard_inbox_waiting (\S+)$", re.MULTILINE)


async def _measure_nodes(bus: Bus, nodes: list[str]) -> None:
    """A sample of every node each second, spread over it."""
    while True:
        began = time.monotonic()
        for number, node in enumerate(nodes):
            devices = tuple(
                DeviceSample(
                    uuid=f"GPU-{node}-{index}",
                    utilization_pct=(number + index) % 100,
                    memory_used_mib=1000 * index,
                    memory_total_mib=81_920,
                    power_mw=300_000,
                    temperature_c=50,
                    power_limit_mw=700_000,
                )
                for index in range(GPUS)
            )
            await bus.publish(
                telemetry(node), encode(Telemetry(node=node, at_ms=time.time_ns() // 1_000_000, devices=devices))
            )
            await asyncio.sleep(max(0.0, began + number / len(nodes) - time.monotonic()))
        await asyncio.sleep(max(0.0, began + 1 - time.monotonic()))


async def _submit(bus: Bus, rate: int, seconds: float) -> int:
    request = encode(JobRequest(command=["/bin/true"], gpus=1))
    publisher = WindowedPublisher(bus, window=256)
    began, sent = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        while sent < rate * passed:
            await publisher.submit(submission("acme", f"user-{sent % USERS}", "submit"), request)
            sent += 1
        await asyncio.sleep(1 / SLICES)
    await publisher.drain()
    return sent


async def _metrics(directory: Path) -> str:
    url = (directory / "state" / "daemon" / "http.url").read_text().strip() + "/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(read)


async def _buckets(directory: Path) -> dict[float, float]:
    return {float(bound): float(count) for bound, count in _BUCKET.findall(await _metrics(directory))}


async def _watch_waiting(directory: Path, seen: list[int]) -> None:
    """How many messages wait for a turn, now and then."""
    while True:
        found = _WAITING.search(await _metrics(directory))
        seen.append(int(float(found[1])) if found else -1)
        await asyncio.sleep(LOOK_S)


def _quantile_ms(before: dict[float, float], after: dict[float, float], share: float) -> float | None:
    """The quantile, taken to lie in its bucket (a fifth wide) in proportion to its rank."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    rank = share * max(counts.values(), default=0.0)
    below_s = below = 0.0
    for bound, count in counts.items():
        if count >= rank > 0:
            inside = bound - below_s if bound < float("inf") else 0.0
            return round((below_s + inside * (rank - below) / (count - below)) * 1000, 2)
        below_s, below = bound, count
    return None


class Span:
    """What one stretch of time cost the daemon."""

    def __init__(self, daemon: psutil.Process, directory: Path) -> None:
        self._daemon, self._directory = daemon, directory

    async def begin(self) -> None:
        self._buckets = await _buckets(self._directory)
        self._cpu, self._began = self._cpu_s(), time.monotonic()

    async def end(self) -> dict[str, object]:
        seconds, cpu_s = time.monotonic() - self._began, self._cpu_s() - self._cpu
        buckets = await _buckets(self._directory)
        return {
            "seconds": round(seconds, 1),
            "core_pct": round(100 * cpu_s / seconds, 1),
            "decision_ms": {
                "p50": _quantile_ms(self._buckets, buckets, 0.5),
                "p99": _quantile_ms(self._buckets, buckets, 0.99),
            },
        }

    def _cpu_s(self) -> float:
        times = self._daemon.cpu_times()
        return times.user + times.system


async def _stats(bus: Bus) -> dict[str, object]:
    found: dict[str, object] = json.loads((await bus.request("q.acme.alice.stats", b"", timeout=10)).data)
    return found


async def _run(options: argparse.Namespace, directory: Path, url: str, daemon: psutil.Process) -> dict[str, object]:
    bus, submitter = [await connect(url, name=name, inbox_prefix=f"_INBOX_{name}") for name in ("AGENTS", "USERS")]
    await until_serving(directory, submitter)
    nodes = [f"node-{index}" for index in range(options.agents)]
    agents = [FakeAgent(bus, node, gpus=GPUS) for node in nodes]
    for agent in agents:
        await agent.join()
    measuring = asyncio.get_running_loop().create_task(_measure_nodes(bus, nodes))
    await asyncio.sleep(3)
    idle, busy = Span(daemon, directory), Span(daemon, directory)
    await idle.begin()
    # Five submissions a second: there must be decisions to time.
    await _submit(submitter, 5, options.idle_seconds)
    idle_cost = await idle.end()
    waiting: list[int] = []
    await busy.begin()
    watching = asyncio.get_running_loop().create_task(_watch_waiting(directory, waiting))
    sent = await _submit(submitter, options.rate, options.seconds)
    watching.cancel()
    cost = await busy.end()
    wanted = sent + int(5 * options.idle_seconds)
    ended = time.monotonic()
    while int(str((await _stats(submitter))["finished"])) < wanted - 5:
        if time.monotonic() - ended > 60:
            break
        await asyncio.sleep(0.05)
    result = {
        "agents": options.agents,
        "submitted_per_s": round(sent / options.seconds),
        "jobs": sent,
        "idle": idle_cost,
        "busy": cost,
        "waiting_for_a_turn": {"max": max(waiting), "last": waiting[-1]},
        "all_finished_after_s": round(time.monotonic() - ended, 2),
        "rss_mib": round(daemon.memory_info().rss / 2**20),
        "faults": [fault for agent in agents for fault in agent.faults][:10],
    }
    measuring.cancel()
    for agent in agents:
        await agent.leave()
    await bus.close()
    await submitter.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=200)
    parser.add_argument("--rate", type=int, default=500, help="submissions a second")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--idle-seconds", type=float, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuyard-load-") as name:
        directory = Path(name)
        server, url = start_nats(directory)
        daemon = start_daemon(directory, url)
        try:
            result = uvloop.run(_run(options, directory, url, psutil.Process(daemon.pid)))
        finally:
            daemon.terminate()
            daemon.wait()
            server.terminate()
            server.wait()
    print(json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
