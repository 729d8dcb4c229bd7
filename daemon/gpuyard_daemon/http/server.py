"""The daemon's five pages.

`/healthz` fails when the daemon does not get on, not only when it is gone; `/readyz` when a submission would not be
decided now.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from gpuyard_daemon.health import Health
from gpuyard_daemon.http.metrics import exposition, standby_exposition
from gpuyard_daemon.http.page import render
from gpuyard_daemon.http.sources import Sources
from gpuyard_protocol.codec import encode
from gpuyard_protocol.service.http_door import EXPOSITION, GuardedDoor
from gpuyard_protocol.service.http_place import Place


class HttpDoor(GuardedDoor):
    """It may be opened before the daemon serves; `show` once it does."""

    def __init__(self, health: Health, place: Place) -> None:
        pages = {
            "/": self._on_page,
            "/metrics": self._on_metrics,
            "/healthz": self._on_healthz,
            "/readyz": self._on_readyz,
            "/stats": self._on_stats,
        }
        super().__init__(place, pages)
        self._health = health
        self._sources: Sources | None = None
        self._exposition: Callable[[], Awaitable[bytes]] | None = None

    def show(self, sources: Sources) -> None:
        self._sources = sources
        self._exposition = exposition(sources)

    async def _on_healthz(self, _: web.Request) -> web.Response:
        trouble, standby_of = self._health.stalled_because(), self._health.standby_of
        return web.Response(text=f"standby of {standby_of}\n") if standby_of and not trouble else _verdict(trouble)

    async def _on_readyz(self, _: web.Request) -> web.Response:
        return _verdict(self._health.unready_because())

    async def _on_metrics(self, _: web.Request) -> web.Response:
        text = await self._exposition() if self._exposition is not None else standby_exposition(self._health)
        return web.Response(body=text, headers={"Content-Type": EXPOSITION})

    async def _on_stats(self, _: web.Request) -> web.Response:
        if self._sources is None:
            return _verdict(self._health.unready_because())
        return web.Response(body=encode(self._sources.stats()), content_type="application/json")

    async def _on_page(self, _: web.Request) -> web.Response:
        if self._sources is None:
            return _verdict(self._health.unready_because())
        return web.Response(text=render(self._sources), content_type="text/html")


def _verdict(trouble: str) -> web.Response:
    return web.Response(status=503, text=trouble + "\n") if trouble else web.Response(text="ok\n")
