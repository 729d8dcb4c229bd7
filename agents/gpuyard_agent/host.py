"""What the agent knows of its host: name, address, boot, CPUs, memory, and how busy they are."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from gpuyard_protocol.units import MILLI

#: An address that is nowhere (TEST-NET-1, RFC 5737), to ask the kernel for the way out.
_ELSEWHERE = "192.0.2.1"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's own, new with every boot."""
    return _BOOT_ID.read_text().strip()


def node_clock_ms() -> int:
    """Milliseconds since boot, suspended time included: what deadlines are kept in."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def hostname() -> str:
    return socket.gethostname()


def cpu_milli() -> int:
    """CPUs that this process may use: less than the host's inside a container or cpuset."""
    return len(os.sched_getaffinity(0)) * MILLI


def memory_mib() -> int:
    return int(psutil.virtual_memory().total) // 2**20


def cpu_pct() -> int:
    """Of all CPUs, since the last call (0 on the first)."""
    return round(psutil.cpu_percent(interval=None))


def memory_used_mib() -> int:
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available) // 2**20


def address_towards(nats_url: str) -> str:
    """The address under which a host that this one reaches can reach it back: that of the route to the NATS server.

    No packet is sent: connecting a datagram socket only asks the kernel for the route.
    """
    server = urlsplit(nats_url.split(",")[0].strip())
    host, port = server.hostname or "127.0.0.1", server.port or 4222
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def reachable_address(nats_url: str, *, one_host: bool) -> str:
    """Where the other members of a gang reach this node.

    Beside its NATS server a node would answer with the loopback address, which means something else on every host. It
    then takes the address of the route to the world. `one_host`: all nodes are on this one, loopback is right.
    """
    address = address_towards(nats_url)
    if one_host or not _is_loopback(address):
        return address
    return address_towards(f"nats://{_ELSEWHERE}:4222")


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def can_bind(port: int) -> bool:
    """Whether nobody listens on this TCP port, on any address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        # Without it a port whose last user has just gone would look taken for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
