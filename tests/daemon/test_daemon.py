"""The daemon as a process, on a real nats-server, with agents that run nothing: what it promises when things die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gpuyard_daemon.config import EXIT_BAD_CONFIG
from gpuyard_daemon.exits import EXIT_TEMPORARY
from gpuyard_protocol.bus.base import Bus, BusError, StoredMessage
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobView
from gpuyard_protocol.nodes import DeviceSample, LogChunk, Telemetry
from gpuyard_protocol.queries import (
    JobQuery,
    JobsPage,
    JobsQuery,
    LogsQuery,
    NodesPage,
    NodesQuery,
    Ok,
    ServicesPage,
    ServicesQuery,
    ShutdownRequest,
    Stats,
    StatsQuery,
    SubmissionQuery,
    SubmissionStatus,
    WhyAnswer,
)
from gpuyard_protocol.subjects import telemetry
from support.daemon import DaemonProcess, Tenant, until
from support.fleet import fleet
from support.nats import NatsProcess

JOB = {"command": ["/bin/true"], "gpus": 1}


@pytest.fixture
def daemon(nats_process: NatsProcess, tmp_path: Path) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path / "daemon", nats_process.url)
    process.start()
    yield process
    process.kill()


@pytest.fixture
async def bus(nats_process: NatsProcess, daemon: DaemonProcess) -> AsyncIterator[Bus]:
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_T", reconnect_jitter_s=(0.01, 0.05))
    yield bus
    await bus.close()


@pytest.fixture
async def tenant(bus: Bus) -> Tenant:
    return Tenant(bus)


async def told_answers(bus: Bus, count: int) -> dict[str, int]:
    """How often each submission's answer was told, once `count` of them were."""
    told = Counter[str]()

    def take(messages: list[StoredMessage]) -> None:
        told.update(event.subject.removeprefix("evt.acme.sub.") for event in messages)

    reader = await bus.read_stream("EVT_main", take, filter_subject="evt.acme.sub.*")

    async def all_told() -> bool:
        return len(told) >= count

    await until(all_told, f"{count} answers told")
    await reader.close()
    return dict(told)


async def finished(tenant: Tenant, count: int) -> Stats:
    async def probe() -> Stats | None:
        stats = await tenant.ask("stats", StatsQuery(), Stats)
        return stats if stats.finished >= count else None

    return await until(probe, f"{count} finished jobs")


# --- dying -----------------------------------------------------------------------------------------------------------


async def test_no_acknowledged_job_is_lost_and_none_runs_twice_over_kills_of_the_daemon(
    bus: Bus, tenant: Tenant, daemon: DaemonProcess
) -> None:
    """kill -9 in the middle of the load, three times; what was acknowledged is decided and run, each once."""
    acknowledged: list[str] = []

    async def submit_all() -> None:
        for _ in range(400):
            submission_id = await tenant.submit(JOB)
            acknowledged.append(submission_id)

    async with fleet(bus, 4) as agents:
        submitting = asyncio.create_task(submit_all())
        for mark in (80, 200, 320):
            while len(acknowledged) < mark:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(daemon.kill)
            await asyncio.to_thread(daemon.start)
        await submitting
        await finished(tenant, 400)
        answers = [await tenant.answer(submission_id) for submission_id in acknowledged]
        assert sorted(answer.job for answer in answers) == list(range(1, 401))
        assert sum(len(agent.ended) for agent in agents) == 400
        assert len(set.union(*(agent.ended for agent in agents))) == 400
        assert await told_answers(bus, 400) == dict.fromkeys(acknowledged, 1)


async def test_the_daemon_outlives_kills_of_the_server_and_loses_nothing(
    bus: Bus, tenant: Tenant, daemon: DaemonProcess, nats_process: NatsProcess
) -> None:
    acknowledged: list[str] = []

    async def submit_all() -> None:
        while len(acknowledged) < 200:
            with contextlib.suppress(BusError):
                acknowledged.append(await tenant.submit({**JOB, "submission_id": f"job-{len(acknowledged)}"}))
            await asyncio.sleep(0)

    async with fleet(bus, 2) as agents:
        submitting = asyncio.create_task(submit_all())
        for mark in (50, 120):
            while len(acknowledged) < mark:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(nats_process.kill)
            await asyncio.to_thread(nats_process.start)
        await submitting
        await finished(tenant, 200)
        answers = [await tenant.answer(submission_id) for submission_id in acknowledged]
        assert sorted(answer.job for answer in answers) == list(range(1, 201))
        assert sum(len(agent.ended) for agent in agents) == 200
    assert (await asyncio.to_thread(daemon.stop)) == 0


