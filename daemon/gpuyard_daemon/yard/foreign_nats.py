"""A yard on a NATS server that somebody else runs (`gpuyard up --nats URL`).

The yard keeps its promises only on a server with its accounts and settings. What the server must know is written out
as a configuration to include; a server that does not know the yard's keys, or breaks a promise, is refused with that
file's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from gpuyard_daemon.yard.accounts import DAEMON_INBOX
from gpuyard_daemon.yard.home import YardTrouble
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import store_budget
from gpuyard_daemon.yard.server_check import check_server
from gpuyard_daemon.yard.server_config import ServerSettings, server_config
from gpuyard_daemon.yard.server_files import is_loopback
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError, Disconnected, PermissionDenied

CONNECT_TIMEOUT_S = 2.0


async def check_foreign_server(
    url: str, keys: YardKeys, *, yard: str, directory: Path, say: Callable[[str], None]
) -> None:
    """Return if the server can carry the yard; `YardTrouble` says what to change."""
    _refuse_plain_text(url)
    needed = _write_needed(keys, yard, directory)
    await _refuse_open_server(url, needed)
    try:
        bus = await nats.connect(url, name="gpuyard up", inbox_prefix=DAEMON_INBOX, seed=str(keys.daemon))
    except PermissionDenied:
        raise YardTrouble(
            f"the NATS server at {url} does not know this yard's keys: take accounts, system_account and jetstream "
            f"settings from {needed} into its configuration, reload it, and start again"
        ) from None
    except (Disconnected, BusError) as error:
        raise YardTrouble(str(error)) from None
    try:
        check = await check_server(bus, yard=yard, store_bytes=store_budget(directory), replicas=replicas_for(url))
    finally:
        await bus.close()
    check.require(url)
    for promise in check.unverified:
        say(f"not verified from here: {url} must have {promise}")


def replicas_for(url: str) -> int:
    """Copies of each stream: three where there are as many servers."""
    return 3 if len([part for part in url.split(",") if part.strip()]) >= 3 else 1


def _refuse_plain_text(url: str) -> None:
    """What tenants say to each other's machines is not for every wire between them."""
    for part in url.split(","):
        address = urlsplit(part.strip() if "://" in part else f"nats://{part.strip()}")
        if address.scheme != "tls" and not is_loopback(address.hostname or ""):
            raise YardTrouble(
                f"{part.strip()} is reached over the network, and in the clear: give that NATS server TLS and name it "
                f"as tls://{address.netloc}"
            )


async def _refuse_open_server(url: str, needed: Path) -> None:
    """A server that lets in anybody protects nobody: whoever reaches it could submit as everyone."""
    try:
        stranger = await nats.connect(
            url, name="gpuyard up", inbox_prefix="_INBOX", connect_timeout_s=CONNECT_TIMEOUT_S
        )
    except PermissionDenied:
        return
    except BusError as error:
        raise YardTrouble(str(error)) from None
    await stranger.close()
    raise YardTrouble(
        f"the NATS server at {url} lets in anybody: give it the accounts in {needed} (and its jetstream settings), "
        "restart it, and start again"
    )


def _write_needed(keys: YardKeys, yard: str, directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = server_config(ServerSettings(yard, directory, store_budget(directory)), keys)
    # Address, name and log are the other server's own affair.
    text = re.sub(r"^(listen|server_name|log_file|logfile_[a-z_]+):.*\n", "", text, flags=re.MULTILINE)
    path = directory / "needed.conf"
    path.write_text(text)
    return path
