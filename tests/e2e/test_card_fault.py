"""A card breaks under a job, a job takes more than its share, an attempt fails: what the yard makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from gpuyard_protocol.queries import CardView
from support.yard import Yard, eventually, running_yard


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="2xH100-80GB") as yard:
        yield yard


async def _cards(client: gpuyard.Client) -> dict[str, CardView]:
    return {card.uuid: card for node in await client.nodes() for card in node.cards}


async def test_a_broken_card_is_fenced_its_job_runs_elsewhere_and_it_returns(yard: Yard) -> None:
    (node,) = (yard.state / "agents").iterdir()
    drill: Path = node / "simulated-faults.toml"
    starts, gate = yard.scratch / "starts", yard.scratch / "gate"
    script = f'echo "$GPUYARD_ATTEMPT $CUDA_VISIBLE_DEVICES" >> {starts}; until [ -e {gate} ]; do sleep 0.05; done'
    async with yard.connect() as client:
        job = await client.submit(command=["/bin/sh", "-c", script], gpus=1)

        async def it_started(times: int) -> bool:
            return starts.exists() and len(starts.read_text().splitlines()) == times

        await eventually(lambda: it_started(1), "the job runs")
        first = starts.read_text().split()[1]
        drill.write_text(f'{first} = "Xid 79: fallen off the bus"\n')
        await eventually(lambda: it_started(2), "the job runs again")
        (_, attempt, second) = starts.read_text().split()[1:]
        assert int(attempt) == 2
        assert second != first
        view = (await _cards(client))[first]
        assert (view.healthy, view.fault) == (False, "Xid 79: fallen off the bus")

        drill.write_text("")

        async def it_is_back() -> bool:
            return (await _cards(client))[first].healthy

        await eventually(it_is_back, "the card returns")
        gate.touch()
        assert (await job.wait()).state == "succeeded"
        assert starts.read_text().count("\n") == 2
        # Both cards take work again.
        assert (await (await client.submit(command=["true"], gpus=2)).wait()).state == "succeeded"


async def test_a_job_over_its_share_of_memory_fails_and_its_neighbour_does_not(yard: Yard) -> None:
    """On modelled cards a job says itself what it takes; what follows is the same as on real ones."""
    takes = 'echo "$$ {mib}" > "$GPUYARD_JOB_DIR/simulated-gpu-use"; until [ -e {gate} ]; do sleep 0.05; done'
    gate = yard.scratch / "neighbour"
    async with yard.connect() as client:
        share = {"gpu": 0.25, "gpu_memory": "16Gi", "isolation": "none"}
        modest = await client.submit(command=["/bin/sh", "-c", takes.format(mib=16_000, gate=gate)], **share)
        greedy = await client.submit(command=["/bin/sh", "-c", takes.format(mib=40_000, gate=gate)], **share)
        end = await greedy.wait()
        assert (end.state, end.reason.code if end.reason else "") == ("failed", "OutOfPartitionMemory")
        assert (await client.job(modest.number)).state == "running"
        gate.touch()
        assert (await modest.wait()).state == "succeeded"


async def test_checkpoints_survive_from_one_attempt_to_the_next(yard: Yard) -> None:
    script = 'cd "$GPUYARD_CHECKPOINT_DIR"; echo "$GPUYARD_ATTEMPT" >> steps; [ "$(wc -l < steps)" -ge 2 ]'
    async with yard.connect() as client:
        job = await client.submit(command=["/bin/sh", "-c", script], gpus=1, retries=1)
        assert (await job.wait()).state == "succeeded"
        assert (await client.job(job.number)).attempt == 2
