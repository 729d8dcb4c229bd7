"""From where tenants' users and operators are connected, for the audit.

A request says who sent it and not from where: it is a subject and bytes. The server knows each connection's address and
the key that it logged in with, and tells both to whoever holds the key of its own account, which lies on the head.

Two ways lead there. The servers tell of each connection that comes and goes, on the side: what a new one asks at once
may be decided before its coming is heard of. And they can be asked, also for connections that have ended: all of them
when the daemon begins to look (or lost its own connection for a while), about one key when somebody acted of whom
nothing is known yet (`seek`). Either way each answer comes when it comes, and is noted.

Who is connected from several addresses at once is said to be at each of them. A daemon without that key knows nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from gpuyard_daemon.yard.accounts import DAEMON_INBOX
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_protocol.bus.base import Bus, BusError, Message

log = structlog.get_logger("whereabouts")

T = TypeVar("T")

#: Keys of which nobody is connected any more and whose last addresses are remembered.
KEYS_MAX = 10_000
#: Connections of one key that have ended and are remembered.
ENDED_MAX = 8
#: Addresses told of one who is connected from many.
TOLD_MAX = 3
#: Clocks and messages on different ways: who was there so shortly before or after counts as there, seconds.
NEAR_S = 1.0
#: A key that was not known may be one just made: the files are read again, and not more often than this. The servers
#: are asked about those who are sought as often.
ROUND_S = 0.5
#: Sought at once; of more, the audit says that it does not know.
SOUGHT_MAX = 1000
CONNECT_AGAIN_S = 5.0
PAGE = 1024
_ALL_STATES = 2
_ALL_SERVERS = "$SYS.REQ.SERVER.PING.CONNZ"


class _Client(msgspec.Struct):
    id: int = 0
    user: str = ""
    host: str = ""


class _Server(msgspec.Struct):
    id: str = ""


class _Event(msgspec.Struct):
    client: _Client
    server: _Server


class _Connection(msgspec.Struct):
    cid: int
    start: datetime
    ip: str = ""
    authorized_user: str = ""
    stop: datetime | None = None


class _Connections(msgspec.Struct):
    now: datetime
    connections: list[_Connection]
    offset: int = 0


class _Page(msgspec.Struct):
    server: _Server
    data: _Connections


@dataclass(slots=True)
class _Stay:
    """One connection."""

    #: The server, and its number there.
    connection: tuple[str, int]
    host: str
    #: Monotonic times; None: it is there.
    came_at: float
    left_at: float | None = None
    #: The server said that it ended; otherwise `left_at` is when this daemon lost sight of it.
    is_over: bool = False

    def touches(self, at: float) -> bool:
        return self.came_at <= at + NEAR_S and (self.left_at is None or self.left_at >= at - NEAR_S)


class Whereabouts:
    def __init__(self, keys: Path) -> None:
        self._keys = keys
        #: The connections of each public key, in the order of their coming; the keys in that of their last news.
        self._stays: dict[str, list[_Stay]] = {}
        #: `user acme/alice`, `operator olga`: their public keys.
        self._keys_of: dict[str, list[str]] = {}
        self._known: set[str] = set()
        self._sought: set[str] = set()
        #: Pages of a server's connections that are still to be asked for: the server, and where the page begins.
        self._pages: list[tuple[str, int]] = []
        self._is_news = asyncio.Event()
        #: There is no key, or no server, to ask with.
        self._is_blind = False
        self._reply_to = f"{DAEMON_INBOX}.where.{secrets.token_hex(6)}"

    def of(self, who: str, at: float | None = None) -> str:
        """Where they were connected from at a monotonic time (None: now), or last before; "" where nobody knows."""
        at = time.monotonic() if at is None else at
        stays = [stay for key in self._keys_of.get(who, ()) for stay in self._stays.get(key, ())]
        there = sorted({stay.host for stay in stays if stay.touches(at)})
        if there:
            return ", ".join(there[:TOLD_MAX]) + (", …" if len(there) > TOLD_MAX else "")
        before = [(stay.left_at, stay.host) for stay in stays if stay.left_at is not None and stay.left_at < at]
        return max(before)[1] if before else ""

    def seek(self, who: str) -> bool:
        """Ask the servers about somebody of whom `of` knows nothing; False: they cannot be asked."""
        if self._is_blind or len(self._sought) >= SOUGHT_MAX:
            return False
        self._sought.add(who)
        self._is_news.set()
        return True

    async def run(self, connect: Callable[[], Awaitable[Bus]]) -> None:
        """For ever. `connect`: with the key of the server's own account."""
        trouble = ""
        while True:
            try:
                bus = await connect()
            except BusError as error:
                self._is_blind = True
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("whereabouts.unknown", error=trouble)
                await asyncio.sleep(CONNECT_AGAIN_S)
                continue
            self._is_blind = False
            try:
                await self._listen(bus)
            except BusError as error:
                log.warning("whereabouts.unknown", error=str(error))
                await asyncio.sleep(CONNECT_AGAIN_S)
            finally:
                self._lose_sight()
                await bus.close()

    async def _listen(self, bus: Bus) -> None:
        await bus.subscribe("$SYS.ACCOUNT.*.CONNECT", self._came)
        await bus.subscribe("$SYS.ACCOUNT.*.DISCONNECT", self._went)
        await bus.subscribe(self._reply_to, self._told)
        bus.on_disconnect(self._lose_sight)
        bus.on_reconnect(self._look_around)
        self._look_around()
        while True:
            await self._is_news.wait()
            self._is_news.clear()
            await asyncio.to_thread(self._read_keys)
            with contextlib.suppress(BusError):  # once there is a connection again, everything is asked anew
                await self._ask(bus)
            await asyncio.sleep(ROUND_S)

    # -- what is asked of the servers ----------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Who is there, and was, on each server."""
        self._pages = [("", 0)]
        self._is_news.set()

    async def _ask(self, bus: Bus) -> None:
        pages, self._pages = self._pages, []
        for server, offset in pages:
            question = {"auth": True, "state": _ALL_STATES, "limit": PAGE, "offset": offset}
            subject = f"$SYS.REQ.SERVER.{server}.CONNZ" if server else _ALL_SERVERS
            await bus.publish(subject, msgspec.json.encode(question), reply=self._reply_to)
        sought, self._sought = self._sought, set()
        for key in {key for who in sought for key in self._keys_of.get(who, ())}:
            # The newest of them, if there are many.
            about = {"auth": True, "state": _ALL_STATES, "user": key, "sort": "last", "limit": ENDED_MAX}
            await bus.publish(_ALL_SERVERS, msgspec.json.encode(about), reply=self._reply_to)

    def _told(self, message: Message) -> None:
        """One server's page."""
        for page in _read(message, _Page):
            now, at = page.data.now, time.monotonic()
            for each in page.data.connections:
                came_at = at - (now - each.start).total_seconds()
                left_at = None if each.stop is None else at - (now - each.stop).total_seconds()
                stay = _Stay((page.server.id, each.cid), each.ip, came_at, left_at, is_over=left_at is not None)
                self._note(each.authorized_user, stay)
            if len(page.data.connections) == PAGE:
                self._pages.append((page.server.id, page.data.offset + PAGE))
                self._is_news.set()

    # -- what they tell ------------------------------------------------------------------------------------------------

    def _came(self, message: Message) -> None:
        for event in _read(message, _Event):
            stay = _Stay((event.server.id, event.client.id), event.client.host, time.monotonic())
            self._note(event.client.user, stay)

    def _went(self, message: Message) -> None:
        for event in _read(message, _Event):
            now, connection = time.monotonic(), (event.server.id, event.client.id)
            self._note(event.client.user, _Stay(connection, event.client.host, now, now, is_over=True))

    def _lose_sight(self) -> None:
        """Who goes now goes unseen; who is still there afterwards is found again."""
        now = time.monotonic()
        for stays in self._stays.values():
            for stay in stays:
                stay.left_at = now if stay.left_at is None else stay.left_at

    def _note(self, key: str, stay: _Stay) -> None:
        if not key:
            return
        stays = self._stays.pop(key, [])
        self._stays[key] = stays
        known = next((each for each in stays if each.connection == stay.connection), None)
        if known is None:
            stays.append(stay)
        elif not known.is_over:  # what a page said of it may be older than the word of its end
            known.left_at, known.is_over = stay.left_at, stay.is_over
        ended = [each for each in stays if each.left_at is not None]
        for each in ended[:-ENDED_MAX]:
            stays.remove(each)
        self._forget_the_oldest()
        if key not in self._known:
            self._is_news.set()

    def _forget_the_oldest(self) -> None:
        if len(self._stays) > KEYS_MAX:
            gone = (key for key, stays in self._stays.items() if all(stay.left_at is not None for stay in stays))
            oldest = next(gone, None)
            if oldest is not None:
                del self._stays[oldest]

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
        # What a key did before it was changed or taken out may still have to be told.
        for who, old in self._keys_of.items():
            seen = [key for key in old if key in self._stays and key not in found.get(who, ())]
            if seen:
                found.setdefault(who, []).extend(seen)
        self._keys_of = found
        self._known = others.union(*found.values())


def _read(message: Message, kind: type[T]) -> Iterable[T]:
    try:
        return (msgspec.json.decode(message.data, type=kind),)
    except msgspec.MsgspecError as error:
        log.warning("whereabouts.unreadable", error=str(error))
        return ()
