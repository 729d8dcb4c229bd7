"""A yard that other machines reach: certificates of its own, TLS on every connection, and no way around it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import gpuyard
from gpuyard_daemon.yard.accounts import DAEMON_INBOX
from gpuyard_daemon.yard.certificates import ensure_certificates
from gpuyard_daemon.yard.foreign_nats import check_foreign_server
from gpuyard_daemon.yard.home import YardTrouble
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import NatsServer
from gpuyard_daemon.yard.server_config import ServerSettings, TlsFiles
from gpuyard_daemon.yard.server_files import ConfigurationError, write_server_config
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError
from support.nats import server_binary
from support.yard import eventually

STORE_BYTES = 400_000_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def process(arguments: Sequence[str | Path], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        running = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
        running.terminate()
        running.wait(30)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return ensure_certificates(tmp_path_factory.mktemp("state"), "lab", ["head.example"])


def test_the_certificate_bears_the_names_and_keys_are_private(files: TlsFiles) -> None:
    shown = subprocess.run(
        ["openssl", "x509", "-in", files.cert, "-noout", "-text"], capture_output=True, text=True, check=True
    ).stdout
    for name in ("DNS:head.example", "DNS:localhost", "IP Address:127.0.0.1", "TLS Web Server Authentication"):
        assert name in shown
    for key in (files.key, files.ca.with_suffix(".key")):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key


def test_a_second_call_changes_nothing_and_a_new_name_keeps_the_authority(tmp_path: Path) -> None:
    first = ensure_certificates(tmp_path, "lab", ["head"])
    before = first.ca.read_bytes(), first.cert.read_bytes(), first.key.read_bytes()
    assert before == tuple(path.read_bytes() for path in (first.ca, first.cert, first.key))
    ensure_certificates(tmp_path, "lab", ["head"])
    assert before == tuple(path.read_bytes() for path in (first.ca, first.cert, first.key))
    ensure_certificates(tmp_path, "lab", ["head", "head.example"])
    assert first.ca.read_bytes() == before[0]
    assert first.cert.read_bytes() != before[1]


def test_without_openssl_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="apt-get install openssl"):
        ensure_certificates(tmp_path / "state", "lab", [])


async def test_clients_get_in_with_the_right_authority_and_with_no_other(files: TlsFiles, tmp_path: Path) -> None:
    keys = YardKeys.load_or_create(tmp_path / "keys")
    directory, port = tmp_path / "nats", free_port()
    directory.mkdir()
    config = write_server_config(ServerSettings("lab", directory, STORE_BYTES, "0.0.0.0", port, files), keys)
    with process([server_binary(), "-c", config], tmp_path / "log"):

        async def connect(host: str, ca: Path | None, scheme: str = "tls", timeout_s: float = 10.0) -> str:
            bus = await nats.connect(
                f"{scheme}://{host}:{port}",
                name="test",
                inbox_prefix=DAEMON_INBOX,
                seed=str(keys.daemon),
                connect_timeout_s=timeout_s,
                tls_ca=str(ca) if ca else None,
            )
            await bus.flush()
            await bus.close()
            return "in"

        assert await connect("127.0.0.1", files.ca) == "in"
        assert await connect("localhost", files.ca) == "in"
        # Whatever the scheme says: who names an authority speaks under TLS.
        assert await connect("127.0.0.1", files.ca, scheme="nats") == "in"
        other = ensure_certificates(tmp_path / "other", "other", [])
        for ca in (other.ca, None):
            with pytest.raises(BusError, match="is not to be believed"):
                await asyncio.wait_for(connect("127.0.0.1", ca, timeout_s=60.0), 10.0)
        with pytest.raises(BusError):
            await connect("127.0.0.1", None, scheme="nats", timeout_s=1.0)


def test_a_certificate_for_other_names_is_refused(tmp_path: Path) -> None:
    files = ensure_certificates(tmp_path, "lab", ["head.example"])
    verdict = subprocess.run(
        ["openssl", "verify", "-CAfile", files.ca, "-verify_hostname", "elsewhere.example", files.cert],
        capture_output=True,
        check=False,
    )
    assert verdict.returncode != 0


async def test_nothing_listens_beyond_this_machine_without_tls(tmp_path: Path) -> None:
    keys = YardKeys.load_or_create(tmp_path / "keys")
    with pytest.raises(ConfigurationError, match="with TLS only"):
        await NatsServer(tmp_path / "nats", keys, yard="lab", host="0.0.0.0", port=0).start()
    with pytest.raises(YardTrouble, match=r"tls://nats\.example:4222"):
        await check_foreign_server(
            "nats://nats.example:4222", keys, yard="lab", directory=tmp_path / "nats", say=lambda _: None
        )


# -- the whole way


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every account may pass through; pytest's own are closed."""
    path = Path(tempfile.mkdtemp(prefix="gpuyard-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def command(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gpuyard.cli", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_yard_of_several_machines_speaks_tls_from_the_first_message(place: Path) -> None:
    """As docs/install.md says: init, server, daemon; a host joins; a tenant comes; its job runs."""
    state, host, port = place / "state", place / "host", free_port()
    command("init", "--state", state, "--listen", f"0.0.0.0:{port}", "--url", f"tls://localhost:{port}")
    ca = state / "tls" / "ca.pem"
    config = state / "daemon.toml"
    config.write_text(f'nats = "tls://127.0.0.1:{port}"\ntls_ca = "{ca}"\nhttp = ""\n[journal]\nbudget = "200Mi"\n')
    with (
        process([server_binary(), "-c", state / "nats" / "nats.conf"], place / "nats.log"),
        process([sys.executable, "-m", "gpuyard_daemon", "--config", config, "--state", state], place / "daemon.log"),
    ):
        command("tenants", "add", "acme", "--user", "alice", "--state", state)
        client = state / "clients" / "acme.alice"
        assert gpuyard.load_context(client).tls_ca == str(client / "ca.pem")
        asyncio.run(eventually(lambda: answers(client), "the daemon answers"))
        token = command("node", "token", "gpu-1", "--state", state).strip()
        command("node", "join", "--token", token, "--state", host / "agent", "--config", host / "agent.toml")
        with (host / "agent.toml").open("a") as settings:
            settings.write(
                'simulate = "1xH100-80GB"\nrun_as = "nobody"\n' if os.geteuid() == 0 else 'simulate = "1xH100-80GB"\n'
            )
        host.chmod(0o755)
        with process([sys.executable, "-m", "gpuyard_agent", "--config", host / "agent.toml"], place / "agent.log"):
            assert asyncio.run(run_a_job(client)) == "succeeded"


async def answers(context: Path) -> bool:
    try:
        async with gpuyard.connect(context) as client:
            await client.stats()
    except gpuyard.GpuyardError:
        return False
    return True


async def run_a_job(context: Path) -> str:
    async with gpuyard.connect(context) as client:
        job = await client.submit(command="true", gpus=1, cpus="0.1", memory="64Mi", allow_pending=True)
        return (await job.wait(timeout=40)).state
