"""What a card shows while it works: load, memory, power, temperature, errors; and the same of its MIG instances.

A figure that the card, the driver or the privilege does not give is None. In MIG mode load exists only per instance,
and only from Hopper on, where it is the difference of two readings of a counter: so the first sample of an instance has
none. Reading all of a card takes about ten calls.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pynvml

from gpuyard_agent.devices.base import DeviceProcess, MigInstanceFound
from gpuyard_agent.devices.nvml_calls import MIB, checked, code_of, fields, optional
from gpuyard_agent.devices.nvml_cards import Card, read_memory
from gpuyard_protocol.nodes import DeviceSample, InstanceSample

#: What the driver calls reasons for low clocks. Idling and clocks set by an administrator slow nobody down.
_SLOWED_BY: dict[int, str] = {
    0x4: "power-cap",
    0x8: "slowdown",
    0x10: "sync-boost",
    0x20: "thermal",
    0x40: "thermal-hardware",
    0x80: "power-brake",
}
_FIELDS = (
    pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL,
    pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL,
    pynvml.NVML_FI_DEV_MEMORY_TEMP,
    pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION,
)
#: Two readings of a performance counter must be at least this far apart.
_METER_S = 0.1
#: So long one reading of the processes' load serves whoever asks.
_LOADS_S = 1.0


class _Reading(msgspec.Struct, kw_only=True):
    """The last reading of an instance's counters."""

    #: The driver's.
    handle: Any
    at_s: float
    #: Of the MIG device read: the number of a GPU instance is used again.
    mig_uuid: str
    utilization_pct: int | None = None


