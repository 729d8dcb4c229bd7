"""Loading, sessions, handles, and the library's answers to callers that are older, newer or wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest

from fake_driver import build
from fake_driver.control import Error, FakeDriver


def run_python(driver: FakeDriver, code: str) -> str:
    """Standard output of a fresh interpreter that meets the driver as any program does, by its soname."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=driver.env(), capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def code_of(call: Any, *arguments: Any) -> int:
    """NVML's code of a call that fails."""
    with pytest.raises(pynvml.NVMLError) as failure:
        call(*arguments)
    return int(failure.value.value)


def test_a_program_finds_the_library_by_its_soname(make_driver: Any) -> None:
    driver = make_driver("A100-40GB", 3)
    code = (
        "import pynvml as n; n.nvmlInit()\n"
        "print(n.nvmlSystemGetDriverVersion(), n.nvmlDeviceGetCount(),"
        " n.nvmlDeviceGetName(n.nvmlDeviceGetHandleByIndex(2)))"
    )
    assert run_python(driver, code) == "580.95.05 3 NVIDIA A100-SXM4-40GB"


def test_the_library_finds_its_state_beside_itself_without_any_environment(driver: FakeDriver) -> None:
    """Jobs are started with a clean environment."""
    code = "import pynvml as n; n.nvmlInit(); print(n.nvmlDeviceGetCount())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_LIBRARY_PATH": os.path.join(driver.root, "lib")},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout.strip() == "2"


def test_a_symbol_that_the_driver_is_too_old_for_is_not_found(make_driver: Any) -> None:
    driver = make_driver(without=("nvmlDeviceGetTemperatureV", "nvmlDeviceGetNumaNodeId"))
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        with pytest.raises(nvml.NVMLError_FunctionNotFound):
            nvml.nvmlDeviceGetTemperatureV(card, 0)
        with pytest.raises(nvml.NVMLError_FunctionNotFound):
            nvml.nvmlDeviceGetNumaNodeId(card)
        assert nvml.nvmlDeviceGetTemperature(card, 0) == 30


def test_no_state_is_no_driver(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with driver.in_process(pynvml) as nvml:
        monkeypatch.setenv("FAKENVML_STATE", str(tmp_path / "nothing"))
        with pytest.raises(nvml.NVMLError_DriverNotLoaded) as failure:
            nvml.nvmlInit()
    assert str(failure.value) == "Driver Not Loaded"


def test_no_call_works_before_init_and_after_the_last_shutdown(driver: FakeDriver) -> None:
    with driver.in_process(pynvml) as nvml:
        assert code_of(nvml._LoadNvmlLibrary() or nvml.nvmlDeviceGetCount) == nvml.NVML_ERROR_UNINITIALIZED
        nvml.nvmlInit()
        nvml.nvmlInit()
        nvml.nvmlShutdown()
        assert nvml.nvmlDeviceGetCount() == 2
        nvml.nvmlShutdown()
        assert code_of(nvml.nvmlDeviceGetCount) == nvml.NVML_ERROR_UNINITIALIZED
    assert driver.calls("nvmlInit") == 1


def test_wrong_struct_versions_are_refused(nvml: Any, card: Any) -> None:
    mismatch = nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    assert code_of(nvml.nvmlDeviceGetMemoryInfo, card, nvml.nvmlMemory_v2 + 1) == mismatch

    profile = nvml.c_nvmlGpuInstanceProfileInfo_v2_t()
    profile.version = 0x02000097
    library = ctypes.CDLL(nvml.nvmlLib._name)
    assert library.nvmlDeviceGetGpuInstanceProfileInfoV(card, 0, ctypes.byref(profile)) == mismatch

    temperature = nvml.c_nvmlTemperature_v1_t()
    assert library.nvmlDeviceGetTemperatureV(card, ctypes.byref(temperature)) == mismatch

    request = nvml.c_nvmlGpmMetricsGet_t()
    assert code_of(nvml.nvmlGpmMetricsGet, request) == mismatch


def test_a_card_is_found_by_index_uuid_bus_and_serial(nvml: Any, driver: FakeDriver) -> None:
    gpu = driver.gpu(1)
    by_index = nvml.nvmlDeviceGetHandleByIndex(1)
    bus = nvml.nvmlDeviceGetPciInfo(by_index).busId
    found = [
        nvml.nvmlDeviceGetHandleByUUID(gpu.uuid),
        nvml.nvmlDeviceGetHandleByPciBusId(bus),
        nvml.nvmlDeviceGetHandleByPciBusId(bus.lower().removeprefix("0000")),
        nvml.nvmlDeviceGetHandleBySerial(nvml.nvmlDeviceGetSerial(by_index).encode()),
    ]
    assert [nvml.nvmlDeviceGetUUID(handle) for handle in found] == [gpu.uuid] * 4
    assert nvml.nvmlDeviceGetIndex(found[0]) == 1
    assert code_of(nvml.nvmlDeviceGetHandleByUUID, "GPU-nobody") == nvml.NVML_ERROR_NOT_FOUND
    assert code_of(nvml.nvmlDeviceGetHandleByIndex, 2) == nvml.NVML_ERROR_INVALID_ARGUMENT


def test_a_lost_card_answers_so_until_the_session_begins_anew(nvml: Any, driver: FakeDriver, card: Any) -> None:
    lost, stale = nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_INVALID_ARGUMENT
    driver.gpu(0).lose()
    assert code_of(nvml.nvmlDeviceGetPowerUsage, card) == lost
    assert code_of(nvml.nvmlDeviceGetHandleByIndex, 0) == lost
    assert nvml.nvmlDeviceGetCount() == 2
    assert nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(1)) == 70_000

    driver.gpu(0).restore()
    assert code_of(nvml.nvmlDeviceGetPowerUsage, card) == stale
    assert code_of(nvml.nvmlDeviceGetHandleByUUID, driver.gpu(0).uuid) == lost
    nvml.nvmlShutdown()
    nvml.nvmlInit()
    assert nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByUUID(driver.gpu(0).uuid)) == 70_000


