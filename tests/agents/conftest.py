"""Fixtures of the agent's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.agent_core import CoreHarness
from support.agents import AgentRoom, agent_room


@pytest.fixture
def core() -> CoreHarness:
    return CoreHarness()


@pytest.fixture
async def room() -> AsyncIterator[AgentRoom]:
    """A machine room whose one agent the test starts."""
    async with agent_room() as made:
        yield made
