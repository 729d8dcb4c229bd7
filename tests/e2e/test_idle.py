"""Cards held idle on a whole yard: the owner is told, the job leaves its card until it is resumed, or it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuyard_protocol.jobs import JobEvent
from support.yard import Yard, eventually, running_yard

SETTINGS = """
[tenants.main]
queue = "lab"
[queues.lab]
[queues.notebooks]
parent = "lab"
idle_gpu_warn = "2s"
idle_gpu_suspend = "4s"
[queues.trials]
parent = "lab"
idle_gpu_suspend = "2s"
idle_gpu_release = "10s"
"""


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="2xH100-80GB", settings=SETTINGS) as yard:
        yield yard


def program(load: Path, ticks: Path) -> str:
    """Writes its process's number over and over, and computes as much on its card as `load` says."""
    says = f'echo "$$ 1000 $(cat {load})" > "$GPUYARD_JOB_DIR/simulated-gpu-use"'
    return f"while :; do echo $$ >> {ticks}; {says}; sleep 0.05; done"


async def test_an_idle_job_leaves_its_card_and_goes_on_where_it_was_when_it_is_resumed(yard: Yard) -> None:
    load, ticks = yard.scratch / "load", yard.scratch / "ticks"
    load.write_text("0\n")
    load.chmod(0o644)
    async with yard.connect() as client:
        told: list[JobEvent] = []
        await client.listen(told.append)
        job = await client.submit(command=program(load, ticks), gpus=1, preemption="suspend", queue="notebooks")

        async def is_off() -> bool:
            return any(event.state == "suspended" for event in told)

        await eventually(is_off, "it leaves its card", timeout=30)
        warnings = [event for event in told if event.state == "running" and event.reason is not None]
        assert {event.reason and event.reason.code for event in warnings} == {"IdleGpu"}
        taker = await client.submit(command=["sleep", "1000"], gpus=2)

        async def runs() -> bool:
            return (await taker.view()).state == "running"

        await eventually(runs, "its card is free for another", timeout=30)
        await taker.cancel()
        await taker.wait()
        halted = len(ticks.read_text().splitlines())
        load.write_text("80\n")
        assert (await job.view()).state == "suspended"
        assert len(ticks.read_text().splitlines()) == halted
        assert yard.cli("resume", str(job.number)).returncode == 0

        async def goes_on() -> bool:
            return len(ticks.read_text().splitlines()) > halted + 5

        await eventually(goes_on, "it works again", timeout=30)
        assert len(set(ticks.read_text().split())) == 1, "one process from the beginning to the end"
        assert (await job.view()).attempt == 1
        await job.cancel()


async def test_an_idle_job_that_nobody_resumes_ends(yard: Yard) -> None:
    load, ticks = yard.scratch / "no-load", yard.scratch / "other-ticks"
    load.write_text("0\n")
    load.chmod(0o644)
    async with yard.connect() as client:
        job = await client.submit(command=program(load, ticks), gpus=1, preemption="suspend", queue="trials")
        ended = await job.wait()
        assert (ended.state, ended.reason and ended.reason.code) == ("failed", "IdleGpu")