def test_indexes_shift_when_a_card_is_taken_from_the_driver(nvml: Any, driver: FakeDriver) -> None:
    second = driver.gpu(1).uuid
    driver.gpu(0).remove()
    nvml.nvmlShutdown()
    nvml.nvmlInit()
    assert nvml.nvmlDeviceGetCount() == 1
    assert nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(0)) == second
    assert code_of(nvml.nvmlDeviceGetHandleByUUID, driver.gpu(0).uuid) == nvml.NVML_ERROR_NOT_FOUND


def test_an_ordered_error_hits_so_many_calls_about_that_card(nvml: Any, driver: FakeDriver, card: Any) -> None:
    other = nvml.nvmlDeviceGetHandleByIndex(1)
    driver.inject("nvmlDeviceGetPowerUsage", error=Error.UNKNOWN, after=1, times=2, gpu=0)
    assert nvml.nvmlDeviceGetPowerUsage(card) == 70_000
    assert code_of(nvml.nvmlDeviceGetPowerUsage, card) == nvml.NVML_ERROR_UNKNOWN
    assert nvml.nvmlDeviceGetPowerUsage(other) == 70_000
    assert code_of(nvml.nvmlDeviceGetPowerUsage, card) == nvml.NVML_ERROR_UNKNOWN
    assert nvml.nvmlDeviceGetPowerUsage(card) == 70_000
    assert driver.calls("nvmlDeviceGetPowerUsage") == 5


def test_a_prefix_orders_errors_for_many_symbols(nvml: Any, driver: FakeDriver, card: Any) -> None:
    driver.inject("nvmlDeviceGet*", error=Error.LIB_RM_VERSION_MISMATCH)
    assert code_of(nvml.nvmlDeviceGetName, card) == Error.LIB_RM_VERSION_MISMATCH
    assert nvml.nvmlSystemGetDriverVersion() == "580.95.05"
    driver.clear_faults()
    assert nvml.nvmlDeviceGetName(card) == "NVIDIA H100 80GB HBM3"


def test_a_call_that_hangs_holds_up_no_other_and_goes_on_when_let_go(nvml: Any, driver: FakeDriver, card: Any) -> None:
    import threading

    driver.hang("nvmlDeviceGetPowerUsage")
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(nvml.nvmlDeviceGetPowerUsage(card)))
    thread.start()
    try:
        assert nvml.nvmlDeviceGetTemperature(card, 0) == 30
        thread.join(timeout=0.05)
        assert thread.is_alive()
    finally:
        driver.clear_faults()
        thread.join(timeout=5)
    assert answers == [70_000]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.CannotBuild, match="apt-get install gcc"):
        build.build()


def test_one_build_serves_every_driver() -> None:
    first, second, older = build.build(), build.build(), build.build(without=("nvmlDeviceGetNumaNodeId",))
    assert first == second != older
    assert first.nvml.stat().st_ino == second.nvml.stat().st_ino


def test_only_the_published_names_are_exported(driver: FakeDriver) -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", driver.library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(("nvml", "fakenvml_"))} == set()
    assert len({name for name in names if name.startswith("nvml")}) >= 95


def test_every_exported_call_is_one_that_pynvml_makes(driver: FakeDriver) -> None:
    """A misspelt name would lie dead in the library."""
    listed = subprocess.run(["nm", "-D", "--defined-only", driver.library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines() if " nvml" in line}
    source = Path(pynvml.__file__).read_text()
    assert {name for name in names if f'"{name}"' not in source} == {"nvmlInit_v2"}
