"""Publish → the job's first instruction, on an idle yard: one job after another, one GPU each.

The time is stamped before the publish and again by the job itself (`/bin/sh` reading CLOCK_REALTIME as its first act).
In between: the durable submission, the daemon's turn with its fenced journal append, the order, the agent's ledger, the
partition and the process start. `fsync_ms_p50` says what one durable write costs on this disk.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from bench.yard import BenchYard, fsync_ms_p50, percentile, report, running_yard

STAMP = "exec date +%s%N"


async def _one(yard: BenchYard, index: int) -> float:
    path = yard.scratch / f"stamp-{index}"
    began = time.time_ns()
    job = await yard.client.submit(command=["/bin/sh", "-c", f"{STAMP} > {path}"], gpus=1, name="latency")
    await job.wait()
    return (int(path.read_text()) - began) / 1e6


async def _run(count: int, warm_up: int) -> dict[str, object]:
    async with running_yard(nodes=1, gpus_per_node=8) as yard:
        for index in range(warm_up):
            await _one(yard, -1 - index)
        times = [await _one(yard, index) for index in range(count)]
        fsync_ms = fsync_ms_p50(yard.state)
    return {
        "n": count,
        "publish_to_start_ms": {"p50": round(percentile(times, 0.5), 2), "p99": round(percentile(times, 0.99), 2)},
        "fsync_ms_p50": round(fsync_ms, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=300, help="submissions measured (default 300)")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report(asyncio.run(_run(options.jobs, options.warm_up)), as_json=options.json)


if __name__ == "__main__":
    main()
