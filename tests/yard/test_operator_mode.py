"""Accounts told by signed tokens, on three servers: everybody gets in anywhere, and changes reach all of them.

That the rights themselves are those of static mode is tried by `test_accounts`, which runs in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from bench.fleet import FakeAgent

from gpuyard_daemon.whereabouts import Whereabouts
from gpuyard_daemon.yard import foreign_nats
from gpuyard_daemon.yard.accounts import DAEMON_INBOX, join_inbox, node_inbox, user_inbox
from gpuyard_daemon.yard.certificates import ensure_certificates, make_node_certificate
from gpuyard_daemon.yard.home import YardTrouble
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.operator_mode import Authority, credentials, join_credential
from gpuyard_daemon.yard.reload import apply_keys
from gpuyard_daemon.yard.server_config import Peer, ServerSettings, server_config
from gpuyard_daemon.yard.server_files import ConfigurationError, KeptByInit, Server
from gpuyard_protocol.bus.base import Bus, BusError, PermissionDenied
from gpuyard_protocol.bus.credentials import has_token, read_public_key
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.queries import Stats, StatsQuery
from support.cluster import Cluster, free_ports
from support.daemon import DaemonProcess, Tenant, until
from support.nats import NatsProcess

STORE_BYTES = 500_000_000
SETTINGS = 'yard = "lab"\nreplicas = 3\n[journal]\nbudget = "256Mi"\n'
READY_S = 40.0


class Site:
    """Three servers, their head's keys, and a daemon beside them."""

    def __init__(self, directory: Path, *, by_tokens: bool = True, with_tls: bool = False) -> None:
        self.daemon_directory = directory / "head"
        self.keys = YardKeys.load_or_create(self.daemon_directory / "state" / "keys")
        self.keys.add_node("n1")
        self.keys.add_user("acme", "alice")
        self.tls = ensure_certificates(self.state, "lab", ["127.0.0.1"]) if with_tls else None
        routes = free_ports(3)
        self.settings = [
            ServerSettings(
                yard="lab",
                directory=directory / "nats" / f"s{number}",
                store_bytes=STORE_BYTES,
                peer=Peer("lab", f"s{number}", f"127.0.0.1:{port}", tuple(f"127.0.0.1:{other}" for other in routes)),
                by_tokens=by_tokens,
                tls=self.tls,
            )
            for number, port in enumerate(routes)
        ]
        self.cluster = Cluster(directory / "nats", [self.config(settings) for settings in self.settings])

    def config(self, settings: ServerSettings) -> str:
        text = server_config(settings, self.keys).replace("{", "{{").replace("}", "}}")
        return text.replace(':4222"', ':{port}"').replace(f'log_file: "{settings.directory}/nats.log"', "")

    @property
    def server(self) -> Server:
        first = self.settings[0]._replace(port=self.cluster.servers[0].port)
        return Server(first, self.cluster.url, tuple(self.settings[1:]))

    @property
    def state(self) -> Path:
        return self.daemon_directory / "state"

    def keep_settings(self) -> None:
        """As `gpuyard init` leaves them on the head, for commands and for the daemon."""
        peers = [f"s{number}=127.0.0.{number + 1}" for number in range(3)]
        kept = KeptByInit(url=self.cluster.url, store_bytes=str(STORE_BYTES), yard="lab", peers=peers)
        directory = self.state / "nats"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "init.json").write_bytes(msgspec.json.encode(kept))

    async def connect(self, tenant: str, user: str, server: int) -> Bus:
        key = self.server.key_file(self.keys.user(tenant, user))
        return await connect(
            self.cluster.servers[server].url,
            name="test",
            inbox_prefix=user_inbox(user),
            seed=str(key),
            tls_ca=str(self.tls.ca) if self.tls else None,
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    site.cluster.start()
    yield site
    site.cluster.kill()


async def test_servers_of_equal_static_configurations_carry_a_yard_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `gpuyard up --nats URL,URL,URL` finds: the accounts stand in the configuration of each."""
    monkeypatch.setattr(foreign_nats, "store_budget", lambda _: STORE_BYTES // 2)
    site = Site(tmp_path, by_tokens=False)
    site.cluster.start()
    said: list[str] = []
    daemon = DaemonProcess(site.daemon_directory, site.cluster.url, settings=SETTINGS, authenticate=True)
    try:

        async def is_fit() -> bool:
            with contextlib.suppress(ConfigurationError, YardTrouble):
                await foreign_nats.check_foreign_server(
                    site.cluster.url, site.keys, yard="lab", directory=tmp_path / "check", say=said.append
                )
                return True
            return False

        await until(is_fit, "a cluster that can carry a yard", READY_S)
        await asyncio.to_thread(daemon.start)
        bus = await connect(
            site.cluster.servers[1].url, name="n1", inbox_prefix=node_inbox("n1"), seed=str(site.keys.node("n1"))
        )
        agent = FakeAgent(bus, "n1", runs_for_s=0.02)
        await agent.join()
        for server in range(3):
            await runs(site, "acme", "alice", server, 1)
        await bus.close()
    finally:
        daemon.kill()
        site.cluster.kill()


@pytest.fixture
async def agent(site: Site) -> AsyncIterator[FakeAgent]:
    key = site.keys.node("n1").with_suffix(".creds")
    bus = await connect(
        site.cluster.servers[1].url, name="n1", inbox_prefix=node_inbox("n1"), seed=str(key), connect_timeout_s=20
    )
    agent = FakeAgent(bus, "n1", runs_for_s=0.02)
    yield agent
    await bus.close()


@pytest.fixture
def daemon(site: Site) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(site.daemon_directory, site.cluster.url, settings=SETTINGS, authenticate=True)
    yield daemon
    daemon.kill()


async def runs(site: Site, tenant: str, user: str, server: int, count: int) -> None:
    """This user's jobs run, through whichever server."""
    bus = await site.connect(tenant, user, server)
    try:
        who = Tenant(bus, tenant, user)
        job = {"command": ["/bin/true"], "gpus": 1}

        async def submitted() -> bool:
            return bool(await who.submit(job))

        await until(submitted, f"a submission of {tenant}/{user}", READY_S)

        async def finished() -> bool:
            return (await who.ask("stats", StatsQuery(), Stats)).jobs.get("succeeded", 0) >= count

        await until(finished, f"{count} jobs of {tenant}/{user}", READY_S)
    finally:
        await bus.close()


async def test_a_yard_on_three_servers_lets_tenants_in_and_out_while_it_runs(
    site: Site, daemon: DaemonProcess, agent: FakeAgent
) -> None:
    await until(lambda: starts(daemon), "a daemon", READY_S)
    await agent.join()
    for server in range(3):
        await runs(site, "acme", "alice", server, 1)
    # A new tenant: no server is told but one, none is reloaded or started again.
    site.keys.add_user("globex", "gus")
    assert await apply_keys(site.server, site.keys)
    await runs(site, "globex", "gus", 2, 1)
    # A user that is taken out is put out of every server, and does not get in again.
    inside = await site.connect("globex", "gus", 1)
    credentials = site.keys.user("globex", "gus").with_suffix(".creds").read_text()
    site.keys.remove_user("globex", "gus")
    assert await apply_keys(site.server, site.keys)
    kept = site.daemon_directory / "kept.creds"
    kept.write_text(credentials)

    async def is_out() -> bool:
        return not inside.is_connected

    await until(is_out, "an end of the connection", READY_S)
    await inside.close()
    for server in site.cluster.servers:
        with pytest.raises(PermissionDenied):
            await connect(server.url, name="gone", inbox_prefix=user_inbox("gus"), seed=str(kept))
    assert agent.faults == []


async def test_servers_speak_tls_among_themselves_and_let_no_stranger_in(tmp_path: Path) -> None:
    site = Site(tmp_path, with_tls=True)
    assert site.tls is not None
    # Of the yard's own authority, and made for something else.
    cert, private = make_node_certificate(site.state, "n1", ["127.0.0.1"])
    first = site.settings[0]
    assert first.peer is not None
    impostor = first._replace(
        directory=tmp_path / "nats" / "impostor",
        tls=site.tls._replace(cert=cert, key=private),
        peer=Peer("lab", "s9", f"127.0.0.1:{free_ports(1)[0]}", (first.peer.listen,)),
    )
    stranger = NatsProcess(tmp_path / "nats" / "impostor", site.config(impostor))
    ca = str(site.tls.ca)
    daemon = DaemonProcess(
        site.daemon_directory,
        site.cluster.url,
        settings=SETTINGS.replace("[journal]", f'tls_ca = "{ca}"\n[journal]'),
        authenticate=True,
    )
    site.cluster.start()
    try:
        stranger.start()
        await until(lambda: starts(daemon), "a daemon", READY_S)
        key = str(site.keys.node("n1").with_suffix(".creds"))
        bus = await connect(site.cluster.servers[1].url, name="n1", inbox_prefix=node_inbox("n1"), seed=key, tls_ca=ca)
        agent = FakeAgent(bus, "n1", runs_for_s=0.02)
        await agent.join()
        for server in range(3):
            await runs(site, "acme", "alice", server, 1)
        await bus.close()

        async def is_refused() -> bool:
            return "TLS route handshake error" in stranger.log + site.cluster.servers[0].log

        await until(is_refused, "a refusal of the stranger", READY_S)
        assert all("s9" not in server.log for server in site.cluster.servers)
        # Nor is anything said to whoever speaks in the clear.
        assert await said_in_the_clear(first.peer.listen) == b""
    finally:
        daemon.kill()
        stranger.kill()
        site.cluster.kill()


async def starts(daemon: DaemonProcess) -> bool:
    """A cluster that has just begun may have no leader yet."""
    daemon.kill()
    with contextlib.suppress(AssertionError):
        await asyncio.to_thread(daemon.start)
        return True
    return False


async def said_in_the_clear(route: str) -> bytes:
    """What a server answers on its route to one who begins as a server does, but without TLS."""
    host, _, port = route.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b'CONNECT {"verbose":false,"name":"s9","cluster":"lab"}\r\nPING\r\n')
    try:
        async with asyncio.timeout(READY_S):
            said = await reader.read()
    except ConnectionResetError:
        said = b""
    writer.close()
    return said.partition(b"\r\n")[2] if said.startswith(b"INFO") else said


