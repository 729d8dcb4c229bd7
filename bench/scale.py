"""Load event → the new replica's process started.

A service with one request per replica is told of one more request in flight, again and again: each report must bring
one more replica, whose process stamps CLOCK_REALTIME as its first act. Reports are a second apart, so that none waits
for the yard's limit of one load change per service and second.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from bench.yard import BenchYard, percentile, report, running_yard

SERVICE = "bench"


async def _until_stamped(directory: Path, known: set[str]) -> str:
    """The name of the next stamp file with content."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in directory.iterdir():
            if path.name not in known and path.stat().st_size > 10:
                return path.name
        await asyncio.sleep(0.005)
    raise SystemExit("no replica started within 30 s of a load report")


async def _measure(yard: BenchYard, rounds: int) -> list[float]:
    stamps = yard.scratch / "stamps"
    stamps.mkdir()
    stamps.chmod(0o777)
    await yard.client.apply(
        name=SERVICE,
        command=["/bin/sh", "-c", f"date +%s%N > {stamps}/$GPUYARD_JOB; exec sleep 3600"],
        replica={"gpu": "0.1", "isolation": "soft"},
        min_replicas=0,
        max_replicas=rounds,
        target_concurrency=1,
        stop_grace="1s",
    )
    known: set[str] = set()
    times = []
    for concurrency in range(1, rounds + 1):
        began = time.time_ns()
        await yard.client.report_load(SERVICE, concurrency=concurrency)
        name = await _until_stamped(stamps, known)
        known.add(name)
        times.append((int((stamps / name).read_text()) - began) / 1e6)
        await asyncio.sleep(1.05)
    return times


async def _run(rounds: int) -> dict[str, object]:
    async with running_yard(nodes=1, gpus_per_node=8) as yard:
        times = await _measure(yard, rounds)
    return {
        "n": len(times),
        "load_to_start_ms": {"p50": round(percentile(times, 0.5), 2), "p99": round(percentile(times, 0.99), 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report(asyncio.run(_run(options.rounds)), as_json=options.json)


if __name__ == "__main__":
    main()
