"""Talking to systemd: ready, alive, stopping. Without systemd every call does nothing.

The protocol is one datagram to the socket named by $NOTIFY_SOCKET; a library for that would be longer than this file.
Whoever feeds the watchdog does so only while it makes progress (`health` in daemon and agent), so that systemd restarts
a process that merely exists.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        #: A leading "@" stands for the NUL of Linux's abstract sockets.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_us = environment.get("WATCHDOG_USEC", "")
        self._watchdog_pid = environment.get("WATCHDOG_PID", "")

    @property
    def watchdog_interval_s(self) -> float | None:
        """How often to feed the watchdog: half of what systemd allows; None if it does not watch this process."""
        if not self._address or not self._watchdog_us.isdigit() or int(self._watchdog_us) == 0:
            return None
        if self._watchdog_pid and self._watchdog_pid != str(os.getpid()):
            return None
        return int(self._watchdog_us) / 2e6

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            ) as sender:
                sender.sendto(state.encode(), self._address)
        except OSError:
            # systemd gone or its queue full: the next word says the same, and if none comes it restarts us, as it
            # should.
            return