async def test_a_token_of_another_authority_is_not_believed(site: Site, tmp_path: Path) -> None:
    strange = YardKeys.load_or_create(tmp_path / "strange")
    strange.add_user("acme", "alice")
    settings = ServerSettings("lab", tmp_path / "nats", STORE_BYTES, by_tokens=True)
    server_config(settings, strange)
    key = strange.user("acme", "alice").with_suffix(".creds")
    assert has_token(str(key))
    assert read_public_key(str(key)) == read_public_key(str(strange.user("acme", "alice")))
    with pytest.raises(PermissionDenied):
        await connect(site.cluster.servers[0].url, name="strange", inbox_prefix="_INBOX.alice", seed=str(key))


def test_keys_of_the_authority_are_made_once_and_stay_private(tmp_path: Path) -> None:
    keys = YardKeys.load_or_create(tmp_path / "keys")
    first, again = Authority(keys), Authority(keys)
    assert first.account_id("SCHED") == again.account_id("SCHED")
    assert first.account_id("SCHED").startswith("A")
    for path in (tmp_path / "keys" / "authority").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_init_writes_a_configuration_for_each_server_of_a_cluster(tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = [f"--server=nats-{number}=127.0.0.{number}" for number in (1, 2, 3)]
    done = gpuyard("init", "--state", str(state), *flags, "--node", "gpu-1", "--user", "acme/alice")
    assert done.returncode == 0, done.stderr
    for number in (1, 2, 3):
        text = (state / "nats" / "servers" / f"nats-{number}" / "nats.conf").read_text()
        assert f'server_name: "nats-{number}"' in text
        assert text.count("tls://127.0.0.") == 2
        assert f"tls://127.0.0.{number}:" not in text
    assert has_token(str(state / "keys" / "node-gpu-1.creds"))
    assert has_token(str(state / "clients" / "acme.alice" / "user.seed"))
    assert (
        "tls://127.0.0.1:4222,tls://127.0.0.2:4222" in (state / "clients" / "acme.alice" / "context.toml").read_text()
    )
    # Asked again it remembers; nobody could come with a token for a host while no server runs.
    assert gpuyard("init", "--state", str(state), "--operator", "olga").returncode == 0
    assert has_token(str(state / "keys" / "operator-olga.creds"))
    token = gpuyard("node", "token", "gpu-2", "--state", str(state))
    assert token.returncode == 1
    assert "no NATS server of this yard runs" in token.stderr
    two = gpuyard("init", "--state", str(tmp_path / "two"), *flags[:2])
    assert "expected 3 or 5" in two.stderr


async def test_a_host_joins_three_servers_with_a_token_while_all_of_them_run(
    site: Site, daemon: DaemonProcess, tmp_path: Path
) -> None:
    """The key never leaves the host; what it is let in with comes with the answer; no server is told but one."""
    site.keep_settings()
    await until(lambda: starts(daemon), "a daemon", READY_S)
    pids = [server.pid for server in site.cluster.servers]

    async def is_issued() -> bool:
        done = await asyncio.to_thread(gpuyard, "node", "token", "gpu-9", "--state", str(site.state))
        issued.append(done.stdout.strip())
        return done.returncode == 0

    issued: list[str] = []
    await until(is_issued, "a token", READY_S)
    host, thief = tmp_path / "host", tmp_path / "thief"
    joined = await asyncio.to_thread(join, host, issued[-1])
    assert joined.returncode == 0, joined.stderr
    key = host / "node.creds"
    assert f'key = "{key}"' in (host / "agent.toml").read_text()
    assert has_token(str(key))
    assert not (site.state / "keys" / "node-gpu-9.seed").exists(), "the seed stays on the host"
    again = await asyncio.to_thread(join, host, issued[-1])
    assert again.returncode == 0, "an answer that was lost may be asked for again"
    stolen = await asyncio.to_thread(join, thief, issued[-1])
    assert "was used before" in stolen.stderr
    for server in site.cluster.servers:
        bus = await connect(server.url, name="gpu-9", inbox_prefix=node_inbox("gpu-9"), seed=str(key))
        await bus.close()
    bus = await connect(site.cluster.url, name="gpu-9", inbox_prefix=node_inbox("gpu-9"), seed=str(key))
    agent = FakeAgent(bus, "gpu-9", runs_for_s=0.02)
    await agent.join()
    await runs(site, "acme", "alice", 2, 1)
    await bus.close()
    assert [server.pid for server in site.cluster.servers] == pids


async def test_a_token_ends_with_its_time_on_every_server(site: Site) -> None:
    site.keep_settings()
    seed = site.keys.tokens.issue("gpu-9", 3_600_000)
    assert await apply_keys(site.server, site.keys)
    kept = site.state / "token.creds"
    kept.write_text(credentials(join_credential(site.keys, "lab", "gpu-9"), seed))
    bus = await connect(site.cluster.servers[0].url, name="host", inbox_prefix=join_inbox("gpu-9"), seed=str(kept))
    site.keys.tokens.revoke("gpu-9")
    assert await apply_keys(site.server, site.keys)

    async def is_out() -> bool:
        return not bus.is_connected

    await until(is_out, "an end of the connection", READY_S)
    await bus.close()
    for server in site.cluster.servers:
        with pytest.raises(PermissionDenied):
            await connect(server.url, name="late", inbox_prefix=join_inbox("gpu-9"), seed=str(kept))
    with pytest.raises(BusError, match="no token for gpu-9"):
        join_credential(site.keys, "lab", "gpu-9")


def join(place: Path, token: str) -> subprocess.CompletedProcess[str]:
    return gpuyard(
        "node", "join", "--token", token, "--state", str(place / "agent"), "--config", str(place / "agent.toml")
    )


def gpuyard(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuyard.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_damaged_list_of_what_was_let_in_is_refused(tmp_path: Path) -> None:
    """Taking it for empty would let in again whoever was put out."""
    keys = YardKeys.load_or_create(tmp_path / "keys")
    settings = ServerSettings("lab", tmp_path / "nats", STORE_BYTES, by_tokens=True)
    server_config(settings, keys)
    (tmp_path / "keys" / "authority" / "issued.json").write_text("{")
    with pytest.raises(BusError, match="is damaged"):
        server_config(settings, keys)


async def test_who_was_on_another_server_and_has_gone_is_found(site: Site) -> None:
    """Each server is asked, also about connections that have ended and of which nobody heard."""

    async def visit(server: int) -> None:
        await (await site.connect("acme", "alice", server)).close()

    await visit(2)
    whereabouts = Whereabouts(site.keys.directory)
    key = site.server.key_file(site.keys.sys)
    looking = asyncio.create_task(
        whereabouts.run(
            lambda: connect(site.cluster.servers[0].url, name="where", inbox_prefix=DAEMON_INBOX, seed=str(key))
        )
    )
    try:

        async def is_found() -> bool:
            return whereabouts.of("user acme/alice") == "127.0.0.1"

        await until(is_found, "the one who had gone before", READY_S)
        whereabouts._came = whereabouts._went = lambda message: None  # type: ignore[method-assign]  # a lost message
        whereabouts._stays.clear()
        await visit(1)

        async def is_sought() -> bool:
            return whereabouts.seek("user acme/alice") and bool(whereabouts.of("user acme/alice"))

        await until(is_sought, "the one whose coming was not heard", READY_S)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
