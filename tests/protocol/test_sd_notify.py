"""Words to systemd: one datagram each, or none where nobody listens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gpuyard_protocol.service.sd_notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_ready_alive_and_stopping(tmp_path: Path, abstract: bool) -> None:
    name = f"@gpuyard-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        notifier = Notifier({"NOTIFY_SOCKET": name})
        notifier.ready("looking after jobs")
        notifier.alive()
        notifier.status("busy")
        notifier.stopping("jobs go on")
        heard = [systemd.recv(4096).decode().splitlines() for _ in range(4)]
    assert heard == [
        ["READY=1", "STATUS=looking after jobs"],
        ["WATCHDOG=1"],
        ["STATUS=busy"],
        ["STOPPING=1", "STATUS=jobs go on"],
    ]


def test_without_systemd_nothing_is_said(tmp_path: Path) -> None:
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000"}, 15.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/x"}, None),
        ({"WATCHDOG_USEC": "30000000"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(environment: dict[str, str], interval_s: float | None) -> None:
    assert Notifier(environment).watchdog_interval_s == interval_s
