"""Durable submissions a second: one job a message, and many a message.

Durable means decided: a submission counts once its `accepted` is in the journal and its submitter was told. The jobs
ask for a card that no node has, and wait: the figure is of submission alone.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import gpuyard
from bench.yard import BenchYard, report, running_yard
from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.units import GpuWish

ABSENT = GpuWish("B300")


async def _timed(yard: BenchYard, jobs: int, *, batched: bool) -> float:
    """Jobs a second until all of them are accepted."""
    requests = [JobRequest(command=["/bin/true"], gpus=1, gpu_model=ABSENT, allow_pending=True) for _ in range(jobs)]
    began = time.monotonic()
    outcomes = await yard.client.submit_many(requests, batched=batched)
    seconds = time.monotonic() - began
    refused = [outcome for outcome in outcomes if isinstance(outcome, gpuyard.Rejected)]
    if refused:
        raise SystemExit(f"{len(refused)} submissions were refused, the first: {refused[0]}")
    return jobs / seconds


async def _run(jobs: int) -> dict[str, object]:
    async with running_yard(nodes=1, gpus_per_node=8) as yard:
        await _timed(yard, min(200, jobs), batched=False)
        single = await _timed(yard, jobs, batched=False)
        batched = await _timed(yard, jobs, batched=True)
    return {"jobs": jobs, "jobs_per_s": round(single, 1), "batched_jobs_per_s": round(batched, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report(asyncio.run(_run(options.jobs)), as_json=options.json)


if __name__ == "__main__":
    main()
