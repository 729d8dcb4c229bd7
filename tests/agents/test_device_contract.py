"""One suite for every kind of cards: modelled ones, the real backend over a fake driver, and real ones (`-m gpu`).

NVIDIA's own binding loads the fake driver through the ordinary dlopen, so signatures, struct sizes and error paths are
the binding's real ones. On a real card nothing is switched, made or destroyed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_agent.devices import nvml_events
from gpuyard_agent.devices.base import DeviceBackend
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.devices.simulated import SimulatedBackend, parse_cards
from support.devices import CHECKS, fake_cards

KINDS = (
    "simulated",
    "fake H100",
    "fake A30 and L4",
    "fake old driver",
    "fake borrowed",
    pytest.param("real", marks=pytest.mark.gpu),
)
#: What a driver of years ago does not have.
NEW_FUNCTIONS = (
    "nvmlDeviceGetGpuInstanceProfileInfoV",
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetFieldValues",
    "nvmlGpmQueryDeviceSupport",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetArchitecture",
    "nvmlEventSetCreate",
)


@pytest.fixture(params=KINDS)
async def backend(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DeviceBackend]:
    monkeypatch.setattr(nvml_events, "WAIT_MS", 20)
    match request.param:
        case "simulated":
            cards = SimulatedBackend(parse_cards("4xA100-40GB,2xA30"), "node-1")
            await cards.open()
            yield cards
        case "fake H100":
            async with fake_cards(tmp_path, "H100-80GB", 4) as (_, made):
                yield made
        case "fake A30 and L4":
            async with fake_cards(tmp_path, ["A30-24GB", "L4-24GB"]) as (_, made):
                yield made
        case "fake old driver":
            async with fake_cards(tmp_path, "A100-40GB", 2, without=NEW_FUNCTIONS) as (_, made):
                yield made
        case "fake borrowed":
            # As a card is that is only lent: nothing may be switched, by settings and by the driver alike.
            async with fake_cards(tmp_path, "H100-80GB", may_switch_mig=False, privileged=0) as (_, made):
                yield made
        case _:
            real = NvmlBackend(may_switch_mig=False)
            await real.open()
            yield real
            await real.close()


@pytest.mark.parametrize("name", CHECKS)
async def test_contract(backend: DeviceBackend, name: str) -> None:
    await CHECKS[name](backend)
