"""The worlds that the suite of buses is played on, each in memory and on a real server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.bus_world import LIMITED, World
from support.nats import NatsProcess

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def limited_nats(tmp_path_factory: pytest.TempPathFactory) -> NatsProcess:
    server = NatsProcess(tmp_path_factory.mktemp("limited-nats"), LIMITED)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest, limited_nats: NatsProcess) -> AsyncIterator[World]:
    world = World(limited_nats if request.param == "nats" else None)
    yield world
    await world.leave()


@pytest.fixture(params=["memory", "nats"])
async def fragile_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A world of the test's own, which it may stop and start."""
    server = NatsProcess(tmp_path / "nats") if request.param == "nats" else None
    if server is not None:
        server.start()
    world = World(server)
    yield world
    await world.leave()
    if server is not None:
        server.kill()


@pytest.fixture
def root() -> str:
    """A subject that no other test uses; it is under `ok.`, where the limited party may go."""
    return f"ok.t{next(_numbers)}"
