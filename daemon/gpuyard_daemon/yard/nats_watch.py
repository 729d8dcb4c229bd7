"""`python -m gpuyard_daemon.yard.nats_watch --state DIR`: watch over a NATS server that systemd runs.

A server that stores nothing is ended; systemd starts it again (`gpuyard-nats.service`). Its process is the one that
its own pid file names, and that runs with this yard's configuration: never another that has the number now.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import structlog

from gpuyard_daemon.logging_setup import set_up
from gpuyard_daemon.yard.ballast import Ballast
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import STOP_TIMEOUT_S, server_running_with
from gpuyard_daemon.yard.server_files import ConfigurationError, Server, read_server
from gpuyard_daemon.yard.store_watch import StoreWatch

log = structlog.get_logger("nats-watch")

#: What `sysexits.h` calls a configuration error; systemd is told not to restart on it.
EXIT_BAD_CONFIG = 78


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch over the yard's NATS server; end it when it stores nothing.")
    parser.add_argument("--state", type=Path, default=Path("/var/lib/gpuyard"), help="directory of the yard")
    state = parser.parse_args().state.absolute()
    set_up("info")
    try:
        server = read_server(state)
    except ConfigurationError as error:
        log.error("watch.refused", error=str(error))
        return EXIT_BAD_CONFIG
    if server.peers:
        log.error("watch.refused", error="this is for a server that stands alone; a cluster goes on with the others")
        return EXIT_BAD_CONFIG
    watch = StoreWatch(
        server.local_url,
        YardKeys.load_or_create(state / "keys"),
        server.settings.yard,
        Ballast(server.settings.directory, server.settings.store_bytes),
        tls_ca=server.tls_ca,
        restart=lambda: _end(server),
        say=lambda text: log.error("watch", said=text),
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(watch.run())
    return 0


async def _end(server: Server) -> None:
    directory = server.settings.directory
    for number in (signal.SIGTERM, signal.SIGKILL):
        pid = server_running_with(directory / "nats.conf", directory / "nats.pid")
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if number is signal.SIGTERM:
            await asyncio.sleep(STOP_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
