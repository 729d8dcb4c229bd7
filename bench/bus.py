"""What the bus costs: client CPU and wall time per operation, one connection, a real server on loopback.

    python -m bench.bus [--json] [--count N] [--loop asyncio|uvloop]

CPU microseconds are this process's (user and system), without the server's. Streams sync every message to the
disk, as in production, so the rate of durable publishes is the disk's, their CPU cost ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from gpuyard_daemon.yard.server_files import find_server
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError, Message, StoredMessage, StreamSpec
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.bus.publisher import WindowedPublisher

PAYLOAD = b"x" * 600
WINDOW = 256
CONFIG = """
listen: "127.0.0.1:-1"
max_payload: 8MB
jetstream {{ store_dir: "{directory}/store", max_file: 2GB, sync_interval: always, strict: true }}
feature_flags {{ js_ack_fc_v2: false }}
"""


class Server:
    def __init__(self, directory: Path) -> None:
        config = directory / "nats.conf"
        config.write_text(CONFIG.format(directory=directory))
        self._directory = directory
        self._process = subprocess.Popen(
            [find_server(), "-c", config, "--ports_file_dir", directory],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def url(self) -> str:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for path in self._directory.glob("*.ports"):
                text = path.read_text()
                if text.endswith("}"):
                    return str(json.loads(text)["nats"][0])
            time.sleep(0.01)
        raise BusError("nats-server did not start")

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measured(count: int, work: Callable[[], Awaitable[None]]) -> dict[str, float]:
    cpu, wall = cpu_s(), time.perf_counter()
    await work()
    cpu, wall = cpu_s() - cpu, time.perf_counter() - wall
    return {"cpu_us": round(cpu / count * 1e6, 2), "per_s": round(count / wall)}


async def run(url: str, count: int) -> dict[str, dict[str, float]]:
    one = await nats.connect(url, name="one", inbox_prefix="_INBOX_1")
    two = await nats.connect(url, name="two", inbox_prefix="_INBOX_2")
    results = {
        "core publish": await core_publish(one, count * 5),
        "core subscribe": await core_subscribe(one, two, count * 5),
        "request, one by one (both sides)": await requests(one, two, count // 4, 1),
        "request, 64 at once (both sides)": await requests(one, two, count, 64),
    }
    await one.ensure_stream(StreamSpec("B", ("b.>",), max_bytes=1_500_000_000))
    results["stream publish, one by one"] = await stream_publish(one, count // 10, 1)
    results[f"stream publish, window {WINDOW}"] = await stream_publish(one, count // 4, WINDOW)
    results["reader, what is there"] = await read_all(one, two)
    results["publish to handler"] = await latency(one, two, count // 20)
    await one.close()
    await two.close()
    return results


async def core_publish(bus: NatsBus, count: int) -> dict[str, float]:
    async def work() -> None:
        for _ in range(count):
            await bus.publish("bench.nobody", PAYLOAD)
        await bus.flush()

    return await measured(count, work)


async def core_subscribe(sender: NatsBus, receiver: NatsBus, count: int) -> dict[str, float]:
    """Publishing and receiving in one process; the cost of the publishes is taken off."""
    alone = await core_publish(sender, count)
    got = 0
    done = asyncio.Event()

    def handler(_: Message) -> None:
        nonlocal got
        got += 1
        if got == count:
            done.set()

    await receiver.subscribe("bench.x", handler)

    async def work() -> None:
        for _ in range(count):
            await sender.publish("bench.x", PAYLOAD)
        await done.wait()

    both = await measured(count, work)
    return {"cpu_us": round(both["cpu_us"] - alone["cpu_us"], 2), "per_s": both["per_s"]}


async def requests(asker: NatsBus, answerer: NatsBus, count: int, at_once: int) -> dict[str, float]:
    tasks: set[asyncio.Task[None]] = set()

    def answer(message: Message) -> None:
        task = asyncio.ensure_future(answerer.publish(message.reply, b"ok"))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    subscription = await answerer.subscribe("bench.q", answer)
    took: list[float] = []

    async def one_after_the_other() -> None:
        for _ in range(count // at_once):
            begin = time.perf_counter()
            await asker.request("bench.q", PAYLOAD)
            took.append(time.perf_counter() - begin)

    async def work() -> None:
        await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))

    result = await measured(count, work)
    await subscription.unsubscribe()
    return result | percentiles(took)


async def stream_publish(bus: NatsBus, count: int, window: int) -> dict[str, float]:
    took: list[float] = []

    async def one_by_one() -> None:
        for _ in range(count):
            begin = time.perf_counter()
            await bus.stream_publish("b.x", PAYLOAD)
            took.append(time.perf_counter() - begin)

    async def windowed() -> None:
        publisher = WindowedPublisher(bus, window=window, timeout=30.0)
        for _ in range(count):
            await publisher.submit("b.x", PAYLOAD)
        await publisher.drain()

    result = await measured(count, one_by_one if window == 1 else windowed)
    return result | percentiles(took) if took else result


async def read_all(bus: NatsBus, reading: NatsBus) -> dict[str, float]:
    count = (await bus.stream_state("B")).messages
    got = 0
    done = asyncio.Event()

    def handler(batch: list[StoredMessage]) -> None:
        nonlocal got
        got += len(batch)
        if got >= count:
            done.set()

    async def work() -> None:
        reader = await reading.read_stream("B", handler)
        await done.wait()
        await reader.close()

    return await measured(count, work)


async def latency(bus: NatsBus, reading: NatsBus, count: int) -> dict[str, float]:
    """From the publish of a durable message to a reader's handler."""
    arrived = asyncio.Event()
    start = (await bus.stream_state("B")).last_sequence + 1
    reader = await reading.read_stream("B", lambda _: arrived.set(), start=start)
    took: list[float] = []

    async def work() -> None:
        for _ in range(count):
            arrived.clear()
            begin = time.perf_counter()
            ack = asyncio.ensure_future(bus.stream_publish("b.x", PAYLOAD))
            await arrived.wait()
            took.append(time.perf_counter() - begin)
            await ack

    result = await measured(count, work)
    await reader.close()
    return result | percentiles(took)


def percentiles(took: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(took, n=100)
    return {"p50_us": round(cuts[49] * 1e6), "p99_us": round(cuts[98] * 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--count", type=int, default=20_000, help="scale of each measurement")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    arguments = parser.parse_args()
    runner = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    with tempfile.TemporaryDirectory(prefix="gpuyard-bench-") as directory:
        server = Server(Path(directory))
        try:
            results = runner(run(server.url(), arguments.count))
        finally:
            server.end()
    if arguments.json:
        print(json.dumps({"loop": arguments.loop, "results": results}))
        return
    for name, figures in results.items():
        print(f"{name:36}", "  ".join(f"{key} {value:>10,}" for key, value in figures.items()), file=sys.stdout)


if __name__ == "__main__":
    main()
