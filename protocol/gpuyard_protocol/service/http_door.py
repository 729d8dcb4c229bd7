"""The listening socket of a service; beyond loopback it opens for those with the token (`http_guard`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from gpuyard_protocol.service.http_place import Place

_log = structlog.get_logger("http")

Page = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: Content type of Prometheus' text format.
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class GuardedDoor:
    """One listening socket and its pages, by path. `open` returns the URL."""

    def __init__(self, place: Place, pages: Mapping[str, Page]) -> None:
        self._place = place
        self._guard = place.guard
        self._pages = pages
        #: Requests without the token.
        self.refused = 0
        self._runner: web.AppRunner | None = None

    async def open(self) -> str:
        """Serve the place, which has been taken; returns the URL."""
        app = web.Application(middlewares=[self._admit])
        for path, page in self._pages.items():
            app.router.add_get(path, page)
        self._runner = runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        assert runner.server is not None
        await self._place.serve(runner.server)
        return self._place.url

    async def close(self) -> None:
        self._place.close()
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._guard.admits(request.headers.get("Authorization", "")):
            return await handler(request)
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th …: a flood fills no log
            _log.warning("http.refused", peer=request.remote, path=request.path[:100], so_far=self.refused)
        return web.Response(status=401, text="a token is needed\n", headers={"WWW-Authenticate": "Bearer"})
