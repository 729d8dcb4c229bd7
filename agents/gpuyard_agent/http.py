"""`/metrics` for Prometheus and `/healthz` for whoever restarts the agent."""

from __future__ import annotations

from aiohttp import web

from gpuyard_agent.health import Health
from gpuyard_agent.metrics import Metrics
from gpuyard_protocol.service.http_door import EXPOSITION, GuardedDoor
from gpuyard_protocol.service.http_place import Place


class HttpDoor(GuardedDoor):
    def __init__(self, metrics: Metrics, health: Health, place: Place) -> None:
        super().__init__(place, {"/metrics": self._on_metrics, "/healthz": self._on_healthz})
        self._metrics = metrics
        self._health = health

    async def _on_metrics(self, _: web.Request) -> web.Response:
        self._metrics.connected.set(self._health.is_connected)
        return web.Response(body=self._metrics.text(), headers={"Content-Type": EXPOSITION})

    async def _on_healthz(self, _: web.Request) -> web.Response:
        health = self._health
        if not health.is_alive:
            return web.Response(status=503, text=f"no turn for {health.age_s:.0f} s\n")
        return web.Response(text="ok\n" if health.is_connected else "ok, not connected to NATS\n")
