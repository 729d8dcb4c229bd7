"""`gpuyard init`: what a yard on several machines needs before its services start, made on the head node.

Keys, the NATS server's configuration, and for each user a directory to hand out. `gpuyard up` makes the same for one
machine and runs it; this command runs nothing. It may be called again at any time: what is there stays, what is named
anew is added.

It must run as the account that the daemon and the NATS server run as, since keys are readable by their owner alone.

This module is loaded with every `gpuyard` command, so it imports nothing that takes time or an extra.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.context import default_state_dir
from gpuyard.errors import GpuyardError

if TYPE_CHECKING:
    from gpuyard_daemon.yard.server_files import KeptByInit, Server

_State = typer.Option("--state", metavar="DIR", help="Directory of the yard (/var/lib/gpuyard on a head node).")
_Yard = typer.Option("--yard", metavar="NAME", help="Name of the yard, as in daemon.toml (default: main).")
_Listen = typer.Option(
    "--listen",
    metavar="HOST:PORT",
    help="Where the NATS server listens, with TLS unless on a loopback address; kept from the last time.",
)
_Url = typer.Option("--url", metavar="URL", help="How users and nodes reach it: tls://HEAD:4222; kept likewise.")
_Peers = typer.Option(
    "--server",
    metavar="NAME=HOST",
    help="A NATS server of a cluster of three or five; given once for each. Kept from the last time.",
)
_Nodes = typer.Option("--node", metavar="NAME", help="A GPU host that may join; may be given repeatedly.")
_Users = typer.Option("--user", metavar="TENANT/USER", help="A tenant's user; may be given repeatedly.")
_Operators = typer.Option("--operator", metavar="NAME", help="Who runs the yard; may be given repeatedly.")
_Viewers = typer.Option("--viewer", metavar="NAME", help="Who may see all of it and change nothing; repeatedly.")

#: The streams take this share of the server's store at most; the rest is the server's own.
STREAMS_PERCENT = 95
ANY_ADDRESS = ("", "0.0.0.0", "::")


def register(app: typer.Typer) -> None:
    app.command("init")(init)


def init(
    state: Annotated[Path | None, _State] = None,
    yard: Annotated[str, _Yard] = "",
    listen: Annotated[str, _Listen] = "",
    url: Annotated[str, _Url] = "",
    server: Annotated[list[str] | None, _Peers] = None,
    node: Annotated[list[str] | None, _Nodes] = None,
    user: Annotated[list[str] | None, _Users] = None,
    operator: Annotated[list[str] | None, _Operators] = None,
    viewer: Annotated[list[str] | None, _Viewers] = None,
) -> None:
    """Make keys and the NATS configuration of a yard on several machines.

    Run it on the head, as the yard's account.
    """
    from gpuyard_daemon.yard.server_files import ConfigurationError
    from gpuyard_protocol.bus.base import BusError

    directory = (state or default_state_dir()).absolute()
    users = [_tenant_and_user(text) for text in user or []]
    try:
        lines = _initialise(
            directory, (yard, listen, url), server or [], node or [], users, operator or [], viewer or []
        )
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
    address: tuple[str, str, str],
    peers: list[str],
    nodes: list[str],
    users: list[tuple[str, str]],
    operators: list[str],
    viewers: list[str],
) -> list[str]:
    """Do it, and say what is to be done next. `address`: yard, listen, url; "" for as before."""
    from gpuyard_daemon.yard.clients import write_client
    from gpuyard_daemon.yard.keys import YardKeys
    from gpuyard_daemon.yard.server_files import write_server_config

    directory.mkdir(parents=True, exist_ok=True)
    check_owner(directory)
    keys = YardKeys.load_or_create(directory / "keys")
    server = _settle(directory, *address, peers)
    made = [("node", name, keys.add_node(name)) for name in nodes]
    made += [("operator", name, keys.add_operator(name)) for name in operators]
    made += [("viewer", name, keys.add_viewer(name)) for name in viewers]
    made += [("user", f"{tenant}/{name}", keys.add_user(tenant, name)) for tenant, name in users]
    configs = [write_server_config(settings, keys) for settings in (server.settings, *server.peers)]
    for tenant, name in users:
        write_client(directory, server, tenant, name, keys)
    budget_mib = server.settings.store_bytes * STREAMS_PERCENT // 100 // 2**20
    where = f"{server.settings.host}:{server.settings.port}, reached as {server.url}"
    lines = [f"{config}: NATS server on {where}" for config in configs]
    if server.peers:
        lines += _about_cluster(directory, len(configs))
    if server.settings.tls is not None:
        lines.append(f'{server.settings.tls.ca}: whom to trust; the daemon needs: tls_ca = "{server.settings.tls.ca}"')
        lines.append(f'daemon.toml: nats = "{server.local_url}"')
    lines += [f"{path}: key of {kind} {name}" for kind, name, path in made]
    lines += [f"{directory / 'clients' / f'{tenant}.{name}'}: for {name} of {tenant}" for tenant, name in users]
    lines += [
        f"daemon.toml: [journal] budget of at most {budget_mib}Mi fits into this server",
        "a server that runs learns of it by: systemctl reload gpuyard-nats",
    ]
    return lines


def _about_cluster(directory: Path, servers: int) -> list[str]:
    return [
        f"each of the {servers} goes to its host as {directory / 'nats' / 'nats.conf'}, with {directory / 'tls'}",
        f"daemon.toml: replicas = {servers}",
        "who connects does so with NAME.creds, which lies beside each NAME.seed",
    ]


def check_owner(directory: Path) -> None:
    owner = directory.stat().st_uid
    if owner != os.geteuid():
        import pwd

        name = pwd.getpwuid(owner).pw_name
        raise GpuyardError(
            f"{directory} belongs to {name}: run this as that account, so that the daemon can read the keys "
            f"(runuser -u {name} -- gpuyard …)"
        )


def _settle(state: Path, yard: str, listen: str, url: str, peers: list[str]) -> Server:
    """Address, size and certificate of the NATS server; what is not said is as the last time."""
    import msgspec

    from gpuyard_daemon.yard.certificates import ensure_certificates
    from gpuyard_daemon.yard.nats_server import store_budget
    from gpuyard_daemon.yard.server_files import KeptByInit, is_loopback, read_server

    directory = state / "nats"
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / "init.json"
    kept = msgspec.json.decode(path.read_bytes(), type=KeptByInit) if path.exists() else KeptByInit()
    if listen:
        _check_listen(listen)
        kept.listen = listen
    kept.yard = yard or kept.yard
    if peers:
        _take_peers(kept, peers, listen)
    scheme = "nats" if is_loopback(kept.host) else "tls"
    kept.url = _with_scheme(scheme, url or kept.url or f"{_own_name(kept.host)}:{kept.port}")
    if not int(kept.store_bytes):
        kept.store_bytes = str(store_budget(directory))
    draft = path.with_suffix(".new")
    draft.write_bytes(msgspec.json.encode(kept))
    draft.replace(path)
    if scheme == "tls":
        ensure_certificates(state, kept.yard, _names(kept))
    return read_server(state)


def _take_peers(kept: KeptByInit, peers: list[str], listen: str) -> None:
    from gpuyard_daemon.yard.server_files import parse_peer

    hosts = dict(parse_peer(peer) for peer in peers)
    if len(hosts) != len(peers) or len(peers) not in (3, 5):
        raise typer.BadParameter(
            f"found {len(hosts)} servers; expected 3 or 5, each with its own name", param_hint="--server"
        )
    kept.peers = peers
    if not listen:
        kept.listen = "0.0.0.0:4222"
    kept.url = ",".join(f"{host}:{kept.port}" for host in hosts.values())


def _check_listen(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise typer.BadParameter(f"found {listen!r}; expected HOST:PORT", param_hint="--listen")


def _own_name(host: str) -> str:
    """Where others find a server that listens on `host`."""
    import socket

    return socket.getfqdn() if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host


def _with_scheme(scheme: str, url: str) -> str:
    """Whatever an address says, the server decides whether it is spoken to under TLS."""
    parts = [part.strip().rpartition("://")[2] for part in url.split(",")]
    return ",".join(f"{scheme}://{part}" for part in parts)


def _names(kept: KeptByInit) -> list[str]:
    """What this server is called by those who connect: by its addresses, and by the names of this machine."""
    import socket
    from urllib.parse import urlsplit

    reached = [urlsplit(part).hostname or "" for part in kept.url.split(",")]
    names = [*reached, kept.host, socket.gethostname(), socket.getfqdn()]
    return [name for name in names if name not in ANY_ADDRESS]
