"""The backend for real cards, through NVIDIA's own binding and a driver library made for the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.devices import CHECKS, build_driver, run_with_driver

FIRST = "GPU-00000000-0000-4000-8000-000000000000"
SECOND = "GPU-00000000-0000-4000-8000-000000000001"

#: Opens the backend, runs the statements given on `b`, and prints `out` as JSON.
PROGRAM = """
import asyncio, json, os, sys
import msgspec
from gpuyard_agent.devices.base import *
from gpuyard_agent.devices import nvml
async def main():
    b = nvml.NvmlBackend()
    out = {}
    try:
        await b.open()
    except NoDriver as problem:
        print(json.dumps({"no_driver": str(problem)}))
        return
%s
    await b.close()
    print(json.dumps(msgspec.to_builtins(out)))
asyncio.run(main())
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


def probe(driver: Path | None, statements: str, **environment: str) -> Any:
    body = "\n".join("    " + line for line in statements.splitlines())
    return json.loads(run_with_driver(driver, ["-c", PROGRAM % body], environment))


@pytest.mark.parametrize("name", CHECKS)
def test_contract(driver: Path, name: str) -> None:
    run_with_driver(driver, ["-m", "support.devices", name], {})


def test_inventory_says_what_the_driver_says(driver: Path) -> None:
    out = probe(driver, 'out["devices"] = await b.inventory()\nout["driver"] = await b.driver()')
    first, second = out["devices"]
    assert out["driver"] == "580.95.05"
    assert first["uuid"] == FIRST
    assert second["uuid"] == SECOND
    assert first["model"] == "NVIDIA H100 80GB HBM3"
    assert first["memory_mib"] == 81559 - 551, "what the driver reserves is not for jobs"
    assert first["pci_bus_id"] == "00000000:A0:00.0"
    assert "mig" not in first["modes"]


def test_mps_is_offered_only_where_its_daemon_is_installed(driver: Path, tmp_path: Path) -> None:
    without = probe(driver, 'out["modes"] = (await b.inventory())[0].modes', PATH="/nowhere")
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with_it = probe(driver, 'out["modes"] = (await b.inventory())[0].modes', PATH=str(tmp_path))
    assert without["modes"] == ["whole", "timeslice"]
    assert with_it["modes"] == ["whole", "mps", "timeslice"]


def test_one_process_at_a_time_admits_no_time_slicing(driver: Path) -> None:
    out = probe(driver, 'out["modes"] = (await b.inventory())[0].modes', FAKENVML_MODE="3")
    assert "timeslice" not in out["modes"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [({"FAKENVML_MODE": "2"}, "its compute mode is `prohibited`"), ({"FAKENVML_MIG": "1"}, "MIG mode is on")],
)
def test_a_card_that_cannot_be_used_is_unhealthy_and_says_why(
    driver: Path, setting: dict[str, str], fault: str
) -> None:
    out = probe(driver, 'out["devices"] = await b.inventory()', **setting)
    second = out["devices"][1]
    assert second["healthy"] is False
    assert fault in second["fault"]
    assert second["modes"] == []


def test_links_over_a_switch_reach_every_card(driver: Path) -> None:
    out = probe(driver, 'out["links"] = [d.nvlinks for d in await b.inventory()]', FAKENVML_LINKS="switch")
    assert out["links"] == [[[SECOND, 18]], [[FIRST, 18]]]


def test_direct_links_are_matched_by_address(driver: Path) -> None:
    out = probe(driver, 'out["links"] = [d.nvlinks for d in await b.inventory()]', FAKENVML_LINKS="peer")
    assert out["links"] == [[[SECOND, 4]], [[FIRST, 4]]]


def test_samples_leave_out_what_the_driver_does_not_have(driver: Path) -> None:
    out = probe(driver, 'await b.inventory()\nout["samples"] = await b.samples()')
    assert out["samples"] == [
        {
            "uuid": FIRST,
            "utilization_pct": 37,
            "memory_used_mib": 1008,
            "memory_total_mib": 81008,
            "temperature_c": 41,
        },
        {
            "uuid": SECOND,
            "utilization_pct": 38,
            "memory_used_mib": 1008,
            "memory_total_mib": 81008,
            "temperature_c": 42,
        },
    ]


def test_an_old_driver_is_tolerated(driver: Path) -> None:
    out = probe(
        driver,
        'out["memory"] = [d.memory_mib for d in await b.inventory()]\nout["samples"] = await b.samples()',
        FAKENVML_OLD="1",
    )
    assert out["memory"] == [81559, 81559]
    assert "utilization_pct" not in out["samples"][0]


def test_a_card_lost_during_the_run_stays_listed_with_its_fault(driver: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    out = probe(
        driver,
        f"""out["before"] = [d.healthy for d in await b.inventory()]
open({str(lost)!r}, "w").close()
out["samples"] = await b.samples()
out["after"] = await b.inventory()
try:
    await b.processes({SECOND!r})
except DeviceTrouble as trouble:
    out["processes"] = str(trouble)
os.unlink({str(lost)!r})
out["healed"] = [d.healthy for d in await b.inventory()]""",
        FAKENVML_LOST=str(lost),
    )
    assert out["before"] == [True, True]
    assert out["samples"][1] == {"uuid": SECOND, "memory_total_mib": 81008}
    first, second = out["after"]
    assert first["healthy"]
    assert second["uuid"] == SECOND
    assert second["healthy"] is False
    assert second["fault"] == "the driver lost the card (GPU is lost)"
    assert "the driver lost the card" in out["processes"]
    assert out["healed"] == [True, True]


def test_processes_on_a_card(driver: Path) -> None:
    out = probe(
        driver,
        f'await b.inventory()\nout["one"] = await b.processes({FIRST!r})\nout["none"] = await b.processes({SECOND!r})',
    )
    assert out["one"] == [{"device": FIRST, "pid": 4711, "memory_mib": 512, "mig_uuid": ""}]
    assert out["none"] == []


def test_a_driver_that_hangs_delays_one_answer_and_not_the_agents_end(driver: Path) -> None:
    out = probe(
        driver,
        """await b.inventory()
nvml.SAMPLE_S = 0.2
try:
    await b.samples()
except DeviceTrouble as trouble:
    out["trouble"] = str(trouble)
try:
    await b.driver()
except DeviceTrouble as trouble:
    out["behind"] = str(trouble)""",
        FAKENVML_SLOW="30",
    )
    assert out["trouble"] == "samples: no answer from the driver in 0 s"
    assert out["behind"] == "driver version: no answer from the driver in 0 s (the driver hangs in: samples)"


def test_without_a_driver_it_says_what_is_missing(driver: Path) -> None:
    assert probe(None, "pass") == {
        "no_driver": "there is no NVIDIA driver on this node: libnvidia-ml.so.1 cannot be loaded"
    }
    assert "Driver Not Loaded" in probe(driver, "pass", FAKENVML_INIT="9")["no_driver"]
