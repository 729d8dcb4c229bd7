"""The ways that must be open: what each role may say, and who hears it, on a real server with these accounts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_daemon import whereabouts as module
from gpuyard_daemon.whereabouts import Whereabouts
from gpuyard_daemon.yard.operator_mode import Authority
from gpuyard_protocol.audit import READING_VERBS
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import (
    BusError,
    Message,
    NoResponders,
    PubAck,
    StoredMessage,
)
from support.role_yard import DEADLINE_S, Answering, Heard, Roles, RoleYard


async def test_a_submission_is_acknowledged_and_read_by_the_daemon(roles: Roles) -> None:
    alice, daemon = await roles.get("acme alice"), await roles.get("daemon")
    ack = await alice.stream_publish("sub.acme.alice.submit", b"{}")
    assert ack.stream == "SUB_lab"
    stored: asyncio.Future[StoredMessage] = asyncio.get_running_loop().create_future()
    reader = await daemon.read_stream("SUB_lab", lambda batch: stored.set_result(batch[0]), start=ack.sequence)
    async with asyncio.timeout(DEADLINE_S):
        message = await stored
    assert (message.subject, message.data) == ("sub.acme.alice.submit", b"{}")
    await reader.close()


async def test_a_report_is_acknowledged(roles: Roles) -> None:
    ack = await (await roles.get("node n1")).stream_publish("rep.n1.report", b"{}")
    assert isinstance(ack, PubAck)
    assert ack.stream == "REP_lab"


async def test_the_daemon_commands_a_node_and_is_answered(roles: Roles) -> None:
    daemon, node = await roles.get("daemon"), await roles.get("node n1")
    answering = Answering(node)
    await node.subscribe("cmd.n1", answering)
    reply = await daemon.request("cmd.n1", b"{}")
    assert reply.data == b"done"
    # What an agent may rely on: only the server makes such reply subjects.
    assert answering.heard[0].reply.startswith("_R_.")
    with pytest.raises(NoResponders):
        await daemon.request("cmd.n2", b"{}")


async def test_heartbeats_telemetry_and_load_reach_the_daemon(roles: Roles) -> None:
    daemon, node, alice = await roles.get("daemon"), await roles.get("node n1"), await roles.get("acme alice")
    for subject, pattern, sender in (
        ("hb.n1", "hb.*", node),
        ("tel.n1.devices", "tel.>", node),
        ("load.acme.chat", "load.>", alice),
    ):
        heard = Heard()
        await daemon.subscribe(pattern, heard)
        # An import of a subject goes live a moment after its subscriber: such messages are periodic for that reason.
        async with asyncio.timeout(DEADLINE_S):
            while not heard.messages:
                await sender.publish(subject, b"1")
                await asyncio.sleep(0.01)
        assert heard.messages[0].subject == subject


async def test_events_reach_their_tenant_and_no_other(roles: Roles) -> None:
    daemon, alice, gus = await roles.get("daemon"), await roles.get("acme alice"), await roles.get("globex gus")
    mine, theirs = Heard(), Heard()
    await alice.subscribe("evt.acme.>", mine)
    await gus.subscribe("evt.globex.>", theirs)
    async with asyncio.timeout(DEADLINE_S):
        while not mine.messages:
            await daemon.stream_publish("evt.acme.17", b"started")
            await asyncio.sleep(0.01)
        while not theirs.messages:
            await daemon.stream_publish("evt.globex.18", b"started")
            await asyncio.sleep(0.01)
    assert {message.subject for message in mine.messages} == {"evt.acme.17"}
    assert {message.subject for message in theirs.messages} == {"evt.globex.18"}


async def test_logs_of_a_node_reach_the_tenant_they_belong_to(roles: Roles) -> None:
    node, alice, gus = await roles.get("node n1"), await roles.get("acme alice"), await roles.get("globex gus")
    mine, theirs = Heard(), Heard()
    await alice.subscribe("log.acme.>", mine)
    await gus.subscribe("log.globex.>", theirs)
    async with asyncio.timeout(DEADLINE_S):
        while not mine.messages:
            await node.publish("log.acme.17.0", b"line")
            await asyncio.sleep(0.01)
    assert theirs.messages == []


async def test_a_question_is_answered_by_the_api(roles: Roles) -> None:
    api, alice = await roles.get("api"), await roles.get("acme alice")
    answering = Answering(api)
    await api.subscribe("q.>", answering, queue="api")
    assert (await alice.request("q.acme.alice.jobs", b"{}")).data == b"done"
    assert answering.heard[0].subject == "q.acme.alice.jobs"


async def test_an_operator_is_answered_by_the_api_and_nobody_else_reads_it(roles: Roles) -> None:
    api, olga, otto = await roles.get("api"), await roles.get("operator olga"), await roles.get("operator otto")
    answering, heard = Answering(api), Heard()
    await api.subscribe("adm.>", answering, queue="api")
    await otto.subscribe("_INBOX_O.otto.>", heard)
    assert (await olga.request("adm.olga.nodes", b"{}")).data == b"done"
    assert answering.heard[0].subject == "adm.olga.nodes"
    assert answering.heard[0].reply.startswith("_INBOX_O.olga.")
    assert heard.messages == []


async def test_the_api_reads_events_and_only_those(roles: Roles) -> None:
    daemon, api = await roles.get("daemon"), await roles.get("api")
    ack = await daemon.stream_publish("evt.acme.19", b"x")
    last = await api.last_message("EVT_lab", "evt.acme.19")
    assert last is not None
    assert last.sequence == ack.sequence
    assert (await api.get_message("EVT_lab", ack.sequence)) == last


async def test_the_daemon_journals_under_a_fence(roles: Roles) -> None:
    daemon = await roles.get("daemon")
    claim = await daemon.stream_publish("jrn.leader", b"")
    fence = {
        "Nats-Expected-Last-Subject-Sequence": str(claim.sequence),
        "Nats-Expected-Last-Subject-Sequence-Subject": "jrn.leader",
    }
    assert (await daemon.stream_publish("jrn.e", b"x", headers=fence)).sequence > claim.sequence


@pytest.mark.parametrize("verb", READING_VERBS)
async def test_a_viewer_reads_what_an_operator_reads(roles: Roles, verb: str) -> None:
    api, vera = await roles.get("api"), await roles.get("viewer vera")
    subscription = await api.subscribe("adm.>", Answering(api), queue="api")
    assert (await vera.request(f"adm.vera.{verb}", b"{}")).data == b"done"
    await subscription.unsubscribe()


async def test_a_host_with_a_token_asks_to_be_let_in(roles: Roles) -> None:
    api, host = await roles.get("api"), await roles.get("token n3")
    answering = Answering(api)
    await api.subscribe("join.*", answering)
    assert (await host.request("join.n3", b"{}")).data == b"done"
    assert [message.subject for message in answering.heard] == ["join.n3"]
    assert answering.heard[0].reply.startswith("_R_.")


async def test_the_audit_takes_entries_and_gives_none_up(roles: Roles) -> None:
    daemon, api = await roles.get("daemon"), await roles.get("api")
    first = await daemon.stream_publish("aud.daemon", b"{}")
    second = await api.stream_publish("aud.head", b"{}")
    assert (await api.get_message("AUD_lab", first.sequence)) is not None
    with pytest.raises(BusError, match="not permitted"):
        await daemon.purge_stream("AUD_lab", up_to=second.sequence)
    deletion = await daemon.request("$JS.API.STREAM.MSG.DELETE.AUD_lab", b'{"seq": %d}' % first.sequence)
    assert b"not permitted" in deletion.data
    assert (await api.get_message("AUD_lab", first.sequence)) is not None


async def test_operators_hear_events_of_every_tenant(roles: Roles) -> None:
    daemon, olga = await roles.get("daemon"), await roles.get("operator olga")
    heard = Heard()
    await olga.subscribe("evt.>", heard)
    await daemon.stream_publish("evt.acme.20", b"x")
    assert (await heard.one()).subject == "evt.acme.20"


async def test_the_server_tells_of_lost_agents(roles: Roles, yard: RoleYard) -> None:
    system = await roles.get("sys")
    heard = Heard()
    agents = Authority(yard.keys).account_id("AGENTS") if yard.by_tokens else "AGENTS"
    await system.subscribe(f"$SYS.ACCOUNT.{agents}.DISCONNECT", heard)
    inbox, seed = yard.role("node n2")
    node = await nats.connect(yard.server.url, name="node n2", inbox_prefix=inbox, seed=str(seed))
    await node.close()
    assert b"n2" in (await heard.one()).data


@contextlib.asynccontextmanager
async def looking(yard: RoleYard) -> AsyncIterator[Whereabouts]:
    inbox, seed = yard.role("sys")
    whereabouts = Whereabouts(yard.keys.directory)
    watching = asyncio.create_task(
        whereabouts.run(lambda: nats.connect(yard.server.url, name="where", inbox_prefix=inbox, seed=str(seed)))
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield whereabouts
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def visit(yard: RoleYard, role: str) -> None:
    """Connect, and go at once."""
    inbox, seed = yard.role(role)
    await (await nats.connect(yard.server.url, name=role, inbox_prefix=inbox, seed=str(seed))).close()


async def test_the_server_says_where_somebody_is(roles: Roles, yard: RoleYard) -> None:
    """Who was there before, who comes, who has gone, and who had gone before anybody looked."""
    await roles.get("operator olga")
    await visit(yard, "globex gus")
    async with looking(yard) as whereabouts:
        while whereabouts.of("operator olga") != "127.0.0.1" or whereabouts.of("user globex/gus") != "127.0.0.1":
            await asyncio.sleep(0.01)
        inbox, seed = yard.role("acme alice")
        alice = await nats.connect(yard.server.url, name="alice", inbox_prefix=inbox, seed=str(seed))
        while whereabouts.of("user acme/alice") != "127.0.0.1":
            await asyncio.sleep(0.01)
        await alice.close()
        assert whereabouts.of("user acme/alice") == "127.0.0.1"
        assert whereabouts.of("user globex/nobody") == ""
        assert whereabouts.seek("user globex/nobody")


async def test_who_came_and_went_unheard_is_found_by_asking(roles: Roles, yard: RoleYard) -> None:
    async with looking(yard) as whereabouts:
        await roles.get("operator olga")
        while not whereabouts.of("operator olga"):
            await asyncio.sleep(0.01)
        whereabouts._came = whereabouts._went = lambda message: None  # type: ignore[method-assign]  # a lost message
        whereabouts._stays.clear()
        await visit(yard, "globex gus")
        while not whereabouts.of("user globex/gus"):
            assert whereabouts.seek("user globex/gus")
            await asyncio.sleep(0.01)


def connections(server: str, *told: tuple[int, str, str, int, int | None]) -> Message:
    """A page as a server tells it at second 100: number, key, address, when it came, when it went."""
    found = [
        {
            "cid": cid,
            "authorized_user": key,
            "ip": ip,
            "start": _clock(came),
            **({"stop": _clock(went)} if went else {}),
        }
        for cid, key, ip, came, went in told
    ]
    page = {"server": {"id": server}, "data": {"now": _clock(100), "offset": 0, "connections": found}}
    return Message("_INBOX_D.x", json.dumps(page).encode())


def _clock(second: int) -> str:
    return f"2026-01-01T00:{second // 60:02}:{second % 60:02}.123456789Z"


def test_an_address_is_that_of_the_time_of_the_act(tmp_path: Path) -> None:
    whereabouts = Whereabouts(tmp_path)
    whereabouts._keys_of = {"user acme/alice": ["UA", "UB"]}
    began = time.monotonic() - 100
    whereabouts._told(connections("one", (7, "UA", "10.0.0.1", 10, 20), (9, "UB", "10.0.0.2", 50, None)))
    whereabouts._told(connections("two", (7, "UA", "10.0.0.3", 60, 70), (8, "UX", "10.9.9.9", 1, None)))
    said = {at: whereabouts.of("user acme/alice", began + at) for at in (2, 15, 40, 55, 65, 90)}
    assert said == {
        2: "",
        15: "10.0.0.1",
        40: "10.0.0.1",  # the last before
        55: "10.0.0.2",
        65: "10.0.0.2, 10.0.0.3",
        90: "10.0.0.2",
    }
    # A page made before the end was told does not bring anybody back.
    event = {"server": {"id": "one"}, "client": {"id": 9, "user": "UB", "host": "10.0.0.2"}}
    whereabouts._went(Message("$SYS.ACCOUNT.acme.DISCONNECT", json.dumps(event).encode()))
    whereabouts._told(connections("one", (9, "UB", "10.0.0.2", 50, None)))
    assert all(stay.left_at is not None for stay in whereabouts._stays["UB"])


def test_what_is_remembered_of_connections_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_MAX", 10)
    monkeypatch.setattr(module, "SOUGHT_MAX", 10)
    whereabouts = Whereabouts(tmp_path)
    whereabouts._told(connections("one", *[(cid, "UA", "10.0.0.1", cid, cid + 1) for cid in range(1, 90)]))
    assert [stay.connection[1] for stay in whereabouts._stays["UA"]] == list(range(90 - module.ENDED_MAX, 90))
    whereabouts._told(connections("one", *[(cid, f"U{cid}", "10.0.0.1", cid, cid + 1) for cid in range(1, 90)]))
    assert list(whereabouts._stays) == [f"U{cid}" for cid in range(80, 90)]
    assert [whereabouts.seek(f"user acme/u{number}") for number in range(11)] == [True] * 10 + [False]
