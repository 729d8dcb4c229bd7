"""`gpuyard init`: what a yard on several machines needs before its services start, made on the head node.

Keys, the NATS server's configuration, and for each user a directory to hand out. `gpuyard up` makes the same for one
machine and runs it; this command runs nothing. It may be called again at any time: what is there stays, what is named
anew is added.

It must run as the account that the daemon and the NATS server run as, since keys are readable by their owner alone.

This module is loaded with every `gpuyard` command, so it imports nothing that takes time or an extra.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.context import Context, default_state_dir, render_context
from gpuyard.errors import GpuyardError

if TYPE_CHECKING:
    from gpuyard_daemon.yard.keys import YardKeys

_State = typer.Option("--state", metavar="DIR", help="Directory of the yard (/var/lib/gpuyard on a head node).")
_Yard = typer.Option("--yard", metavar="NAME", help="Name of the yard, as in daemon.toml.")
_Listen = typer.Option("--listen", metavar="HOST:PORT", help="Where the NATS server listens; kept from the last time.")
_Url = typer.Option("--url", metavar="URL", help="How users and nodes reach it: nats://HEAD:4222; kept likewise.")
_Nodes = typer.Option("--node", metavar="NAME", help="A GPU host that may join; may be given repeatedly.")
_Users = typer.Option("--user", metavar="TENANT/USER", help="A tenant's user; may be given repeatedly.")
_Operators = typer.Option("--operator", metavar="NAME", help="Who runs the yard; may be given repeatedly.")

DEFAULT_LISTEN = "127.0.0.1:4222"
#: The streams take this share of the server's store at most; the rest is the server's own.
STREAMS_PERCENT = 95


def register(app: typer.Typer) -> None:
    app.command("init")(init)


def init(
    state: Annotated[Path | None, _State] = None,
    yard: Annotated[str, _Yard] = "main",
    listen: Annotated[str, _Listen] = "",
    url: Annotated[str, _Url] = "",
    node: Annotated[list[str] | None, _Nodes] = None,
    user: Annotated[list[str] | None, _Users] = None,
    operator: Annotated[list[str] | None, _Operators] = None,
) -> None:
    """Make keys and the NATS configuration of a yard on several machines (run as its account, on the head)."""
    from gpuyard_daemon.yard.nats_server import ConfigurationError
    from gpuyard_protocol.bus.base import BusError

    directory = (state or default_state_dir()).absolute()
    users = [_tenant_and_user(text) for text in user or []]
    try:
        lines = _initialise(directory, yard, listen, url, node or [], users, operator or [])
    except (ConfigurationError, BusError) as error:
        raise GpuyardError(str(error)) from None
    except OSError as error:
        raise GpuyardError(f"{error.filename or directory}: {error.strerror or error}") from None
    sys.stdout.write("\n".join(lines) + "\n")


def _tenant_and_user(text: str) -> tuple[str, str]:
    tenant, slash, name = text.partition("/")
    if not slash:
        raise typer.BadParameter(f"found {text!r}; expected TENANT/USER", param_hint="--user")
    return tenant, name


def _initialise(
    directory: Path,
    yard: str,
    listen: str,
    url: str,
    nodes: list[str],
    users: list[tuple[str, str]],
    operators: list[str],
) -> list[str]:
    """Do it, and say what is to be done next."""
    from gpuyard_daemon.yard.keys import YardKeys

    directory.mkdir(parents=True, exist_ok=True)
    _check_owner(directory)
    keys = YardKeys.load_or_create(directory / "keys")
    settings = _Settings.settle(directory / "nats", listen, url)
    made = [("node", name, keys.add_node(name)) for name in nodes]
    made += [("operator", name, keys.add_operator(name)) for name in operators]
    made += [("user", f"{tenant}/{name}", keys.add_user(tenant, name)) for tenant, name in users]
    config = _write_server_config(directory / "nats", yard, settings, keys)
    for tenant, name in users:
        _write_client(directory / "clients" / f"{tenant}.{name}", yard, settings.url, tenant, name, keys)
    budget_mib = settings.store_bytes * STREAMS_PERCENT // 100 // 2**20
    lines = [f"{config}: NATS server on {settings.listen}, reached as {settings.url}"]
    lines += [f"{path}: key of {kind} {name}" for kind, name, path in made]
    lines += [f"{directory / 'clients' / f'{tenant}.{name}'}: for {name} of {tenant}" for tenant, name in users]
    lines += [
        f"daemon.toml: [journal] budget of at most {budget_mib}Mi fits into this server",
        "a server that runs learns of it by: systemctl reload gpuyard-nats",
    ]
    return lines


def _check_owner(directory: Path) -> None:
    owner = directory.stat().st_uid
    if owner != os.geteuid():
        import pwd

        name = pwd.getpwuid(owner).pw_name
        raise GpuyardError(
            f"{directory} belongs to {name}: run this as that account, so that the daemon can read the keys "
            f"(runuser -u {name} -- gpuyard init …)"
        )


class _Settings:
    """Address and size of the NATS server, remembered beside its store: the size must not shrink under the streams."""

    def __init__(self, listen: str, url: str, store_bytes: int) -> None:
        self.listen = listen
        self.url = url
        self.store_bytes = store_bytes
        self.host, _, port = listen.rpartition(":")
        if not self.host or not port.isdigit() or not 0 < int(port) < 65536:
            raise typer.BadParameter(f"found {listen!r}; expected HOST:PORT", param_hint="--listen")
        self.port = int(port)

    @classmethod
    def settle(cls, directory: Path, listen: str, url: str) -> _Settings:
        import msgspec

        from gpuyard_daemon.yard.nats_server import store_budget

        directory.mkdir(mode=0o700, exist_ok=True)
        path = directory / "init.json"
        kept = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
        listen = listen or kept.get("listen", DEFAULT_LISTEN)
        url = url or kept.get("url", f"nats://{listen}")
        settings = cls(listen, url, int(kept.get("store_bytes", "0")) or store_budget(directory))
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode({"listen": listen, "url": url, "store_bytes": str(settings.store_bytes)}))
        draft.replace(path)
        return settings


def _write_server_config(directory: Path, yard: str, settings: _Settings, keys: YardKeys) -> Path:
    """Put a checked configuration in place; one that the server would refuse never gets there."""
    from gpuyard_daemon.yard.accounts import ServerSettings, server_config
    from gpuyard_daemon.yard.nats_server import find_server

    path = directory / "nats.conf"
    draft = path.with_suffix(".draft")
    host = settings.host.strip("[]")
    draft.write_text(server_config(ServerSettings(yard, directory, settings.store_bytes, host, settings.port), keys))
    verdict = subprocess.run(
        [find_server(), "-t", "-c", draft], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if verdict.returncode != 0:
        raise GpuyardError(f"the NATS server refuses {draft}: {verdict.stdout.strip()[-2000:]}")
    draft.replace(path)
    return path


def _write_client(directory: Path, yard: str, url: str, tenant: str, user: str, keys: YardKeys) -> None:
    """What a user copies to `~/.config/gpuyard/`."""
    directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    context = Context(yard=yard, url=url, tenant=tenant, user=user, key="user.seed")
    for name, text in (("user.seed", keys.user(tenant, user).read_text()), ("context.toml", render_context(context))):
        path = directory / name
        path.touch(mode=0o600)
        path.write_text(text)
