"""MPS over the fake driver's control daemon: limits kept, faults of neighbours, kills in order, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fake_driver.control import FakeDriver
from gpuyard_agent.devices import nvml_events
from gpuyard_agent.devices.base import DeviceTrouble
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions import mps, mps_daemon
from gpuyard_agent.partitions.base import NeighbourFault, PartitionGrant, PartitionRefused
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_agent.partitions.mps_daemon import MpsDaemon
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Device, MigInstance, MpsShare
from support.devices import fake_cards

#: For a program to start, and for what happens to it to show.
SOON_S = 20.0


class Job:
    """A fake CUDA program, in a session of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.said: dict[str, Any] = {}

    async def until(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(SOON_S):
            while line := await self._process.stdout.readline():
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event:
                    return said
        raise AssertionError(f"it ended without {event}")

    async def end(self) -> int:
        async with asyncio.timeout(SOON_S):
            return await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Yard:
    """One card, and jobs that share it."""

    def __init__(self, driver: FakeDriver, backend: NvmlBackend, directory: Path) -> None:
        self.driver = driver
        self.backend = backend
        self.directory = directory
        self.account = Account(name="me", uid=os.getuid(), gid=os.getgid())
        self.jobs: list[Job] = []
        self.agents: list[CardPartitions] = []
        #: MPS daemons of agents that are gone: children of this process, which nobody else waits for.
        self.left: set[int] = set()
        self.hit: list[NeighbourFault] = []

    async def partitions(self, **settings: bool) -> CardPartitions:
        """Those of a new agent."""
        made = CardPartitions(
            self.backend, self.directory, mps_control=self.driver.program("nvidia-cuda-mps-control"), **settings
        )
        self.agents.append(made)
        made.listen(self.hit.append)
        await made.refresh()
        return made

    async def lose(self, agent: CardPartitions) -> None:
        """The agent ends, and what it started stays."""
        self.left.update(self.daemons())
        await agent.close()

    def kill(self, daemon: int) -> None:
        self.left.discard(daemon)
        os.kill(daemon, signal.SIGKILL)
        os.waitpid(daemon, 0)

    async def card(self) -> Device:
        return (await self.backend.inventory())[0]

    async def share(self, partitions: CardPartitions, job: int, milli: int, memory_mib: int) -> PartitionGrant:
        device = await self.card()
        return await partitions.prepare(key(job), MpsShare(device.uuid, milli, memory_mib), self.account, "acme")

    async def start(self, grant: PartitionGrant, *options: str) -> Job:
        process = await asyncio.create_subprocess_exec(
            self.driver.program("fake-cuda"), "--sleep", *options,
            env={"PATH": os.environ["PATH"], **grant.env}, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        job = Job(process)
        self.jobs.append(job)
        job.said = await job.until("ready")
        return job

    def place(self, uuid: str) -> tuple[str, int]:
        return uuid, os.getuid()

    def daemons(self) -> list[int]:
        files = self.directory.glob("mps/*/pipe/nvidia-cuda-mps-control.pid")
        return [pid for pid in (int(file.read_text()) for file in files) if Path(f"/proc/{pid}").exists()]


@pytest.fixture
async def yard(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Yard]:
    monkeypatch.setattr(nvml_events, "WAIT_MS", 20)
    # A short path: sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="gy-") as directory:
        async with fake_cards(Path(directory)) as (driver, backend):
            made = Yard(driver, backend, Path(directory) / "run")
            monkeypatch.setenv("PATH", driver.bin + os.pathsep + os.environ["PATH"])
            yield made
            for job in made.jobs:
                job.kill()
                await job.end()
            for agent in made.agents:
                await agent.close()
            for pid in made.left.union(made.daemons()):
                made.kill(pid)


def key(job: int) -> AssignmentKey:
    return AssignmentKey(job, 1, 0)


async def test_a_client_has_its_limits_and_the_card_admits_nobody_else(yard: Yard) -> None:
    partitions = await yard.partitions()
    grant = await yard.share(partitions, 1, 300, 2000)
    assert yard.driver.gpu().get("compute_mode") == 3
    assert "timeslice" in (await yard.card()).modes, "what the agent did itself changes nothing of what it offers"
    job = await yard.start(grant, "--memory", "500", "--seconds", "60")
    assert (job.said["percentage"], job.said["limit_mib"]) == (30.0, 2000)
    without = {name: value for name, value in grant.env.items() if not name.startswith("CUDA_MPS")}
    outsider = await asyncio.create_subprocess_exec(
        yard.driver.program("fake-cuda"), env={"PATH": os.environ["PATH"], **without}, stdout=subprocess.DEVNULL
    )
    assert await outsider.wait() == 72, "busy or unavailable"
    greedy = await asyncio.create_subprocess_exec(
        yard.driver.program("fake-cuda"), "--memory", "1900",
        env={"PATH": os.environ["PATH"], **grant.env}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert await greedy.wait() == 70, "out of memory"
    job.kill()
    await job.end()
    await partitions.undo(key(1))
    assert yard.daemons() == []
    assert yard.driver.gpu().get("compute_mode") == 0


async def test_the_compute_mode_is_left_alone_where_told_so_or_forbidden_or_set_before(yard: Yard) -> None:
    told = await yard.partitions(mps_exclusive=False)
    await yard.share(told, 1, 300, 2000)
    assert yard.driver.gpu().get("compute_mode") == 0
    await told.undo(key(1))

    yard.driver.set_knob("privileged", 0)
    forbidden = await yard.partitions()
    await yard.share(forbidden, 1, 300, 2000)
    assert yard.driver.gpu().get("compute_mode") == 0
    await forbidden.undo(key(1))

    yard.driver.gpu().set(compute_mode=3)
    yard.driver.set_knob("privileged", 1)
    set_before = await yard.partitions()
    await yard.share(set_before, 1, 300, 2000)
    await set_before.undo(key(1))
    assert yard.driver.gpu().get("compute_mode") == 3


async def test_a_fault_of_one_is_told_for_all_and_ends_with_the_last_of_them(yard: Yard) -> None:
    partitions = await yard.partitions()
    card = await yard.card()
    first = await yard.share(partitions, 1, 300, 2000)
    second = await yard.share(partitions, 2, 300, 2000)
    ill = await yard.start(first, "--seconds", "60")
    await yard.start(second, "--seconds", "60")
    watch = asyncio.create_task(partitions.watch())
    daemon = MpsDaemon(
        yard.driver.program("nvidia-cuda-mps-control"), next(yard.directory.glob("mps/*")), card.uuid, yard.account
    )
    # One that does not end by itself keeps the server in its fault.
    os.kill(ill.pid, signal.SIGSTOP)
    await asyncio.to_thread(daemon._ask, f"fake_fault {ill.said['mps_server']}")
    partitions.look_now()
    async with asyncio.timeout(SOON_S):
        while not yard.hit:
            await asyncio.sleep(0.02)
    assert [news.key for news in yard.hit] == [key(1), key(2)]
    assert "fatal fault" in yard.hit[0].detail
    with pytest.raises(DeviceTrouble, match="about to be restarted: a process that shares it had a fatal fault"):
        await yard.share(partitions, 3, 300, 2000)
    watch.cancel()
    for job in yard.jobs:
        job.kill()
        await job.end()
    await partitions.undo(key(1))
    await partitions.undo(key(2))
    await yard.share(partitions, 3, 300, 2000)
    await partitions.undo(key(3))


async def test_a_wedged_daemon_is_found_and_replaced(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    partitions = await yard.partitions()
    grant = await yard.share(partitions, 1, 300, 2000)
    job = await yard.start(grant, "--seconds", "60")
    (before,) = yard.daemons()
    monkeypatch.setattr(mps_daemon, "ANSWER_S", 0.5)
    monkeypatch.setattr(mps_daemon, "QUIT_S", 0.5)
    yard.driver.hang("mps:get_server_list")
    place = yard.place((await yard.card()).uuid)
    for _ in range(mps.SILENT_MAX):
        assert yard.hit == []
        await partitions._mps.examine(place)
    assert [news.key for news in yard.hit] == [key(1)]
    assert "does not answer" in yard.hit[0].detail
    job.kill()
    await job.end()
    await partitions.undo(key(1))
    yard.driver.clear_faults()
    monkeypatch.undo()
    await yard.share(partitions, 2, 300, 2000)
    (after,) = yard.daemons()
    assert after != before
    await partitions.undo(key(2))


async def test_work_is_ended_before_a_kill_so_that_the_server_survives_it(yard: Yard) -> None:
    partitions = await yard.partitions()
    card = await yard.card()
    victim = await yard.start(await yard.share(partitions, 1, 300, 2000), "--seconds", "60", "--ignore-sigterm")
    neighbour = await yard.start(await yard.share(partitions, 2, 300, 2000), "--seconds", "60")
    yard.driver.inject("mps:client-killed", error=1)
    await partitions.before_kill(key(1), (victim.pid,))
    assert await victim.end() == 75, "terminated by MPS"
    victim.kill()
    await partitions._mps.examine(yard.place(card.uuid))
    assert yard.hit == []
    assert neighbour.said["mps_server"] == victim.said["mps_server"]
    await partitions.before_kill(key(9), (1,))


async def test_ending_work_takes_seconds_at_most(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "TERMINATE_S", 0.3)
    partitions = await yard.partitions()
    job = await yard.start(await yard.share(partitions, 1, 300, 2000), "--seconds", "60")
    yard.driver.hang("mps:terminate_client")
    async with asyncio.timeout(5):
        await partitions.before_kill(key(1), (job.pid,))
    yard.driver.clear_faults()


async def test_a_card_that_an_earlier_agent_left_exclusive_is_opened_again(yard: Yard) -> None:
    first = await yard.partitions()
    await yard.share(first, 1, 300, 2000)
    (pid,) = yard.daemons()
    await yard.lose(first)
    yard.kill(pid)
    second = await yard.partitions()
    card = await yard.card()
    assert await second.sweep() == (f"exclusive compute mode of card {card.uuid}",)
    assert yard.driver.gpu().get("compute_mode") == 0


# --- inside a MIG instance ---


async def crowd(yard: Yard, partitions: CardPartitions, processes: int = 4) -> PartitionGrant:
    """Of a job whose processes share an instance."""
    card = await yard.card()
    facts = next(facts for facts in card.mig_profiles if facts.name == "3g.40gb")
    instance = MigInstance(card.uuid, "3g.40gb", 4, facts.size, facts.memory_mib, facts.compute_slices, processes)
    return await partitions.prepare(key(1), instance, yard.account, "acme")


async def test_processes_of_a_job_share_its_mig_instance_and_each_has_its_part_of_the_memory(yard: Yard) -> None:
    partitions = await yard.partitions()
    grant = await crowd(yard, partitions)
    assert grant.env["CUDA_VISIBLE_DEVICES"] == grant.mig_uuid
    jobs = [await yard.start(grant, "--memory", "8000", "--seconds", "60") for _ in range(2)]
    card = await yard.card()
    for job in jobs:
        assert job.said["mps_server"] == jobs[0].said["mps_server"]
        assert (job.said["percentage"], job.said["limit_mib"]) == (100.0, 40_448 // 4)
    assert {one.mig_uuid for one in await yard.backend.processes(card.uuid)} == {grant.mig_uuid}
    greedy = await asyncio.create_subprocess_exec(
        yard.driver.program("fake-cuda"), "--memory", "11000",
        env={"PATH": os.environ["PATH"], **grant.env}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert await greedy.wait() == 70, "out of memory"
    for job in jobs:
        await partitions.before_kill(key(1), (job.pid,))
        assert await job.end() == 75, "terminated by MPS"
    await partitions.undo(key(1))
    assert yard.daemons() == []
    assert await yard.backend.mig_instances(card.uuid) == ()


async def test_the_card_goes_on_admitting_everybody_while_an_instance_is_under_mps(yard: Yard) -> None:
    partitions = await yard.partitions()
    await crowd(yard, partitions)
    assert yard.driver.gpu().get("compute_mode") == 0
    await partitions.undo(key(1))


async def test_a_fault_inside_an_instance_is_the_jobs_own(yard: Yard) -> None:
    partitions = await yard.partitions()
    grant = await crowd(yard, partitions)
    job = await yard.start(grant, "--seconds", "60")
    server = job.said["mps_server"]
    client = MpsDaemon(
        yard.driver.program("nvidia-cuda-mps-control"),
        Path(grant.env["CUDA_MPS_PIPE_DIRECTORY"]).parent, grant.mig_uuid, yard.account,
    )  # fmt: skip
    await asyncio.to_thread(client._ask, f"fake_fault {server}")
    assert await job.end() == 76, "a fatal fault"
    await partitions._mps.examine((grant.mig_uuid, os.getuid()))
    assert yard.hit == [], "nobody else was hit, and its program has seen it"
    await yard.start(grant, "--seconds", "60")


async def test_an_agent_that_comes_back_finds_the_instance_served(yard: Yard) -> None:
    first = await yard.partitions()
    grant = await crowd(yard, first)
    (daemon,) = yard.daemons()
    await yard.lose(first)
    second = await yard.partitions()
    card = await yard.card()
    facts = next(facts for facts in card.mig_profiles if facts.name == "3g.40gb")
    instance = MigInstance(card.uuid, "3g.40gb", 4, facts.size, facts.memory_mib, facts.compute_slices, 4)
    assert await second.adopt(key(1), instance, yard.account, "acme") == grant
    assert await second.sweep() == ()
    assert yard.daemons() == [daemon]
    await second.undo(key(1))
    assert yard.daemons() == []


async def test_what_an_earlier_agent_left_of_a_served_instance_goes_daemon_first(yard: Yard) -> None:
    first = await yard.partitions()
    job = await yard.start(await crowd(yard, first), "--seconds", "60")
    job.kill()
    await job.end()
    await yard.lose(first)
    second = await yard.partitions()
    swept = await second.sweep()
    assert [line.split(" of ")[0] for line in swept] == ["MPS control daemon", "MIG instance 3g.40gb at 4"]
    assert await yard.backend.mig_instances((await yard.card()).uuid) == ()


async def test_more_processes_than_an_instance_serves_are_refused(yard: Yard) -> None:
    partitions = await yard.partitions()
    with pytest.raises(PartitionRefused, match=r"serves 20 processes under MPS in 3g\.40gb, not 21"):
        await crowd(yard, partitions, 21)
    assert yard.daemons() == []


async def test_an_instance_goes_again_when_its_daemon_does_not_come_up(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    partitions = await yard.partitions()
    yard.driver.inject("mps:start", error=1)
    with pytest.raises(DeviceTrouble):
        await crowd(yard, partitions)
    yard.driver.clear_faults()
    assert await yard.backend.mig_instances((await yard.card()).uuid) == ()
    assert partitions.held() == ()
