"""What connects this node to others: interfaces, RDMA ports, and the variables by which training libraries find them.

Left alone, NCCL, Gloo and MPI take the first interface they find, which on many hosts is a bridge of a container engine
that leads nowhere. So a gang's members are told: the interface that has the node's address, and the fastest RDMA ports
that are up, or that there are none. These are defaults; what a job names itself wins. Algorithm and protocol (Ring,
Tree) are left to NCCL, as its authors ask.

Read once, when the agent starts.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from gpuyard_protocol.nodes import NetworkInterface, RdmaPort

_RDMA = Path("/sys/class/infiniband")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def interfaces() -> tuple[NetworkInterface, ...]:
    """Those that are up and have an address, loopback left out."""
    found = []
    stats = psutil.net_if_stats()
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        state = stats.get(name)
        if state is None or not state.isup or "loopback" in state.flags.split(","):
            continue
        own = tuple(
            entry.address.partition("%")[0]
            for family in _FAMILIES
            for entry in addresses
            if entry.family == family and not entry.address.startswith("fe80:")
        )
        if own:
            # A card that is unplugged or virtual says 0 or, in 32 bits, -1.
            speed = state.speed if 0 < state.speed < 2**31 else 0
            found.append(NetworkInterface(name=name, addresses=own, speed_mbps=speed))
    return tuple(found)


def rdma_ports(root: Path = _RDMA) -> tuple[RdmaPort, ...]:
    """Every port of every RDMA device, also those that are down."""
    found = []
    for port in sorted(root.glob("*/ports/*")):
        device = port.parent.parent
        if not port.name.isdigit():
            continue
        nets = sorted(entry.name for entry in device.glob("device/net/*"))
        found.append(
            RdmaPort(
                device=device.name,
                port=int(port.name),
                active=_read(port / "state").startswith("4:"),
                rate_gbps=_leading_number(_read(port / "rate")),
                link_layer=_read(port / "link_layer"),
                interface=nets[0] if nets else "",
            )
        )
    return tuple(found)


def interface_of(address: str, known: Iterable[NetworkInterface]) -> str:
    """The interface that has this address; "" for none (an address that is translated on the way)."""
    if address == "::1" or address.startswith("127."):
        return "lo"
    return next((interface.name for interface in known if address in interface.addresses), "")


def training_environment(
    address: str, known: Iterable[NetworkInterface], rdma: Sequence[RdmaPort]
) -> Mapping[str, str]:
    """What the member of a gang on this node is told. `address`: where the other members reach it."""
    env: dict[str, str] = {}
    if name := interface_of(address, known):
        env |= {
            # `=`: this one and not all whose names begin so.
            "NCCL_SOCKET_IFNAME": f"={name}",
            "GLOO_SOCKET_IFNAME": name,
            "TP_SOCKET_IFNAME": name,
            "OMPI_MCA_btl_tcp_if_include": name,
            "OMPI_MCA_oob_tcp_if_include": name,
        }
    active = [port for port in rdma if port.active]
    if not active:
        return env | {"NCCL_IB_DISABLE": "1"}
    fastest = max(port.rate_gbps for port in active)
    names = ",".join(f"{port.device}:{port.port}" for port in active if port.rate_gbps == fastest)
    return env | {"NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": f"={names}", "UCX_NET_DEVICES": names}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _leading_number(text: str) -> int:
    """400 of "400 Gb/sec (4X NDR)"; 2.5 becomes 2."""
    word = text.split(" ", 1)[0].split(".")[0]
    return int(word) if word.isdigit() else 0
