"""A store that takes nothing is found and its server started again; room is kept for that."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon.yard import ballast as ballasts
from gpuyard_daemon.yard import store_watch
from gpuyard_daemon.yard.accounts import DAEMON_INBOX
from gpuyard_daemon.yard.ballast import Ballast
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import NatsServer
from gpuyard_daemon.yard.nats_watch import EXIT_BAD_CONFIG
from gpuyard_daemon.yard.server_files import KeptByInit, find_server, read_server, write_server_config
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError, StreamSpec, Unanswered
from gpuyard_protocol.bus.nats import NatsBus

DEADLINE_S = 30.0
STREAM = StreamSpec(name="JRN_lab", subjects=("jrn.>",), max_bytes=64 * 1024**2)
STORE_BYTES = 256 * 1024**2
WATCH = (sys.executable, "-m", "gpuyard_daemon.yard.nats_watch")


def test_the_ballast_takes_its_room_and_gives_it_back(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path, STORE_BYTES)
    assert ballast.restore()
    assert ballast.is_there
    assert ballast.path.stat().st_blocks * 512 >= ballast.bytes == STORE_BYTES // ballasts.PART_OF_STORE
    assert ballast.restore()
    assert ballast.release()
    assert not ballast.is_there
    assert not ballast.release()


def test_the_ballast_waits_until_there_is_plenty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = Ballast(tmp_path, STORE_BYTES)
    monkeypatch.setattr(Ballast, "free_bytes", ballast.bytes * 2)
    assert not ballast.restore()
    assert not ballast.path.exists()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
async def server(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NatsServer]:
    monkeypatch.setattr(store_watch, "INTERVAL_S", 0.1)
    server = NatsServer(
        tmp_path / "nats", YardKeys.load_or_create(tmp_path / "keys"), yard="lab", port=0, on_event=said.append
    )
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def bus(tmp_path: Path, server: NatsServer) -> AsyncIterator[NatsBus]:
    seed = str(YardKeys.load_or_create(tmp_path / "keys").daemon)
    bus = await nats.connect(
        server.url, name="test", inbox_prefix=DAEMON_INBOX, seed=seed, reconnect_jitter_s=(0.01, 0.05)
    )
    await bus.ensure_stream(STREAM)
    yield bus
    await bus.close()


async def until_stored(bus: NatsBus) -> int:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return (await bus.stream_publish("jrn.e", b"x", timeout=0.5)).sequence
            except BusError:
                await asyncio.sleep(0.05)


async def _fill_blocks(bus: NatsBus) -> None:
    for _ in range(120):
        await bus.stream_publish("jrn.e", b"x" * 500_000, timeout=0.5)


async def test_a_stream_that_takes_nothing_is_found_and_the_server_started_again(
    tmp_path: Path, server: NatsServer, bus: NatsBus, said: list[str]
) -> None:
    (blocks,) = (tmp_path / "nats" / "store").rglob("streams/JRN_lab/msgs")
    before = await until_stored(bus)
    # The next block file cannot be made: the stream meets a failed write, as on a full disk, and is dead from then on.
    shutil.rmtree(blocks)
    with pytest.raises(Unanswered):
        await _fill_blocks(bus)
    after = await until_stored(bus)
    assert after > 0 < before
    assert server.restarts == 1
    assert any("stores nothing" in text and "JRN_lab" in text for text in said)


async def test_a_healthy_server_is_left_alone(server: NatsServer, bus: NatsBus, said: list[str]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await _probes(bus)) < 5:
            await asyncio.sleep(0.05)
    assert server.restarts == 0
    assert said == []


async def _probes(bus: NatsBus) -> int:
    try:
        return (await bus.stream_state("PRB_lab")).last_sequence
    except BusError:
        return 0


async def test_appends_without_an_answer_mean_a_store_that_hangs(
    server: NatsServer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watch, "ANSWER_TIMEOUT_S", 0.2)
    first = server.pid
    publish = NatsBus.stream_publish

    async def hang(self: NatsBus, subject: str, data: bytes, **options: object) -> object:
        if subject == store_watch.PROBE and not server.restarts:
            raise Unanswered("no answer")
        return await publish(self, subject, data, **options)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(NatsBus, "stream_publish", hang)
    async with asyncio.timeout(DEADLINE_S):
        while not server.restarts or server.pid is None:
            await asyncio.sleep(0.02)
    assert server.pid != first
    assert any("stores nothing (no answer)" in text for text in said)


# --- a server that systemd runs ---------------------------------------------------------------------------------------


def test_there_is_nothing_to_watch_without_a_server(tmp_path: Path) -> None:
    done = subprocess.run([*WATCH, "--state", str(tmp_path)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == EXIT_BAD_CONFIG
    assert "holds no yard" in done.stdout + done.stderr


async def test_a_server_that_stores_nothing_is_ended_for_its_unit_to_start_it_again(tmp_path: Path) -> None:
    keys = YardKeys.load_or_create(tmp_path / "keys")
    directory = tmp_path / "nats"
    directory.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = KeptByInit(listen=f"127.0.0.1:{port}", store_bytes=str(STORE_BYTES), yard="lab")
    (directory / "init.json").write_bytes(msgspec.json.encode(kept))
    server = read_server(tmp_path)
    config = write_server_config(server.settings, keys)
    running = await asyncio.create_subprocess_exec(find_server(), "--config", config, stderr=subprocess.DEVNULL)
    watching = None
    try:
        bus = await nats.connect(
            server.local_url, name="test", inbox_prefix=DAEMON_INBOX, seed=str(keys.daemon), connect_timeout_s=20.0
        )
        await bus.ensure_stream(STREAM)
        (blocks,) = (directory / "store").rglob("streams/JRN_lab/msgs")
        shutil.rmtree(blocks)
        with pytest.raises(Unanswered):
            await _fill_blocks(bus)
        watching = await asyncio.create_subprocess_exec(*WATCH, "--state", str(tmp_path), stderr=subprocess.PIPE)
        assert watching.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            assert await running.wait() == 0
            assert b"stores nothing" in await watching.stderr.readline()
        await bus.close()
    finally:
        for process in (running, watching):
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
