"""Three real nats-servers that are one cluster, each of which can be killed, suspended, stopped and started again."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from gpuyard_protocol.bus.base import Bus, BusError
from support.nats import NatsProcess

SERVERS = 3

CONFIG = """
listen: "127.0.0.1:{{port}}"
server_name: "{name}"
max_payload: 8MB
jetstream {{{{ store_dir: "{{directory}}/store", max_file: 1GB, max_mem: 64MB, sync_interval: always, strict: true }}}}
feature_flags {{{{ js_ack_fc_v2: false }}}}
cluster {{{{ name: "yard", listen: "127.0.0.1:{route}", routes: [ {routes} ] }}}}
"""


class Cluster:
    """`config`: of one server by its number, with the fields of `NatsProcess.config`; None: without accounts."""

    def __init__(self, directory: Path, configs: list[str] | None = None, ports: list[int] | None = None) -> None:
        self.route_ports = ports or free_ports(SERVERS)
        routes = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in self.route_ports)
        own = [CONFIG.format(name=f"s{n}", route=port, routes=routes) for n, port in enumerate(self.route_ports)]
        self.servers = [NatsProcess(directory / f"s{n}", text) for n, text in enumerate(configs or own)]
        for server, port in zip(self.servers, free_ports(SERVERS), strict=True):
            server.port = port

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def kill(self) -> None:
        for server in self.servers:
            server.kill()


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


async def stream_info(bus: Bus, stream: str) -> dict[str, object] | None:
    """The server's own word about a stream; None while there is none."""
    try:
        reply = await bus.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=2.0)
    except BusError:
        return None
    answer: dict[str, object] = json.loads(reply.data)
    return None if "error" in answer else answer


async def leader_of(bus: Bus, stream: str) -> str:
    """Name of the server that leads a stream; "" while none does."""
    info = await stream_info(bus, stream)
    cluster = info.get("cluster") if info else None
    return str(cluster.get("leader", "")) if isinstance(cluster, dict) else ""


async def is_whole(bus: Bus, streams: list[str]) -> bool:
    """Every stream has a leader and its copies are up to date."""
    for stream in streams:
        info = await stream_info(bus, stream)
        cluster = info.get("cluster") if info else None
        if not isinstance(cluster, dict) or not cluster.get("leader"):
            return False
        replicas = cluster.get("replicas") or []
        if len(replicas) != SERVERS - 1 or any(not copy["current"] or copy.get("offline") for copy in replicas):
            return False
    return True
