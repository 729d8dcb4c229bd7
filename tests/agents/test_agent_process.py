"""A real agent on a real NATS server with real keys, its supervisor, and real jobs; the test is the daemon."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import psutil
import pytest

from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Message
from gpuyard_protocol.codec import decode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    FollowLog,
    Go,
    LogChunk,
    OrderAnswer,
    ReadLog,
    Renew,
    Start,
    Started,
    Stop,
    Telemetry,
)
from gpuyard_protocol.resources import MigInstance, MpsShare, WholeCards
from support.agents import AgentRoom, Commander, lines_of, order_surely, start_order, until_file


@pytest.fixture
async def commander(room: AgentRoom) -> Commander:
    """The daemon of a yard whose one agent has joined and knows that nothing is wanted of it."""
    commander = await room.commander()
    await room.start_agent()
    await commander.joined()
    assert (await commander.sync()).status == "ok"
    return commander


async def test_a_job_runs_from_order_to_end(room: AgentRoom, commander: Commander) -> None:
    start = start_order(1, f"echo out; echo err >&2; echo $GPUYARD_ASSIGNMENT > {room.scratch}/done; exit 3")
    assert await commander.order(start) == OrderAnswer(status="ok", applied=1)
    ended = await commander.ended(start.key)
    assert (ended.outcome, ended.exit_code) == ("exited", 3)
    assert (await commander.started(start.key)).at_ms <= ended.at_ms
    assert (room.scratch / "done").read_text() == "1.1.0\n"
    chunk = await commander.read_log(ReadLog(job=1))
    assert (chunk.data, chunk.ended) == (b"out\n", True)
    assert (await commander.read_log(ReadLog(job=1, stream="err"))).data == b"err\n"


async def test_the_node_says_what_it_has_and_that_it_lives(room: AgentRoom, commander: Commander) -> None:
    joined = await commander.joined()
    assert [device.short_model for device in joined.inventory.devices] == ["H100", "H100"]
    assert joined.inventory.simulated
    assert joined.held == ()
    await commander.until(lambda: commander.heartbeat is not None)
    assert commander.heartbeat is not None
    assert (commander.heartbeat.instance, commander.heartbeat.reported) == (commander.instance, 1)
    samples: asyncio.Queue[Message] = asyncio.Queue()
    await commander.bus.subscribe(subjects.telemetry("node-1"), samples.put_nowait)
    async with asyncio.timeout(10):
        telemetry = decode(Telemetry, (await samples.get()).data)
    assert [sample.uuid for sample in telemetry.devices] == [device.uuid for device in joined.inventory.devices]


async def test_jobs_get_their_partition_and_nothing_of_the_agents_environment(
    room: AgentRoom, commander: Commander
) -> None:
    first, second = (device.uuid for device in (await commander.joined()).inventory.devices)
    mig = MigInstance(device=second, profile="1g.10gb", start=0, size=1, memory_mib=9_728, compute_slices=1)
    orders = [
        start_order(1, "env", partition=WholeCards((first,))),
        start_order(2, "env", partition=mig),
        start_order(3, "env"),
    ]
    await commander.order(*orders)
    visible = {}
    for start in orders:
        ended = await commander.ended(start.key)
        assert (ended.outcome, ended.exit_code) == ("exited", 0), ended
        lines = (await commander.read_log(ReadLog(job=start.key.job))).data.decode().splitlines()
        env = dict(line.split("=", 1) for line in lines)
        assert "RANK" not in env  # the agent itself was started with one
        assert "PYTHONPATH" not in env
        visible[env["GPUYARD_PARTITION"]] = env["CUDA_VISIBLE_DEVICES"]
    assert visible["whole"] == first
    assert visible["mig"].startswith("MIG-")
    assert visible["none"] == ""


async def test_what_breaks_the_rules_of_a_card_is_refused(room: AgentRoom, commander: Commander) -> None:
    card = (await commander.joined()).inventory.devices[0].uuid
    whole = start_order(1, "sleep 1000", partition=WholeCards((card,)))
    share = start_order(2, "true", partition=MpsShare(device=card, share_milli=100, memory_mib=1_000))
    await commander.order(whole)
    await commander.started(whole.key)
    await commander.order(share, start_order(3, "true", cwd="/nowhere"), start_order(4, "/no/such/program", "x"))
    refused = await commander.ended(share.key)
    assert (refused.outcome, refused.code) == ("refused", "PartitionUnavailable")
    assert (await commander.ended(AssignmentKey(3, 1, 0))).code == "WorkingDirectoryMissing"
    assert (await commander.ended(AssignmentKey(4, 1, 0))).code == "CommandNotFound"
    await commander.order(Stop(key=whole.key, grace_ms=0))
    await commander.ended(whole.key)
    again = start_order(5, "true", partition=MpsShare(device=card, share_milli=100, memory_mib=1_000))
    await commander.order(again)
    assert (await commander.ended(again.key)).outcome == "exited"


async def test_a_stop_is_a_request_first_and_a_kill_after_the_grace(room: AgentRoom, commander: Commander) -> None:
    path = room.scratch / "ready"
    polite = start_order(1, f"trap 'exit 7' TERM; echo >> {path}; while :; do sleep 0.01; done")
    stubborn = start_order(2, f"trap '' TERM; echo >> {path}; while :; do sleep 0.01; done")
    await commander.order(polite, stubborn)
    await until_file(path, lambda text: text.count("\n") == 2)
    await commander.order(*(Stop(key=start.key, grace_ms=300, reason="preempted") for start in (polite, stubborn)))
    ended = await commander.ended(polite.key)
    assert (ended.outcome, ended.exit_code, ended.detail) == ("stopped", 7, "preempted")
    ended = await commander.ended(stubborn.key)
    assert (ended.outcome, ended.signal) == ("stopped", 9)


async def test_the_agent_keeps_time_limits(room: AgentRoom, commander: Commander) -> None:
    start = start_order(1, "sleep 1000", time_limit_ms=200, stop_grace_ms=1_000)
    await commander.order(start)
    ended = await commander.ended(start.key)
    assert (ended.outcome, ended.code, ended.signal) == ("stopped", "TimeLimit", 15)
    assert 200 <= ended.at_ms - ended.started_ms < 1_000


async def test_a_gang_is_prepared_whole_before_any_of_it_starts(room: AgentRoom, commander: Commander) -> None:
    path = room.scratch / "ranks"
    command = f'echo "$RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT" >> {path}'
    members = [start_order(1, command, replica=rank, replicas=2, hold=True) for rank in (0, 1)]
    await commander.order(*members)
    ports = [(await commander.prepared(member.key)).port for member in members]
    assert len(set(ports)) == 2
    assert commander.of(Started) == []
    await commander.order(*(Go(key=m.key, master_address="10.9.8.7", master_port=ports[0]) for m in members))
    for member in members:
        assert (await commander.ended(member.key)).exit_code == 0
    lines = sorted((room.scratch / "ranks").read_text().splitlines())
    assert lines == [f"0/2 10.9.8.7:{ports[0]}", f"1/2 10.9.8.7:{ports[0]}"]


async def test_followers_get_output_live_and_its_end(room: AgentRoom, commander: Commander) -> None:
    go = room.scratch / "go"
    start = start_order(1, f"echo before; while ! [ -e {go} ]; do sleep 0.01; done; echo live; exit 0")
    await commander.order(start)
    async with asyncio.timeout(10):
        while (await commander.read_log(ReadLog(job=1))).data != b"before\n":
            await asyncio.sleep(0.01)
    heard: asyncio.Queue[LogChunk] = asyncio.Queue()
    tenant = await room.tenant_bus()
    await tenant.subscribe(subjects.log("acme", 1, 0), lambda message: heard.put_nowait(decode(LogChunk, message.data)))
    answer = await commander.read_log(FollowLog(tenant="acme", job=1))  # type: ignore[arg-type]
    assert answer.offset == len(b"before\n")
    go.touch()
    chunks = []
    async with asyncio.timeout(10):
        while not (chunks and chunks[-1].ended):
            chunks.append(await heard.get())
    assert b"".join(chunk.data for chunk in chunks) == b"live\n"


async def test_a_killed_agent_takes_over_what_went_on_without_it(room: AgentRoom, commander: Commander) -> None:
    """One job ends while no agent is there, one goes on: both are reported with their true ends, once."""
    go = room.scratch / "go"
    short = start_order(1, "sleep 0.3; exit 4")
    long = start_order(2, f"while ! [ -e {go} ]; do sleep 0.01; done; exit 5")
    await commander.order(short, long)
    short_pid = (await commander.started(short.key)).pid
    pid = (await commander.started(long.key)).pid
    await room.agents[0].kill()
    async with asyncio.timeout(10):
        while psutil.pid_exists(short_pid):  # it ends with nobody there to see it
            await asyncio.sleep(0.01)
    await room.start_agent()
    joined = await commander.joined(2)
    assert long.key in joined.held
    assert (await commander.ended(short.key)).exit_code == 4
    assert (await commander.sync(Desired(start=long))).status == "ok"
    go.touch()
    ended = await commander.ended(long.key)
    assert (ended.outcome, ended.exit_code) == ("exited", 5)
    assert (await commander.started(long.key)).pid == pid


async def test_a_stopped_agent_leaves_its_jobs_and_ends_at_once(room: AgentRoom, commander: Commander) -> None:
    start = start_order(1, "sleep 1000")
    await commander.order(start)
    await commander.started(start.key)
    began_s = asyncio.get_running_loop().time()
    assert await room.agents[0].stop() == 0
    assert asyncio.get_running_loop().time() - began_s < 2
    await room.start_agent()
    assert (await commander.joined(2)).held == (start.key,)
    assert commander.of(Ended) == []


async def test_what_a_sync_does_not_want_is_stopped(room: AgentRoom, commander: Commander) -> None:
    start = start_order(1, "sleep 1000")
    wanted = start_order(2, "exit 0")
    await commander.order(start)
    await commander.started(start.key)
    assert (await commander.sync(Desired(start=wanted))).status == "ok"
    ended = await commander.ended(start.key)
    assert (ended.outcome, ended.detail) == ("stopped", "superseded")
    assert (await commander.ended(wanted.key)).exit_code == 0


async def test_orders_of_the_past_and_of_others_change_nothing(room: AgentRoom, commander: Commander) -> None:
    path = room.scratch / "runs"
    start = start_order(1, f"echo run >> {path}")
    await commander.order(start)
    await commander.ended(start.key)
    commander.ordered = 0  # the same message once more
    assert (await commander.order(start)).status == "ok"
    commander.epoch, commander.ordered = 6, 1
    assert (await commander.order(start_order(2, "true"))).status == "stale"
    commander.epoch, commander.ordered = 7, 5
    assert (await commander.order(start_order(2, "true"))).status == "gap"
    commander.instance, commander.ordered = "somebody-else", 1
    assert (await commander.order(start_order(2, "true"))).status == "wrong-instance"
    message = await commander.bus.request(subjects.commands("node-1"), b'{"type":"orders"}')
    assert decode(OrderAnswer, message.data).status == "malformed"
    assert path.read_text() == "run\n"
    assert len(commander.of(Ended)) == 1


async def test_reports_wait_for_a_server_that_is_away(room: AgentRoom, commander: Commander) -> None:
    go = room.scratch / "go"
    start = start_order(1, f"while ! [ -e {go} ]; do sleep 0.01; done; echo > {room.scratch}/done")
    await commander.order(start)
    await commander.started(start.key)
    await room.server.stop()
    go.touch()
    await until_file(room.scratch / "done", lambda text: text == "\n")
    await room.server.start()
    assert (await commander.ended(start.key)).exit_code == 0


async def test_an_agent_without_a_server_still_looks_after_its_jobs(room: AgentRoom, commander: Commander) -> None:
    start = start_order(1, "sleep 1000", time_limit_ms=700, stop_grace_ms=100)
    await commander.order(start)
    await commander.started(start.key)
    await room.agents[0].kill()
    await room.server.stop()
    agent = await room.start_agent()
    await until_file(agent.log, lambda text: '"outcome": "stopped"' in text and "TimeLimit" in text)
    await room.server.start()
    assert (await commander.ended(start.key)).code == "TimeLimit"


async def test_metrics_and_health_are_served(room: AgentRoom) -> None:
    commander = await room.commander()
    agent = await room.start_agent("--http", "127.0.0.1:0")
    await commander.joined()
    await commander.sync()
    start = start_order(1, "exit 0")
    await commander.order(start)
    await commander.ended(start.key)
    log = await until_file(agent.log, lambda text: '"event": "http"' in text)
    url = next(line.split('"')[3] for line in log.splitlines() if '"event": "http"' in line)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/healthz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        async with session.get(f"{url}/metrics") as answer:
            page = await answer.text()
    for line in (
        'gpuyard_agent_ended_total{outcome="exited"} 1.0',
        "gpuyard_agent_starts_total 1.0",
        "gpuyard_agent_start_latency_seconds_count 1.0",
        'gpuyard_agent_assignments{state="running"} 0.0',
        "gpuyard_agent_bus_connected 1.0",
    ):
        assert line in page
    assert "gpuyard_agent_gpu_memory_bytes{device=" in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--node", "node-9"], "belongs to node 'node-1', not to 'node-9'"),
        ([], "another agent runs on this directory"),
        (["--simulate", "8xNothing"], "simulate: "),
    ],
)
async def test_an_agent_with_a_wrong_setting_does_not_start(
    room: AgentRoom, commander: Commander, arguments: list[str], complaint: str
) -> None:
    second = await room.start_agent(*arguments)
    async with asyncio.timeout(10):
        assert await second.process.wait() == 78
    assert complaint in second.log.read_text()


async def test_no_job_is_lost_or_runs_twice_when_the_agent_is_killed_at_random_moments(
    room: AgentRoom, commander: Commander
) -> None:
    """Jobs count their own runs. The daemon repeats an order until it is taken, then syncs with what has not ended."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    starts: dict[AssignmentKey, Start] = {}

    def unfinished() -> list[Desired]:
        ended = {report.key for report in commander.of(Ended)}
        return [Desired(start=start) for key, start in starts.items() if key not in ended]

    async def order_all() -> None:
        for first in range(1, 41, 4):
            batch = [start_order(job, f"echo run >> {room.scratch}/{job}") for job in range(first, first + 4)]
            starts.update({start.key: start for start in batch})
            await order_surely(commander, *batch)

    ordering = asyncio.create_task(order_all())
    for _ in range(6):
        await asyncio.sleep(chance.uniform(0, 0.1))
        await room.agents[-1].kill()
        killed = commander.instance
        await room.start_agent()
        await commander.until(lambda killed=killed: commander.instance != killed)  # type: ignore[misc]
    await ordering
    assert (await commander.sync(*unfinished())).status == "ok"
    for key in starts:
        end = await commander.ended(key)
        assert (end.outcome, end.exit_code) == ("exited", 0), f"seed {seed}: {end}"
    names = [str(job) for job in range(1, 41)]
    assert lines_of(room.scratch, names) == dict.fromkeys(names, 1), f"seed {seed}"