async def test_while_the_server_is_away_the_daemon_lives_and_is_not_ready(
    bus: Bus, tenant: Tenant, daemon: DaemonProcess, nats_process: NatsProcess
) -> None:
    await asyncio.to_thread(nats_process.kill)

    async def is_unready() -> bool:
        return (await asyncio.to_thread(daemon.get, "/readyz")) == (503, "no connection to NATS\n")

    await until(is_unready, "unreadiness")
    assert await asyncio.to_thread(daemon.get, "/healthz") == (200, "ok\n")
    await asyncio.to_thread(nats_process.start)

    async def is_ready() -> bool:
        return bus.is_connected and (await asyncio.to_thread(daemon.get, "/readyz"))[0] == 200

    await until(is_ready, "readiness")
    assert (await tenant.answer(await tenant.submit(JOB))).accepted


async def test_a_stream_that_lost_its_files_ends_the_daemon_before_it_answers_with_old_jobs(
    tenant: Tenant, daemon: DaemonProcess, nats_process: NatsProcess
) -> None:
    """The server goes on from 1, and would acknowledge a new request under the number of the first."""
    first = await tenant.submit(JOB)
    assert (await tenant.answer(first)).job == 1
    await tenant.answer(await tenant.submit(JOB))
    await asyncio.to_thread(nats_process.kill)
    (blocks,) = (nats_process.directory / "store").rglob("streams/SUB_main/msgs")
    shutil.rmtree(blocks)
    await asyncio.to_thread(nats_process.start)

    async def again() -> str:
        return await tenant.submit(JOB)

    assert await until(again, "a submission") == first
    with pytest.raises(BusError):
        await tenant.ask("submission", SubmissionQuery(submission_id=first), SubmissionStatus)
    assert await asyncio.to_thread(daemon.wait) == EXIT_BAD_CONFIG
    assert "the stream SUB_main ends at" in daemon.log
    daemon.spawn()
    assert await asyncio.to_thread(daemon.wait) == EXIT_BAD_CONFIG


async def test_told_to_stop_it_ends_and_the_next_one_goes_on(bus: Bus, tenant: Tenant, daemon: DaemonProcess) -> None:
    async with fleet(bus, 1, runs_for_s=-1) as (agent,):
        await tenant.answer(await tenant.submit(JOB))
        assert await asyncio.to_thread(daemon.stop) == 0
        waiting = await tenant.submit(JOB)
        await asyncio.to_thread(daemon.start)
        assert (await tenant.answer(waiting)).job == 2

        async def both_run() -> bool:
            return len(agent.live) == 2

        await until(both_run, "both jobs running")


async def test_a_second_daemon_on_the_same_directory_is_turned_away(
    daemon: DaemonProcess, nats_process: NatsProcess
) -> None:
    other = DaemonProcess(daemon.directory, nats_process.url)
    other.spawn()
    assert await asyncio.to_thread(other.wait) == EXIT_TEMPORARY
    assert "another daemon runs from this state directory" in daemon.log
    assert (await asyncio.to_thread(daemon.get, "/readyz"))[0] == 200


async def test_without_its_key_it_refuses_and_says_which(nats_process: NatsProcess, tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "daemon", nats_process.url, authenticate=True)
    daemon.spawn()
    assert await asyncio.to_thread(daemon.wait) == EXIT_BAD_CONFIG
    assert f"there is no key {daemon.state / 'keys' / 'daemon.seed'}" in daemon.log


async def test_told_to_stop_while_it_waits_for_a_server_it_ends(nats_process: NatsProcess, tmp_path: Path) -> None:
    nats_process.kill()
    daemon = DaemonProcess(tmp_path / "daemon", nats_process.url)
    daemon.spawn()

    async def is_up() -> bool:
        return (daemon.state / "daemon" / "http.url").exists()

    await until(is_up, "an HTTP door")
    assert await asyncio.to_thread(daemon.get, "/readyz") == (503, "starting or stopping\n")
    assert await asyncio.to_thread(daemon.stop) == 0


# --- bad input -------------------------------------------------------------------------------------------------------


