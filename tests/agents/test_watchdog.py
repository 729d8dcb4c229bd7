"""Words to systemd, and when an agent counts as alive."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gpuyard_agent import health
from gpuyard_agent.health import Health
from gpuyard_agent.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_ready_alive_and_stopping(tmp_path: Path, abstract: bool) -> None:
    name = f"@gpuyard-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        notifier = Notifier({"NOTIFY_SOCKET": name})
        notifier.ready("looking after jobs")
        notifier.alive()
        notifier.status("busy")
        notifier.stopping()
        heard = [systemd.recv(4096).decode().splitlines()[0] for _ in range(4)]
    assert heard == ["READY=1", "WATCHDOG=1", "STATUS=busy", "STOPPING=1"]


def test_without_systemd_nothing_is_said(tmp_path: Path) -> None:
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000"}, 15.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/x"}, None),
        ({"WATCHDOG_USEC": "30000000"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(environment: dict[str, str], interval_s: float | None) -> None:
    assert Notifier(environment).watchdog_interval_s == interval_s


def test_an_agent_whose_turns_do_not_end_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(health.time, "monotonic", lambda: now_s)
    one = Health()
    assert one.is_alive
    now_s += health.STALLED_S
    assert not one.is_alive
    one.turned()
    assert one.is_alive