async def test_jobs_outlive_their_supervisor(room: AgentRoom, commander: Commander) -> None:
    """The next supervisor takes them over, and the agent goes on with it; orders do not wait for anybody's help."""
    go = room.scratch / "go"
    start = start_order(1, f"while ! [ -e {go} ]; do sleep 0.01; done; echo run >> {room.scratch}/runs")
    await commander.order(start)
    await commander.started(start.key)
    (supervisor,) = room.supervisors()
    supervisor.kill()
    other = start_order(2, "exit 6")
    await commander.order(other)
    assert (await commander.ended(other.key)).exit_code == 6
    assert commander.of(Ended, start.key) == []
    go.touch()
    assert (await commander.ended(start.key)).outcome in ("exited", "lost")  # older kernels do not tell an orphan's end
    assert (room.scratch / "runs").read_text() == "run\n"


async def test_a_lease_ends_a_job_whose_agent_is_dead_and_whose_daemon_is_not_heard(
    room: AgentRoom, commander: Commander
) -> None:
    inventory = (await commander.joined()).inventory
    assert inventory.keeps_leases
    assert (inventory.launcher, "devices" in inventory.enforces) == ("supervisor", False)
    leased, free = start_order(1, "sleep 1000", lease_ms=2_000, stop_grace_ms=0), start_order(2, "sleep 1000")
    await commander.order(leased, free)
    pid = (await commander.started(leased.key)).pid
    await commander.started(free.key)
    await commander.until(lambda: commander.heartbeat is not None and commander.heartbeat.clock_ms > 0)
    for _ in range(8):  # twice as long as the lease is
        assert commander.heartbeat is not None
        renew = Renew(node="node-1", instance=commander.instance, epoch=7, clock_ms=commander.heartbeat.clock_ms)
        assert (await commander.send(renew)).status == "ok"
        await asyncio.sleep(0.5)
    assert psutil.pid_exists(pid)
    await room.agents[-1].kill()
    async with asyncio.timeout(10):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.05)
    await room.start_agent()
    ended = await commander.ended(leased.key)
    assert (ended.outcome, ended.code) == ("lost", "LeaseExpired")
    assert commander.of(Ended, free.key) == []
