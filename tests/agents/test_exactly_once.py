"""What could make work happen twice, tried on real agents: a second agent of one name, and a disk that is full."""

from __future__ import annotations

import resource

import psutil
import pytest

from gpuyard_agent.__main__ import EXIT_TEMPORARY
from gpuyard_agent.config import EXIT_BAD_CONFIG
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.nodes import Joined
from support.agents import NODE, AgentRoom, start_order, until_file


async def test_a_second_agent_of_one_name_exits_and_reports_nothing(room: AgentRoom) -> None:
    """A node's name and key on a second host, with a state directory of its own: it would report every job as lost."""
    commander = await room.commander()
    first = await room.start_agent()
    await commander.joined()
    assert (await commander.sync()).status == "ok"
    start = start_order(1, f"echo run >> {room.scratch}/runs; sleep 60")
    await commander.order(start)
    await until_file(room.scratch / "runs")

    copy = room.root / "copy"
    second = await room.start_agent("--state", str(copy))
    assert await second.process.wait() == EXIT_BAD_CONFIG
    text = second.log.read_text()
    assert f"node '{NODE}' is held by another live agent" in text
    assert f"process {first.pid}" in text

    # The first goes on, and is still the one that is commanded.
    assert (await commander.order(start_order(2, "true"))).status == "ok"
    await commander.ended(start_order(2, "true").key)
    assert commander.count(Joined) == 1
    assert (room.scratch / "runs").read_text().split() == ["run"]


async def test_a_name_is_free_again_when_its_agent_is_gone(room: AgentRoom) -> None:
    commander = await room.commander()
    first = await room.start_agent()
    await commander.joined()
    await first.kill()
    await room.start_agent()
    await commander.joined(2)


async def test_an_agent_whose_disk_is_full_takes_nothing_on_and_loses_nothing(room: AgentRoom) -> None:
    """It answers no order whose intent it could not write, ends with the word to try again, and its jobs go on.

    Reports whose delivery it could not note any more come again under their numbers; `Commander` holds them equal."""
    commander = await room.commander()
    agent = await room.start_agent()
    await commander.joined()
    assert (await commander.sync()).status == "ok"
    gate = room.scratch / "gate"
    first = start_order(1, f"echo first >> {room.scratch}/runs; until [ -e {gate} ]; do sleep 0.05; done")
    second = start_order(2, f"echo second >> {room.scratch}/runs")
    await commander.order(first)
    await until_file(room.scratch / "runs")

    full = (room.state / "ledger.sqlite-wal").stat().st_size
    psutil.Process(agent.pid).rlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    with pytest.raises(BusError):
        await commander.order(second)
    assert await agent.process.wait() == EXIT_TEMPORARY
    assert "ledger.sqlite" in agent.log.read_text()
    gate.touch()  # the job ends while nobody is there

    await room.start_agent()
    await commander.joined(2)
    assert (await commander.ended(first.key)).outcome == "exited"
    assert (await commander.order(second)).status == "ok"
    assert (await commander.ended(second.key)).outcome == "exited"
    assert sorted((room.scratch / "runs").read_text().split()) == ["first", "second"]
