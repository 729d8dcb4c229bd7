"""The listening socket and its five pages.

Beyond loopback whoever reads them needs the token (`gpuyard_protocol.http_guard`).

`/healthz` fails when the daemon does not get on, not only when it is gone; `/readyz` when a submission would not be
decided now.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from gpuyard_daemon.health import Health
from gpuyard_daemon.http.metrics import exposition, standby_exposition
from gpuyard_daemon.http.page import render
from gpuyard_daemon.http.sources import Sources
from gpuyard_protocol.codec import encode
from gpuyard_protocol.http_guard import OPEN, HttpGuard

log = structlog.get_logger("http")


class HttpDoor:
    """`open` before the daemon serves, so that health can be asked from the first moment; `show` once it does."""

    def __init__(self, host: str, port: int, health: Health, guard: HttpGuard = OPEN) -> None:
        self._host = host
        self._port = port
        self._health = health
        self._guard = guard
        #: Requests without the token.
        self.refused = 0
        self._sources: Sources | None = None
        self._exposition: Callable[[], bytes] = bytes
        self._runner: web.AppRunner | None = None

    def show(self, sources: Sources) -> None:
        self._sources = sources
        self._exposition = exposition(sources)

    async def open(self) -> str:
        """Listen; returns the URL. Raises OSError when the address is taken."""
        app = web.Application(middlewares=[self._admit])
        app.router.add_get("/", self._on_page)
        app.router.add_get("/metrics", self._on_metrics)
        app.router.add_get("/healthz", self._on_healthz)
        app.router.add_get("/readyz", self._on_readyz)
        app.router.add_get("/stats", self._on_stats)
        self._runner = runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, self._host, self._port, ssl_context=self._guard.tls).start()
        host, port = runner.addresses[0][:2]
        return f"{self._guard.scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._guard.admits(request.headers.get("Authorization", "")):
            return await handler(request)
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th …: a flood fills no log
            log.warning("http.refused", peer=request.remote, path=request.path[:100], so_far=self.refused)
        return web.Response(status=401, text="a token is needed\n", headers={"WWW-Authenticate": "Bearer"})

    async def _on_healthz(self, _: web.Request) -> web.Response:
        trouble, standby_of = self._health.stalled_because(), self._health.standby_of
        return web.Response(text=f"standby of {standby_of}\n") if standby_of and not trouble else _verdict(trouble)

    async def _on_readyz(self, _: web.Request) -> web.Response:
        return _verdict(self._health.unready_because())

    async def _on_metrics(self, _: web.Request) -> web.Response:
        text = self._exposition() if self._sources is not None else standby_exposition(self._health)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

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
