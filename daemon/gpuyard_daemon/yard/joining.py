"""`gpuyard node token` on the head, `gpuyard node join` on a GPU host: how a host gets into a yard.

The host makes its own key; only the public half leaves it. What it brings along is the token, a key for that one
question (`gpuyard_daemon.yard.tokens`). The answer is handled by the daemon (`gpuyard_daemon.joining`).

`join` leaves behind what an agent needs, `node.toml` in its state directory, and key, `ca.pem` and settings beside each
other, and runs nothing. It may be repeated until it has succeeded: the key is kept.

This module is loaded with every `gpuyard` command, so it imports nothing that takes time or an extra.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import remark, say
from gpuyard.context import default_state_dir
from gpuyard.errors import Forbidden, GpuyardError, QueryFailed
from gpuyard_daemon.yard import node_commands
from gpuyard_protocol.names import NAME_EXPECTED, NodeId, is_name
from gpuyard_protocol.units import Duration, format_ms

if TYPE_CHECKING:
    from gpuyard_daemon.yard.tokens import Token
    from gpuyard_protocol.joining import JoinAnswer

LIFETIME = "1h"
LIFETIME_MAX_MS = 7 * 86_400_000
ANSWER_TIMEOUT_S = 20.0

_Name = Annotated[str, typer.Argument(metavar="NAME", help="What the node is to be called.")]
_HeadState = Annotated[
    Path | None, typer.Option("--state", metavar="DIR", help="Directory of the yard, on its head node.")
]
_Lifetime = Annotated[
    str, typer.Option("--for", metavar="TIME", help="How long it may be used: 30m, 1d; a week at most.")
]
_Replace = Annotated[bool, typer.Option("--replace", help="The node is there already, and gets a new key.")]
_Token = Annotated[
    str, typer.Option("--token", metavar="TOKEN", help="As `gpuyard node token` printed it; '-': from standard input.")
]
_Url = Annotated[str, typer.Option("--url", metavar="URL", help="Where the NATS server is (default: the token knows).")]
_AgentState = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="Directory of the agent (/var/lib/gpuyard/agent with the units)."),
]
_Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Its settings (for root: /etc/gpuyard/agent.toml; else in DIR)."),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Let GPU hosts join the yard, and take out those that are gone.", no_args_is_help=True)
    group.command("token")(token)
    group.command("join")(join)
    node_commands.register(group)
    app.add_typer(group, name="node")


def token(name: _Name, lifetime: _Lifetime = LIFETIME, replace: _Replace = False, state: _HeadState = None) -> None:
    """Print a one-time token for a GPU host (on the head)."""
    from gpuyard_daemon.yard.head import Head
    from gpuyard_daemon.yard.operator_mode import join_credential
    from gpuyard_daemon.yard.tokens import Token

    if not is_name(name):
        raise typer.BadParameter(f"found {name!r}; expected {NAME_EXPECTED}", param_hint="NAME")
    lifetime_ms = _lifetime_ms(lifetime)
    head = Head(state if state is not None else default_state_dir())
    if name in head.keys.public_nodes() and not replace:
        raise GpuyardError(f"there is a node {name!r} already: choose another name, or give it a new key (--replace)")
    seed = head.keys.tokens.issue(name, lifetime_ms, replaces=replace)
    if not asyncio.run(head.apply("node token", f"node {name}")):
        head.keys.tokens.revoke(name)
        raise GpuyardError("no NATS server of this yard runs, so nobody could join: start it first")
    settings = head.server.settings
    ca = settings.tls.ca.read_text() if settings.tls else ""
    credential = join_credential(head.keys, settings.yard, name) if settings.by_tokens else ""
    say(Token(node=name, url=head.server.url, seed=seed, credential=credential, ca=ca).to_text())
    remark(f"good once, for {format_ms(lifetime_ms)}; on the GPU host: gpuyard node join --token TOKEN")


def _lifetime_ms(text: str) -> int:
    try:
        lifetime_ms = int(Duration.parse(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from None
    if not 0 < lifetime_ms <= LIFETIME_MAX_MS:
        raise typer.BadParameter(f"found {text!r}; expected more than nothing and a week at most", param_hint="--for")
    return lifetime_ms


# --- on the host ------------------------------------------------------------------------------------------------------


def join(token: _Token, url: _Url = "", state: _AgentState = None, config: _Config = None) -> None:
    """Make this host's key and have it let in (on the GPU host).

    Run it as the account that the agent runs as.
    """
    import sys

    from gpuyard_daemon.yard.keys import make_seed
    from gpuyard_daemon.yard.tokens import Token
    from gpuyard_protocol.bus.base import BusError

    try:
        given = Token.from_text(sys.stdin.read() if token == "-" else token)
        directory = (state if state is not None else _default_agent_state()).absolute()
        settings = (config if config is not None else _default_config(directory)).absolute()
        _check_identity(directory, given.node)
        settings.parent.mkdir(parents=True, exist_ok=True)
        seed = make_seed(settings.parent / "node.seed")
        ca = settings.parent / "ca.pem"
        if given.ca:
            ca.write_text(given.ca)
        server = url or given.url
        answer = asyncio.run(_ask(given, server, str(ca) if given.ca else None, seed))
        _write_identity(directory, given.node)
        key = _key_file(seed, answer.credential)
        values = {"state": str(directory), "nats": server, "node": given.node, "key": str(key)}
        _write_settings(settings, values | ({"tls_ca": str(ca)} if given.ca else {}))
    except BusError as error:
        raise GpuyardError(str(error)) from None
    except OSError as error:
        raise GpuyardError(f"{error.filename}: {error.strerror or error}") from None
    say(f"{given.node} belongs to the yard {answer.yard}; settings: {settings}, key: {key}")
    remark(f"start it with: systemctl enable --now gpuyard-agent (or: gpuyard-agent --config {settings})")


def _default_agent_state() -> Path:
    return default_state_dir() / "agent"


def _default_config(directory: Path) -> Path:
    return Path("/etc/gpuyard/agent.toml") if os.geteuid() == 0 else directory / "agent.toml"


def _key_file(seed: Path, credential: str) -> Path:
    """What the agent connects with: its seed, or where servers believe signed tokens, seed and token in one file."""
    if not credential:
        return seed
    from gpuyard_daemon.yard.keys import write_private
    from gpuyard_daemon.yard.operator_mode import credentials
    from gpuyard_protocol.bus.credentials import CREDENTIALS_SUFFIX

    path = seed.with_suffix(CREDENTIALS_SUFFIX)
    write_private(path, credentials(credential, seed.read_text().strip()))
    return path


async def _ask(token: Token, url: str, tls_ca: str | None, seed: Path) -> JoinAnswer:
    """The yard's answer, once it lets this host's key in."""
    from gpuyard.link import ask
    from gpuyard_daemon.yard.accounts import join_inbox
    from gpuyard_daemon.yard.operator_mode import credentials
    from gpuyard_protocol.bus import nats
    from gpuyard_protocol.bus.base import PermissionDenied
    from gpuyard_protocol.bus.credentials import read_public_key
    from gpuyard_protocol.joining import JoinAnswer, JoinRequest
    from gpuyard_protocol.joining import join as join_subject

    request = JoinRequest(public_key=read_public_key(str(seed)), hostname=socket.gethostname())
    with tempfile.TemporaryDirectory(prefix="gpuyard-join-") as place:
        key = Path(place) / "token.seed"
        key.touch(mode=0o600)
        key.write_text(credentials(token.credential, token.seed) if token.credential else token.seed)
        try:
            bus = await nats.connect(
                url, name=f"join {token.node}", inbox_prefix=join_inbox(token.node), seed=str(key), tls_ca=tls_ca
            )
        except PermissionDenied:
            raise Forbidden(
                f"{url} does not know this token: it has expired, was used, or a newer one was made for {token.node}; "
                f"get a new one with `gpuyard node token {token.node}` on the head"
            ) from None
        try:
            answer = await ask(bus, join_subject(token.node), request, JoinAnswer, timeout_s=ANSWER_TIMEOUT_S)
        except QueryFailed as error:
            raise GpuyardError(f"the yard does not let {token.node} in: {error}") from None
        finally:
            await bus.close()
    return answer


def _check_identity(directory: Path, node: NodeId) -> None:
    """A ledger belongs to one name for ever."""
    try:
        known = tomllib.loads((directory / "node.toml").read_text()).get("node")
    except FileNotFoundError:
        return
    except tomllib.TOMLDecodeError as error:
        raise GpuyardError(f"{directory / 'node.toml'}: {error}") from None
    if known != node:
        raise GpuyardError(
            f"{directory} belongs to the node {known!r}: get a token for that name, or use another directory (--state)"
        )


def _write_identity(directory: Path, node: NodeId) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "node.toml"
    if not path.exists():
        path.write_text(
            f'# Minted once. Belongs to the ledger beside it; never copy one without the other.\nnode = "{node}"\n'
        )


def _write_settings(path: Path, values: dict[str, str]) -> None:
    """Put values into a file of settings, in the place of what it says or shows for them; the rest stays."""
    lines = path.read_text().splitlines() if path.exists() else ["# Settings of this host's agent."]
    end = next((number for number, line in enumerate(lines) if re.match(r"\s*\[", line)), len(lines))
    top, rest = lines[:end], lines[end:]
    for name, value in values.items():
        setting = f"{name} = {json.dumps(value)}"
        said = [number for number, line in enumerate(top) if re.match(rf"{name}\s*=", line)]
        shown = [number for number, line in enumerate(top) if re.match(rf"#\s*{name}\s*=", line)]
        if said or shown:
            top[(said or shown)[0]] = setting
        else:
            top.append(setting)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text("\n".join((*top, *rest)) + "\n")
    fresh.replace(path)
