"""The fake CUDA program: which card it takes, how it shares, how it is checkpointed; and the driver's JSON lines."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_driver.control import (
    EVENT_XID,
    Checkpoint,
    CheckpointRefused,
    FakeDriver,
    Flag,
    Request,
)

NOT_READY, WRONG_STATE, NOT_SUPPORTED, OUT_OF_MEMORY = 600, 401, 801, 2


def test_visible_devices_choose_the_card(driver: FakeDriver, start_job: Any) -> None:
    first, second = (gpu.uuid for gpu in driver.gpus)

    def device(*arguments: str, **environment: str) -> Any:
        return start_job("--steps", "1", "--step-ms", "1", *arguments, **environment).until("ready")["device"]

    assert device() == first
    assert device(CUDA_VISIBLE_DEVICES=second) == second
    assert device(CUDA_VISIBLE_DEVICES=second[:16]) == second
    assert device(CUDA_VISIBLE_DEVICES="1,0") == second
    assert device("--ordinal", "1", CUDA_VISIBLE_DEVICES=f"{second},{first}") == first
    for nothing in ("", "GPU-unknown", f"GPU-unknown,{first}"):
        assert start_job("--steps", "1", CUDA_VISIBLE_DEVICES=nothing).exit_code() == 71


def test_a_card_in_mig_mode_is_nothing_without_an_instance(nvml: Any, card: Any, start_job: Any) -> None:
    nvml.nvmlDeviceSetMigMode(card, 1)
    uuid = nvml.nvmlDeviceGetUUID(card)
    assert start_job("--steps", "1", CUDA_VISIBLE_DEVICES=uuid).exit_code() == 71
    gi = nvml.nvmlDeviceCreateGpuInstance(card, 19)
    device = nvml.nvmlComputeInstanceGetInfo(nvml.nvmlGpuInstanceCreateComputeInstance(gi, 0)).device
    ready = start_job("--steps", "1", CUDA_VISIBLE_DEVICES=uuid).until("ready")
    assert ready["device"] == nvml.nvmlDeviceGetUUID(device)


def test_a_job_that_is_too_big_runs_out_of_memory(start_job: Any) -> None:
    assert start_job("--memory", "81152", "--context", "1").exit_code() == 70


def test_a_job_does_its_steps_and_leaves_with_its_code(driver: FakeDriver, start_job: Any) -> None:
    job = start_job("--steps", "5", "--step-ms", "2", "--report", "0", "--exit", "3")
    assert job.until("progress")["steps"] == 1
    assert job.until("done")["steps"] == 5
    assert job.exit_code() == 3
    assert driver.processes() == []


def test_an_illegal_address_is_reported_as_an_xid_of_the_application(nvml: Any, card: Any, start_job: Any) -> None:
    events = nvml.nvmlEventSetCreate()
    nvml.nvmlDeviceRegisterEvents(card, EVENT_XID, events)
    assert start_job("--fault-after", "0").exit_code() == 76
    assert nvml.nvmlEventSetWait(events, 1000).eventData == 31
    nvml.nvmlEventSetFree(events)


def test_a_job_can_ignore_sigterm(start_job: Any) -> None:
    stubborn = start_job("--ignore-sigterm", "--sleep")
    stubborn.until("ready")
    stubborn.process.terminate()
    assert stubborn.until("progress")
    gentle = start_job("--sleep")
    gentle.until("ready")
    gentle.process.terminate()
    assert gentle.exit_code() == -signal.SIGTERM


def test_a_checkpoint_frees_the_card_and_a_restore_fills_it(
    nvml: Any, card: Any, driver: FakeDriver, start_job: Any
) -> None:
    job = start_job("--memory", "1000", "--context", "0", "--step-ms", "1", "--report", "0")
    job.until("progress")
    assert driver.checkpoint_state(job.pid) is Checkpoint.RUNNING
    driver.checkpoint(job.pid, Request.LOCK, timeout_s=5)
    assert driver.checkpoint_state(job.pid) is Checkpoint.LOCKED
    driver.checkpoint(job.pid, Request.CHECKPOINT)
    assert driver.checkpoint_state(job.pid) is Checkpoint.CHECKPOINTED
    assert nvml.nvmlDeviceGetComputeRunningProcesses(card) == []
    assert nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2).used == 0
    assert driver.processes()[0]["saved_mib"] == 1000

    driver.checkpoint(job.pid, Request.RESTORE)
    assert driver.checkpoint_state(job.pid) is Checkpoint.LOCKED
    assert nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2).used >> 20 == 1000
    driver.checkpoint(job.pid, Request.UNLOCK)
    assert driver.checkpoint_state(job.pid) is Checkpoint.RUNNING
    assert job.until("progress")
    assert driver.checkpoint_state(os.getpid()) is None


def code_of(driver: FakeDriver, pid: int, request: Request, timeout_s: float | None = None) -> int:
    with pytest.raises(CheckpointRefused) as failure:
        driver.checkpoint(pid, request, timeout_s=timeout_s)
    return failure.value.code


def test_a_frozen_job_cannot_be_locked(driver: FakeDriver, start_job: Any) -> None:
    """A thread of the job does the work."""
    job = start_job("--sleep", "--step-ms", "1")
    job.until("ready")
    job.freeze()
    assert code_of(driver, job.pid, Request.LOCK, 0.1) == NOT_READY
    assert driver.checkpoint_state(job.pid) is Checkpoint.RUNNING
    job.process.send_signal(signal.SIGCONT)
    driver.checkpoint(job.pid, Request.LOCK, timeout_s=5)


def test_requests_out_of_order_and_of_the_wrong_process_are_refused(
    driver: FakeDriver, start_job: Any, bystander: Any
) -> None:
    driver.gpu(0).allocate(bystander.pid, 10)
    assert code_of(driver, bystander.pid, Request.CHECKPOINT) == WRONG_STATE
    assert code_of(driver, bystander.pid, Request.UNLOCK) == WRONG_STATE
    assert code_of(driver, os.getpid(), Request.LOCK) == 1
    driver.gpu(0).allocate(bystander.pid, 10, flags=Flag.MPS_CLIENT)
    assert code_of(driver, bystander.pid, Request.LOCK) == NOT_SUPPORTED
    job = start_job("--unsuspendable", "--sleep")
    job.until("ready")
    assert code_of(driver, job.pid, Request.LOCK) == NOT_SUPPORTED


def test_a_restore_needs_the_memory_back(driver: FakeDriver, bystander: Any) -> None:
    driver.gpu(0).allocate(bystander.pid, 50_000)
    driver.checkpoint(bystander.pid, Request.LOCK)
    driver.checkpoint(bystander.pid, Request.CHECKPOINT)
    driver.gpu(0).allocate(os.getpid(), 40_000)
    assert code_of(driver, bystander.pid, Request.RESTORE) == OUT_OF_MEMORY
    assert driver.checkpoint_state(bystander.pid) is Checkpoint.CHECKPOINTED
    driver.release(os.getpid())
    driver.checkpoint(bystander.pid, Request.RESTORE)


def test_a_checkpoint_that_breaks_off_leaves_a_failed_process(driver: FakeDriver, bystander: Any) -> None:
    driver.gpu(0).allocate(bystander.pid, 10)
    driver.inject("cuCheckpointProcessCheckpoint", error=999, times=1)
    driver.checkpoint(bystander.pid, Request.LOCK)
    assert code_of(driver, bystander.pid, Request.CHECKPOINT) == 999
    assert driver.checkpoint_state(bystander.pid) is Checkpoint.FAILED
    assert code_of(driver, bystander.pid, Request.UNLOCK) == WRONG_STATE


def test_a_job_that_dies_during_a_request_is_an_error_and_not_a_hang(driver: FakeDriver, start_job: Any) -> None:
    job = start_job("--sleep", "--step-ms", "1")
    job.until("ready")
    driver.checkpoint(job.pid, Request.LOCK)
    job.freeze()
    killer = threading.Timer(0.1, job.process.kill)
    killer.start()
    assert code_of(driver, job.pid, Request.CHECKPOINT) == 999
    killer.join()


def test_libcuda_asks_like_control_does(driver: FakeDriver, bystander: Any) -> None:
    driver.gpu(0).allocate(bystander.pid, 500)
    code = (
        "import ctypes, sys; c = ctypes.CDLL('libcuda.so.1'); pid = int(sys.argv[1]); s = ctypes.c_int(-1)\n"
        "f = ctypes.c_void_p(); q = ctypes.c_int()\n"
        "z = ctypes.c_uint64(0)\n"
        "c.cuGetProcAddress_v2(b'cuCheckpointProcessLock', ctypes.byref(f), 12080, z, ctypes.byref(q))\n"
        "v = ctypes.c_int(); c.cuDriverGetVersion(ctypes.byref(v)); n = ctypes.c_char_p()\n"
        "c.cuGetErrorName(600, ctypes.byref(n))\n"
        "def state():\n"
        "    c.cuCheckpointProcessGetState(pid, ctypes.byref(s)); return s.value\n"
        "print(c.cuInit(0), bool(f.value), v.value, n.value.decode(), state(), c.cuCheckpointProcessLock(pid, None),"
        " c.cuCheckpointProcessCheckpoint(pid, None), state(), c.cuCheckpointProcessRestore(pid, None),"
        " c.cuCheckpointProcessUnlock(pid, None), state())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bystander.pid)], env=driver.env(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "True", "13000", "CUDA_ERROR_NOT_READY", "0", "0", "0", "2", "0", "0", "0"]


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


class _Pair(ctypes.Structure):
    _fields_ = [("old", _Uuid), ("new", _Uuid)]


class _Restore(ctypes.Structure):
    _fields_ = [("pairs", ctypes.POINTER(_Pair)), ("count", ctypes.c_uint), ("reserved", ctypes.c_char * 60)]


def test_a_restore_can_move_to_another_card(
    driver: FakeDriver, bystander: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.gpu(0).allocate(bystander.pid, 500)
    monkeypatch.setenv("FAKENVML_STATE", driver.state)
    cuda = ctypes.CDLL(os.path.join(driver.root, "lib", "libcuda.so.1"))
    assert cuda.cuInit(0) == 0
    driver.checkpoint(bystander.pid, Request.LOCK)
    driver.checkpoint(bystander.pid, Request.CHECKPOINT)
    raw = [bytes.fromhex(gpu.uuid.removeprefix("GPU-").replace("-", "")) for gpu in driver.gpus]
    pair = _Pair(*(_Uuid((ctypes.c_ubyte * 16)(*end)) for end in raw))
    assert cuda.cuCheckpointProcessRestore(bystander.pid, ctypes.byref(_Restore(ctypes.pointer(pair), 1))) == 0
    assert [(entry["gpu"], entry["mib"]) for entry in driver.processes()] == [(1, 500)]


def test_json_lines_do_what_control_does(tmp_path: Path) -> None:
    requests: list[dict[str, Any]] = [
        {"do": "create", "model": "A30-24GB", "count": 2, "seed": 1},
        {"do": "alloc", "pid": os.getpid(), "gpu": 1, "mib": 100},
        {"do": "processes"},
        {"do": "alloc", "pid": os.getpid(), "gpu": 1, "mib": 24_000},
        {"do": "set", "gpu": 0, "temperature_c": 90},
        {"do": "get", "gpu": 0, "name": "temperature_c"},
        {"do": "nonsense"},
        {"do": "xid", "gpu": 0},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fake_driver", str(tmp_path / "driver")],
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["ok"] for answer in answers] == [True, True, True, False, True, True, False, False]
    assert answers[2]["result"][0]["mib"] == 100
    assert answers[3] == {"ok": False, "error": "allocate: MEMORY", "code": 20}
    assert answers[5]["result"] == 90
    assert "expected one of" in answers[6]["error"]
    assert "number" in answers[7]["error"]
    assert [gpu.uuid for gpu in FakeDriver.open(tmp_path / "driver").gpus] == answers[0]["result"]
