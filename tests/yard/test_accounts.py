"""Who may say and hear what: each role against the subjects of the others, on a real server with these accounts.

`REFUSED` is the matrix: each row must fail with "permission denied" within moments, and stand in the server's log with
the key that tried. The tests below it are the ways that must be open, and the attacks that permissions alone do not
stop (reply redirection).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpuyard_daemon.yard.accounts import (
    API_INBOX,
    DAEMON_INBOX,
    ServerSettings,
    join_inbox,
    layout,
    node_inbox,
    operator_inbox,
    server_config,
    user_inbox,
)
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.operator_mode import Authority, credentials
from gpuyard_protocol.audit import READING_VERBS, audit_stream
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import (
    BusError,
    Message,
    NoResponders,
    PermissionDenied,
    PubAck,
    StoredMessage,
    Unanswered,
)
from gpuyard_protocol.bus.credentials import CREDENTIALS_SUFFIX, read_public_key
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.subjects import streams
from support.nats import NatsProcess

DEADLINE_S = 5.0
STORE_BYTES = 400_000_000
ALL_STREAMS = (*streams("lab", STORE_BYTES * 9 // 10), audit_stream("lab", STORE_BYTES * 9 // 10))


class Yard:
    """A server with the generated accounts, and a connection for each role that asks for one."""

    def __init__(self, directory: Path, *, by_tokens: bool = False) -> None:
        self.by_tokens = by_tokens
        self.keys = YardKeys.load_or_create(directory / "keys")
        self.keys.add_operator("olga")
        self.keys.add_operator("otto")
        self.keys.add_viewer("vera")
        self.token = self.directory_of(directory) / "token.seed"
        self.token.write_text(self.keys.tokens.issue("n3", 3_600_000))
        for node in ("n1", "n2"):
            self.keys.add_node(node)
        for tenant, user in (("acme", "alice"), ("acme", "bob"), ("globex", "gus")):
            self.keys.add_user(tenant, user)
        self.server = NatsProcess(directory / "nats")
        self.server.config = self.config()

    @staticmethod
    def directory_of(directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        return directory

    def config(self) -> str:
        settings = ServerSettings("lab", self.server_directory, STORE_BYTES, port=4222, by_tokens=self.by_tokens)
        text = server_config(settings, self.keys).replace("{", "{{").replace("}", "}}")
        return text.replace(':4222"', ':{port}"').replace(f'log_file: "{self.server_directory}/nats.log"', "")

    @property
    def server_directory(self) -> Path:
        return self.server.directory

    def role(self, role: str) -> tuple[str, Path]:
        """Inbox prefix and key file of a role, as `_role` names it."""
        inbox, seed = self._role(role)
        if not self.by_tokens:
            return inbox, seed
        by_token = seed.with_suffix(CREDENTIALS_SUFFIX)
        if role.startswith("token ") and not by_token.exists():
            # Hosts bring no one-time tokens in this mode; the account and its bounds are there all the same.
            authority = Authority(self.keys)
            account = next(account for account in layout("lab", self.keys) if account.name == "JOIN")
            token = authority.user_token(account, account.users[0], role)
            by_token.write_text(credentials(token, seed.read_text().strip()))
        return inbox, by_token

    def _role(self, role: str) -> tuple[str, Path]:
        """Inbox prefix and seed file of `api`, `operator olga`, `viewer vera`, `token n3`, `node n1`, `acme alice`."""
        match role.split():
            case ["daemon"]:
                return DAEMON_INBOX, self.keys.daemon
            case ["api"]:
                return API_INBOX, self.keys.api
            case ["sys"]:
                return DAEMON_INBOX, self.keys.sys
            case ["operator", name]:
                return operator_inbox(name), self.keys.operator(name)
            case ["viewer", name]:
                return operator_inbox(name), self.keys.viewer(name)
            case ["token", node]:
                return join_inbox(node), self.token
            case ["node", node]:
                return node_inbox(node), self.keys.node(node)
            case [tenant, user]:
                return user_inbox(user), self.keys.user(tenant, user)
        raise AssertionError(role)


@pytest.fixture(scope="module", params=["static", "tokens"])
def yard(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Yard]:
    yard = Yard(tmp_path_factory.mktemp("yard"), by_tokens=request.param == "tokens")
    yard.server.start()
    yield yard
    yard.server.kill()


class Roles:
    """The connections of one test."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        self._buses: dict[str, NatsBus] = {}

    async def get(self, role: str) -> NatsBus:
        if role not in self._buses:
            inbox, seed = self.yard.role(role)
            self._buses[role] = await nats.connect(self.yard.server.url, name=role, inbox_prefix=inbox, seed=str(seed))
        return self._buses[role]

    async def close(self) -> None:
        for bus in self._buses.values():
            await bus.close()


