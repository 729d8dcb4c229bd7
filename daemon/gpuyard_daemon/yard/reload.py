"""A running NATS server takes in changed keys: no restart, connected clients stay, removed keys are put out.

Whoever changes keys need not be the one who runs the server. The server is asked through its own system account (the
yard holds that key), so this works the same for the server of `gpuyard up` and for systemd's, from any process that
may read the keys, and the server's answer says what was wrong if something was.

Where accounts are told by tokens, nothing is reloaded: the tokens are pushed to one server, and reach all.

In static mode, a new account answers only after a second reload (seen with 2.15.1): it is reloaded twice, and then
until a probe in the name of a new user comes through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec

from gpuyard_daemon.yard.accounts import API_INBOX, DAEMON_INBOX, user_inbox
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.operator_mode import account_tokens, says_the_same
from gpuyard_daemon.yard.server_files import Server, write_server_config
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError, Disconnected, Message
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.names import Tenant, User

CONNECT_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 0.5
#: Reloads until new users are answered; more than two are for a loaded machine.
ATTEMPTS = 5


async def apply_keys(server: Server, keys: YardKeys, *, new_users: Iterable[tuple[Tenant, User]] = ()) -> bool:
    """Let in the keys as they are now, and no others; False if no server runs that would have to learn of it.

    Returns when the new users reach the daemon's account. `ConfigurationError` or a `BusError` says what went wrong.
    """
    for settings in (server.settings, *server.peers):
        await asyncio.to_thread(write_server_config, settings, keys)
    try:
        system = await nats.connect(
            server.local_url,
            name="gpuyard reload",
            inbox_prefix=DAEMON_INBOX,
            seed=server.key_file(keys.sys),
            connect_timeout_s=CONNECT_TIMEOUT_S,
            tls_ca=server.tls_ca,
        )
    except Disconnected:
        return False
    try:
        if server.settings.by_tokens:
            await push_accounts(system, server.settings.yard, keys)
            return True
        name = await _server_id(system)
        await _reload(system, name)
        await _reload(system, name)
        for tenant, user in new_users:
            await _until_reached(system, name, server, keys, tenant, user)
    finally:
        await system.close()
    return True


async def push_accounts(system: NatsBus, yard: str, keys: YardKeys) -> None:
    """Tell one server of every account that has changed; it tells the others.

    Of those alone: answers that are under way between accounts are lost when one of the two is told anew.
    """
    for account, token in (await asyncio.to_thread(account_tokens, yard, keys)).items():
        if says_the_same(token, await _known_token(system, account)):
            continue
        reply = await system.request("$SYS.REQ.CLAIMS.UPDATE", token.encode(), timeout=REQUEST_TIMEOUT_S)
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
        if "error" in answer:
            said = answer["error"].get("description", "?")
            raise BusError(f"the NATS server refuses the token of account {account}: {said}")


async def _known_token(system: NatsBus, account: str) -> str:
    """What the servers believe of an account now; "": nothing, or none of them says."""
    try:
        reply = await system.request(f"$SYS.REQ.ACCOUNT.{account}.CLAIMS.LOOKUP", b"", timeout=REQUEST_TIMEOUT_S)
    except BusError:
        return ""
    return reply.data.decode(errors="replace")


async def _until_reached(
    system: NatsBus, name: str, server: Server, keys: YardKeys, tenant: Tenant, user: User
) -> None:
    if not keys.user(tenant, user).exists():
        return  # made its key elsewhere: nobody here can ask in its name
    for _ in range(ATTEMPTS):
        if await reaches_daemon(server.local_url, server.tls_ca, keys, tenant, user):
            return
        await _reload(system, name)
    raise BusError(f"the NATS server at {server.local_url} does not let {user} of {tenant} reach the yard")


async def _server_id(system: NatsBus) -> str:
    reply = await system.request("$SYS.REQ.SERVER.PING", b"{}", timeout=REQUEST_TIMEOUT_S)
    found: dict[str, Any] = msgspec.json.decode(reply.data)
    return str(found["server"]["id"])


async def _reload(system: NatsBus, name: str) -> None:
    reply = await system.request(f"$SYS.REQ.SERVER.{name}.RELOAD", b"", timeout=REQUEST_TIMEOUT_S)
    answer: dict[str, Any] = msgspec.json.decode(reply.data)
    if "error" in answer:
        raise BusError(f"the NATS server refuses its new configuration: {answer['error'].get('description', '?')}")


async def reaches_daemon(url: str, tls_ca: str | None, keys: YardKeys, tenant: Tenant, user: User) -> bool:
    """Ask as that user, answer as the daemon does: whether the way between the accounts is open."""
    try:
        api = await nats.connect(
            url, name="reload probe", inbox_prefix=API_INBOX, seed=str(keys.api), connect_timeout_s=1.0, tls_ca=tls_ca
        )
    except BusError:
        return False
    answers: set[asyncio.Task[None]] = set()

    def answer(message: Message) -> None:
        answers.add(asyncio.ensure_future(api.publish(message.reply, b"{}")))

    try:
        asker = await nats.connect(
            url,
            name="reload probe",
            inbox_prefix=user_inbox(user),
            seed=str(keys.user(tenant, user)),
            connect_timeout_s=1.0,
            tls_ca=tls_ca,
        )
        try:
            subject = f"q.{tenant}.{user}.probe"
            await api.subscribe(subject, answer)
            await asker.request(subject, b"{}", timeout=PROBE_TIMEOUT_S)
        finally:
            await asker.close()
    except BusError:
        return False
    finally:
        await api.close()
    return True
