"""What the fake MPS daemon, its command line and fake CUDA programs say to each other: JSON lines over a Unix socket.

The real protocol is private to NVIDIA; nobody but these three speaks this one. Also here: the grammar of limits, which
daemon and clients read alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Iterator
from typing import Any

#: Longest path of a Unix socket, without its closing zero.
SOCKET_PATH_MAX = 107

Message = dict[str, Any]


def pipe_directory() -> str:
    """Where the daemon's files are, for daemon and clients alike."""
    return os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"


class Line:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    @classmethod
    def connect(cls, directory: str) -> Line:
        """To the daemon of this pipe directory. Raises `OSError` if there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(os.path.join(directory, "control"))
        except OSError:
            connection.close()
            raise
        return cls(connection)

    def send(self, message: Message) -> None:
        """Raises `OSError` if the other side has gone."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """None: the other side has gone."""
        try:
            line = self._file.readline()
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        message: Message = json.loads(line)
        return message

    def messages(self) -> Iterator[Message]:
        """Until the other side has gone."""
        while (message := self.receive()) is not None:
            yield message

    def peer(self) -> tuple[int, int]:
        """(pid, uid) of the other side, from the kernel."""
        facts = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(facts[0:4], "little"), int.from_bytes(facts[4:8], "little")

    def has_hung_up(self) -> bool:
        """Whether the other side has closed, without waiting."""
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Also wakes a thread of this process that waits in `receive`."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._connection.close()


def parse_size(text: str) -> int | None:
    """Bytes of `512M` or `8G`; None for anything else, which the real daemon takes and does not enforce."""
    units = {"M": 1 << 20, "G": 1 << 30}
    number, unit = text[:-1], text[-1:].upper()
    return int(number) * units[unit] if number.isdecimal() and unit in units else None


def parse_limits(text: str | None) -> dict[str, str]:
    """By device, as `CUDA_MPS_PINNED_DEVICE_MEM_LIMIT` writes it: `0=8G,GPU-…=8192M`. The last one wins."""
    limits = {}
    for part in (text or "").split(","):
        device, equals, size = part.strip().partition("=")
        if equals:
            limits[device] = size
    return limits


def parse_percentage(text: str | None) -> float | None:
    """None: not given, or not between 0 and 100."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value <= 100 else None
