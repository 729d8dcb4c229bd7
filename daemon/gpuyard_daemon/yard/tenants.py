"""`gpuyard tenants`: who may use the yard, changed on the head while it runs.

A tenant is an account of its own on the NATS server; a user of it is a key. Adding, renewing and removing take effect
when the command returns, without a restart; whoever was removed is disconnected. A user may keep the key to himself
and send its public half (`--public-key`).

This module is loaded with every `gpuyard` command, so it imports nothing that takes time or an extra.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from gpuyard.cli.output import AsJson, print_json, remark, say
from gpuyard.cli.tables import print_table
from gpuyard.context import default_state_dir
from gpuyard.errors import GpuyardError
from gpuyard_protocol.names import NAME_EXPECTED, Tenant, User, is_name, nearest

if TYPE_CHECKING:
    from gpuyard_daemon.yard.head import Head

T = TypeVar("T")

State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="Directory of the yard, on its head node."),
]
_PublicKey = Annotated[
    str, typer.Option("--public-key", metavar="KEY", help="Trust this key (U…), which the user made and keeps.")
]
_TenantName = Annotated[str, typer.Argument(metavar="TENANT")]
_WhoseName = Annotated[str, typer.Argument(metavar="TENANT/USER")]
_Users = Annotated[
    list[str] | None, typer.Option("--user", metavar="NAME", help="A user of it; may be given repeatedly.")
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Tenants and their users: list, add, rotate, remove (on the head).", no_args_is_help=True)
    commands: tuple[tuple[str, Callable[..., None]], ...] = (
        ("list", list_tenants),
        ("add", add),
        ("add-user", add_user),
        ("rotate", rotate),
        ("remove-user", remove_user),
        ("remove", remove),
    )
    for name, command in commands:
        group.command(name)(command)
    app.add_typer(group, name="tenants")


class _Whose(NamedTuple):
    tenant: Tenant
    user: User


def list_tenants(state: State = None, as_json: AsJson = False) -> None:
    """List tenants, their users and public keys."""
    found = _open(state).keys.public_tenants()
    if as_json:
        print_json([{"tenant": tenant, "users": users} for tenant, users in found.items()])
    elif not found:
        remark("there is no tenant yet: gpuyard tenants add NAME --user NAME")
    else:
        rows = [(tenant, user, key) for tenant, users in found.items() for user, key in (users or {"": ""}).items()]
        print_table(("TENANT", "USER", "PUBLIC KEY"), rows)


def add(tenant: _TenantName, user: _Users = None, public_key: _PublicKey = "", state: State = None) -> None:
    """Add a tenant, and users of it."""
    names = user or []
    if public_key and len(names) != 1:
        raise typer.BadParameter("is the key of one user: name that one with --user", param_hint="--public-key")
    head = _open(state)
    _check_name(tenant, "TENANT")
    for name in names:
        _check_name(name, "--user")
    if tenant in head.keys.public_tenants():
        raise GpuyardError(f"there is a tenant {tenant!r} already (more users: gpuyard tenants add-user {tenant}/NAME)")
    head.keys.add_tenant(tenant)
    _admit(head, [_Whose(tenant, name) for name in names], public_key, "tenants add", f"tenant {tenant}")


def add_user(whose: _WhoseName, public_key: _PublicKey = "", state: State = None) -> None:
    """Add a user to a tenant."""
    head, named = _open(state), _parse(whose)
    if named.user in _users_of(head, named.tenant):
        raise GpuyardError(f"{whose} is there already (a new key: gpuyard tenants rotate {whose})")
    _admit(head, [named], public_key, "tenants add-user", f"user {whose}")


def rotate(
    whose: Annotated[str, typer.Argument(metavar="TENANT[/USER]", help="Without a user: every user of the tenant.")],
    public_key: _PublicKey = "",
    state: State = None,
) -> None:
    """Replace keys: the old ones stop working at once."""
    head = _open(state)
    is_one = "/" in whose
    named = [_known_user(head, whose)] if is_one else [_Whose(whose, user) for user in _users_of(head, whose)]
    if public_key and len(named) != 1:
        raise typer.BadParameter("is the key of one user: name TENANT/USER", param_hint="--public-key")
    for tenant, user in named:
        if public_key:
            _trusting(head, tenant, user, public_key)
        elif head.keys.user(tenant, user).exists():
            head.keys.renew_user(tenant, user)
        else:
            raise GpuyardError(f"{user} of {tenant} keeps the key to himself: name the new one with --public-key")
    _apply(head, "tenants rotate", f"{'user' if is_one else 'tenant'} {whose}", named)
    _hand_out(head, named)


def remove_user(whose: _WhoseName, state: State = None) -> None:
    """Take a user out: the key stops working and its connections end."""
    from gpuyard_daemon.yard.clients import remove_clients

    head = _open(state)
    named = _known_user(head, whose)
    head.keys.remove_user(*named)
    remove_clients(head.state, *named)
    _apply(head, "tenants remove-user", f"user {whose}", [])
    say(f"{whose} is out; what he submitted goes on under the tenant")


def remove(tenant: _TenantName, state: State = None) -> None:
    """Take a tenant out with all its users."""
    from gpuyard_daemon.yard.clients import remove_clients

    head = _open(state)
    users = _users_of(head, tenant)
    head.keys.remove_tenant(tenant)
    for user in users:
        remove_clients(head.state, tenant, user)
    _apply(head, "tenants remove", f"tenant {tenant}", [])
    say(f"tenant {tenant} is out; jobs it had submitted run to their end")


# --- what the commands share ------------------------------------------------------------------------------------------


def _open(state: Path | None) -> Head:
    from gpuyard_daemon.yard.head import Head

    return Head(state if state is not None else default_state_dir())


def _admit(head: Head, named: list[_Whose], public_key: str, what: str, about: str) -> None:
    for tenant, user in named:
        if public_key:
            _trusting(head, tenant, user, public_key)
        else:
            head.keys.add_user(tenant, user)
    _apply(head, what, about, named)
    _hand_out(head, named)


def _trusting(head: Head, tenant: Tenant, user: User, public_key: str) -> None:
    from gpuyard_protocol.bus.base import BusError

    try:
        head.keys.trust_user(tenant, user, public_key)
    except BusError as error:
        raise typer.BadParameter(str(error), param_hint="--public-key") from None


def _apply(head: Head, what: str, about: str, new_users: list[_Whose]) -> None:
    if not run(head.apply(what, about, new_users=new_users)):
        remark("no NATS server of this yard runs: it takes the change in when it starts")


def _hand_out(head: Head, named: list[_Whose]) -> None:
    from gpuyard_daemon.yard.clients import SEED, write_client

    for tenant, user in named:
        directory = write_client(head.state, head.server, tenant, user, head.keys)
        missing = "" if (directory / SEED).exists() else f" (to be joined there by the user's own key, {SEED})"
        say(f"{directory}: for {user} of {tenant}{missing}")


def _parse(whose: str) -> _Whose:
    tenant, slash, user = whose.partition("/")
    if not slash:
        raise typer.BadParameter(f"found {whose!r}; expected TENANT/USER", param_hint="TENANT/USER")
    _check_name(tenant, "TENANT")
    _check_name(user, "USER")
    return _Whose(tenant, user)


def _check_name(name: str, what: str) -> None:
    if not is_name(name):
        raise typer.BadParameter(f"found {name!r}; expected {NAME_EXPECTED}", param_hint=what)


def _users_of(head: Head, tenant: Tenant) -> list[User]:
    known = head.keys.public_tenants()
    if tenant not in known:
        raise GpuyardError(f"there is no tenant {tenant!r}{_hint(tenant, known, f'gpuyard tenants add {tenant}')}")
    return list(known[tenant])


def _known_user(head: Head, whose: str) -> _Whose:
    named = _parse(whose)
    known = _users_of(head, named.tenant)
    if named.user not in known:
        raise GpuyardError(
            f"{named.tenant} has no user {named.user!r}{_hint(named.user, known, f'gpuyard tenants add-user {whose}')}"
        )
    return named


def _hint(name: str, known: Any, otherwise: str) -> str:
    near = nearest(name, known)
    return f": did you mean {near!r}?" if near else f" (to add it: {otherwise})"


def run(work: Coroutine[Any, Any, T]) -> T:
    """The work's result; Ctrl-C ends it."""
    return asyncio.run(work)
