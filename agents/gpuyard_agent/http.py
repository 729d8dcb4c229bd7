"""`/metrics` for Prometheus and `/healthz` for whoever restarts the agent; beyond loopback for those with the token."""

from __future__ import annotations

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from gpuyard_agent.health import Health
from gpuyard_agent.metrics import Metrics
from gpuyard_protocol.http_guard import OPEN, HttpGuard

_log = structlog.get_logger("gpuyard_agent.http")


class HttpDoor:
    """One listening socket; `open` returns the URL."""

    def __init__(self, host: str, port: int, metrics: Metrics, health: Health, guard: HttpGuard = OPEN) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._health = health
        self._guard = guard
        #: Requests without the token.
        self.refused = 0
        self._runner: web.AppRunner | None = None

    async def open(self) -> str:
        """Raises `OSError` when the address is taken."""
        app = web.Application(middlewares=[self._admit])
        app.router.add_get("/metrics", self._on_metrics)
        app.router.add_get("/healthz", self._on_healthz)
        self._runner = runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self._host, self._port, ssl_context=self._guard.tls).start()
        host, port = runner.addresses[0][:2]
        return f"{self._guard.scheme}://{host}:{port}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._guard.admits(request.headers.get("Authorization", "")):
            return await handler(request)
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th …: a flood fills no log
            _log.warning("http refused", peer=request.remote, path=request.path[:100], so_far=self.refused)
        return web.Response(status=401, text="a token is needed\n", headers={"WWW-Authenticate": "Bearer"})

    async def _on_metrics(self, _: web.Request) -> web.Response:
        self._metrics.connected.set(self._health.is_connected)
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _on_healthz(self, _: web.Request) -> web.Response:
        health = self._health
        if not health.is_alive:
            return web.Response(status=503, text=f"no turn for {health.age_s:.0f} s\n")
        return web.Response(text="ok\n" if health.is_connected else "ok, not connected to NATS\n")
