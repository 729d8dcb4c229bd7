"""Several processes and one state: memory, lists, load, events, and processes that die at the wrong moment."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pynvml
import pytest

from fake_driver.control import EVENT_ECC_DOUBLE, EVENT_XID, DriverRefused, Error, FakeDriver, Flag

Bystander = subprocess.Popen[bytes]


def code_of(call: Any, *arguments: Any) -> int:
    with pytest.raises(pynvml.NVMLError) as failure:
        call(*arguments)
    return int(failure.value.value)


def control(driver: FakeDriver, code: str) -> subprocess.Popen[str]:
    """Another process with the driver's control functions at hand as `driver`."""
    prelude = (
        f"import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})\n"
        f"from fake_driver.control import FakeDriver; driver = FakeDriver.open({driver.root!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def test_memory_taken_by_a_job_is_seen_here(nvml: Any, card: Any, start_job: Any) -> None:
    job = start_job("--memory", "1000", "--context", "24", "--sleep")
    job.until("ready")
    (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(card)
    assert (process.pid, process.usedGpuMemory >> 20, process.gpuInstanceId) == (job.pid, 1024, 0xFFFFFFFF)
    memory = nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2)
    assert memory.used >> 20 == 1024
    assert memory.used + memory.reserved + memory.free == memory.total
    assert nvml.nvmlDeviceGetMemoryInfo(card).used == memory.used + memory.reserved
    (detail,) = nvml.nvmlDeviceGetRunningProcessDetailList(card, nvml.nvmlProcessDetailList_v1, 0)
    assert (detail.pid, detail.usedGpuMemory >> 20) == (job.pid, 1024)
    assert nvml.nvmlSystemGetProcessName(job.pid)

    # Killed and not yet waited for: the kernel has closed its files, so nothing of it is left on the card.
    job.process.kill()
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(card) == []
    assert nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2).used == 0


