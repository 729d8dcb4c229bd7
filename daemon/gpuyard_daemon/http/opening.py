"""The page of a daemon from its address to its end: the address is taken at once, the page opens when there is time.

Reading the web server takes as long as replaying ten thousand jobs, and who restarts a daemon waits for its orders. So
the page follows the first decision. A start that takes longer (without NATS, behind a leader, with a long replay) opens
it meanwhile, so that its health can be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from typing import TYPE_CHECKING

import structlog

from gpuyard_daemon.config import EXIT_BAD_CONFIG, DaemonConfig
from gpuyard_daemon.exits import Fate
from gpuyard_daemon.health import Health
from gpuyard_daemon.recovery import StartRefused
from gpuyard_protocol.service.http_place import Place
from gpuyard_protocol.service.settings_file import BadConfig

if TYPE_CHECKING:
    from gpuyard_daemon.http.server import HttpDoor
    from gpuyard_daemon.http.sources import Sources

log = structlog.get_logger("daemon")

#: A start that takes longer than this is one to be asked about.
PATIENCE_S = 3.0
#: From when the daemon leads: for what waited to be decided.
REST_S = 0.3


class Opening:
    """The page, now or later."""

    def __init__(self, config: DaemonConfig, health: Health, fate: Fate, place: Place) -> None:
        self._config = config
        self._health = health
        self._fate = fate
        self._place = place
        self._is_wanted = asyncio.Event()
        self._door: HttpDoor | None = None
        self._sources: Sources | None = None
        self._opening = asyncio.get_running_loop().create_task(self._open(), name="page")

    def show(self, sources: Sources) -> None:
        """The daemon leads."""
        self._sources = sources
        if self._door is not None:
            self._door.show(sources)
        asyncio.get_running_loop().call_later(REST_S, self._is_wanted.set)

    async def _open(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._is_wanted.wait()
        # In a thread, so that the loop goes on meanwhile.
        server = await asyncio.to_thread(importlib.import_module, "gpuyard_daemon.http.server")
        door: HttpDoor = server.HttpDoor(self._health, self._place)
        try:
            url = await door.open()
        except OSError as error:
            self._fate.seal(EXIT_BAD_CONFIG, f"cannot listen on {self._config.http}: {error.strerror or error}")
            return
        self._door = door
        if self._sources is not None:
            door.show(self._sources)
        # For whoever started us with port 0; whole or not there.
        note = self._config.directory / "http.url.new"
        note.write_text(url + "\n")
        note.replace(self._config.directory / "http.url")
        log.info("http.listening", url=url)

    async def opened(self) -> None:
        """Return when the page is open, or will not be."""
        await asyncio.wait([self._opening])

    async def close(self) -> None:
        self._opening.cancel()
        await asyncio.gather(self._opening, return_exceptions=True)
        self._place.close()
        if self._door is not None:
            await self._door.close()


async def begin(config: DaemonConfig, health: Health, fate: Fate) -> Opening | None:
    """Take the address; None if there is to be no page. `StartRefused` if it cannot be had."""
    address = config.http_address()
    if address is None:
        return None
    try:
        place = Place(config.http_guard())
        await place.take(*address)
    except BadConfig as error:
        raise StartRefused(str(error)) from None
    except OSError as error:
        raise StartRefused(f"cannot listen on {config.http}: {error.strerror or error}") from None
    return Opening(config, health, fate, place)
