"""What each replica does on its cards: by the driver's list of processes, told to the yard and to Prometheus."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuyard_agent import job_use
from gpuyard_agent.core.events import SeenIdle
from gpuyard_agent.core.model import Assignment
from gpuyard_agent.job_use import JobUse
from gpuyard_agent.metrics import Metrics
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import DeviceSample, Idle, InstanceSample, JobSample
from gpuyard_protocol.resources import MpsShare, Partition, TimeSliceShare, WholeCards
from support.agent_core import CoreHarness
from support.agents import start_order
from support.devices import fake_cards

ONE, TWO = AssignmentKey(1, 1, 0), AssignmentKey(2, 1, 0)


@pytest.fixture
def programs() -> Iterator[list[int]]:
    """Two processes that can stand for the programs of two jobs."""
    with subprocess.Popen(["sleep", "1000"]) as first, subprocess.Popen(["sleep", "1000"]) as second:
        yield [first.pid, second.pid]
        first.kill()
        second.kill()


def running(key: AssignmentKey, partition: Partition, pid: int) -> Assignment:
    start = start_order(key.job, "x", partition=partition)
    return Assignment(key=key, start=start, boot_id="b", state="running", pid=pid)


async def test_load_and_memory_are_told_apart_by_job(tmp_path: Path, programs: list[int]) -> None:
    async with fake_cards(tmp_path) as (driver, backend):
        (device,) = await backend.inventory()
        share = TimeSliceShare(device.uuid, 500, 10_000)
        live = {key: running(key, share, pid) for key, pid in zip((ONE, TWO), programs, strict=True)}
        for pid, mib in zip(programs, (3_000, 1_000), strict=True):
            driver.gpu(0).allocate(pid, mib)
        driver.load(programs[0], 70)
        use = JobUse(backend)
        await use.look(live)
        assert use.samples == (
            JobSample(key=ONE, memory_mib=3_000, utilization_pct=70, processes=1),
            JobSample(key=TWO, memory_mib=1_000, utilization_pct=0, processes=1),
        )
        assert (use.is_busy(ONE), use.is_busy(TWO)) == (True, None)
        other = JobUse(backend)
        await other.look(live)  # at once: it is told what the first one read
        assert other.samples == use.samples


async def test_what_was_seen_long_ago_says_nothing_of_now(
    tmp_path: Path, programs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_cards(tmp_path) as (driver, backend):
        (device,) = await backend.inventory()
        driver.gpu(0).allocate(programs[0], 10)
        driver.load(programs[0], 70)
        use = JobUse(backend)
        await use.look({ONE: running(ONE, WholeCards((device.uuid,)), programs[0])})
        assert use.is_busy(ONE)
        monkeypatch.setattr(job_use, "FRESH_S", -1.0)
        assert use.is_busy(ONE) is None


async def test_under_mps_and_for_what_has_ended_no_load_is_told(tmp_path: Path, programs: list[int]) -> None:
    async with fake_cards(tmp_path) as (driver, backend):
        (device,) = await backend.inventory()
        driver.gpu(0).allocate(programs[0], 500)
        live = {
            ONE: running(ONE, MpsShare(device.uuid, 500, 10_000), programs[0]),
            TWO: running(TWO, MpsShare(device.uuid, 500, 10_000), 0),
        }
        use = JobUse(backend)
        await use.look(live)
        assert use.samples == (JobSample(key=ONE, memory_mib=500, utilization_pct=None, processes=1),)
        driver.gpu(0).lose()
        await use.look(live)
        assert use.samples == (JobSample(key=ONE),)


def test_an_idle_job_is_reported() -> None:
    core, start = CoreHarness(), start_order(1, "x")
    core.run(start)
    told = core.tell(SeenIdle(start.key, 60_000, "suspend", 90_000))
    expected = Idle(key=start.key, at_ms=core.wall_ms, idle_ms=60_000, stage="suspend", release_ms=90_000)
    assert told.reports == [expected]
    assert told.others == []
    assert core.tell(SeenIdle(AssignmentKey(9, 1, 0), 60_000, "warn")).reports == []


def test_prometheus_is_told_everything_that_a_card_says_and_nothing_that_it_does_not() -> None:
    metrics = Metrics(dict, lambda: 0)
    full = DeviceSample(
        uuid="GPU-1",
        utilization_pct=50,
        memory_used_mib=1024,
        memory_total_mib=2048,
        power_mw=300_500,
        temperature_c=60,
        energy_mj=7_500,
        ecc_corrected=3,
        ecc_uncorrected=1,
        slowed_by=("thermal",),
        instances=(InstanceSample(mig_uuid="MIG-1", profile="1g.10gb", utilization_pct=25, memory_total_mib=1024),),
    )
    metrics.samples = (full, DeviceSample(uuid="GPU-2", memory_total_mib=2048))
    metrics.uses = (JobSample(key=ONE, memory_mib=512, utilization_pct=40, processes=2), JobSample(key=TWO))
    lines = set(metrics.text().decode().splitlines())
    for line in (
        'gpuyard_agent_gpu_utilization_ratio{device="GPU-1"} 0.5',
        'gpuyard_agent_gpu_power_watts{device="GPU-1"} 300.5',
        'gpuyard_agent_gpu_energy_joules_total{device="GPU-1"} 7.5',
        'gpuyard_agent_gpu_ecc_corrected_total{device="GPU-1"} 3.0',
        'gpuyard_agent_gpu_ecc_uncorrected_total{device="GPU-1"} 1.0',
        'gpuyard_agent_gpu_slowed{device="GPU-1",reason="thermal"} 1.0',
        'gpuyard_agent_gpu_slowed{device="GPU-1",reason="power-cap"} 0.0',
        'gpuyard_agent_mig_utilization_ratio{device="GPU-1",instance="MIG-1",profile="1g.10gb"} 0.25',
        'gpuyard_agent_mig_memory_bytes{device="GPU-1",instance="MIG-1",profile="1g.10gb"} 1.073741824e+09',
        'gpuyard_agent_job_gpu_utilization_ratio{job="1",replica="0"} 0.4',
        'gpuyard_agent_job_gpu_processes{job="2",replica="0"} 0.0',
        'gpuyard_agent_gpu_memory_bytes{device="GPU-2"} 2.147483648e+09',
    ):
        assert line in lines, line
    assert not any("GPU-2" in line and "gpu_power" in line for line in lines)
    assert not any('job="2"' in line and "utilization" in line for line in lines)
    metrics.samples = ()
    assert "GPU-1" not in metrics.text().decode(), "what is gone is not told any more"
