"""The daemon's connections to NATS: with the key of the role that each speaks for."""

from __future__ import annotations

from gpuyard_daemon.config import DaemonConfig
from gpuyard_daemon.recovery import StartRefused
from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.bus.nats import connect

CONNECT_TIMEOUT_S = 30.0


async def open_bus(config: DaemonConfig, role: str, inbox_prefix: str) -> Bus:
    seed = config.seed(role)
    if seed is not None and not seed.exists():
        if role == "sys":
            raise BusError(f"there is no key {seed}")
        raise StartRefused(f"there is no key {seed}: `gpuyard up` makes the keys of a yard")
    return await connect(
        config.nats,
        name=f"gpuyard-{role}",
        inbox_prefix=inbox_prefix,
        seed=str(seed) if seed is not None else None,
        reconnect_jitter_s=(0.02, 0.1),
        connect_timeout_s=CONNECT_TIMEOUT_S,
        tls_ca=config.tls_ca or None,
        tls_cert=config.tls_cert or None,
        tls_key=config.tls_key or None,
    )