class Sampler:
    """One card's. Used in that card's thread alone."""

    def __init__(self) -> None:
        #: By GPU instance. None: the card has no such counters.
        self._readings: dict[int, _Reading] | None = {}
        self._is_asked = False

    def sample(self, card: Card) -> DeviceSample:
        """Raises `Lost`."""
        handle, device = card.handle, card.device
        utilization = optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
        _, used_mib = read_memory(handle)
        corrected, uncorrected, memory_c, energy_mj = fields(handle, _FIELDS)
        reasons = optional(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
        return DeviceSample(
            uuid=device.uuid,
            utilization_pct=int(utilization.gpu) if utilization is not None else None,
            memory_used_mib=used_mib,
            memory_total_mib=device.memory_mib,
            power_mw=_whole(optional(pynvml.nvmlDeviceGetPowerUsage, handle)),
            temperature_c=_whole(optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)),
            power_limit_mw=_whole(optional(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
            energy_mj=energy_mj,
            memory_temperature_c=memory_c,
            sm_clock_mhz=_whole(optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)),
            slowed_by=tuple(word for bit, word in _SLOWED_BY.items() if int(reasons) & bit),
            ecc_corrected=corrected,
            ecc_uncorrected=uncorrected,
            instances=tuple(self._sample_instance(card, one) for one in card.instances if one.mig_uuid),
        )

    def forget(self) -> None:
        """The session with the driver ended, and its counters with it."""
        self._readings, self._is_asked = {}, False

    def _sample_instance(self, card: Card, one: MigInstanceFound) -> InstanceSample:
        handle = card.mig_handles.get(one.mig_uuid)
        total_mib, used_mib = read_memory(handle) if handle is not None else (0, None)
        return InstanceSample(
            mig_uuid=one.mig_uuid,
            profile=one.profile,
            utilization_pct=self._load(card, one),
            memory_used_mib=used_mib,
            memory_total_mib=total_mib or one.memory_mib,
        )

    def _load(self, card: Card, one: MigInstanceFound) -> int | None:
        if not self._is_asked:
            self._is_asked = True
            support = optional(pynvml.nvmlGpmQueryDeviceSupport, card.handle)
            if support is None or not support.isSupportedDevice:
                self._readings = None
        if self._readings is None:
            return None
        before, now_s = self._readings.get(one.gpu_instance), time.monotonic()
        if before is not None and before.mig_uuid != one.mig_uuid:
            self._drop(one.gpu_instance)
            before = None
        if before is not None and now_s - before.at_s < _METER_S:
            return before.utilization_pct
        fresh = optional(pynvml.nvmlGpmSampleAlloc)
        if fresh is None:
            return None
        reading = _Reading(handle=fresh, at_s=now_s, mig_uuid=one.mig_uuid)
        if optional(pynvml.nvmlGpmMigSampleGet, card.handle, one.gpu_instance, fresh) is None:
            _free(fresh)
            return None
        if before is not None:
            reading.utilization_pct = _compare(before.handle, fresh)
            _free(before.handle)
        self._readings[one.gpu_instance] = reading
        return reading.utilization_pct

    def _drop(self, gpu_instance: int) -> None:
        if self._readings is not None and (reading := self._readings.pop(gpu_instance, None)) is not None:
            _free(reading.handle)


def _compare(before: Any, after: Any) -> int | None:
    """Share of time in which the instance computed between two readings."""
    request = pynvml.c_nvmlGpmMetricsGet_t()
    request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    request.numMetrics = 1
    request.sample1, request.sample2 = before, after
    request.metrics[0].metricId = pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL
    answer = optional(pynvml.nvmlGpmMetricsGet, request)
    if answer is None or answer.metrics[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return min(100, max(0, round(float(answer.metrics[0].value))))


def _free(reading: Any) -> None:
    optional(pynvml.nvmlGpmSampleFree, reading)


def _whole(value: Any) -> int | None:
    return int(value) if value is not None else None


def _read_loads(card: Card) -> dict[int, int] | None:
    """By pid, the most of what was sampled since the last reading; None: the card does not tell. Raises `Lost`. Two who
    ask one after the other are told the same: what the first has read is not there for the second."""
    if time.monotonic() - card.loads_read_s >= _LOADS_S:
        card.loads, card.loads_read_s = _read_fresh_loads(card), time.monotonic()
    return card.loads


def _read_fresh_loads(card: Card) -> dict[int, int] | None:
    try:
        samples = checked(pynvml.nvmlDeviceGetProcessUtilization, card.handle, card.load_seen_us)
    except pynvml.NVMLError as error:
        # Nothing new means that nobody computed. A driver may also report success while it finds nothing.
        return {} if code_of(error) in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_SUCCESS) else None
    loads: dict[int, int] = {}
    for sample in samples:
        loads[int(sample.pid)] = max(loads.get(int(sample.pid), 0), min(100, int(sample.smUtil)))
        card.load_seen_us = max(card.load_seen_us, int(sample.timeStamp))
    return loads


def read_processes(card: Card) -> tuple[DeviceProcess, ...]:
    """By pid. Clients of MPS are listed like any other. Raises `Lost`."""
    places = {(one.gpu_instance, one.compute_instance): one.mig_uuid for one in card.instances}
    found: dict[tuple[int, str], int | None] = {}
    listed: list[Any] = []
    is_told = False
    for list_them in (
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
    ):
        processes = optional(list_them, card.handle)
        is_told = is_told or processes is not None
        listed.extend(processes or ())
    if not is_told:
        # Without the privilege to see a card in MIG mode whole, its instances still tell of themselves.
        for handle in card.mig_handles.values():
            listed.extend(optional(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle) or ())
    for process in listed:
        used = process.usedGpuMemory
        mig_uuid = places.get((process.gpuInstanceId, process.computeInstanceId), "")
        found[int(process.pid), mig_uuid] = int(used) // MIB if used is not None else None
    loads = _read_loads(card)
    return tuple(
        DeviceProcess(
            device=card.facts.uuid,
            pid=pid,
            memory_mib=used,
            mig_uuid=mig_uuid,
            utilization_pct=loads.get(pid, 0) if loads is not None else None,
        )
        for (pid, mig_uuid), used in sorted(found.items())
    )
