"""N no-op jobs through a whole yard: from the first publish to the last result in the journal.

Each job is a message of its own and a real `/bin/true` on one GPU; eight agents are processes of their own, and every
state of every job is durable. `cpu_ms_per_job` is the CPU time of nats-server, daemon, agents and supervisors per job.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from bench.yard import BenchYard, report, running_yard
from gpuyard_protocol.jobs import JobRequest

AGENTS = 8


async def _finished(yard: BenchYard) -> int:
    return (await yard.client.stats()).finished


async def _drain(yard: BenchYard, jobs: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of the yard."""
    before = await _finished(yard)
    requests = [JobRequest(command=["/bin/true"], gpus=1) for _ in range(jobs)]
    cpu_before, began = yard.cpu_s(), time.monotonic()
    sending = asyncio.create_task(yard.client.submit_many(requests, batched=False))
    while (done := await _finished(yard) - before) < jobs:
        print(f"\r{done}/{jobs}", end="", file=sys.stderr)
        await asyncio.sleep(0.05)
    seconds, cpu_s = time.monotonic() - began, yard.cpu_s() - cpu_before
    print(f"\r{jobs}/{jobs} in {seconds:.1f} s", file=sys.stderr)
    await sending
    return seconds, cpu_s


async def _run(jobs: int, gpus: int) -> dict[str, object]:
    async with running_yard(nodes=AGENTS, gpus_per_node=gpus // AGENTS) as yard:
        await _drain(yard, min(100, jobs))
        seconds, cpu_s = await _drain(yard, jobs)
    return {
        "jobs": jobs,
        "gpus": gpus,
        "seconds": round(seconds, 2),
        "jobs_per_s": round(jobs / seconds, 1),
        "cpu_ms_per_job": round(cpu_s * 1000 / jobs, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--gpus", type=int, default=64, help=f"a multiple of {AGENTS} (default 64)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.gpus < AGENTS or options.gpus % AGENTS:
        parser.error(f"--gpus: found {options.gpus}; expected a multiple of {AGENTS}")
    report(asyncio.run(_run(options.jobs, options.gpus)), as_json=options.json)


if __name__ == "__main__":
    main()
