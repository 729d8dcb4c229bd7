"""`gpuyard init`: a head node's files, made twice without harm, and good enough for a real server."""

from __future__ import annotations

import asyncio
import stat
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gpuyard.context import load_context
from gpuyard.errors import GpuyardError
from gpuyard_daemon.yard import init
from gpuyard_daemon.yard.accounts import DAEMON_INBOX, node_inbox, user_inbox
from gpuyard_protocol.bus.base import PermissionDenied
from gpuyard_protocol.bus.nats import connect
from support.nats import NatsProcess


def run(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    init.register(app)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_what_it_makes_lets_daemon_node_and_user_in_and_nobody_else(tmp_path: Path) -> None:
    state = tmp_path / "state"
    run("--state", str(state), "--node", "gpu-1", "--user", "acme/alice", "--operator", "olga")
    config = (state / "nats" / "nats.conf").read_text().replace('"127.0.0.1:4222"', '"127.0.0.1:{port}"')
    server = NatsProcess(tmp_path / "server")
    server.config = "".join(part if part == "{port}" else _escaped(part) for part in _split(config))
    server.start()
    try:
        asyncio.run(_try_keys(server.url, state))
    finally:
        server.kill()


def _split(config: str) -> list[str]:
    before, port, after = config.partition("{port}")
    return [before, port, after]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


async def _try_keys(url: str, state: Path) -> None:
    client = load_context(state / "clients" / "acme.alice")
    for inbox, seed in (
        (DAEMON_INBOX, state / "keys" / "daemon.seed"),
        (node_inbox("gpu-1"), state / "keys" / "node-gpu-1.seed"),
        (user_inbox("alice"), Path(client.key)),
    ):
        bus = await connect(url, name="test", inbox_prefix=inbox, seed=str(seed))
        await bus.flush()
        await bus.close()
    with pytest.raises(PermissionDenied):
        await connect(url, name="test", inbox_prefix="_INBOX.mallory")


def test_a_second_call_keeps_every_key_and_the_address(tmp_path: Path) -> None:
    run("--state", str(tmp_path), "--listen", "0.0.0.0:4333", "--url", "nats://head:4333", "--user", "acme/alice")
    before = {path: path.read_bytes() for path in (tmp_path / "keys").rglob("*.seed")}
    run("--state", str(tmp_path), "--node", "gpu-2")
    after = {path: path.read_bytes() for path in (tmp_path / "keys").rglob("*.seed")}
    assert before.items() <= after.items()
    assert {path.name for path in after.keys() - before.keys()} == {"node-gpu-2.seed"}
    context = tomllib.loads((tmp_path / "clients" / "acme.alice" / "context.toml").read_text())
    assert (context["url"], context["key"]) == ("tls://head:4333", "user.seed")
    assert (context["tls_ca"], 'listen: "0.0.0.0:4333"' in (tmp_path / "nats" / "nats.conf").read_text()) == (
        "ca.pem",
        True,
    )


def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    run("--state", str(tmp_path), "--node", "gpu-1", "--user", "acme/alice")
    for path in tmp_path.rglob("*.seed"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--node", "GPU 1"), "not a name"), (("--user", "acme/Al"), "not a name"), (("--operator", ""), "not a name")],
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(GpuyardError, match=words):
        run("--state", str(tmp_path), *arguments)


@pytest.mark.parametrize("arguments", [("--user", "alice"), ("--listen", "4222"), ("--listen", "127.0.0.1:0")])
def test_what_cannot_be_read_is_a_wrong_parameter(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    init.register(app)
    assert CliRunner().invoke(app, ["--state", str(tmp_path), *arguments]).exit_code == 2
