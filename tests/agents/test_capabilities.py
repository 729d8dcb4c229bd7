"""What a host says it can enforce on its cards, and what it says is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuyard_agent.devices import capabilities, nvml_events
from gpuyard_agent.devices.capabilities import Capability, probe
from gpuyard_agent.devices.simulated import SimulatedBackend, parse_cards
from support.devices import fake_cards


def by_name(found: tuple[Capability, ...]) -> dict[str, Capability]:
    assert len({one.name for one in found}) == len(found)
    assert all(one.detail for one in found)
    return {one.name: one for one in found}


async def test_modelled_cards_claim_nothing() -> None:
    (only,) = await probe(SimulatedBackend(parse_cards("2xA30"), "node-1"), "")
    assert "nothing enforced" in only.detail


async def test_a_host_with_everything_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml_events, "WAIT_MS", 20)
    monkeypatch.setattr(capabilities, "is_admin", lambda: True)
    monkeypatch.setattr(capabilities, "sees_whole_host", lambda: True)
    async with fake_cards(tmp_path, count=2) as (driver, backend):
        monkeypatch.setenv("PATH", driver.bin)
        found = by_name(await probe(backend, ""))
    for name in ("driver", "cards", "faults", "mig", "mps", "mps-exclusive", "memory-by-process", "checkpoint"):
        assert (found[name].state, found[name].remedy) == ("yes", ""), found[name]


async def test_what_is_missing_comes_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml_events, "WAIT_MS", 20)
    monkeypatch.setattr(capabilities, "is_admin", lambda: False)
    monkeypatch.setattr(capabilities, "sees_whole_host", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    # The compiler is found by its own path: the fake driver is built on first use.
    monkeypatch.setenv("CC", "/usr/bin/gcc")
    async with fake_cards(tmp_path, ["A100-40GB", "L4-24GB"], privileged=0, mig_config=0) as (driver, backend):
        driver.gpu(1).set(compute_mode=2)
        found = by_name(await probe(backend, "the package cuda-bindings is not installed"))
    assert found["cards"] == Capability(
        name="cards", state="partly", detail="1 of 2 can be used; card 1: its compute mode is `prohibited`"
    )
    for name in ("mig", "mps", "mps-exclusive", "memory-by-process", "checkpoint"):
        assert found[name].state == "no"
        assert found[name].remedy
    assert "card 0: no MIG: the driver does not let it read placements" in found["mig"].detail
    assert found["checkpoint"].detail == "the package cuda-bindings is not installed"
