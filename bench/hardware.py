"""Everything that only a real card can show, measured at one go, as rows of the table in docs/hardware.md.

    python -m bench.hardware [--json] [--mib 8192] [--simulated]

What was found (inventory), what measuring it costs, MPS limits in the default compute mode, checkpoint and restore of a
bare CUDA program and (where PyTorch is installed) of one of PyTorch's, and how long the card goes on once a process is
halted. No setting of the card is changed. A part that fails says so in its row and the rest goes on; exit code 1 then.
`--simulated` takes the fake driver instead: its figures mean nothing, that they come does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.support import hardware
from tests.support.devices import CHECKS, fake_cards

from bench import telemetry
from gpuyard_agent.checkpoint_worker import CheckpointWorker
from gpuyard_agent.devices.base import DeviceBackend, NoDriver
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_protocol.resources import Device


class Row(NamedTuple):
    card: str
    driver: str
    what: str
    figure: str


class Host(NamedTuple):
    backend: DeviceBackend
    device: Device
    driver: str
    worker: CheckpointWorker
    control: str | None
    is_real: bool


@contextlib.asynccontextmanager
async def _host(simulated: bool) -> AsyncIterator[Host]:
    async with contextlib.AsyncExitStack() as stack:
        backend: NvmlBackend
        control = None
        if simulated:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            driver, backend = await stack.enter_async_context(fake_cards(Path(folder)))
            stack.enter_context(mock.patch.dict(os.environ, driver.env()))
            control = driver.program("nvidia-cuda-mps-control")
        else:
            backend = NvmlBackend(may_switch_mig=False)
            await backend.open()
            stack.push_async_callback(backend.close)
        worker = CheckpointWorker()
        stack.push_async_callback(worker.close)
        device = (await backend.inventory())[0]
        yield Host(backend, device, await backend.driver(), worker, control, not simulated)


async def _contract(host: Host) -> str:
    """The suite that every backend passes, on these cards."""
    for check in CHECKS.values():
        await check(host.backend)
    return f"{len(CHECKS)} checks of the backend's contract passed"


async def _inventory(host: Host) -> str:
    device = host.device
    profiles = f", {len(device.mig_profiles)} MIG profiles" if device.mig_profiles else ""
    links = f", NVLink to {len(device.nvlinks)}" if device.nvlinks else ""
    lacking = "; ".join((await host.backend.limits()).get(device.uuid, ()))
    modes = ", ".join(device.modes)
    return f"{device.memory_mib} MiB, modes {modes}{profiles}{links}" + (f"; {lacking}" if lacking else "")


async def _sample(host: Host) -> str:
    sample = (await host.backend.samples())[0]
    told = [name for name in sample.__struct_fields__ if getattr(sample, name) not in (None, (), "")]
    cost = await telemetry.measure(1, 100, real=host.is_real)
    return f"{cost['cpu_ms_per_sample']} ms CPU a sample of all cards; told: {', '.join(told)}"


async def _mps(host: Host) -> str:
    return _words(await hardware.share_under_mps(host.backend, host.control))


async def _drain(host: Host) -> str:
    return _words(await hardware.drain_after_freeze(host.device, 256))


def _suspend(name: str, mib: int) -> Callable[[Host], Awaitable[str]]:
    async def measured(host: Host) -> str:
        return _words(await hardware.suspend_and_resume(host.backend, host.worker, host.device, name, mib))

    return measured


def _words(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


async def measure(mib: int, simulated: bool) -> tuple[list[Row], bool]:
    """(rows, whether all of it went well)."""
    rows: list[Row] = []
    went_well = True
    async with _host(simulated) as host:
        programs: Iterable[str] = hardware.programs() if host.is_real else ("cuda",)
        parts: dict[str, Callable[[Host], Awaitable[str]]] = {
            "contract": _contract,
            "inventory": _inventory,
            "telemetry": _sample,
            "MPS share, default compute mode": _mps,
            **{f"checkpoint and restore, {name}": _suspend(name, mib) for name in programs},
            "work of the card after its process was halted": _drain,
        }
        for what, part in parts.items():
            try:
                figure = await part(host)
            except Exception as error:  # noqa: BLE001  # whatever is wrong with one part: the others are worth having
                went_well, figure = False, f"FAILED: {type(error).__name__}: {error}"
            rows.append(Row(host.device.model, host.driver, what, figure))
    return rows, went_well


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--mib", type=int, default=8_192, help="what the suspended program holds")
    parser.add_argument("--simulated", action="store_true", help="the fake driver: shows that it runs, and no figures")
    given = parser.parse_args()
    try:
        rows, went_well = asyncio.run(measure(given.mib, given.simulated))
    except NoDriver as problem:
        sys.exit(str(problem))
    if given.json:
        print(json.dumps({"rows": [row._asdict() for row in rows]}))
    else:
        for row in rows:
            sys.stdout.write("| " + " | ".join(text.replace("|", "/") for text in row) + " |\n")
    sys.exit(0 if went_well else 1)


if __name__ == "__main__":
    main()
