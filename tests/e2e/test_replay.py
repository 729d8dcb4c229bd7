"""The journal of a yard that runs, lived again beside it: read only, with another quota and with more nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from support.yard import Yard, running_yard

JOBS = 6


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="2xH100-80GB") as yard:
        yield yard


async def _replay(yard: Yard, *options: str) -> dict[str, dict[str, float]]:
    done = await asyncio.to_thread(yard.cli, "replay", str(yard.state), "--json", *options)
    assert done.returncode == 0, done.stderr
    return {run["run"]: run for run in map(json.loads, done.stdout.splitlines())}


async def test_a_running_yard_is_replayed_without_being_disturbed(yard: Yard) -> None:
    async with yard.connect() as client:
        jobs = [await client.submit(command=["sleep", "0.2"], gpus=2) for _ in range(JOBS)]
        for job in jobs:
            assert (await job.wait(timeout=60)).state == "succeeded"
        same = await _replay(yard)
        assert same["recorded"]["jobs"] == same["gpuyard"]["jobs"] == JOBS
        assert same["gpuyard"]["ended_in_time"] == JOBS
        more = await _replay(yard, "--more", "node-1=5")
        assert more["gpuyard"]["avg_wait_s"] < same["gpuyard"]["avg_wait_s"]
        again = await client.submit(command=["true"])
        assert (await again.wait(timeout=60)).state == "succeeded"
