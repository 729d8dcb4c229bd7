"""Hosts of their own on one machine, and a switch between them that is not to be trusted.

Each host is a network namespace with one TAP device; a thread carries frames from one to another, and delays, drops,
repeats or withholds them as the way between the two says, each direction for itself, from one seed. The kernel needs no
queueing discipline for that. This process takes part as `console`, from its own namespace. Needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import random
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CONSOLE = "console"
_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000
_FRAME_MAX = 2048
_BROADCAST = 1


@dataclass
class Way:
    """From one host to another; what comes back has a way of its own."""

    loss: float = 0.0
    duplicate: float = 0.0
    #: Each frame takes anything up to this; so later ones overtake earlier ones.
    delay_max_s: float = 0.0
    is_cut: bool = False


class Lan:
    def __init__(self, hosts: Sequence[str], seed: int) -> None:
        self.hosts = tuple(hosts)
        self._rng = random.Random(seed)
        self._net = f"10.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}"
        self._prefix = f"gy{os.getpid()}-"
        everybody = [*self.hosts, CONSOLE]
        self.ways = {(one, other): Way() for one in everybody for other in everybody if one != other}
        self._taps: dict[str, int] = {}
        self._known: dict[bytes, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="switch", daemon=True)
        #: Frames by what became of them.
        self.carried = self.dropped = 0

    def address(self, host: str) -> str:
        return f"{self._net}.{1 + [*self.hosts, CONSOLE].index(host)}"

    def ways_of(self, host: str) -> list[str]:
        """Whom it has a way to."""
        return [other for one, other in self.ways if one == host]

    def at(self, host: str) -> tuple[str, ...]:
        """What runs a command on that host, before the command."""
        return ("nsenter", f"--net=/run/netns/{self._prefix}{host}")

    def open(self) -> None:
        for host in self.hosts:
            _ip("netns", "add", self._prefix + host)
            self._taps[host] = _in_namespace(f"/run/netns/{self._prefix}{host}", lambda: _tap("tap0"))
            self._set_up(host, "tap0", ("-n", self._prefix + host))
        name = f"gy{os.getpid()}"
        self._taps[CONSOLE] = _tap(name)
        self._set_up(CONSOLE, name, ())
        for host, tap in self._taps.items():
            self._loop.add_reader(tap, self._receive, host, tap)
        self._thread.start()

    def _set_up(self, host: str, device: str, where: Sequence[str]) -> None:
        _ip(*where, "address", "add", f"{self.address(host)}/24", "dev", device)
        _ip(*where, "link", "set", device, "up")
        if where:
            _ip(*where, "link", "set", "lo", "up")

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        for tap in self._taps.values():
            os.close(tap)
        for host in self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", self._prefix + host)

    def heal(self) -> None:
        for way in self.ways.values():
            way.loss = way.duplicate = way.delay_max_s = 0.0
            way.is_cut = False

    # -- in the switch's thread -----------------------------------------------------------------------------------

    def _receive(self, host: str, tap: int) -> None:
        while True:
            try:
                frame = os.read(tap, _FRAME_MAX)
            except BlockingIOError:
                return
            self._known[frame[6:12]] = host
            to = None if frame[0] & _BROADCAST else self._known.get(frame[:6])
            for other in (to,) if to is not None else self._taps:
                if other != host:
                    self._carry(self.ways[host, other], self._taps[other], frame)

    def _carry(self, way: Way, tap: int, frame: bytes) -> None:
        if way.is_cut or self._rng.random() < way.loss:
            self.dropped += 1
            return
        for _ in range(1 + (self._rng.random() < way.duplicate)):
            self.carried += 1
            if way.delay_max_s:
                self._loop.call_later(self._rng.uniform(0.0, way.delay_max_s), _write, tap, frame)
            else:
                _write(tap, frame)


@contextlib.contextmanager
def lan(hosts: Sequence[str], seed: int) -> Iterator[Lan]:
    made = Lan(hosts, seed)
    try:
        made.open()
        yield made
    finally:
        made.close()


def _write(tap: int, frame: bytes) -> None:
    # A host whose device takes no more loses it, as on any wire.
    with contextlib.suppress(OSError):
        os.write(tap, frame)


def _tap(name: str) -> int:
    """A TAP device in this thread's namespace, there as long as it is open."""
    if not os.path.exists(_TUN):
        os.makedirs(os.path.dirname(_TUN), exist_ok=True)
        os.mknod(_TUN, 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    tap = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def _in_namespace(path: str, make: Callable[[], int]) -> int:
    """What `make` returns in that network namespace: in a thread, since a namespace is a thread's own."""
    made: list[int | OSError] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(path, "rb") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {path}")
            made.append(make())
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = made
    if isinstance(result, OSError):
        raise result
    return result


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)