async def test_malformed_requests_are_answered_on_their_subject(
    bus: Bus, tenant: Tenant, daemon: DaemonProcess
) -> None:
    events: list[StoredMessage] = []
    reader = await bus.read_stream("EVT_main", events.extend)
    for payload, path in (
        ({**JOB, "gpu_memroy": "1Gi"}, "$.gpu_memroy"),
        (b"\xff\xfe", "$"),
        ({**JOB, "cwd": "relative"}, "$.cwd"),
    ):
        answer = await tenant.answer(await tenant.submit(payload))
        assert not answer.accepted
        assert answer.path == path
        assert answer.expected

    async def told() -> bool:
        return len(events) == 3

    await until(told, "three events")
    assert [event.subject for event in events] == [f"evt.acme.sub.s{number}" for number in (1, 2, 3)]
    kind = 'gpuyard_messages_refused_total{kind="malformed_request"}'
    assert await asyncio.to_thread(daemon.metric, kind) == 3
    await reader.close()


async def test_poison_is_counted_and_harms_nobody(
    bus: Bus, tenant: Tenant, daemon: DaemonProcess, nats_process: NatsProcess
) -> None:
    """Bytes that no client library would send, in subject, reply, headers and payload, wherever the daemon listens."""
    await asyncio.to_thread(send_raw, nats_process.port, POISON)
    async with fleet(bus, 1):
        answer = await tenant.answer(await tenant.submit(JOB))
        assert answer.accepted
        await finished(tenant, 1)
    for kind, least in (("poison_submission", 2), ("poison_report", 1), ("poison_lossy", 2), ("malformed_load", 1)):
        name = f'gpuyard_messages_refused_total{{kind="{kind}"}}'
        assert await asyncio.to_thread(daemon.metric, name) >= least, kind
    await asyncio.to_thread(daemon.kill)
    await asyncio.to_thread(daemon.start)
    assert (await tenant.answer(await tenant.submit(JOB))).submission_id


POISON = b"".join(
    (
        b"PUB sub.acme.al\xffice.submit 2\r\n{}\r\n",
        b"PUB sub.acme.alice 2\r\n{}\r\n",
        b"PUB sub.acme.alice.submit \xff\xfe 3\r\n\xff\xff\xff\r\n",
        b"HPUB sub.acme.alice.submit 10 12\r\nNATS/9.9\r\n{}\r\n",
        b"HPUB sub.acme.alice.submit 16 18\r\nNATS/1.0 \xff\xff\xff\r\n\r\n{}\r\n",
        b"PUB rep.node-0.report 3\r\n\x00\x01\x02\r\n",
        b"PUB rep.node-0.report 2\r\n{}\r\n",
        b"PUB hb.node-0 3\r\n\xff\xff\xff\r\n",
        b"PUB tel.node-0.devices 2\r\n{}\r\n",
        b"PUB load.acme.chat 2\r\n{}\r\n",
        b"PUB q.acme.alice.jobs 2\r\n{}\r\n",
        b"PUB q.acme.alice.jobs no.body 3\r\n\xff\xff\xff\r\n",
        b"PUB adm.x 2\r\n{}\r\n",
        b"PUB q.\xff\xff.alice.jobs a.b 2\r\n{}\r\n",
    )
)


