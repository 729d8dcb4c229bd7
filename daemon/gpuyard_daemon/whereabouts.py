"""From where tenants' users and operators are connected, for the audit.

A request says who sent it and not from where: it is a subject and bytes. The server knows each connection's address and
the key that it logged in with, and tells both to whoever holds the key of its own account, which lies on the head.
Who is connected from several addresses at once is said to be at each of them. A daemon without that key knows nobody's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_protocol.bus.base import Bus, BusError, Message

log = structlog.get_logger("whereabouts")

#: Keys whose last address is remembered after they have gone.
KEYS_MAX = 10_000
#: Addresses told of one who is connected from many.
TOLD_MAX = 3
#: A key that was not known may be one just made: the files are read again, and not more often than this.
READ_AGAIN_S = 1.0
ASK_TIMEOUT_S = 5.0
PAGE = 1024


class _Client(msgspec.Struct):
    id: int = 0
    user: str = ""
    host: str = ""


class _Server(msgspec.Struct):
    id: str = ""


class _Event(msgspec.Struct):
    client: _Client
    server: _Server


class Whereabouts:
    def __init__(self, keys: Path) -> None:
        self._keys = keys
        #: Addresses of the connections of each public key, by server and number; and the last one of those that left.
        self._live: dict[str, dict[tuple[str, int], str]] = {}
        self._last: dict[str, str] = {}
        #: `user acme/alice`, `operator olga`: their public keys.
        self._keys_of: dict[str, list[str]] = {}
        self._known: set[str] = set()
        self._is_news = asyncio.Event()

    def of(self, who: str) -> str:
        """Where they are connected from, or were last; "" where nobody knows."""
        keys = self._keys_of.get(who, ())
        live = sorted({host for key in keys for host in self._live.get(key, {}).values()})
        if live:
            return ", ".join(live[:TOLD_MAX]) + (", …" if len(live) > TOLD_MAX else "")
        return next((self._last[key] for key in keys if key in self._last), "")

    async def run(self, connect: Callable[[], Awaitable[Bus]]) -> None:
        """For ever. `connect`: with the key of the server's own account."""
        try:
            bus = await connect()
        except BusError as error:
            log.warning("whereabouts.unknown", error=str(error))
            return
        try:
            await bus.subscribe("$SYS.ACCOUNT.*.CONNECT", self._came)
            await bus.subscribe("$SYS.ACCOUNT.*.DISCONNECT", self._went)
            bus.on_reconnect(self._live.clear)
            await self._look_around(bus)
            await asyncio.to_thread(self._read_keys)
            while True:
                await self._is_news.wait()
                self._is_news.clear()
                await asyncio.to_thread(self._read_keys)
                await asyncio.sleep(READ_AGAIN_S)
        except BusError as error:
            log.warning("whereabouts.unknown", error=str(error))
        finally:
            await bus.close()

    # -- what the server says ------------------------------------------------------------------------------------------

    async def _look_around(self, bus: Bus) -> None:
        """Who is there already; of several servers, on the one that this daemon is connected to."""
        offset = 0
        while True:
            question = msgspec.json.encode({"auth": True, "limit": PAGE, "offset": offset})
            reply = await bus.request("$SYS.REQ.SERVER.PING.CONNZ", question, timeout=ASK_TIMEOUT_S)
            try:
                page: dict[str, Any] = msgspec.json.decode(reply.data)
                server, found = page["server"]["id"], page["data"]["connections"]
                clients = [_Client(each["cid"], each.get("authorized_user", ""), each["ip"]) for each in found]
            except (msgspec.MsgspecError, KeyError, TypeError) as error:
                log.warning("whereabouts.unreadable", error=str(error))
                return
            for client in clients:
                self._note(server, client)
            offset += PAGE
            if len(clients) < PAGE:
                return

    def _came(self, message: Message) -> None:
        for event in _read(message):
            self._note(event.server.id, event.client)

    def _note(self, server: str, client: _Client) -> None:
        if not client.user:
            return
        self._live.setdefault(client.user, {})[server, client.id] = client.host
        if client.user not in self._known:
            self._is_news.set()

    def _went(self, message: Message) -> None:
        for event in _read(message):
            connections = self._live.get(event.client.user, {})
            host = connections.pop((event.server.id, event.client.id), "")
            if not connections:
                self._live.pop(event.client.user, None)
            if host:
                self._last.pop(event.client.user, None)
                self._last[event.client.user] = host
                if len(self._last) > KEYS_MAX:
                    del self._last[next(iter(self._last))]

    # -- whose keys they are -------------------------------------------------------------------------------------------

    def _read_keys(self) -> None:
        """In a thread: one file for each key."""
        keys = YardKeys(self._keys)
        found: dict[str, list[str]] = {}
        try:
            others = {*keys.public_roles().values(), *keys.public_nodes().values()}
            for operator, key in [*keys.public_operators().items(), *keys.public_viewers().items()]:
                found.setdefault(f"operator {operator}", []).append(key)
            for tenant, users in keys.public_tenants().items():
                for user, key in users.items():
                    found.setdefault(f"user {tenant}/{user}", []).append(key)
        except (BusError, OSError) as error:
            log.warning("whereabouts.keys-unreadable", error=str(error))
            return
        self._keys_of = found
        self._known = others.union(*found.values())


def _read(message: Message) -> Iterable[_Event]:
    try:
        return (msgspec.json.decode(message.data, type=_Event),)
    except msgspec.MsgspecError as error:
        log.warning("whereabouts.unreadable", error=str(error))
        return ()
