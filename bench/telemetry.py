"""What measuring cards costs: CPU time of one sample of every card and of one look at the jobs on them.

    python -m bench.telemetry --json [--cards 8] [--samples 200] [--real]

NVIDIA's own binding over the fake driver (or the real one with `--real`), as the agent uses it. `cpu_pct_at_1hz` is
the part of one core that sampling once a second would take, instances of MIG (half of the cards, seven each) and the
look at the jobs' processes included. The fake driver's own work is in it, and a real driver's system calls are not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tests.support.agents import start_order
from tests.support.devices import fake_cards

from gpuyard_agent.core.model import Assignment
from gpuyard_agent.devices.base import DeviceBackend
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.job_use import JobUse
from gpuyard_protocol.resources import WholeCards


@contextlib.asynccontextmanager
async def _cards(count: int, real: bool) -> AsyncIterator[DeviceBackend]:
    if real:
        backend = NvmlBackend(may_switch_mig=False)
        await backend.open()
        yield backend
        await backend.close()
        return
    with tempfile.TemporaryDirectory() as folder:
        async with fake_cards(Path(folder), "H100-80GB", count) as (driver, backend):
            devices = await backend.inventory()
            for device in devices[: count // 2]:
                for start in range(7):
                    await backend.create_mig(device.uuid, "1g.10gb", start)
            for card in range(count // 2, count):
                driver.gpu(card).allocate(os.getpid(), 1_000)
            yield backend


async def measure(count: int, samples: int, real: bool) -> dict[str, object]:
    async with _cards(count, real) as backend:
        devices = await backend.inventory()
        whole = [device.uuid for device in devices if not await backend.mig_instances(device.uuid)]
        start = start_order(1, "x", partition=WholeCards(tuple(whole)))
        job = Assignment(key=start.key, start=start, boot_id="", state="running", pid=os.getpid())
        live = {job.key: job}
        use = JobUse(backend)
        await backend.samples()
        await use.look(live)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(samples):
            shown = await backend.samples()
            await use.look(live)
        cpu_ms = (time.process_time() - began_cpu_s) * 1000 / samples
        took_ms = (time.perf_counter() - began_s) * 1000 / samples
    return {
        "driver": "real" if real else "fake",
        "cards": len(devices),
        "instances": sum(len(sample.instances) for sample in shown),
        "cpu_ms_per_sample": round(cpu_ms, 2),
        "took_ms_per_sample": round(took_ms, 2),
        "cpu_pct_at_1hz": round(cpu_ms / 10, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--real", action="store_true", help="the cards that are there; nothing is changed on them")
    given = parser.parse_args()
    result = asyncio.run(measure(given.cards, given.samples, given.real))
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        sys.stdout.write(f"{name:20} {value}\n")


if __name__ == "__main__":
    main()
