"""The memory watchdog on NVIDIA's own binding: what it counts is what the driver says of real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pynvml

from fake_driver.control import FakeDriver
from gpuyard_agent.core.events import Event, MustEnd
from gpuyard_agent.core.model import Assignment
from gpuyard_agent.declared_use import DeclaredUse
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.logs import LogStore
from gpuyard_agent.watchdog import Watchdog
from gpuyard_protocol.resources import TimeSliceShare
from support.agents import start_order


async def test_the_job_over_its_share_is_found_among_its_neighbours(
    driver: FakeDriver, start_job: Any, tmp_path: Path
) -> None:
    """Two jobs of the same size on one card; one was given less than it takes."""
    with driver.in_process(pynvml):
        backend = NvmlBackend()
        await backend.open()
        try:
            card = (await backend.inventory())[0].uuid
            live = {}
            for number, memory_mib in ((1, 4_000), (2, 16_000)):
                job = start_job("--memory", "8000", "--sleep", CUDA_VISIBLE_DEVICES=card)
                job.until("ready")
                start = start_order(number, "true", partition=TimeSliceShare(card, 400, memory_mib))
                live[start.key] = Assignment(key=start.key, start=start, boot_id="b", state="running", pid=job.pid)
            events: list[Event] = []
            declared = DeclaredUse(LogStore(tmp_path, lambda key: True))
            dog = Watchdog(backend, declared, emit=events.append, live=lambda: live)
            await dog.look()
            assert events == []
            await dog.look()
        finally:
            await backend.close()
    (found,) = events
    assert isinstance(found, MustEnd)
    assert (found.key.job, found.verdict.code) == (1, "OutOfPartitionMemory")
    assert "8300 MiB" in found.verdict.detail
