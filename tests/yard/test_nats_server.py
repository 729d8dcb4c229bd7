"""The yard's own server: started, reloaded, restarted, stopped, and the checks of somebody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpuyard_daemon.yard import nats_server, server_files
from gpuyard_daemon.yard.accounts import DAEMON_INBOX, node_inbox, user_inbox
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import NatsServer
from gpuyard_daemon.yard.server_check import check_server
from gpuyard_daemon.yard.server_files import ConfigurationError, find_server
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError, NoResponders, PermissionDenied
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.subjects import streams
from support.nats import OPEN_CONFIG, NatsProcess

DEADLINE_S = 10.0
JETSTREAM_LINE = next(line for line in OPEN_CONFIG.splitlines() if line.startswith("jetstream"))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def keys(tmp_path: Path) -> YardKeys:
    keys = YardKeys.load_or_create(tmp_path / "keys")
    keys.add_user("acme", "alice")
    keys.add_node("n1")
    return keys


@pytest.fixture
async def events() -> list[str]:
    return []


@pytest.fixture
async def server(tmp_path: Path, keys: YardKeys, events: list[str]) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path / "nats", keys, yard="lab", port=0, on_event=events.append)
    await server.start()
    yield server
    await server.stop()


async def log_in(server: NatsServer, inbox: str, seed: Path) -> NatsBus:
    return await nats.connect(
        server.url, name=seed.stem, inbox_prefix=inbox, seed=str(seed), reconnect_jitter_s=(0.01, 0.03)
    )


async def test_it_takes_clients_when_start_returns_and_is_gone_after_stop(
    tmp_path: Path, keys: YardKeys, events: list[str]
) -> None:
    server = NatsServer(tmp_path / "nats", keys, yard="lab", port=0, on_event=events.append)
    await server.start()
    pid = server.pid
    assert pid is not None
    assert os.getpgid(pid) == pid != os.getpgid(0)
    bus = await log_in(server, DAEMON_INBOX, keys.daemon)
    for spec in streams("lab", server.store_bytes):
        await bus.ensure_stream(spec)
    await bus.close()
    await server.stop()
    await server.stop()
    assert (server.pid, is_alive(pid), events) == (None, False, [])


async def test_it_is_started_again_when_it_dies(server: NatsServer, keys: YardKeys, events: list[str]) -> None:
    bus = await log_in(server, DAEMON_INBOX, keys.daemon)
    for spec in streams("lab", server.store_bytes):
        await bus.ensure_stream(spec)
    await bus.stream_publish("jrn.e", b"kept")
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: not bus.is_connected)
    await eventually(lambda: bus.is_connected)
    assert server.pid != first
    assert "signal SIGKILL" in events[0]
    for spec in streams("lab", server.store_bytes):
        await bus.ensure_stream(spec)
    assert (await bus.stream_state("JRN_lab")).messages == 1
    await bus.close()


async def test_the_port_and_the_store_stay_over_restarts(tmp_path: Path, keys: YardKeys) -> None:
    first = NatsServer(tmp_path / "nats", keys, yard="lab", port=0)
    await first.start()
    kept = (first.port, first.store_bytes)
    await first.stop()
    again = NatsServer(tmp_path / "nats", keys, yard="lab")
    await again.start()
    assert (again.port, again.store_bytes) == kept
    await again.stop()


async def test_a_port_taken_by_another_program_is_left_to_it(tmp_path: Path, keys: YardKeys, events: list[str]) -> None:
    first = NatsServer(tmp_path / "nats", keys, yard="lab", port=0)
    await first.start()
    port = first.port
    await first.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        asked_for = NatsServer(tmp_path / "nats", keys, yard="lab", port=port)
        with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is taken"):
            await asked_for.start()
        free = NatsServer(tmp_path / "nats", keys, yard="lab", port=0, on_event=events.append)
        await free.start()
        assert free.port != port
        assert f"moves to {free.port}" in events[0]
        await free.stop()


async def test_a_server_left_by_a_killed_run_is_ended_first(
    tmp_path: Path, keys: YardKeys, events: list[str], server: NatsServer
) -> None:
    """The first object plays the run that was killed: its server lives, nobody looks after it."""
    left = server.pid
    assert left is not None
    assert server._supervisor is not None
    server._supervisor.cancel()
    again = NatsServer(tmp_path / "nats", keys, yard="lab", port=0, on_event=events.append)
    await again.start()
    assert again.port == server.port
    assert not is_alive(left)
    assert f"process {left}" in events[0]
    await again.stop()


async def test_another_program_with_the_old_process_number_is_left_alone(
    tmp_path: Path, keys: YardKeys, server: NatsServer
) -> None:
    await server.stop()
    (tmp_path / "nats" / "nats.pid").write_text(f"{os.getpid()}\n")
    await server.start()
    assert server.pid is not None


async def test_a_new_tenant_gets_in_and_connected_clients_stay(server: NatsServer, keys: YardKeys) -> None:
    alice = await log_in(server, user_inbox("alice"), keys.user("acme", "alice"))
    keys.add_user("globex", "gus")
    keys.add_node("n2")
    await server.reload(new_users=[("globex", "gus")])
    gus = await log_in(server, user_inbox("gus"), keys.user("globex", "gus"))
    node = await log_in(server, node_inbox("n2"), keys.node("n2"))
    for bus, tenant, user in ((gus, "globex", "gus"), (alice, "acme", "alice")):
        with pytest.raises(NoResponders):
            await bus.request(f"q.{tenant}.{user}.jobs", b"")
    assert alice.reconnects == 0
    for bus in (alice, gus, node):
        await bus.close()


async def test_a_removed_user_is_out_at_once(server: NatsServer, keys: YardKeys) -> None:
    alice = await log_in(server, user_inbox("alice"), keys.user("acme", "alice"))
    errors: list[BusError] = []
    alice.on_error(errors.append)
    seed = keys.user("acme", "alice")
    kept = seed.read_bytes()
    keys.remove_user("acme", "alice")
    seed.with_suffix(".mine").write_bytes(kept)
    await server.reload()
    await eventually(lambda: not alice.is_connected)
    with pytest.raises(PermissionDenied):
        await log_in(server, user_inbox("alice"), seed.with_suffix(".mine"))
    await alice.close()


async def test_a_configuration_the_server_would_refuse_never_replaces_a_good_one(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_files, "server_config", lambda *_: "listen: { nonsense")
    with pytest.raises(ConfigurationError, match="refuses"):
        await server.reload()
    assert "nonsense" not in (server.log_file.parent / "nats.conf").read_text()
    assert server.pid is not None


async def test_a_server_that_cannot_start_says_why(tmp_path: Path, keys: YardKeys) -> None:
    directory = tmp_path / "nats"
    directory.mkdir()
    (directory / "store").write_text("a file where a directory must be")
    server = NatsServer(directory, keys, yard="lab", port=0)
    with pytest.raises(
        BusError, match=r"(?s)nats-server ended at its start; its log says:\n.*storage directory is not a directory"
    ):
        await server.start()
    await server.stop()


def test_the_server_program_is_found_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NATS_SERVER", raising=False)
    assert find_server().name == "nats-server"
    monkeypatch.setenv("NATS_SERVER", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="nowhere is no executable file"):
        find_server()


def test_a_disk_without_room_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nats_server.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(ConfigurationError, match=r"room for 8 MiB of streams; at least 256 MiB"):
        nats_server.store_budget(tmp_path)


class _Usage:
    free = 10 * 1024 * 1024


# -- servers that somebody else runs


async def check_of(server: NatsProcess, url: str | None = None) -> tuple[list[str], list[str]]:
    bus = await nats.connect(url or server.url, name="daemon", inbox_prefix="_INBOX")
    try:
        check = await check_server(bus, yard="lab", store_bytes=500_000_000)
        return check.problems, check.unverified
    finally:
        await bus.close()


async def test_a_good_foreign_server_passes_and_what_it_hides_is_said(nats_process: NatsProcess) -> None:
    problems, unverified = await check_of(nats_process)
    assert problems == []
    assert any("sync_interval: always" in line for line in unverified)


async def test_two_yards_on_one_account_refuse_each_other(nats_process: NatsProcess) -> None:
    bus = await nats.connect(nats_process.url, name="other", inbox_prefix="_INBOX")
    for spec in streams("other", 100_000_000):
        await bus.ensure_stream(spec)
    await bus.close()
    problems, _ = await check_of(nats_process)
    assert problems
    assert "another yard" in problems[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("max_payload: 8MB", "max_payload: 1MB"), "max_payload is 1048576"),
        ((JETSTREAM_LINE, ""), "JetStream is not enabled"),
        (("max_file: 2GB", "max_file: 10MB"), "create stream SUB_lab"),
    ],
)
async def test_a_foreign_server_that_breaks_a_promise_is_refused(
    tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    server = NatsProcess(tmp_path / "nats", OPEN_CONFIG.replace(*change))
    server.start()
    problems, _ = await check_of(server)
    assert any(complaint in problem for problem in problems)
    server.kill()


async def test_the_server_account_shows_the_sync_setting(server: NatsServer, keys: YardKeys) -> None:
    daemon = await log_in(server, DAEMON_INBOX, keys.daemon)
    system = await log_in(server, DAEMON_INBOX, keys.sys)
    check = await check_server(daemon, yard="lab", store_bytes=server.store_bytes, sys_bus=system)
    assert (check.problems, check.unverified) == ([], [])
    for bus in (daemon, system):
        await bus.close()


async def test_a_server_that_syncs_late_is_refused_where_that_can_be_seen(tmp_path: Path) -> None:
    config = (
        OPEN_CONFIG.replace("sync_interval: always", "sync_interval: 2m")
        + "accounts {{ A {{ jetstream: enabled, users: [ {{ user: a, password: x }} ] }}, "
        + "S {{ users: [ {{ user: s, password: x }} ] }} }}\nsystem_account: S\nno_auth_user: a\n"
    )
    server = NatsProcess(tmp_path / "nats", config)
    server.start()
    daemon = await nats.connect(server.url, name="daemon", inbox_prefix="_INBOX")
    system = await nats.connect(server.url.replace("//", "//s:x@"), name="sys", inbox_prefix="_INBOX")
    check = await check_server(daemon, yard="lab", store_bytes=500_000_000, sys_bus=system)
    with pytest.raises(ConfigurationError, match=r"cannot carry a yard:\n  - it does not sync each message"):
        check.require(server.url)
    for bus in (daemon, system):
        await bus.close()
    server.kill()
