"""The server with accounts that several files here play roles on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from support.role_yard import ALL_STREAMS, Roles, RoleYard


@pytest.fixture(scope="module", params=["static", "tokens"])
def yard(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[RoleYard]:
    yard = RoleYard(tmp_path_factory.mktemp("yard"), by_tokens=request.param == "tokens")
    yard.server.start()
    yield yard
    yard.server.kill()


@pytest.fixture
async def roles(yard: RoleYard) -> AsyncIterator[Roles]:
    roles = Roles(yard)
    daemon = await roles.get("daemon")
    for spec in ALL_STREAMS:
        await daemon.ensure_stream(spec)
    yield roles
    await roles.close()
