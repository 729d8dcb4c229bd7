"""Hosts that fall silent with jobs on them: declared dead, back again, taken out."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import psutil
import pytest

from support.yard import Yard, eventually, running_yard

QUICK = '[nodes]\nsuspected_after = "1s"\nlost_after = "2s"\n'


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="1xH100-80GB", settings=QUICK) as running:
        yield running


def agents_of(yard: Yard, node: str) -> list[psutil.Process]:
    """The agent alone: its supervisor goes on, as does whatever else outlives an agent."""
    return yard.processes("-m gpuyard_agent --state", f"/{node}")


async def node_state(yard: Yard, node: str) -> str:
    async with yard.connect() as client:
        return next((view.state for view in await client.nodes() if view.node == node), "gone")


async def until_state(yard: Yard, node: str, state: str) -> None:
    async def is_so() -> bool:
        return await node_state(yard, node) == state

    await eventually(is_so, f"{node} is {state}")


async def test_a_node_declared_dead_gives_its_job_away_and_ends_it_when_it_returns(yard: Yard) -> None:
    marks = yard.scratch / "marks"
    script = f'echo "$GPUYARD_ATTEMPT $GPUYARD_NODE $$" >> {marks}; exec sleep 300'
    async with yard.connect() as client:
        job = await client.submit(command=["/bin/sh", "-c", script], gpus=1)

        async def started(attempts: int) -> list[list[str]]:
            async def enough() -> bool:
                return marks.exists() and len(marks.read_text().splitlines()) >= attempts

            await eventually(enough, f"attempt {attempts} starts")
            return [line.split() for line in marks.read_text().splitlines()]

        ((_, first, pid),) = await started(1)
        refused = yard.cli("node", "declare-dead", first)
        assert refused.returncode == 1
        assert "only a lost node" in refused.stderr
        stopped = agents_of(yard, first)
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        try:
            await until_state(yard, first, "lost")
            full = yard.cli("node", "remove", first)
            assert (full.returncode, "may still run" in full.stderr) == (1, True)
            said = yard.cli("node", "declare-dead", first)
            assert said.returncode == 0, said.stderr
            assert "1 replicas there were given up" in said.stdout
            _, (attempt, second, _) = await started(2)
            assert (attempt, second != first) == ("2", True)
            # Nobody could end it there: that is what the operator said would not matter.
            assert psutil.pid_exists(int(pid))
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)

        async def has_ended() -> bool:
            return not psutil.pid_exists(int(pid))

        await eventually(has_ended, "the first attempt is ended")
        await until_state(yard, first, "ready")
        view = await job.view()
        assert (view.state, view.attempt) == ("running", 2)
        await job.cancel()
        assert (await job.wait(timeout=30)).state == "cancelled"
        audit = yard.cli("audit", "--limit", "20", "--json").stdout
        told = [entry for entry in json.loads(audit) if entry["what"] == "declare-dead"]
        assert [entry["about"] for entry in told] == [f"node {first}"] * len(told)
        assert "ok" in [entry["outcome"] for entry in told]


async def test_a_job_under_a_lease_runs_on_while_its_node_is_heard_and_elsewhere_once_it_is_not(yard: Yard) -> None:
    """Its agent is suspended, as a host that hangs: the lease is kept outside it, and never do two attempts run."""
    marks = yard.scratch / "lease-marks"
    tick = 'echo "$GPUYARD_ATTEMPT $GPUYARD_NODE $$ $(cut -d" " -f1 /proc/uptime)"'
    script = f"while :; do {tick} >> {marks}; sleep 0.1; done"

    def ticks(attempt: str) -> list[float]:
        lines = [line.split() for line in marks.read_text().splitlines()] if marks.exists() else []
        return [float(line[3]) for line in lines if len(line) == 4 and line[0] == attempt]

    async with yard.connect() as client:
        job = await client.submit(command=["/bin/sh", "-c", script], gpus=1, lease="10s", stop_grace="1s")

        async def is_renewed() -> bool:
            return bool(ticks("1")) and ticks("1")[-1] - ticks("1")[0] > 12

        await eventually(is_renewed, "the first attempt outlives its lease while its node is heard")
        first = (await job.view()).placed[0].node
        stopped = agents_of(yard, first)
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        try:

            async def is_elsewhere() -> bool:
                return bool(ticks("2"))

            await eventually(is_elsewhere, "the second attempt starts", timeout=45)
            assert ticks("1")[-1] < ticks("2")[0]
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)
        await until_state(yard, first, "ready")
        assert ticks("1")[-1] < ticks("2")[0]
        view = await job.view()
        assert (view.state, view.attempt) == ("running", 2)
        assert view.placed[0].node != first
        await job.cancel()
        assert (await job.wait(timeout=30)).state == "cancelled"


async def test_a_node_that_is_removed_is_gone_with_its_key(yard: Yard) -> None:
    stopped = agents_of(yard, "node-2")
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        await until_state(yard, "node-2", "lost")
        said = yard.cli("node", "remove", "node-2")
        assert (said.returncode, said.stdout) == (0, "node-2 is out, and its key with it\n"), said.stderr
        assert await node_state(yard, "node-2") == "gone"
        assert not (yard.state / "keys" / "node-node-2.seed").exists()
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    unknown = yard.cli("node", "remove", "node-3")
    assert unknown.returncode == 1
    assert "node-1" in unknown.stderr
