"""The address of a service's pages: taken first, and served when there is something to serve it with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpuyard_protocol.service.http_guard import HttpGuard


class Place:
    """An address that nobody else can take. Until it is served, whoever comes is refused by the host."""

    def __init__(self, guard: HttpGuard) -> None:
        self.guard = guard
        self._server: asyncio.Server | None = None
        self._protocol: Callable[[], asyncio.BaseProtocol] = asyncio.Protocol

    async def take(self, host: str, port: int) -> None:
        """Raises `OSError` when the address is taken."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: self._protocol(), host, port, ssl=self.guard.tls, start_serving=False
        )

    @property
    def url(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{self.guard.scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def serve(self, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        assert self._server is not None
        self._protocol = protocol
        await self._server.start_serving()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
