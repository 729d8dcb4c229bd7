"""When an agent counts as alive."""

from __future__ import annotations

import pytest

from gpuyard_agent import health
from gpuyard_agent.health import Health


def test_an_agent_whose_turns_do_not_end_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(health.time, "monotonic", lambda: now_s)
    one = Health()
    assert one.is_alive
    now_s += health.STALLED_S
    assert not one.is_alive
    one.turned()
    assert one.is_alive
