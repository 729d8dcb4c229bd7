"""Progress, not existence: what counts as alive and as ready, and what systemd is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from gpuyard_daemon.health import BEAT_LATE_S, BEAT_S, STALLED_AFTER_S, Health
from gpuyard_daemon.measures import Histogram
from gpuyard_protocol.bus.nats import connect
from support.daemon import DaemonProcess, Tenant, until
from support.nats import NatsProcess


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.health = Health(lambda: self.now)
        self.is_connected = True
        self.health.is_connected = lambda: self.is_connected
        self.health.is_serving = True

    def pass_s(self, seconds: float) -> None:
        """Time passes and the loop runs."""
        self.now += seconds
        self.health.beat()


def test_a_loop_that_stands_still_is_stalled() -> None:
    world = World()
    world.now += BEAT_S + BEAT_LATE_S + 0.1
    assert "the loop has not run" in world.health.stalled_because()


def test_a_turn_that_does_not_end_is_stalled() -> None:
    world = World()
    world.health.turn_since = world.now
    world.pass_s(STALLED_AFTER_S - 1)
    assert world.health.stalled_because() == ""
    world.pass_s(2)
    assert "a turn has been under way" in world.health.stalled_because()


def test_what_waits_for_a_turn_that_never_begins_is_a_stall() -> None:
    world = World()
    began = world.now
    world.health.waiting_since = lambda: began
    world.pass_s(STALLED_AFTER_S - 1)
    assert world.health.undecided_because() == ""
    world.pass_s(2)
    assert "an input has waited 21.0 s" in world.health.undecided_because()
    assert world.health.stalled_because() == world.health.undecided_because()
    world.is_connected = False
    assert world.health.undecided_because() == ""


def test_waiting_for_a_server_that_is_away_is_no_stall_but_not_ready() -> None:
    world = World()
    world.health.turn_since = world.now
    world.is_connected = False
    world.pass_s(STALLED_AFTER_S * 10)
    assert world.health.stalled_because() == ""
    assert world.health.unready_because() == "no connection to NATS"
    world.is_connected = True
    world.health.reconnected()
    world.pass_s(1)
    assert world.health.stalled_because() == ""
    assert world.health.unready_because() == ""


def test_the_largest_delay_of_the_loop_is_told_once() -> None:
    world = World()
    world.pass_s(BEAT_S)
    world.pass_s(BEAT_S + 0.25)
    assert world.health.take_loop_delay_s() == pytest.approx(0.25)
    assert world.health.take_loop_delay_s() == 0


async def test_a_daemon_whose_turns_stand_still_says_so_and_starves_the_watchdog(
    nats_process: NatsProcess, tmp_path: Path
) -> None:
    """The process, its loop and its pages are all there; systemd would end it all the same."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        daemon = DaemonProcess(tmp_path / "daemon", nats_process.url)
        daemon.entry = ("support.dying_daemon", "stand-still", "0")
        daemon.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        bus = await connect(nats_process.url, name="test", inbox_prefix="_INBOX_T")
        try:
            await asyncio.to_thread(daemon.start)
            while b"WATCHDOG=1" not in await asyncio.to_thread(manager.recv, 1000):
                pass
            assert (await asyncio.to_thread(daemon.get, "/healthz"))[0] == 200
            await Tenant(bus).submit({"command": ["/bin/true"], "submission_id": "stand-still"})

            async def unwell() -> bool:
                return (await asyncio.to_thread(daemon.get, "/healthz"))[0] == 503

            await until(unwell, "a health page that says so")
            assert "a turn has been under way" in (await asyncio.to_thread(daemon.get, "/readyz"))[1]
            manager.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while manager.recv(1000):
                    pass  # What was said before.
            manager.settimeout(3)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(manager.recv, 1000)
        finally:
            await bus.close()
            daemon.kill()


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert histogram.sum == 12
