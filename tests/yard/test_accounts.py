"""Who may not say and hear what: each role against the subjects of the others, on a real server with these accounts.

`REFUSED` is the matrix: each row must fail with "permission denied" within moments, and stand in the server's log with
the key that tried. Below it is what permissions alone do not stop: answers sent where they do not belong. The ways that
must be open are in `test_account_ways`; what a role may do and does too much of, in `test_hostile`.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import (
    BusError,
    PermissionDenied,
    Unanswered,
)
from gpuyard_protocol.bus.credentials import read_public_key
from support.role_yard import ALL_STREAMS, Answering, Heard, Roles, RoleYard, until_logged

PUBLISH, SUBSCRIBE = "publish", "subscribe"
REFUSED: list[tuple[str, str, str]] = [
    # a tenant's user towards other users, other tenants, and everything inside
    ("acme alice", PUBLISH, "sub.acme.bob.submit"),
    ("acme alice", PUBLISH, "sub.globex.gus.submit"),
    ("acme alice", PUBLISH, "sub.globex.alice.submit"),
    ("acme alice", PUBLISH, "sub.acme"),
    ("acme alice", PUBLISH, "q.acme.bob.jobs"),
    ("acme alice", PUBLISH, "q.globex.gus.jobs"),
    ("acme alice", PUBLISH, "load.globex.chat"),
    ("acme alice", PUBLISH, "evt.acme.17"),
    ("acme alice", PUBLISH, "log.acme.17.0"),
    ("acme alice", PUBLISH, "jrn.e"),
    ("acme alice", PUBLISH, "jrn.leader"),
    ("acme alice", PUBLISH, "cmd.n1"),
    ("acme alice", PUBLISH, "rep.n1.report"),
    ("acme alice", PUBLISH, "hb.n1"),
    ("acme alice", PUBLISH, "tel.n1.devices"),
    ("acme alice", PUBLISH, "adm.olga.nodes"),
    ("acme alice", PUBLISH, "adm.alice.nodes"),
    ("acme alice", PUBLISH, "$JS.API.STREAM.INFO.SUB_lab"),
    ("acme alice", PUBLISH, "$JS.API.STREAM.DELETE.SUB_lab"),
    ("acme alice", PUBLISH, "$JS.API.INFO"),
    ("acme alice", PUBLISH, "$SYS.REQ.SERVER.PING"),
    ("acme alice", PUBLISH, "_R_.abc"),
    ("acme alice", PUBLISH, "_INBOX.bob.abc"),
    ("acme alice", SUBSCRIBE, "evt.globex.>"),
    ("acme alice", SUBSCRIBE, "evt.>"),
    ("acme alice", SUBSCRIBE, "log.globex.>"),
    ("acme alice", SUBSCRIBE, "sub.>"),
    ("acme alice", SUBSCRIBE, "sub.acme.>"),
    ("acme alice", SUBSCRIBE, "q.acme.>"),
    ("acme alice", SUBSCRIBE, "load.acme.>"),
    ("acme alice", SUBSCRIBE, "_INBOX.>"),
    ("acme alice", SUBSCRIBE, "_INBOX.bob.>"),
    ("acme alice", SUBSCRIBE, "cmd.>"),
    ("acme alice", SUBSCRIBE, ">"),
    ("globex gus", PUBLISH, "sub.acme.alice.submit"),
    ("globex gus", SUBSCRIBE, "evt.acme.>"),
    # an agent towards other nodes, the scheduler, tenants
    ("node n1", PUBLISH, "rep.n2.report"),
    ("node n1", PUBLISH, "hb.n2"),
    ("node n1", PUBLISH, "tel.n2.devices"),
    ("node n1", PUBLISH, "cmd.n2"),
    ("node n1", PUBLISH, "who.n2"),
    ("node n1", PUBLISH, "_INBOX_A.n2.x"),
    ("node n1", PUBLISH, "cmd.n1"),
    ("node n1", PUBLISH, "jrn.e"),
    ("node n1", PUBLISH, "evt.acme.17"),
    ("node n1", PUBLISH, "sub.acme.alice.submit"),
    ("node n1", PUBLISH, "adm.olga.nodes"),
    ("node n1", PUBLISH, "$JS.API.STREAM.INFO.REP_lab"),
    ("node n1", SUBSCRIBE, "cmd.n2"),
    ("node n1", SUBSCRIBE, "who.n2"),
    ("node n1", SUBSCRIBE, "cmd.*"),
    ("node n1", SUBSCRIBE, "_INBOX_A.n2.>"),
    ("node n1", SUBSCRIBE, "_INBOX_A.>"),
    ("node n1", SUBSCRIBE, "rep.>"),
    ("node n1", SUBSCRIBE, "hb.*"),
    ("node n1", SUBSCRIBE, "log.acme.>"),
    ("node n1", SUBSCRIBE, "_R_.>"),
    # an operator speaks to the daemon's API and to nothing else
    ("operator olga", PUBLISH, "adm.otto.nodes"),
    ("operator olga", PUBLISH, "jrn.e"),
    ("operator olga", PUBLISH, "cmd.n1"),
    ("operator olga", PUBLISH, "sub.acme.alice.submit"),
    ("operator olga", PUBLISH, "evt.acme.17"),
    ("operator olga", PUBLISH, "_R_.abc"),
    ("operator olga", PUBLISH, "$JS.API.STREAM.INFO.JRN_lab"),
    ("operator olga", SUBSCRIBE, "adm.>"),
    ("operator olga", SUBSCRIBE, "_INBOX_O.otto.>"),
    ("operator olga", SUBSCRIBE, "_INBOX_D.>"),
    ("operator olga", SUBSCRIBE, "jrn.>"),
    # a viewer asks, and changes nothing; nor does the audit of the yard belong to those who look on
    ("viewer vera", PUBLISH, "adm.vera.shutdown"),
    ("viewer vera", PUBLISH, "adm.vera.audit"),
    ("viewer vera", PUBLISH, "adm.vera.anything"),
    ("viewer vera", PUBLISH, "adm.vera"),
    ("viewer vera", PUBLISH, "adm.olga.nodes"),
    ("viewer vera", PUBLISH, "sub.acme.alice.submit"),
    ("viewer vera", PUBLISH, "q.acme.alice.jobs"),
    ("viewer vera", PUBLISH, "jrn.e"),
    ("viewer vera", PUBLISH, "cmd.n1"),
    ("viewer vera", PUBLISH, "evt.acme.17"),
    ("viewer vera", PUBLISH, "join.n3"),
    ("viewer vera", PUBLISH, "aud.daemon"),
    ("viewer vera", PUBLISH, "_R_.abc"),
    ("viewer vera", PUBLISH, "_INBOX_O.olga.x"),
    ("viewer vera", PUBLISH, "$JS.API.STREAM.INFO.AUD_lab"),
    ("viewer vera", PUBLISH, "$JS.API.DIRECT.GET.AUD_lab.aud.daemon"),
    ("viewer vera", SUBSCRIBE, "adm.>"),
    ("viewer vera", SUBSCRIBE, "aud.>"),
    ("viewer vera", SUBSCRIBE, "_INBOX_O.olga.>"),
    ("viewer vera", SUBSCRIBE, "_INBOX_O.>"),
    ("viewer vera", SUBSCRIBE, "jrn.>"),
    # a host with a one-time token asks to be let in under the token's name, and nothing else
    ("token n3", PUBLISH, "join.n1"),
    ("token n3", PUBLISH, "join.n4"),
    ("token n3", PUBLISH, "rep.n3.report"),
    ("token n3", PUBLISH, "hb.n3"),
    ("token n3", PUBLISH, "tel.n3.devices"),
    ("token n3", PUBLISH, "log.acme.17.0"),
    ("token n3", PUBLISH, "cmd.n1"),
    ("token n3", PUBLISH, "sub.acme.alice.submit"),
    ("token n3", PUBLISH, "q.acme.alice.jobs"),
    ("token n3", PUBLISH, "adm.olga.nodes"),
    ("token n3", PUBLISH, "jrn.e"),
    ("token n3", PUBLISH, "aud.head"),
    ("token n3", PUBLISH, "_R_.abc"),
    ("token n3", PUBLISH, "$JS.API.INFO"),
    ("token n3", SUBSCRIBE, "join.>"),
    ("token n3", SUBSCRIBE, "join.n3"),
    ("token n3", SUBSCRIBE, "cmd.n3"),
    ("token n3", SUBSCRIBE, "_INBOX_J.n4.>"),
    ("token n3", SUBSCRIBE, "_INBOX_J.>"),
    ("token n3", SUBSCRIBE, "evt.>"),
    ("token n3", SUBSCRIBE, ">"),
    # nobody but a token's host asks to join; nobody but daemon and head writes the audit, each its own subject
    ("acme alice", PUBLISH, "join.n3"),
    ("acme alice", PUBLISH, "aud.daemon"),
    ("acme alice", SUBSCRIBE, "aud.>"),
    ("acme alice", PUBLISH, "$JS.API.DIRECT.GET.AUD_lab.aud.daemon"),
    ("node n1", PUBLISH, "join.n1"),
    ("node n1", PUBLISH, "aud.daemon"),
    ("node n1", SUBSCRIBE, "aud.>"),
    ("operator olga", PUBLISH, "join.n3"),
    ("operator olga", PUBLISH, "aud.daemon"),
    ("operator olga", PUBLISH, "$JS.API.DIRECT.GET.AUD_lab.aud.daemon"),
    ("operator olga", SUBSCRIBE, "aud.>"),
    ("api", PUBLISH, "aud.daemon"),
    ("api", PUBLISH, "join.n3"),
    ("api", PUBLISH, "$JS.API.STREAM.PURGE.AUD_lab"),
    ("api", SUBSCRIBE, "aud.>"),
    ("daemon", PUBLISH, "aud.head"),
    ("daemon", PUBLISH, "$JS.API.STREAM.DELETE.AUD_lab"),
    ("daemon", PUBLISH, "join.n3"),
    ("daemon", SUBSCRIBE, "join.*"),
    ("sys", PUBLISH, "aud.daemon"),
    # the API answers questions; it decides, stores and commands nothing
    ("api", PUBLISH, "jrn.e"),
    ("api", PUBLISH, "evt.acme.17"),
    ("api", PUBLISH, "cmd.n1"),
    ("api", PUBLISH, "sub.acme.alice.submit"),
    ("api", PUBLISH, "$JS.API.STREAM.PURGE.JRN_lab"),
    ("api", PUBLISH, "$JS.API.DIRECT.GET.JRN_lab"),
    ("api", PUBLISH, "_INBOX_D.abc"),
    ("api", SUBSCRIBE, "_INBOX_D.>"),
    ("api", SUBSCRIBE, "jrn.>"),
    ("api", SUBSCRIBE, "sub.>"),
    # the daemon is the only one with streams, but it is no tenant, agent or operator
    ("daemon", PUBLISH, "sub.acme.alice.submit"),
    ("daemon", PUBLISH, "rep.n1.report"),
    ("daemon", PUBLISH, "adm.olga.nodes"),
    ("daemon", SUBSCRIBE, "_INBOX_API.>"),
    ("daemon", SUBSCRIBE, "_INBOX_O.>"),
    ("sys", PUBLISH, "jrn.e"),
    ("sys", SUBSCRIBE, "evt.>"),
    # only the daemon's key tries whether the store takes anything, and only operators say what became of a host
    ("acme alice", PUBLISH, "probe.store"),
    ("node n1", PUBLISH, "probe.store"),
    ("operator olga", PUBLISH, "probe.store"),
    ("token n3", PUBLISH, "probe.store"),
    ("api", PUBLISH, "probe.store"),
    ("viewer vera", PUBLISH, "adm.vera.declare-dead"),
    ("viewer vera", PUBLISH, "adm.vera.remove-node"),
    ("acme alice", PUBLISH, "q.acme.bob.declare-dead"),
]


@pytest.mark.parametrize(("role", "verb", "subject"), REFUSED, ids=[" ".join(row) for row in REFUSED])
async def test_refused(roles: Roles, yard: RoleYard, role: str, verb: str, subject: str) -> None:
    """At once, to whoever tried; and it stands in the server's log, with the key and the subject."""
    bus = await roles.get(role)
    seen = len(yard.server.log)
    call = bus.request(subject, b"{}", timeout=30.0) if verb == PUBLISH else bus.subscribe(subject, lambda _: None)
    with pytest.raises(PermissionDenied):
        await asyncio.wait_for(call, 1.0)
    kind = "Publish Violation" if verb == PUBLISH else "Subscription Violation"
    await until_logged(yard, seen, kind, read_public_key(str(yard.role(role)[1])), f'"{subject}"')


