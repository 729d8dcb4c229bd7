"""A real agent process over the fake driver: cards cut for its jobs, and jobs that lose their card."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from fake_driver.control import FakeDriver
from gpuyard_protocol.nodes import Ended, Joined, Stop
from gpuyard_protocol.resources import Device, MigInstance, Partition, WholeCards
from support.agents import AgentRoom, Commander, agent_room, start_order, until_file


class Node(NamedTuple):
    room: AgentRoom
    driver: FakeDriver
    commander: Commander
    devices: tuple[Device, ...]

    def instance(self, profile: str, start: int) -> MigInstance:
        device = self.devices[0]
        facts = next(facts for facts in device.mig_profiles if facts.name == profile)
        return MigInstance(device.uuid, profile, start, facts.size, facts.memory_mib, facts.compute_slices)

    async def run(self, job: int, script: str, partition: Partition) -> Ended:
        start = start_order(job, script, partition=partition)
        await self.commander.order(start)
        return await self.commander.ended(start.key)

    def layout(self) -> list[tuple[str, int]]:
        return [(one["profile"], one["start"]) for one in self.driver.gpu().facts()["instances"]]


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    async with agent_room() as room:
        driver = FakeDriver.create(room.root / "driver", "H100-80GB", 2)
        for name, value in driver.env().items():
            monkeypatch.setenv(name, value)
        commander = await room.commander()
        await room.start_agent(simulate="")
        devices = (await commander.joined()).inventory.devices
        assert (await commander.sync()).status == "ok"
        yield Node(room, driver, commander, devices)
        driver.close()


async def test_an_agent_cuts_a_card_for_a_job_and_makes_it_whole_again(node: Node) -> None:
    assert [device.uuid for device in node.devices] == [gpu.uuid for gpu in node.driver.gpus]
    assert not (await node.commander.joined()).inventory.simulated
    seen = node.room.scratch / "seen"
    start = start_order(1, f"echo $CUDA_VISIBLE_DEVICES > {seen}; sleep 60", partition=node.instance("3g.40gb", 4))
    await node.commander.order(start)
    assert (await until_file(seen)).startswith("MIG-")
    assert node.driver.find((await until_file(seen)).strip())[0] == 0
    await node.commander.order(Stop(key=start.key, grace_ms=0))
    assert (await node.commander.ended(start.key)).outcome == "stopped"
    assert node.driver.gpu().facts()["instances"] == []
    ended = await node.run(
        2, "test $CUDA_VISIBLE_DEVICES = " + node.devices[0].uuid, WholeCards((node.devices[0].uuid,))
    )
    assert (ended.outcome, ended.exit_code) == ("exited", 0)
    assert node.driver.gpu().facts()["mig"] == [0, 0]


async def test_a_job_whose_card_is_lost_ends_so_and_the_card_is_reported(node: Node) -> None:
    first, second = node.devices
    hit = start_order(1, "sleep 60", partition=WholeCards((first.uuid,)))
    spared = start_order(2, "sleep 60", partition=WholeCards((second.uuid,)))
    await node.commander.order(hit, spared)
    for start in (hit, spared):
        await node.commander.started(start.key)
    node.driver.gpu(0).lose()
    ended = await node.commander.ended(hit.key)
    assert (ended.outcome, ended.code) == ("lost", "DeviceFault")
    await node.commander.until(lambda: node.commander.count(Joined) > 1)
    shown = {device.uuid: device.healthy for device in node.commander.of(Joined)[-1].inventory.devices}
    assert shown == {first.uuid: False, second.uuid: True}
    assert not node.commander.of(Ended, spared.key)


async def test_an_agent_that_is_killed_finds_its_instance_again(node: Node) -> None:
    start = start_order(1, "sleep 60", partition=node.instance("1g.10gb", 0))
    await node.commander.order(start)
    await node.commander.started(start.key)
    before = node.driver.gpu().facts()["instances"]
    await node.room.agents[-1].kill()
    await node.room.start_agent(simulate="")
    joined = await node.commander.joined(2)
    assert joined.held == (start.key,)
    assert node.driver.gpu().facts()["instances"] == before
    assert joined.inventory.devices[0].modes == node.devices[0].modes
