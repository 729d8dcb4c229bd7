"""A yard with a standby: its leader is killed, suspended and told to hand over while jobs run; each runs exactly once.

The count is taken from what the jobs themselves wrote.
"""

from __future__ import annotations

import asyncio
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard

JOBS = 60


@pytest.fixture
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB", flags=("--standby",)) as yard:
        yield yard


def _get(yard: Yard, directory: str) -> str:
    """ "ready" for the daemon that leads, "standby …" for the other, "" for none."""
    try:
        url = (yard.state / directory / "http.url").read_text().strip()
        with urllib.request.urlopen(url + "/readyz", timeout=2):
            return "ready"
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()
    except OSError:
        return ""


async def _roles(yard: Yard) -> dict[str, str]:
    return {name: await asyncio.to_thread(_get, yard, name) for name in ("daemon", "standby")}


async def _leader(yard: Yard) -> psutil.Process:
    """The leader's process, once one leads and the other stands by for it."""
    found: list[str] = []

    async def settled() -> bool:
        roles = await _roles(yard)
        found[:] = [name for name, role in roles.items() if role == "ready"]
        return len(found) == 1 and any(role.startswith("standby of") for role in roles.values())

    await eventually(settled, "a leader and a standby", timeout=60)
    for process in yard.processes("gpuyard_daemon"):
        if ("--daemon-dir" in process.cmdline()) == (found[0] == "standby"):
            return process
    raise AssertionError("the leader's process is not there")


def _script(yard: Yard) -> str:
    journal = yard.scratch / "$GPUYARD_JOB"
    return f'echo "start $GPUYARD_ATTEMPT" >> {journal}; sleep 0.8; echo "end $GPUYARD_ATTEMPT" >> {journal}'


async def _strike(yard: Yard, blow: str) -> None:
    leader = await _leader(yard)
    if blow == "kill":
        leader.kill()
    elif blow == "suspend":
        leader.suspend()

        async def another_leads() -> bool:
            return "ready" in (await _roles(yard)).values()

        await eventually(another_leads, "another leader", timeout=20)
        leader.send_signal(signal.SIGCONT)
    else:
        done = await asyncio.to_thread(yard.cli, "handover")
        assert done.returncode == 0, done.stderr
        assert "leads now" in done.stderr


async def test_every_job_runs_exactly_once_while_leaders_come_and_go(yard: Yard) -> None:
    async with yard.connect() as client:
        outcomes = await client.submit_many(
            [{"command": _script(yard), "gpus": 1, "name": f"job-{index}"} for index in range(JOBS)], batched=False
        )
        jobs = [outcome for outcome in outcomes if isinstance(outcome, gpuyard.Job)]
        assert len(jobs) == JOBS

        async def finished() -> int:
            try:
                return (await client.stats()).finished
            except gpuyard.GpuyardError:
                return -1

        for round_, blow in enumerate(("kill", "suspend", "handover", "kill")):
            floor = round_ * JOBS // 6

            async def some_more_are_done(floor: int = floor) -> bool:
                return await finished() >= floor

            await eventually(some_more_are_done, f"{floor} jobs done before a {blow}", timeout=60)
            await _strike(yard, blow)

        async def all_are_done() -> bool:
            return await finished() >= JOBS

        await eventually(all_are_done, "every job done", timeout=90)
        views = [await client.job(job.number) for job in jobs]
    assert [(view.job, view.state, view.reason) for view in views if view.state != "succeeded"] == []
    for view in views:
        lines = (yard.scratch / str(view.job)).read_text().splitlines()
        assert lines == ["start 1", "end 1"], f"job {view.job} wrote {lines}"