@pytest.mark.parametrize(
    "role",
    ["daemon", "api", "operator olga", "viewer vera", "token n3", "node n1", "acme alice", "globex gus"],
)
async def test_nobody_gets_in_with_another_roles_inbox(yard: RoleYard, role: str) -> None:
    inbox, seed = yard.role(role)
    other = "_INBOX.alice" if inbox != "_INBOX.alice" else "_INBOX.bob"
    seen = len(yard.server.log)
    with pytest.raises(PermissionDenied, match="inbox"):
        await nats.connect(yard.server.url, name=role, inbox_prefix=other, seed=str(seed))
    await until_logged(yard, seen, "Violation", read_public_key(str(seed)), other)


async def test_nobody_gets_in_without_a_key_or_with_a_strange_one(yard: RoleYard, tmp_path: Path) -> None:
    seen = len(yard.server.log)
    with pytest.raises(PermissionDenied, match="no key"):
        await nats.connect(yard.server.url, name="nobody", inbox_prefix="_INBOX.alice")
    await until_logged(yard, seen, "authentication error")
    seen = len(yard.server.log)
    strange = YardKeys.load_or_create(tmp_path).add_user("acme", "alice")
    with pytest.raises(PermissionDenied, match=r"refuses stranger \(key U[A-Z0-9]{55} of .*alice\.seed\)"):
        await nats.connect(yard.server.url, name="stranger", inbox_prefix="_INBOX.alice", seed=str(strange))
    await until_logged(yard, seen, "authentication error", read_public_key(str(strange)))


