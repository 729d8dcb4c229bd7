"""Whether a NATS server that somebody else runs keeps the yard's promises (`gpuyard up --nats URL`).

What a client can see is tried; what only the server's own account can see (`SYS`) is asked there if a key for it is at
hand, and otherwise named as not verified: whoever runs the server has to vouch for it. A promise that is certainly
broken is a refusal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gpuyard_daemon.yard.server_files import ConfigurationError
from gpuyard_protocol.bus.base import BusError, NoResponders, PermissionDenied
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.subjects import Streams, streams

MIN_VERSION = (2, 12)
MIN_PAYLOAD_BYTES = 8 * 1024 * 1024


@dataclass(slots=True)
class ServerCheck:
    """The findings, as sentences for whoever set up the server."""

    #: Broken promises: the yard must not start on this server.
    problems: list[str] = field(default_factory=list)
    #: What nobody here can see, each with the setting that keeps the promise.
    unverified: list[str] = field(default_factory=list)

    def require(self, url: str) -> None:
        if self.problems:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            raise ConfigurationError(f"the NATS server at {url} cannot carry a yard:{listed}")


async def check_server(
    bus: NatsBus, *, yard: str, store_bytes: int, replicas: int = 1, sys_bus: NatsBus | None = None
) -> ServerCheck:
    """`bus` is logged in with the daemon's key; `sys_bus` with the server account's, where there is one."""
    check = ServerCheck()
    _check_handshake(bus, check)
    await _check_jetstream(bus, store_bytes, check)
    if not check.problems:
        await _check_streams(bus, streams(yard, store_bytes, replicas), check)
    await _check_settings(sys_bus, check)
    return check


def _check_handshake(bus: NatsBus, check: ServerCheck) -> None:
    found = re.match(r"(\d+)\.(\d+)", bus.server_version)
    if found is None or (int(found[1]), int(found[2])) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        check.problems.append(f"it is nats-server {bus.server_version or '?'}; {wanted} or later is needed")
    if bus.max_payload < MIN_PAYLOAD_BYTES:
        check.problems.append(f"max_payload is {bus.max_payload} bytes; {MIN_PAYLOAD_BYTES} (8MB) are needed")


async def _check_jetstream(bus: NatsBus, store_bytes: int, check: ServerCheck) -> None:
    try:
        info: dict[str, Any] = msgspec.json.decode((await bus.request("$JS.API.INFO", b"")).data)
    except NoResponders:
        check.problems.append("JetStream is not enabled for the daemon's account (jetstream: enabled)")
        return
    except PermissionDenied:
        check.problems.append("the daemon's key may not publish on $JS.API.>")
        return
    if "error" in info:
        check.problems.append(f"JetStream: {info['error'].get('description', info['error'])}")
        return
    limit = info.get("limits", {}).get("max_storage", -1)
    if 0 <= limit < store_bytes:
        check.problems.append(f"the daemon's account may store {limit} bytes; the yard's streams need {store_bytes}")


async def _check_streams(bus: NatsBus, wanted: Streams, check: ServerCheck) -> None:
    """The yard's streams can be made, and nobody else's stream takes its subjects."""
    for spec in wanted:
        for subject in spec.subjects:
            request = msgspec.json.encode({"subject": subject})
            answer: dict[str, Any] = msgspec.json.decode((await bus.request("$JS.API.STREAM.NAMES", request)).data)
            others = [name for name in answer.get("streams") or [] if name != spec.name]
            if others:
                check.problems.append(
                    f"stream {others[0]} in the same account takes {subject}: another yard lives there; "
                    "give this one an account of its own"
                )
                return
    for spec in wanted:
        try:
            await bus.ensure_stream(spec)
        except BusError as error:
            check.problems.append(str(error))
            return


async def _check_settings(sys_bus: NatsBus | None, check: ServerCheck) -> None:
    wanted_sync = "jetstream { sync_interval: always }, or acknowledged jobs are lost with a power cut"
    wanted_flag = "feature_flags { js_ack_fc_v2: false }"
    if sys_bus is None:
        check.unverified += [wanted_sync, wanted_flag]
        return
    try:
        reply = await sys_bus.request("$SYS.REQ.SERVER.PING.JSZ", b'{"config": true}')
        state: dict[str, Any] = msgspec.json.decode(reply.data)
    except BusError:
        check.unverified += [wanted_sync, wanted_flag]
        return
    replicated = state.get("data", {}).get("meta_cluster") is not None
    if not state.get("data", {}).get("config", {}).get("sync_always", False) and not replicated:
        check.problems.append(f"it does not sync each message to the disk: set {wanted_sync}")
    if state.get("server", {}).get("feature_flags", {}).get("js_ack_fc_v2", False):
        check.problems.append(f"it acknowledges in a form this client does not read: set {wanted_flag}")
