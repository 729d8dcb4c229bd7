"""Elastic jobs on a real yard: the members say themselves in which world they ran."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard

#: Rounds come each second, so that a test need not wait for one.
_SETTINGS = "[scheduler]\npreempt_every_ms = 500\n"


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB", settings=_SETTINGS) as yard:
        yield yard


def training(trail: Path, gate: Path) -> str:
    """A member that writes its world, and on SIGTERM that it saved; it ends well once the gate is there."""
    line = "$GPUYARD_ATTEMPT $RANK $GPUYARD_WORLD_SIZE $GPUYARD_MIN_REPLICAS-$GPUYARD_MAX_REPLICAS"
    return (
        f'echo "{line} $(echo $GPUYARD_PEERS | tr , "\\n" | wc -l)" >> {trail}; '
        f"trap 'echo saved >> {trail}; exit 0' TERM; until [ -e {gate} ]; do sleep 0.05; done"
    )


def worlds(trail: Path) -> list[tuple[int, int]]:
    """(attempt, size) that every member of an attempt agreed on."""
    lines = [line.split() for line in trail.read_text().splitlines() if line != "saved"] if trail.exists() else []
    found = {}
    for attempt, rank, size, _, peers in lines:
        assert size == peers
        found.setdefault((int(attempt), int(size)), set()).add(int(rank))
    return sorted(world for world, ranks in found.items() if ranks == set(range(world[1])))


async def test_a_job_begins_wide_shrinks_at_its_owners_word_and_grows_again(yard: Yard) -> None:
    trail, gate = yard.scratch / "scaled", yard.scratch / "scaled-gate"
    async with yard.connect() as client:
        job = await client.submit(
            command=training(trail, gate), gpus=1, replicas=8, min_replicas=2, preemption="checkpoint"
        )

        async def has(world: tuple[int, int]) -> bool:
            return world in worlds(trail)

        await eventually(lambda: has((1, 8)), "it runs with all eight")
        shown = await asyncio.to_thread(yard.cli, "scale", str(job.number), "3")
        assert shown.returncode == 0, shown.stderr
        await eventually(lambda: has((2, 3)), "it runs with three")
        other = await client.submit(command=["true"], gpus=4)
        assert (await other.wait(timeout=30)).state == "succeeded"
        await client.scale(job.number, 6)
        await eventually(lambda: has((3, 6)), "it runs with six")
        listed = await asyncio.to_thread(yard.cli, "jobs")
        assert "6 of 2-6 × (1×GPU)" in listed.stdout
        why = await asyncio.to_thread(yard.cli, "why", str(job.number))
        assert "6 replicas, of 2 to 6" in why.stdout
        gate.touch()
        view = await job.wait(timeout=30)
    assert (view.state, view.attempt, view.retries_left) == ("succeeded", 3, 0)
    assert trail.read_text().count("saved") == 8 + 3


async def test_scale_refuses_what_has_one_size_what_is_too_few_and_what_is_not_there(yard: Yard) -> None:
    async with yard.connect() as client:
        plain = await client.submit(command=["true"], hold=True)
        elastic = await client.submit(command=["true"], replicas=4, min_replicas=2, hold=True)
        with pytest.raises(gpuyard.Rejected) as refused:
            await client.scale(plain.number, 2)
        assert refused.value.reason == "NotElastic"
        with pytest.raises(gpuyard.Rejected) as refused:
            await client.scale(elastic.number, 1)
        assert refused.value.reason == "BelowLeast"
        with pytest.raises(gpuyard.Rejected) as refused:
            await client.scale(999_999, 1)
        assert refused.value.reason == "UnknownJob"
        with pytest.raises(gpuyard.Rejected, match="min_replicas"):
            await client.submit(command=["true"], replicas=2, min_replicas=3)
        for job in (plain, elastic):
            await client.cancel(job.number)


async def test_a_service_is_scaled_and_rolled_out_and_back(yard: Yard, tmp_path: Path) -> None:
    def file(version: str) -> bytes:
        service = {"name": "echo", "command": ["sleep", "1000"], "version": version, "replica": {"gpu": 0.2}}
        return json.dumps({**service, "max_replicas": 4, "min_replicas": 1}).encode()

    async def cli(*words: str, stdin: bytes = b"") -> str:
        shown = await asyncio.to_thread(yard.cli, *words, stdin=stdin)
        assert shown.returncode == 0, shown.stderr
        return shown.stdout

    await cli("apply", "-f", "-", stdin=file("1"))
    await cli("scale", "echo", "3")
    through = await cli("rollout", "status", "echo", "--timeout", "30s")
    assert "3 replicas run, all of generation 1" in through
    await cli("rollout", "restart", "echo")
    assert "3 replicas run, all of generation 2" in await cli("rollout", "status", "echo", "--timeout", "60s")
    await cli("apply", "-f", "-", stdin=file("2"))
    await cli("scale", "echo", "2:4")
    await cli("rollout", "status", "echo", "--timeout", "60s")
    await cli("rollout", "undo", "echo")
    view = json.loads(await cli("rollout", "status", "echo", "--timeout", "60s", "--json"))
    assert (view["version"], view["min_replicas"], view["max_replicas"]) == ("1", 2, 4)
    assert view["updated"] == view["wanted"]
    assert view["generation"] == 4
    await cli("delete", "echo")