# -- answers sent where they do not belong: a server never checks the reply subject of a message

REDIRECTED = [
    ("acme alice", "sub.acme.alice.submit", "sub.acme.bob.cancel"),
    ("acme alice", "sub.acme.alice.submit", "sub.globex.gus.cancel"),
    ("acme alice", "sub.acme.alice.submit", "jrn.leader"),
    ("acme alice", "sub.acme.alice.submit", "jrn.e"),
    ("acme alice", "sub.acme.alice.submit", "evt.globex.17"),
    ("acme alice", "sub.acme.alice.submit", "cmd.n1"),
    ("acme alice", "sub.acme.alice.submit", "rep.n1.report"),
    ("acme alice", "sub.acme.alice.submit", "adm.olga.drain"),
    ("acme alice", "sub.acme.alice.submit", "$JS.API.STREAM.DELETE.SUB_lab"),
    ("acme alice", "q.acme.alice.jobs", "sub.acme.bob.cancel"),
    ("acme alice", "q.acme.alice.jobs", "q.acme.bob.jobs"),
    ("acme alice", "q.acme.alice.jobs", "jrn.e"),
    ("acme alice", "q.acme.alice.jobs", "adm.olga.drain"),
    ("node n1", "rep.n1.report", "rep.n2.report"),
    ("node n1", "rep.n1.report", "jrn.e"),
    ("node n1", "rep.n1.report", "sub.acme.alice.submit"),
    ("operator olga", "adm.olga.nodes", "adm.otto.nodes"),
    ("operator olga", "adm.olga.nodes", "jrn.e"),
    ("operator olga", "adm.olga.nodes", "_INBOX_D.x"),
    ("operator olga", "adm.olga.nodes", "aud.daemon"),
    ("acme alice", "q.acme.alice.jobs", "aud.head"),
    ("acme alice", "sub.acme.alice.submit", "aud.daemon"),
    ("viewer vera", "adm.vera.nodes", "adm.olga.nodes"),
    ("viewer vera", "adm.vera.nodes", "jrn.e"),
    ("token n3", "join.n3", "rep.n1.report"),
    ("token n3", "join.n3", "jrn.e"),
    ("token n3", "join.n3", "adm.olga.nodes"),
]


