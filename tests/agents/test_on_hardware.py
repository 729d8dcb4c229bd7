"""What only a real card can show: a process suspended and resumed, limits of MPS that the driver keeps, what a card
goes on with. On a real one with `-m gpu`; on the fake driver always, so that the first try finds programs that run.

`python -m bench.hardware` measures the same and prints what belongs into docs/hardware.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from bench.hardware import measure

from gpuyard_agent.checkpoint_worker import CheckpointWorker
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_protocol.resources import Device
from support import hardware
from support.devices import fake_cards

#: Enough that a rate means something on a real card.
HELD_MIB = 8_192


class Host(NamedTuple):
    backend: NvmlBackend
    device: Device
    worker: CheckpointWorker
    is_real: bool
    #: The MPS control program; None: as the host has it.
    control: str | None


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
async def host(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    if request.param == "real":
        backend, worker = NvmlBackend(may_switch_mig=False), CheckpointWorker()
        await backend.open()
        yield Host(backend, (await backend.inventory())[0], worker, True, None)
        await worker.close()
        await backend.close()
        return
    async with fake_cards(tmp_path) as (driver, backend):
        for name, value in driver.env().items():
            monkeypatch.setenv(name, value)
        worker = CheckpointWorker()
        control = driver.program("nvidia-cuda-mps-control")
        yield Host(backend, (await backend.inventory())[0], worker, False, control)
        await worker.close()


@pytest.mark.parametrize("name", hardware.programs())
async def test_a_process_leaves_its_card_and_comes_back(host: Host, name: str) -> None:
    if name == "torch" and not host.is_real:
        name = "cuda"  # PyTorch needs more of a driver than there is
    rates = await hardware.suspend_and_resume(host.backend, host.worker, host.device, name, HELD_MIB)
    assert rates["held_gib"] >= HELD_MIB / 1024
    assert rates["down_gib_per_s"] > 0.5
    assert rates["up_gib_per_s"] > 0.5


async def test_the_driver_keeps_a_share_under_mps_within_its_memory(host: Host) -> None:
    seen = await hardware.share_under_mps(host.backend, host.control)
    sms, all_sms = seen["sms"], seen["sms_of_card"]
    assert isinstance(sms, int)
    assert isinstance(all_sms, int)
    # The hardware rounds to whole groups of multiprocessors.
    assert abs(sms - all_sms * hardware.SHARE_MILLI / 1000) <= 16


async def test_a_card_stops_soon_after_its_process_was_halted(host: Host) -> None:
    seen = await hardware.drain_after_freeze(host.device, 256)
    assert seen["step_ms"] > 0
    # A driver's queue holds about a thousand launches.
    assert seen["drain_ms"] <= 1_000 + 2_000 * seen["step_ms"]


async def test_one_command_measures_all_of_it() -> None:
    rows, went_well = await measure(1_024, simulated=True)
    assert went_well, rows
    assert {row.driver for row in rows} == {rows[0].driver}
    assert [row.what for row in rows] == [
        "contract",
        "inventory",
        "telemetry",
        "MPS share, default compute mode",
        "checkpoint and restore, cuda",
        "work of the card after its process was halted",
    ]
