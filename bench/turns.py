"""The daemon alone: submissions through a real nats-server, decided, journaled, ordered and answered by agents that
run nothing.

What a job costs the daemon, with every message it really sees (submission, orders, two reports, events), and nothing
of what an agent does. The daemon is a process of its own, and so are its fake agents and submitters;
`daemon_us_per_job` is its CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import uvloop

from bench.fleet import FakeAgent
from gpuyard_protocol.bus.base import Bus
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.bus.publisher import WindowedPublisher
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.subjects import submission

CONFIG = """
listen: "127.0.0.1:-1"
max_payload: 8MB
jetstream {{ store_dir: "{directory}/store", max_file: 16GB, max_mem: 64MB, sync_interval: always }}
feature_flags {{ js_ack_fc_v2: false }}
"""
_DEADLINE_S = 120.0


def start_nats(directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    config = directory / "nats.conf"
    config.write_text(CONFIG.format(directory=directory))
    binary = os.environ.get("NATS_SERVER") or str(Path(sys.executable).parent / "nats-server")
    with (directory / "nats.log").open("wb") as log:
        server = subprocess.Popen(
            [binary, "-c", str(config), "--ports_file_dir", str(directory)], stdout=log, stderr=log
        )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for path in directory.glob("*.ports"):
            if (text := path.read_text()).endswith("}"):
                return server, "nats://127.0.0.1:" + str(json.loads(text)["nats"][0]).rsplit(":", 1)[1]
        time.sleep(0.005)
    raise RuntimeError((directory / "nats.log").read_text())


def start_daemon(directory: Path, url: str) -> subprocess.Popen[bytes]:
    arguments = ["--state", str(directory / "state"), "--nats", url, "--http", "127.0.0.1:0", "--no-authentication"]
    with (directory / "daemon.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "gpuyard_daemon", *arguments], stdout=log, stderr=log)


async def until_serving(directory: Path, bus: Bus) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        try:
            await bus.request("q.acme.alice.ping", b"", timeout=0.5)
            return
        except Exception:  # noqa: BLE001  whatever it is, the daemon does not serve yet
            await asyncio.sleep(0.02)
    raise RuntimeError((directory / "daemon.log").read_text())


async def _run(jobs: int, nodes: int, directory: Path, url: str, daemon: psutil.Process) -> dict[str, object]:
    bus = await connect(url, name="bench", inbox_prefix="_INBOX_B")
    await until_serving(directory, bus)
    agents = [FakeAgent(bus, f"node-{index}") for index in range(nodes)]
    for agent in agents:
        await agent.join()
    await asyncio.sleep(0.3)
    request = encode(JobRequest(command=["/bin/true"], gpus=1))
    publisher = WindowedPublisher(bus, window=64)
    before = daemon.cpu_times()
    began = time.perf_counter()
    for _ in range(jobs):
        await publisher.submit(submission("acme", "alice", "submit"), request)
    await publisher.drain()
    submitted = time.perf_counter()
    while sum(len(agent.ended) for agent in agents) < jobs:
        if time.perf_counter() - began > _DEADLINE_S:
            raise RuntimeError(f"{sum(len(agent.ended) for agent in agents)} of {jobs} jobs ended")
        await asyncio.sleep(0.005)
    while json.loads((await bus.request("q.acme.alice.stats", b"")).data)["finished"] < jobs:
        await asyncio.sleep(0.01)
    seconds = time.perf_counter() - began
    after = daemon.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    latency = await _latency(bus, agents, request)
    await bus.close()
    return {
        "jobs": jobs,
        "nodes": nodes,
        "seconds": round(seconds, 2),
        "jobs_per_s": round(jobs / seconds),
        "submit_seconds": round(submitted - began, 2),
        "daemon_us_per_job": round(cpu_s / jobs * 1e6),
        "daemon_rss_mib": round(daemon.memory_info().rss / 2**20),
        "publish_to_order_ms": latency,
        "faults": [fault for agent in agents for fault in agent.faults],
    }


async def _latency(bus: Bus, agents: list[FakeAgent], request: bytes) -> dict[str, float]:
    """Submission published → order at the agent, one at a time on an idle yard."""
    times = []
    news = asyncio.Event()
    for agent in agents:
        agent.news = news
    for _ in range(200):
        news.clear()
        began = time.perf_counter()
        await bus.stream_publish(submission("acme", "alice", "submit"), request)
        await news.wait()
        times.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.01)
    times.sort()
    return {"p50": round(times[100], 2), "p99": round(times[197], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuyard-turns-") as name:
        directory = Path(name)
        server, url = start_nats(directory)
        daemon = start_daemon(directory, url)
        try:
            result = uvloop.run(_run(options.jobs, options.nodes, directory, url, psutil.Process(daemon.pid)))
        finally:
            daemon.terminate()
            daemon.wait()
            server.terminate()
            server.wait()
            if os.environ.get("BENCH_LOG"):
                sys.stderr.write((directory / "daemon.log").read_text())
    print(json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
