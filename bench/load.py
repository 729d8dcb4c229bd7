"""A busy day for the daemon alone: heartbeats and telemetry of many nodes, and submissions at a steady rate.

The nodes run nothing (`bench.fleet`), but say all that real ones say: a heartbeat and a sample of eight cards each
second, and for each job its start and its end. Submissions come one by one at even distances (with `--burst`, so many
at once), as many a second as asked for. What is measured, against the same yard with its nodes and next to no
submissions: the daemon's CPU time; whether anything is left waiting; what one decision takes (one start, or one proof
that nothing that waits fits); how long after its arrival at the daemon a message's decision is in the journal; and how
long after its sending a submission's job is commanded at a node. The last is taken here, where the nodes and the
submitters are one process, so their own work is in it.
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
from gpuyard_protocol.nodes import DeviceSample, Start, Telemetry
from gpuyard_protocol.subjects import submission, telemetry

GPUS = 8
USERS = 8
#: Between two looks at what waits: few, since each costs the daemon the making of its whole page.
LOOK_S = 5.0
QUANTILES = (("p50", 0.5), ("p99", 0.99))
_BUCKET = re.compile(r'^(gpuyard_decision_(?:latency_)?seconds)_bucket\{le="([^"]+)"\} (\S+)', re.MULTILINE)
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


class Submitter:
    """Sends jobs, and sees them arrive at nodes as commands."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._number = 0
        self._sent_at: dict[str, float] = {}
        #: Seconds from the sending of each job to its command.
        self.commanded_after_s: list[float] = []

    def commanded(self, start: Start) -> None:
        sent_at = self._sent_at.pop(start.launch.argv[-1], None)
        if sent_at is not None:
            self.commanded_after_s.append(time.monotonic() - sent_at)

    async def submit(self, rate: int, burst: int, seconds: float) -> int:
        publisher = WindowedPublisher(self._bus, window=256)
        began, sent = time.monotonic(), 0
        while (passed := time.monotonic() - began) < seconds:
            if sent > rate * passed:
                await asyncio.sleep(sent / rate - passed)
                continue
            for _ in range(burst):
                self._number += 1
                request = encode(JobRequest(command=["/bin/true", str(self._number)], gpus=1))
                self._sent_at[str(self._number)] = time.monotonic()
                await publisher.submit(submission("acme", f"user-{sent % USERS}", "submit"), request)
                sent += 1
        await publisher.drain()
        return sent


async def _metrics(directory: Path) -> str:
    note = directory / "state" / "daemon" / "http.url"
    while not note.exists():  # the page opens a moment after the daemon's first decision
        await asyncio.sleep(0.05)
    url = note.read_text().strip() + "/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(read)


async def _buckets(directory: Path) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    for name, bound, count in _BUCKET.findall(await _metrics(directory)):
        found.setdefault(name, {})[float(bound)] = float(count)
    return found


async def _watch_waiting(directory: Path, seen: list[int]) -> None:
    """How many messages wait for a turn, now and then."""
    while True:
        found = _WAITING.search(await _metrics(directory))
        seen.append(int(float(found[1])) if found else -1)
        await asyncio.sleep(LOOK_S)


def _quantile(before: dict[float, float], after: dict[float, float], share: float) -> float | None:
    """The quantile, taken to lie in its bucket (a fifth wide) in proportion to its rank."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    rank = share * max(counts.values(), default=0.0)
    below_s = below = 0.0
    for bound, count in counts.items():
        if count >= rank > 0:
            inside = bound - below_s if bound < float("inf") else 0.0
            return below_s + inside * (rank - below) / (count - below)
        below_s, below = bound, count
    return None


class Span:
    """What one stretch of time cost the daemon."""

    def __init__(self, daemon: psutil.Process, directory: Path, submitter: Submitter) -> None:
        self._daemon, self._directory, self._submitter = daemon, directory, submitter

    async def begin(self) -> None:
        self._buckets = await _buckets(self._directory)
        self._submitter.commanded_after_s.clear()
        self._cpu, self._began = self._cpu_s(), time.monotonic()

    async def end(self) -> dict[str, object]:
        seconds, cpu_s = time.monotonic() - self._began, self._cpu_s() - self._cpu
        buckets = await _buckets(self._directory)
        return {
            "seconds": round(seconds, 1),
            "core_pct": round(100 * cpu_s / seconds, 1),
            "decision_us": self._quantiles(buckets, "gpuyard_decision_seconds", 1e6),
            "decided_after_ms": self._quantiles(buckets, "gpuyard_decision_latency_seconds", 1e3),
            "commanded_after_ms": _sampled(self._submitter.commanded_after_s, 1e3),
        }

    def _quantiles(self, buckets: dict[str, dict[float, float]], name: str, times: float) -> dict[str, float | None]:
        found = {}
        for quantile, share in QUANTILES:
            value = _quantile(self._buckets.get(name, {}), buckets[name], share)
            found[quantile] = None if value is None else round(value * times, 2)
        return found

    def _cpu_s(self) -> float:
        times = self._daemon.cpu_times()
        return times.user + times.system


def _sampled(values: list[float], times: float) -> dict[str, float | None]:
    ordered = sorted(values)
    return {
        quantile: round(ordered[int(share * len(ordered))] * times, 2) if ordered else None
        for quantile, share in QUANTILES
    }


async def _stats(bus: Bus) -> dict[str, object]:
    found: dict[str, object] = json.loads((await bus.request("q.acme.alice.stats", b"", timeout=10)).data)
    return found


async def _run(options: argparse.Namespace, directory: Path, url: str, daemon: psutil.Process) -> dict[str, object]:
    bus, users = [await connect(url, name=name, inbox_prefix=f"_INBOX_{name}") for name in ("AGENTS", "USERS")]
    await until_serving(directory, users)
    submitter = Submitter(users)
    nodes = [f"node-{index}" for index in range(options.agents)]
    agents = [FakeAgent(bus, node, gpus=GPUS) for node in nodes]
    for agent in agents:
        agent.on_start = submitter.commanded
        await agent.join()
    measuring = asyncio.get_running_loop().create_task(_measure_nodes(bus, nodes))
    await asyncio.sleep(3)
    idle, busy = [Span(daemon, directory, submitter) for _ in range(2)]
    await idle.begin()
    # Five submissions a second: there must be decisions to time.
    await submitter.submit(5, 1, options.idle_seconds)
    idle_cost = await idle.end()
    waiting: list[int] = []
    await busy.begin()
    watching = asyncio.get_running_loop().create_task(_watch_waiting(directory, waiting))
    sent = await submitter.submit(options.rate, options.burst, options.seconds)
    watching.cancel()
    cost = await busy.end()
    wanted = sent + int(5 * options.idle_seconds)
    ended = time.monotonic()
    while int(str((await _stats(users))["finished"])) < wanted - 5:
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
    await users.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=200)
    parser.add_argument("--rate", type=int, default=500, help="submissions a second")
    parser.add_argument("--burst", type=int, default=1, help="submissions sent at once")
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
