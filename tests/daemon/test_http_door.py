"""The pages beyond loopback: with the token over TLS and in no other way, those of the daemon and of an agent alike."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuyard_agent.health import Health as AgentHealth
from gpuyard_agent.http import HttpDoor as AgentDoor
from gpuyard_agent.metrics import Metrics
from gpuyard_daemon.config import EXIT_BAD_CONFIG, DaemonConfig
from gpuyard_daemon.yard.certificates import ensure_certificates, make_node_certificate
from gpuyard_protocol.service.http_guard import guard_for
from gpuyard_protocol.service.http_place import Place
from support.daemon import SETTINGS, DaemonProcess
from support.nats import NatsProcess


def read(url: str, *, ca: Path | None = None, token: str = "") -> tuple[int, str]:
    context = ssl.create_default_context(cafile=ca) if ca is not None else None
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of a yard with certificates."""
    state = tmp_path_factory.mktemp("state")
    ensure_certificates(state, "main", [])
    return state


@pytest.fixture
def daemon(nats_process: NatsProcess, tmp_path: Path, state: Path) -> Iterator[DaemonProcess]:
    """On every address of this machine, and so beyond loopback."""
    process = DaemonProcess(tmp_path / "daemon", nats_process.url, settings=SETTINGS)
    shutil.copytree(state, process.state)
    process.http = "0.0.0.0:0"
    process.spawn()
    yield process
    process.kill()


def until_url(daemon: DaemonProcess) -> str:
    for _ in range(500):
        path = daemon.state / "daemon" / "http.url"
        if path.exists():
            return path.read_text().strip().replace("0.0.0.0", "127.0.0.1")
        asyncio.run(asyncio.sleep(0.02))
    raise AssertionError(daemon.log)


def test_the_daemons_pages_need_the_token_and_tls(daemon: DaemonProcess) -> None:
    url, ca = until_url(daemon), daemon.state / "tls" / "ca.pem"
    assert url.startswith("https://")
    token = daemon.state / "keys" / "http.token"
    assert token.stat().st_mode & 0o777 == 0o600
    for page in ("/", "/metrics", "/healthz", "/readyz", "/stats", "/nothing"):
        assert read(url + page, ca=ca)[0] == 401
        assert read(url + page, ca=ca, token="x" * 43)[0] == 401
    assert read(url + "/healthz", ca=ca, token=token.read_text().strip()) == (200, "ok\n")
    assert "gpuyard_" in read(url + "/metrics", ca=ca, token=token.read_text().strip())[1]
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        read(url.replace("https://", "http://") + "/healthz")
    assert "http.refused" in daemon.log


def test_without_a_certificate_the_daemon_does_not_open_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpuyard_daemon", "--state", str(tmp_path), "--http", "0.0.0.0:0"]
    done = subprocess.run(
        [*command, "--nats", "nats://127.0.0.1:1", "--no-authentication"],
        capture_output=True, text=True, timeout=30, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == EXIT_BAD_CONFIG
    assert "that takes TLS" in done.stdout + done.stderr


def test_loopback_stays_as_it_was(tmp_path: Path) -> None:
    guard = DaemonConfig(state=str(tmp_path), http="127.0.0.1:0").http_guard()
    assert (guard.token, guard.tls) == ("", None)


async def test_an_agents_metrics_need_the_token_and_tls(state: Path, tmp_path: Path) -> None:
    cert, key = make_node_certificate(state, "n-1", ["n-1.example"])
    guard = guard_for("0.0.0.0", tmp_path / "http.token", cert, key)
    place = Place(guard)
    await place.take("127.0.0.1", 0)
    door = AgentDoor(Metrics(dict, lambda: 0), AgentHealth(), place)
    url, ca = await door.open(), state / "tls" / "ca.pem"
    try:
        for token, status in (("", 401), ("wrong-token-of-some-length", 401), (guard.token, 200)):
            found, _ = await asyncio.to_thread(read, url + "/metrics", ca=ca, token=token)
            assert found == status
        assert door.refused == 2
    finally:
        await door.close()
