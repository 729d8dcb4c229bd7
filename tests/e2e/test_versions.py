"""Older and newer versions together, as they are while a yard is upgraded: real processes of both, from git's history.

Counted from what the jobs themselves wrote: whatever was acknowledged by either version runs once and ends once.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

import gpuyard
from gpuyard_protocol.queries import JobView
from support.older import TODAY, Version, joined_agent, older, standby_of, yard_of
from support.yard import Yard, eventually

#: Of the first line of releases: the earliest that was whole, and the first that had a standby and ruled by levels.
#: What is on the wire and on disk has had new fields, records and messages since both.
FIRST = "a616c3dc72c30fb0cb2b800d768cb3f25c730edc"
WITH_STANDBY = "825077a3332bb712da8ccd1e319cb745e4b21ce6"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return older(FIRST, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def with_standby(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return older(WITH_STANDBY, tmp_path_factory.mktemp("with-standby"))


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not pytest's own: jobs of another account come through it.
    with tempfile.TemporaryDirectory(prefix="gpuyard-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _script(yard: Yard, waits_for: str = "") -> str:
    """Writes when it starts, waits for a file, writes when it ends; a single write each."""
    journal = yard.scratch / "$GPUYARD_JOB.$GPUYARD_REPLICA"
    waiting = f"while [ ! -e {yard.scratch / waits_for} ]; do sleep 0.05; done; " if waits_for else ""
    return f'echo "start $GPUYARD_ATTEMPT $GPUYARD_NODE" >> {journal}; {waiting}echo "end" >> {journal}'


async def _submit(client: gpuyard.Client, count: int, command: str, **fields: object) -> list[int]:
    jobs = [await client.submit(command=command, **{"gpus": 1, **fields}) for _ in range(count)]
    return [job.number for job in jobs]


async def _views(client: gpuyard.Client, jobs: list[int]) -> list[JobView]:
    return [await client.job(job) for job in jobs]


def _states_are(client: gpuyard.Client, jobs: list[int], state: str) -> Callable[[], Awaitable[bool]]:
    async def hold() -> bool:
        return all(view.state == state for view in await _views(client, jobs))

    return hold


def _nodes_of(yard: Yard, jobs: list[int], replicas: int = 1) -> list[str]:
    """Where each replica ran, having seen that it ran exactly once and to its end, at its first attempt."""
    found = []
    for job in jobs:
        for replica in range(replicas):
            lines = (yard.scratch / f"{job}.{replica}").read_text().splitlines()
            assert [line.split()[0] for line in lines] == ["start", "end"], f"job {job} wrote {lines}"
            attempt, node = lines[0].split()[1:]
            assert attempt == "1"
            found.append(node)
    return found


def test_what_an_older_yard_took_in_is_finished_by_this_one(first: Version, directory: Path) -> None:
    """All of it killed but the jobs: journal, streams, keys, ledger and supervisor are the older one's."""
    ended: list[int] = []
    running: list[int] = []
    waiting: list[int] = []

    async def load(yard: Yard) -> None:
        async with yard.connect() as client:
            ended.extend(await _submit(client, 3, _script(yard)))
            await eventually(_states_are(client, ended, "succeeded"), "the first jobs ended")
            running.extend(await _submit(client, 2, _script(yard, "go")))
            await eventually(_states_are(client, running, "running"), "two jobs run")
            waiting.extend(await _submit(client, 5, _script(yard, "go")))

    async def finish(yard: Yard) -> None:
        async with yard.connect() as client:
            states = [view.state for view in await _views(client, [*ended, *running])]
            assert states == ["succeeded"] * 3 + ["running"] * 2
            (yard.scratch / "go").touch()
            late = await _submit(client, 2, _script(yard))
            await eventually(_states_are(client, [*running, *waiting, *late], "succeeded"), "every job ended")
            _nodes_of(yard, [*ended, *running, *waiting, *late])

    with yard_of(first, directory, dies=True) as yard:
        asyncio.run(load(yard))
    with yard_of(TODAY, directory) as yard:
        asyncio.run(finish(yard))