def test_a_process_within_a_mig_device_is_listed_with_its_instance(
    nvml: Any, card: Any, driver: FakeDriver, start_job: Any
) -> None:
    nvml.nvmlDeviceSetMigMode(card, 1)
    migs = []
    for start in (0, 4):
        placement = nvml.c_nvmlGpuInstancePlacement_t(start, 4)
        gi = nvml.nvmlDeviceCreateGpuInstanceWithPlacement(card, 9, ctypes.byref(placement))
        migs.append(nvml.nvmlComputeInstanceGetInfo(nvml.nvmlGpuInstanceCreateComputeInstance(gi, 2)).device)
    uuids = [nvml.nvmlDeviceGetUUID(mig) for mig in migs]
    job = start_job("--sleep", "--memory", "500", "--context", "0", CUDA_VISIBLE_DEVICES=uuids[1])
    assert job.until("ready")["device"] == uuids[1]
    (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(migs[1])
    assert (process.pid, process.gpuInstanceId, process.computeInstanceId) == (job.pid, 2, 0)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(migs[0]) == []
    assert [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(card)] == [job.pid]
    assert nvml.nvmlDeviceGetMemoryInfo(migs[1]).used >> 20 == 500
    assert nvml.nvmlDeviceGetMemoryInfo(migs[0]).used == 0
    # Its limit is the instance's memory, not the card's.
    assert start_job("--memory", "40449", "--context", "0", CUDA_VISIBLE_DEVICES=uuids[1]).exit_code() == 70


def test_refusals_of_memory(driver: FakeDriver, bystander: Bystander) -> None:
    gpu = driver.gpu(0)

    def refused(**place: int) -> int:
        with pytest.raises(DriverRefused) as failure:
            gpu.allocate(bystander.pid, 1, **place)
        return failure.value.code

    gpu.allocate(bystander.pid, 81152)
    assert refused() == Error.MEMORY
    gpu.free(bystander.pid, 1)
    gpu.allocate(bystander.pid, 1)
    driver.release(bystander.pid)
    assert refused(gi=1, ci=0) == Error.NOT_FOUND
    gpu.set(mig_current=1)
    assert refused() == Error.NOT_SUPPORTED
    gpu.set(mig_current=0)
    gpu.lose()
    assert refused() == Error.GPU_IS_LOST
    with pytest.raises(DriverRefused):
        gpu.allocate(0x3FFFFFFF, 1)


def test_an_exclusive_card_takes_one_process_or_mps(driver: FakeDriver, start_job: Any, bystander: Bystander) -> None:
    gpu = driver.gpu(0)
    gpu.set(compute_mode=3)
    gpu.allocate(bystander.pid, 30, flags=Flag.MPS_SERVER)
    gpu.allocate(os.getpid(), 10, flags=Flag.MPS_CLIENT)
    assert start_job("--steps", "1").exit_code() == 72
    driver.release(bystander.pid)
    driver.release(os.getpid())
    assert start_job("--steps", "1").exit_code() == 0
    gpu.set(compute_mode=2)
    assert start_job("--steps", "1").exit_code() == 72


def test_load_shows_as_utilisation_power_and_temperature(
    nvml: Any, card: Any, driver: FakeDriver, bystander: Bystander
) -> None:
    idle = nvml.nvmlDeviceGetPowerUsage(card)
    assert nvml.nvmlDeviceGetCurrentClocksEventReasons(card) == nvml.nvmlClocksEventReasonGpuIdle
    driver.gpu(0).allocate(bystander.pid, 10)
    driver.load(bystander.pid, 80, 30)
    rates = nvml.nvmlDeviceGetUtilizationRates(card)
    assert (rates.gpu, rates.memory) == (80, 30)
    assert nvml.nvmlDeviceGetPowerUsage(card) > idle
    assert nvml.nvmlDeviceGetTemperature(card, 0) == nvml.nvmlDeviceGetTemperatureV(card, 0) == 66
    (sample,) = nvml.nvmlDeviceGetProcessUtilization(card, 0)
    assert (sample.pid, sample.smUtil) == (bystander.pid, 80)
    (wider,) = nvml.nvmlDeviceGetProcessesUtilizationInfo(card, 0)
    assert (wider.pid, wider.memUtil) == (bystander.pid, 30)
    future = int(time.time() * 1e6) + 10**9
    assert code_of(nvml.nvmlDeviceGetProcessUtilization, card, future) == nvml.NVML_ERROR_NOT_FOUND

    driver.gpu(0).set(utilization=5, power_mw=123_456, temperature_c=91, clocks_event_reasons=0x40)
    assert nvml.nvmlDeviceGetUtilizationRates(card).gpu == 5
    assert nvml.nvmlDeviceGetPowerUsage(card) == 123_456
    assert nvml.nvmlDeviceGetTemperature(card, 0) == 91
    assert nvml.nvmlDeviceGetCurrentClocksEventReasons(card) == 0x40


def test_load_that_is_not_renewed_runs_out(nvml: Any, card: Any, driver: FakeDriver, bystander: Bystander) -> None:
    """A job that was frozen reports nothing: the card is idle."""
    driver.gpu(0).allocate(bystander.pid, 10)
    driver.load(bystander.pid, 80, lasting_s=0.01)
    end = time.monotonic() + 5
    while nvml.nvmlDeviceGetUtilizationRates(card).gpu:
        assert time.monotonic() < end


def test_performance_monitoring_gives_the_load_of_a_mig_instance(
    nvml: Any, card: Any, driver: FakeDriver, bystander: Bystander
) -> None:
    nvml.nvmlDeviceSetMigMode(card, 1)
    gi = nvml.nvmlDeviceCreateGpuInstance(card, 9)
    nvml.nvmlGpuInstanceCreateComputeInstance(gi, 2)
    number = nvml.nvmlGpuInstanceGetInfo(gi).id
    driver.gpu(0).allocate(bystander.pid, 10, gi=number, ci=0)
    assert nvml.nvmlGpmQueryDeviceSupport(card).isSupportedDevice == 1
    samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
    driver.load(bystander.pid, 60)
    nvml.nvmlGpmMigSampleGet(card, number, samples[0])
    threading.Event().wait(0.02)
    nvml.nvmlGpmMigSampleGet(card, number, samples[1])
    request = nvml.c_nvmlGpmMetricsGet_t()
    request.version, request.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, 2
    request.sample1, request.sample2 = samples
    request.metrics[0].metricId, request.metrics[1].metricId = nvml.NVML_GPM_METRIC_SM_UTIL, 200
    nvml.nvmlGpmMetricsGet(request)
    assert request.metrics[0].value == pytest.approx(60)
    assert request.metrics[1].nvmlReturn == nvml.NVML_ERROR_NOT_SUPPORTED
    for sample in samples:
        nvml.nvmlGpmSampleFree(sample)


def test_energy_grows_with_time(nvml: Any, card: Any, driver: FakeDriver) -> None:
    driver.gpu(0).set(power_mw=1_000_000)
    before = nvml.nvmlDeviceGetTotalEnergyConsumption(card)
    began = time.monotonic()
    threading.Event().wait(0.05)
    joules = (nvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1000
    assert joules == pytest.approx(1000 * (time.monotonic() - began), rel=0.2)


def test_mps_clients_are_listed_apart_and_their_load_on_the_server(
    nvml: Any, card: Any, driver: FakeDriver, bystander: Bystander
) -> None:
    gpu = driver.gpu(0)
    gpu.allocate(bystander.pid, 30, flags=Flag.MPS_SERVER)
    gpu.allocate(os.getpid(), 10, flags=Flag.MPS_CLIENT)
    driver.load(os.getpid(), 40)
    assert [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(card)] == [bystander.pid]
    assert [process.pid for process in nvml.nvmlDeviceGetMPSComputeRunningProcesses(card)] == [os.getpid()]
    samples = nvml.nvmlDeviceGetProcessUtilization(card, 0)
    assert [(sample.pid, sample.smUtil) for sample in samples] == [(bystander.pid, 40)]
    driver.release(os.getpid())


def test_fields_that_a_card_lacks_do_not_spoil_the_others(nvml: Any, card: Any, driver: FakeDriver) -> None:
    driver.gpu(0).ecc(corrected=2, uncorrected=1)
    wanted = [
        nvml.NVML_FI_DEV_MEMORY_TEMP,
        nvml.NVML_FI_DEV_POWER_INSTANT,
        (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, 17),
        nvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL,
        250,
    ]
    values = nvml.nvmlDeviceGetFieldValues(card, wanted)
    assert [value.nvmlReturn for value in values] == [0, 0, 0, 0, nvml.NVML_ERROR_NOT_SUPPORTED]
    assert (values[0].value.uiVal, values[1].value.uiVal, values[3].value.ullVal) == (40, 70_000, 1)
    assert nvml.nvmlDeviceGetTotalEccErrors(card, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, 0) == 2
    assert nvml.nvmlDeviceGetRemappedRows(card) == (0, 0, 0, 0)


def test_an_event_from_another_process_wakes_a_waiting_thread(nvml: Any, card: Any, driver: FakeDriver) -> None:
    events = nvml.nvmlEventSetCreate()
    nvml.nvmlDeviceRegisterEvents(card, nvml.nvmlEventTypeXidCriticalError, events)
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(nvml.nvmlEventSetWait(events, 10_000)))
    waiter.start()
    # This thread goes on while the other one waits.
    assert nvml.nvmlDeviceGetPowerUsage(card) == 70_000
    other = control(driver, "driver.gpu(1).xid(48); driver.gpu(0).ecc(corrected=1); driver.gpu(0).xid(79, gi=3, ci=1)")
    other.communicate(timeout=10)
    waiter.join(timeout=10)
    (event,) = got
    assert nvml.nvmlDeviceGetUUID(event.device) == driver.gpu(0).uuid
    assert (event.eventType, event.eventData) == (EVENT_XID, 79)
    assert (event.gpuInstanceId, event.computeInstanceId) == (3, 1)
    assert code_of(nvml.nvmlEventSetWait, events, 1) == nvml.NVML_ERROR_TIMEOUT
    nvml.nvmlEventSetFree(events)
    assert code_of(nvml.nvmlEventSetWait, events, 1) == nvml.NVML_ERROR_INVALID_ARGUMENT


def test_every_set_sees_each_event_once_and_none_from_before(nvml: Any, card: Any, driver: FakeDriver) -> None:
    driver.gpu(0).xid(1)
    sets = [nvml.nvmlEventSetCreate() for _ in range(2)]
    for events in sets:
        nvml.nvmlDeviceRegisterEvents(card, EVENT_XID | EVENT_ECC_DOUBLE, events)
    driver.gpu(0).xid(2)
    driver.gpu(0).ecc(uncorrected=3)
    for events in sets:
        seen = [nvml.nvmlEventSetWait(events, 0) for _ in range(2)]
        assert [(event.eventType, event.eventData) for event in seen] == [(EVENT_XID, 2), (EVENT_ECC_DOUBLE, 3)]
        assert code_of(nvml.nvmlEventSetWait, events, 0) == nvml.NVML_ERROR_TIMEOUT
        nvml.nvmlEventSetFree(events)


def test_events_that_a_card_does_not_report_are_refused(nvml: Any, card: Any, driver: FakeDriver) -> None:
    events = nvml.nvmlEventSetCreate()
    mask = nvml.nvmlDeviceGetSupportedEventTypes(card)
    assert mask & EVENT_XID
    beyond = (card, mask | 0x8000, events)
    assert code_of(nvml.nvmlDeviceRegisterEvents, *beyond) == nvml.NVML_ERROR_NOT_SUPPORTED
    driver.gpu(0).set(supported_events=EVENT_XID)
    assert code_of(nvml.nvmlDeviceRegisterEvents, card, mask, events) == nvml.NVML_ERROR_NOT_SUPPORTED
    nvml.nvmlDeviceRegisterEvents(card, EVENT_XID, events)
    nvml.nvmlEventSetFree(events)


def test_the_loss_of_a_card_ends_the_wait_after_its_xid(nvml: Any, card: Any, driver: FakeDriver) -> None:
    events = nvml.nvmlEventSetCreate()
    nvml.nvmlDeviceRegisterEvents(card, EVENT_XID, events)
    driver.gpu(0).lose()
    assert nvml.nvmlEventSetWait(events, 0).eventData == 79
    assert code_of(nvml.nvmlEventSetWait, events, 10_000) == nvml.NVML_ERROR_GPU_IS_LOST
    nvml.nvmlEventSetFree(events)


def test_a_process_that_dies_with_the_lock_held_stops_nobody(nvml: Any, card: Any, driver: FakeDriver) -> None:
    dying = control(driver, "driver.die_holding_the_lock()")
    dying.communicate(timeout=10)
    assert dying.returncode == -signal.SIGABRT
    assert nvml.nvmlDeviceGetPowerUsage(card) == 70_000


def test_sigkill_amid_calls_stops_nobody(nvml: Any, card: Any, driver: FakeDriver, until: Any) -> None:
    """Also a waiter may be killed: the next wake-up must not wait for it."""
    code = (
        "import pynvml as n, threading; n.nvmlInit()\n"
        "c = n.nvmlDeviceGetHandleByIndex(0); s = n.nvmlEventSetCreate(); n.nvmlDeviceRegisterEvents(c, 8, s)\n"
        "threading.Thread(target=lambda: n.nvmlEventSetWait(s, 60000), daemon=True).start()\n"
        "while True: n.nvmlDeviceGetMemoryInfo(c)"
    )
    for _ in range(3):
        calls = driver.calls("nvmlDeviceGetMemoryInfo")
        with subprocess.Popen([sys.executable, "-c", code], env=driver.env()) as hammer:
            until(lambda before=calls: driver.calls("nvmlDeviceGetMemoryInfo") > before + 100)
            hammer.kill()
        began = time.monotonic()
        driver.gpu(0).xid(13)
        assert nvml.nvmlDeviceGetPowerUsage(card) == 70_000
        assert time.monotonic() - began < 2


def test_a_forked_child_shares_the_session(nvml: Any, card: Any, driver: FakeDriver) -> None:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, str(nvml.nvmlDeviceGetPowerUsage(card)).encode())
        os._exit(0)
    os.wait()
    assert os.read(reader, 100) == b"70000"
    os.close(reader)
    os.close(writer)