@pytest.fixture
async def roles(yard: Yard) -> AsyncIterator[Roles]:
    roles = Roles(yard)
    daemon = await roles.get("daemon")
    for spec in ALL_STREAMS:
        await daemon.ensure_stream(spec)
    yield roles
    await roles.close()


class Heard:
    """Everything that arrived at one handler."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._arrived = asyncio.Event()

    def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self._arrived.set()

    async def one(self) -> Message:
        async with asyncio.timeout(DEADLINE_S):
            while not self.messages:
                self._arrived.clear()
                await self._arrived.wait()
        return self.messages[0]


class Answering:
    """Answers each request with `answer`, as its role."""

    def __init__(self, bus: NatsBus, answer: bytes = b"done") -> None:
        self.heard: list[Message] = []
        self._bus = bus
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, message: Message) -> None:
        self.heard.append(message)
        task = asyncio.ensure_future(self._bus.publish(message.reply, self._answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
async def test_refused(roles: Roles, yard: Yard, role: str, verb: str, subject: str) -> None:
    """At once, to whoever tried; and it stands in the server's log, with the key and the subject."""
    bus = await roles.get(role)
    seen = len(yard.server.log)
    call = bus.request(subject, b"{}", timeout=30.0) if verb == PUBLISH else bus.subscribe(subject, lambda _: None)
    with pytest.raises(PermissionDenied):
        await asyncio.wait_for(call, 1.0)
    kind = "Publish Violation" if verb == PUBLISH else "Subscription Violation"
    await until_logged(yard, seen, kind, read_public_key(str(yard.role(role)[1])), f'"{subject}"')


async def until_logged(yard: Yard, seen: int, *words: str) -> None:
    """Until one line of the server's log after its first `seen` characters has each of the words."""
    async with asyncio.timeout(DEADLINE_S):
        while not any(all(word in line for word in words) for line in yard.server.log[seen:].splitlines()):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "role",
    ["daemon", "api", "operator olga", "viewer vera", "token n3", "node n1", "acme alice", "globex gus"],
)
async def test_nobody_gets_in_with_another_roles_inbox(yard: Yard, role: str) -> None:
    inbox, seed = yard.role(role)
    other = "_INBOX.alice" if inbox != "_INBOX.alice" else "_INBOX.bob"
    seen = len(yard.server.log)
    with pytest.raises(PermissionDenied, match="inbox"):
        await nats.connect(yard.server.url, name=role, inbox_prefix=other, seed=str(seed))
    await until_logged(yard, seen, "Violation", read_public_key(str(seed)), other)


async def test_nobody_gets_in_without_a_key_or_with_a_strange_one(yard: Yard, tmp_path: Path) -> None:
    seen = len(yard.server.log)
    with pytest.raises(PermissionDenied, match="no key"):
        await nats.connect(yard.server.url, name="nobody", inbox_prefix="_INBOX.alice")
    await until_logged(yard, seen, "authentication error")
    seen = len(yard.server.log)
    strange = YardKeys.load_or_create(tmp_path).add_user("acme", "alice")
    with pytest.raises(PermissionDenied, match=r"refuses stranger \(key U[A-Z0-9]{55} of .*alice\.seed\)"):
        await nats.connect(yard.server.url, name="stranger", inbox_prefix="_INBOX.alice", seed=str(strange))
    await until_logged(yard, seen, "authentication error", read_public_key(str(strange)))


# -- the ways that must be open


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


async def test_the_server_tells_of_lost_agents(roles: Roles, yard: Yard) -> None:
    system = await roles.get("sys")
    heard = Heard()
    agents = Authority(yard.keys).account_id("AGENTS") if yard.by_tokens else "AGENTS"
    await system.subscribe(f"$SYS.ACCOUNT.{agents}.DISCONNECT", heard)
    inbox, seed = yard.role("node n2")
    node = await nats.connect(yard.server.url, name="node n2", inbox_prefix=inbox, seed=str(seed))
    await node.close()
    assert b"n2" in (await heard.one()).data


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