def test_a_yard_is_upgraded_by_its_standby(with_standby: Version, directory: Path) -> None:
    """As docs/install.md says: this version stands by for the older leader, is told to lead, and the older one goes.
    Its agent is the older one throughout."""
    jobs: list[int] = []

    async def load(yard: Yard) -> None:
        async with yard.connect() as client:
            jobs.extend(await _submit(client, 2, _script(yard, "go")))
            await eventually(_states_are(client, jobs, "running"), "two jobs run")
            jobs.extend(await _submit(client, 5, _script(yard, "go")))

    async def finish(yard: Yard) -> None:
        async with yard.connect() as client:

            async def answers() -> bool:
                try:
                    return len(await client.nodes()) == 1
                except gpuyard.GpuyardError:
                    return False

            await eventually(answers, "the newer one leads")
            assert [view.state for view in await _views(client, jobs[:2])] == ["running"] * 2
            (yard.scratch / "go").touch()
            jobs.extend(await _submit(client, 2, _script(yard)))
            await eventually(_states_are(client, jobs, "succeeded"), "every job ended")
        _nodes_of(yard, jobs)

    async def remember(yard: Yard) -> None:
        async with yard.connect() as client:
            assert {view.state for view in await _views(client, jobs)} == {"succeeded"}

    with yard_of(with_standby, directory, dies=True) as yard, standby_of(TODAY, yard) as leader:
        asyncio.run(load(yard))
        yard.up.kill()  # it would start the older daemon again
        with_standby.cli("handover", GPUYARD_CONTEXT=str(yard.context))
        with contextlib.suppress(psutil.NoSuchProcess):  # once another leads it ends by itself
            leader.kill()
        asyncio.run(finish(yard))
    with yard_of(TODAY, directory) as yard:
        asyncio.run(remember(yard))


async def _bring_along(client: gpuyard.Client, yard: Yard) -> list[int]:
    """Jobs that ask for what the first agents do not know."""
    directory = yard.state.parent / "brought"
    directory.mkdir()
    (directory / "note").write_text("here")
    upload = await client.upload(directory)
    return await _submit(client, 4, f"cat note && {{ {_script(yard)}; }}", upload=upload)


@pytest.mark.parametrize("newer", ["daemon", "agent"])
def test_older_and_newer_agents_serve_one_yard(first: Version, directory: Path, newer: str) -> None:
    """Its daemon is this version and one of its agents older, or the other way round."""
    head, guest = (TODAY, first) if newer == "daemon" else (first, TODAY)

    async def work(yard: Yard) -> None:
        async with yard.connect() as client:
            held = await _submit(client, 4, _script(yard, "go"))
            await eventually(_states_are(client, held, "running"), "both nodes are full")
            gang = await _submit(client, 1, _script(yard), replicas=2, gpus=2)
            short = await _submit(client, 6, _script(yard))
            bringing = await _bring_along(client, yard) if newer == "daemon" else []
            # A whole desired set, to every node, from a daemon that reads its journal again.
            assert yard.kill("gpuyard_daemon ")
            stopped = held.pop()

            async def is_cancelled() -> bool:
                try:
                    await client.cancel(stopped)
                except gpuyard.GpuyardError:
                    return False  # the daemon is being started
                return True

            await eventually(is_cancelled, "an order to stop is taken")
            (yard.scratch / "go").touch()
            await eventually(
                _states_are(client, [*held, *gang, *short, *bringing], "succeeded"), "all ended", timeout=60
            )
            await eventually(_states_are(client, [stopped], "cancelled"), "and one was stopped")
            assert set(_nodes_of(yard, [*held, *short])) <= {"node-1", "guest"}
            assert sorted(_nodes_of(yard, gang, replicas=2)) == ["guest", "node-1"]
            assert set(_nodes_of(yard, bringing)) <= {"node-1"}, "the older agent would run them without"

    with yard_of(head, directory) as yard, joined_agent(guest, yard, head, "guest"):
        asyncio.run(work(yard))
