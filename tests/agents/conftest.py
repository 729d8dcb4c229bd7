"""Fixtures of the agent's tests."""

from __future__ import annotations

import pytest

from support.agent_core import CoreHarness


@pytest.fixture
def core() -> CoreHarness:
    return CoreHarness()
