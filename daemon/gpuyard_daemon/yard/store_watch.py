"""A stream that takes nothing while its server lives is found, and the server is started again.

Two things are asked every few seconds: what the server itself says of its streams (after a failed write it knows, and
goes on answering everything but that stream's messages), and whether an append to a small stream kept for this purpose
is acknowledged. A server that cannot be reached is not this file's business: whoever runs it starts it again anyway.

Jobs go on meanwhile; daemon and agents reconnect by themselves. Where the disk was full, the ballast is released
first, so that there is room to start with; it is taken again when there is plenty.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from gpuyard_daemon.yard.accounts import DAEMON_INBOX, PROBE
from gpuyard_daemon.yard.ballast import Ballast
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError, Disconnected, PermissionDenied, StreamSpec, StreamUnavailable
from gpuyard_protocol.bus.nats import NatsBus

INTERVAL_S = 2.0
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 3.0
#: Unanswered appends in a row, while the server answers otherwise, that mean a store that hangs.
HANGING_PROBES = 5
#: After a restart the server gets this long before it is judged again; doubled each time that it did not help.
REST_S = 10.0
REST_MAX_S = 300.0


class StoreWatch:
    """`restart` ends the server, which its supervisor then starts; `say` hears, in a sentence, of what was done."""

    def __init__(
        self,
        url: str,
        keys: YardKeys,
        yard: str,
        ballast: Ballast,
        *,
        tls_ca: str | None = None,
        restart: Callable[[], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self._url = url
        self._keys = keys
        self._yard = yard
        self._ballast = ballast
        self._tls_ca = tls_ca
        self._restart = restart
        self._say = say
        self._system: NatsBus | None = None
        self._bus: NatsBus | None = None
        self._unanswered = 0
        self._rest_s = REST_S
        self._rests_until = 0.0
        #: Whether somebody was told that the ballast is gone.
        self._is_told = False
        self.restarts = 0

    async def run(self) -> None:
        """For ever."""
        try:
            while True:
                await asyncio.sleep(INTERVAL_S)
                self._look_after_ballast()
                if time.monotonic() >= self._rests_until and (trouble := await self._trouble()):
                    await self._help(trouble)
        finally:
            await self._disconnect()

    def _look_after_ballast(self) -> None:
        is_there = self._ballast.restore()
        if not is_there and not self._is_told:
            room = self._ballast.free_bytes // 1024**2
            self._say(f"the disk of the NATS server is nearly full ({room} MiB free in {self._ballast.path.parent})")
        self._is_told = not is_there

    async def _help(self, trouble: str) -> None:
        self._say(f"the NATS server stores nothing ({trouble}); starting it again")
        if self._ballast.free_bytes < self._ballast.bytes and self._ballast.release():
            self._say(f"the disk is full: {self._ballast.bytes // 1024**2} MiB of ballast were released")
        await self._disconnect()
        self.restarts += 1
        await self._restart()
        self._rests_until = time.monotonic() + self._rest_s
        self._rest_s = min(self._rest_s * 2, REST_MAX_S)
        self._unanswered = 0

    # -- asking -----------------------------------------------------------------------------------------------------

    async def _trouble(self) -> str:
        """Why the server must be started again; "" if it need not be, or nobody can tell."""
        try:
            failed = await self._failed_write()
            if not failed:
                failed = await self._hanging()
        except BusError:
            await self._disconnect()
            return ""
        if not failed:
            self._rest_s = REST_S
        return failed

    async def _failed_write(self) -> str:
        """What the server knows of a write that failed."""
        if self._system is None:
            self._system = await self._connect(self._keys.sys)
        pong = await self._system.request("$SYS.REQ.SERVER.PING", b"{}", timeout=ANSWER_TIMEOUT_S)
        name = _plain(pong.data).get("server", {}).get("id", "")
        answer = await self._system.request(f"$SYS.REQ.SERVER.{name}.HEALTHZ", b"{}", timeout=ANSWER_TIMEOUT_S)
        health = _plain(answer.data).get("data", {})
        error = str(health.get("error", ""))
        return error if health.get("status") != "ok" and "write error" in error else ""

    async def _hanging(self) -> str:
        """Appends that are not answered, while questions are."""
        if self._bus is None:
            self._bus = await self._connect(self._keys.daemon)
        try:
            await self._bus.ensure_stream(probe_stream(self._yard))
            await self._bus.stream_publish(PROBE, b"", timeout=ANSWER_TIMEOUT_S)
        except (Disconnected, PermissionDenied, StreamUnavailable):
            # Of these the first is the supervisor's, and the others are no sign of a store that hangs.
            self._unanswered = 0
        except BusError as error:
            self._unanswered += 1
            return str(error) if self._unanswered >= HANGING_PROBES else ""
        else:
            self._unanswered = 0
        return ""

    async def _connect(self, seed: Path) -> NatsBus:
        return await nats.connect(
            self._url,
            name="gpuyard store watch",
            inbox_prefix=DAEMON_INBOX,
            seed=str(seed),
            connect_timeout_s=CONNECT_TIMEOUT_S,
            tls_ca=self._tls_ca,
        )

    async def _disconnect(self) -> None:
        connections = [bus for bus in (self._system, self._bus) if bus is not None]
        self._system = self._bus = None
        for bus in connections:
            with contextlib.suppress(BusError, OSError):
                await bus.close()


async def takes_messages(url: str, keys: YardKeys, yard: str, *, tls_ca: str | None, within_s: float) -> bool:
    """Whether an append is acknowledged now."""
    try:
        async with asyncio.timeout(within_s):
            bus = await nats.connect(
                url, name="gpuyard probe", inbox_prefix=DAEMON_INBOX, seed=str(keys.daemon), tls_ca=tls_ca
            )
            try:
                await bus.ensure_stream(probe_stream(yard))
                await bus.stream_publish(PROBE, b"", timeout=within_s)
            finally:
                await bus.close()
    except (BusError, OSError, TimeoutError):
        return False
    return True


def probe_stream(yard: str) -> StreamSpec:
    """One message at a time, of no content."""
    return StreamSpec(
        name=f"PRB_{yard}",
        subjects=(PROBE,),
        max_bytes=64 * 1024,
        max_messages_per_subject=1,
        discard_old=True,
        duplicate_window_s=120,
    )


def _plain(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}