def test_links_behind_a_switch_lead_to_the_switch(nvml: Any, card: Any) -> None:
    assert sum(nvml.nvmlDeviceGetNvLinkState(card, link) for link in range(18)) == 18
    assert nvml.nvmlDeviceGetNvLinkRemoteDeviceType(card, 0) == 2
    assert code_of(nvml.nvmlDeviceGetNvLinkState, card, 18) == nvml.NVML_ERROR_INVALID_ARGUMENT
    other = nvml.nvmlDeviceGetHandleByIndex(1)
    assert nvml.nvmlDeviceGetNvLinkRemotePciInfo(card, 0).busId != nvml.nvmlDeviceGetPciInfo(other).busId
    assert nvml.nvmlDeviceGetP2PStatus(card, other, 2) == 0


def test_direct_links_are_matched_by_the_bus_of_the_peer(make_driver: Any) -> None:
    driver = make_driver("A100-40GB", 4, topology="mesh", numa_nodes=2)
    with driver.in_process(pynvml) as nvml:
        nvml.nvmlInit()
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(4)]
        buses = [nvml.nvmlDeviceGetPciInfo(card).busId for card in cards]
        reached = [nvml.nvmlDeviceGetNvLinkRemotePciInfo(cards[2], link).busId for link in range(12)]
        assert [reached.count(bus) for bus in buses] == [4, 4, 0, 4]
        assert nvml.nvmlDeviceGetNvLinkRemoteDeviceType(cards[2], 0) == 0
        levels = [nvml.nvmlDeviceGetTopologyCommonAncestor(cards[0], card) for card in cards]
        assert levels == [0, 10, 50, 50]
        assert code_of(nvml.nvmlDeviceGetNumaNodeId, cards[0]) == nvml.NVML_ERROR_NOT_SUPPORTED
        driver.gpu(0).set(memory_numa_node=4)
        assert nvml.nvmlDeviceGetNumaNodeId(cards[0]) == 4
        assert list(nvml.nvmlDeviceGetMemoryAffinity(cards[3], 1, 0)) == [2]
        assert len(nvml.nvmlDeviceGetTopologyNearestGpus(cards[0], 50)) == 2


def test_a_card_without_links_says_so(make_driver: Any) -> None:
    with make_driver("L40S-48GB", 2).in_process(pynvml) as nvml:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        assert code_of(nvml.nvmlDeviceGetNvLinkState, card, 0) == nvml.NVML_ERROR_NOT_SUPPORTED
        assert nvml.nvmlDeviceGetArchitecture(card) == nvml.NVML_DEVICE_ARCH_ADA
        assert nvml.nvmlDeviceGetCudaComputeCapability(card) == (8, 9)
