"""What a user takes along: a directory with a context, the user's key, and whom to trust.

    clients/<tenant>.<user>/   context.toml  user.seed  ca.pem (with TLS)

Paths inside are relative, so the directory works wherever it is copied to, usually `~/.config/gpuyard/`. A user who
keeps the key to himself finds no `user.seed` there: he puts his own beside the context.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gpuyard.context import FILE_NAME, Context, load_context, render_context
from gpuyard.errors import NoYard
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.server_files import Server
from gpuyard_protocol.names import Tenant, User

SEED = "user.seed"
CA = "ca.pem"


def client_directory(state: Path, tenant: Tenant, user: User) -> Path:
    return state / "clients" / f"{tenant}.{user}"


def write_client(state: Path, server: Server, tenant: Tenant, user: User, keys: YardKeys) -> Path:
    """The user's directory, as things are now."""
    directory = client_directory(state, tenant, user)
    directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    tls = server.settings.tls
    ca = CA if tls is not None else ""
    context = Context(yard=server.settings.yard, url=server.url, tenant=tenant, user=user, key=SEED, tls_ca=ca)
    _write(directory / FILE_NAME, render_context(context))
    if tls is not None:
        _write(directory / CA, tls.ca.read_text())
    seed = keys.user(tenant, user)
    if seed.exists():
        key = Path(server.key_file(seed)).read_text()
        for copy in {directory, *_copies(state, tenant, user)}:
            _write(copy / SEED, key)
    else:
        (directory / SEED).unlink(missing_ok=True)
    return directory


def remove_clients(state: Path, tenant: Tenant, user: User) -> None:
    for directory in {client_directory(state, tenant, user), *_copies(state, tenant, user)}:
        shutil.rmtree(directory, ignore_errors=True)


def _copies(state: Path, tenant: Tenant, user: User) -> Iterator[Path]:
    """Every directory of clients that speaks as this user; `gpuyard up` names the sudo user's by his login."""
    for path in (state / "clients").glob(f"*/{FILE_NAME}"):
        with contextlib.suppress(NoYard):
            context = load_context(path)
            if (context.tenant, context.user) == (tenant, user):
                yield path.parent


def _write(path: Path, text: str) -> None:
    """In place, so that a copy that belongs to another account goes on belonging to it."""
    path.touch(mode=0o600)
    path.write_text(text)