@pytest.mark.parametrize(("role", "subject", "target"), REDIRECTED, ids=[" to ".join(row[1:]) for row in REDIRECTED])
async def test_an_answer_cannot_be_sent_to_a_foreign_subject(
    roles: Roles, role: str, subject: str, target: str
) -> None:
    daemon, api, bus = await roles.get("daemon"), await roles.get("api"), await roles.get(role)
    answering = Answering(api, b'{"job": 1}')
    await api.subscribe("q.>", answering)
    await api.subscribe("adm.>", answering)
    await api.subscribe("join.*", answering)
    inbox = Heard()
    await daemon.subscribe("_INBOX_D.x", inbox)
    before = {spec.name: (await daemon.stream_state(spec.name)).last_sequence for spec in ALL_STREAMS}
    await bus.publish(subject, b"{}", reply=target)
    with contextlib.suppress(BusError):
        await bus.request(subject, b"{}", timeout=1.0)
    for bus_of_all in (bus, api, daemon):
        await bus_of_all.flush()
    stored = [
        message.subject
        for spec in ALL_STREAMS
        for sequence in range(before[spec.name] + 1, (await daemon.stream_state(spec.name)).last_sequence + 1)
        if (message := await daemon.get_message(spec.name, sequence))
    ]
    assert [found for found in stored if found != subject] == []
    assert [message.subject for message in answering.heard if message.subject != subject] == []
    assert len(answering.heard) == (0 if subject.startswith(("sub.", "rep.")) else 2)
    assert inbox.messages == []


async def test_a_redirected_acknowledgement_reaches_an_agent_without_the_servers_prefix(roles: Roles) -> None:
    """An agent takes commands only with a reply below `_R_.`: another agent's redirected acknowledgement has none."""
    n1, n2 = await roles.get("node n1"), await roles.get("node n2")
    heard = Heard()
    await n2.subscribe("cmd.n2", heard)
    await n1.publish("rep.n1.report", b"{}", reply="cmd.n2")
    with contextlib.suppress(Unanswered):
        await n1.stream_publish("rep.n1.report", b"{}")
    await n2.flush()
    assert [message for message in heard.messages if message.reply.startswith("_R_.")] == []