def send_raw(port: int, commands: bytes) -> None:
    """Bytes straight onto the wire, as a client that means harm would send them."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.recv(65536)
        connection.sendall(b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n' + commands + b"PING\r\n")
        received = b""
        while b"PONG" not in received:
            chunk = connection.recv(65536)
            assert chunk, received
            received += chunk


async def test_a_submission_that_comes_again_gets_the_first_answer_and_one_run(bus: Bus, tenant: Tenant) -> None:
    async with fleet(bus, 1) as (agent,):
        request = {**JOB, "submission_id": "night-1"}
        first = await tenant.answer(await tenant.submit(request))
        for _ in range(3):
            await tenant.submit(request)
        await finished(tenant, 1)
        other = await tenant.answer(await tenant.submit(JOB))
        assert await tenant.answer("night-1") == first
        assert other.job == first.job + 1
        await finished(tenant, 2)
        assert len(agent.started) == 2


async def test_many_jobs_in_one_message_are_decided_each_alone(bus: Bus, tenant: Tenant) -> None:
    async with fleet(bus, 1):
        batch = {"submission_id": "night", "jobs": [JOB, {**JOB, "gpus": "two"}, JOB]}
        await tenant.submit(batch, "submit-many")
        answers = [await tenant.answer(f"night-{index}") for index in range(3)]
        assert [answer.accepted for answer in answers] == [True, False, True]
        assert answers[1].path == "$.jobs[1].gpus"
        await finished(tenant, 2)


# --- questions -------------------------------------------------------------------------------------------------------


async def test_questions_are_answered_and_tenants_see_their_own(bus: Bus, tenant: Tenant) -> None:
    other = Tenant(bus, "globex", "bob")
    async with fleet(bus, 1, runs_for_s=-1):
        job = (await tenant.answer(await tenant.submit({**JOB, "name": "mine"}))).job
        theirs = (await other.answer(await other.submit(JOB))).job
        view = await tenant.ask("job", JobQuery(job=job), JobView)
        assert (view.name, view.user) == ("mine", "alice")
        assert view.spec is not None
        assert (await tenant.ask("why", JobQuery(job=job), WhyAnswer)).job == job
        assert [row.job for row in (await tenant.ask("jobs", JobsQuery(), JobsPage)).jobs] == [job]
        chunk = await tenant.ask("logs", LogsQuery(job=job, follow=True), LogChunk)
        assert chunk.data == b"output\n"
        (node,) = (await tenant.ask("nodes", NodesQuery(), NodesPage)).nodes
        assert (node.state, len(node.cards)) == ("ready", 8)
        assert [card.jobs for card in node.cards if card.jobs] == [(job,)]
        assert (await tenant.ask("services", ServicesQuery(), ServicesPage)).services == ()
        assert (await tenant.ask("ping", {}, Ok)).text == "main"
        for verb in ("job", "why", "logs"):
            error = await tenant.error(verb, encode({"job": theirs}))
            assert (error.code, error.nearest) == ("UnknownJob", str(job))
        every = json.loads((await bus.request("adm.olga.jobs", b"")).data)
        assert [row["job"] for row in every["jobs"]] == [theirs, job]


async def test_bad_questions_are_told_what_is_wrong(tenant: Tenant) -> None:
    for verb, payload, code, near in (
        ("jbos", b"", "UnknownVerb", "jobs"),
        ("shutdown", b"", "UnknownVerb", ""),
        ("jobs", b'{"limitt": 5}', "Malformed", "limit"),
        ("jobs", b'{"limit": 5000}', "Malformed", ""),
        ("job", b"\xff", "Malformed", ""),
        ("job", b'{"job": 9007199254740991}', "UnknownJob", ""),
        ("services", b'{"service": "chat"}', "UnknownService", ""),
        ("nodes", b'{"node": "node-9"}', "UnknownNode", ""),
    ):
        error = await tenant.error(verb, payload)
        assert (error.code, error.nearest) == (code, near), verb


async def test_jobs_that_left_the_scheduler_are_found_in_the_history(nats_process: NatsProcess, tmp_path: Path) -> None:
    settings = '[journal]\nbudget = "256Mi"\n[scheduler]\nfinished_kept_max = 5\nretired_per_turn = 5\n'
    daemon = DaemonProcess(tmp_path / "daemon", nats_process.url, settings=settings)
    await asyncio.to_thread(daemon.start)
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_T")
    tenant = Tenant(bus)
    try:
        async with fleet(bus, 1):
            for _ in range(30):
                await tenant.submit(JOB)
            await finished(tenant, 30)

        async def retired() -> bool:
            page = await tenant.ask("jobs", JobsQuery(all=True), JobsPage)
            return sum(page.counts.values()) <= 10 and len(page.jobs) == 30

        await until(retired, "most jobs in the history")
        seen: list[int] = []
        cursor = 0
        while True:
            page = await tenant.ask("jobs", JobsQuery(all=True, limit=7, cursor=cursor), JobsPage)
            seen += [view.job for view in page.jobs]
            cursor = page.next
            if not cursor:
                break
        assert seen == list(range(30, 0, -1))
        assert (await tenant.ask("job", JobQuery(job=1), JobView)).state == "succeeded"
        assert "succeeded" in (await tenant.ask("why", JobQuery(job=1), WhyAnswer)).summary
        assert (await Tenant(bus, "globex").error("job", b'{"job": 1}')).code == "UnknownJob"
    finally:
        await bus.close()
        daemon.kill()


# --- stopping the yard, and looking at it ----------------------------------------------------------------------------


async def test_a_stopped_yard_ends_every_replica_and_the_next_start_goes_on(
    bus: Bus, tenant: Tenant, daemon: DaemonProcess
) -> None:
    async with fleet(bus, 1, runs_for_s=-1) as (agent,):
        job = (await tenant.answer(await tenant.submit(JOB))).job
        reply = await bus.request("adm.olga.shutdown", encode(ShutdownRequest(deadline_ms=10_000)), timeout=15)
        assert json.loads(reply.data)["text"].startswith("every replica has ended")
        assert agent.live == set()
        view = await tenant.ask("job", JobQuery(job=job), JobView)
        assert (view.state, view.retries_left) == ("pending", 0)
        assert await asyncio.to_thread(daemon.stop) == 0
        await asyncio.to_thread(daemon.start)

        async def runs_again() -> bool:
            return len(agent.live) == 1

        await until(runs_again, "the job running again")


async def test_a_stop_that_takes_too_long_says_what_it_waits_for(bus: Bus, tenant: Tenant) -> None:
    async with fleet(bus, 1, runs_for_s=-1) as (agent,):
        await tenant.answer(await tenant.submit(JOB))
        agent.is_mute = True
        reply = await bus.request("adm.olga.shutdown", encode(ShutdownRequest(deadline_ms=100)), timeout=15)
        assert "1 on node-0" in json.loads(reply.data)["text"]


async def test_a_stop_waits_for_no_node_that_is_lost(tmp_path: Path, nats_process: NatsProcess) -> None:
    """A host that is gone hears no order to stop, and the yard can be stopped all the same."""
    settings = '[journal]\nbudget = "256Mi"\n[nodes]\nsuspected_after = "500ms"\nlost_after = "1s"\n'
    daemon = DaemonProcess(tmp_path / "daemon", nats_process.url, settings=settings)
    await asyncio.to_thread(daemon.start)
    bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_T")
    try:
        async with fleet(bus, 1, runs_for_s=-1):
            await Tenant(bus).answer(await Tenant(bus).submit(JOB))
        reply = await bus.request("adm.olga.shutdown", encode(ShutdownRequest(deadline_ms=60_000)), timeout=30)
        assert json.loads(reply.data)["text"].endswith("on lost nodes are left: 1 on node-0")
    finally:
        await bus.close()
        daemon.kill()


async def test_pages_for_people_and_prometheus(bus: Bus, tenant: Tenant, daemon: DaemonProcess) -> None:
    async with fleet(bus, 1):
        await tenant.answer(await tenant.submit({**JOB, "name": "secret-name"}))
        await finished(tenant, 1)
        for path, words in (
            ("/", "Yard main"),
            ("/", "<td>node-0</td>"),
            ("/", "linear-gradient(to top, currentColor 0%, transparent 0%)"),
            ("/stats", '"finished":1'),
            ("/metrics", "gpuyard_decision_latency_seconds_bucket"),
            ("/metrics", "gpuyard_decision_seconds_bucket"),
            ("/healthz", "ok"),
            ("/readyz", "ok"),
        ):
            status, text = await asyncio.to_thread(daemon.get, path)
            assert (status, words in text) == (200, True), path
            assert "secret-name" not in text
        assert await asyncio.to_thread(daemon.metric, 'gpuyard_jobs{state="succeeded"}') == 1
        assert await asyncio.to_thread(daemon.metric, "gpuyard_journal_append_seconds_count") > 1
        assert await asyncio.to_thread(daemon.metric, "gpuyard_decision_seconds_count") == 1
        assert await asyncio.to_thread(daemon.metric, 'gpuyard_mode_gpus{mode="idle"}') == 8


async def test_every_card_that_its_node_tells_of_is_on_the_page_for_prometheus(bus: Bus, daemon: DaemonProcess) -> None:
    odd = 'GPU-"odd"\\\n'
    async with fleet(bus, 150):
        for node in range(150):
            cards = (
                DeviceSample(uuid="GPU-a", utilization_pct=50, memory_used_mib=1, memory_total_mib=2),
                DeviceSample(uuid=odd, memory_total_mib=3),
            )
            told = Telemetry(node=f"node-{node}", at_ms=0, devices=cards)
            await bus.publish(telemetry(told.node), encode(told))

        async def samples() -> dict[str, list[Sample]] | None:
            _, text = await asyncio.to_thread(daemon.get, "/metrics")
            found = {family.name: family.samples for family in text_string_to_metric_families(text)}
            counts = [len(found[f"gpuyard_{name}"]) for name in ("gpu_memory_bytes", "node_heard_seconds")]
            return found if counts == [300, 150] else None

        found = await until(samples, "all cards")
        assert {sample.labels["gpu"]: sample.value for sample in found["gpuyard_gpu_memory_bytes"]} == {
            "GPU-a": 2 * 2**20,
            odd: 3 * 2**20,
        }
        assert {sample.value for sample in found["gpuyard_gpu_utilization_ratio"]} == {0.5}
        assert len(found["gpuyard_gpu_memory_used_bytes"]) == 150
