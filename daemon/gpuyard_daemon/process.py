"""The daemon's process: arguments, logging, the loop, and how it ends.

Exit codes: 0 told to stop; 70 a fault of its own, restart it; 75 another daemon leads, or NATS is away at the start,
try again; 78 it must not start like this, a person has to look. Standard output stays empty.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence

import structlog
import uvloop

from gpuyard_daemon import logging_setup, serving
from gpuyard_daemon.config import EXIT_BAD_CONFIG, DaemonConfig, parse_arguments
from gpuyard_daemon.exits import EXIT_OK, EXIT_TEMPORARY, Fate
from gpuyard_daemon.health import Health
from gpuyard_daemon.journal import JournalRefused, LeadershipLost
from gpuyard_daemon.recovery import StartLater, StartRefused
from gpuyard_daemon.reload import Reloader
from gpuyard_protocol.bus.base import BusError, PermissionDenied
from gpuyard_protocol.service.sd_notify import Notifier
from gpuyard_protocol.service.settings_file import BadConfig

log = structlog.get_logger("daemon")

#: A collection of the youngest objects stops the loop for as long as they are many (20,000: 5 to 9 ms), so few. It
#: finds little among messages that are freed by their counts anyway, and all together cost the same however few.
#: The older generations hold the whole yard, and looking through them would stop the loop for a second: hence seldom.
GC_THRESHOLDS = (1000, 1000, 100)
#: For what is left when the daemon has ended: whatever still hangs (a thread on a dead disk) must not keep the process.
EXIT_GRACE_S = 5.0


async def serve(config: DaemonConfig, reloader: Reloader) -> int:
    fate, health = Fate(), Health()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(serving.handle_loop_exception(fate))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, fate.seal, EXIT_OK, f"told to stop ({signal.Signals(number).name})")
    loop.add_signal_handler(signal.SIGHUP, reloader.ask)
    running = loop.create_task(serving.run(config, fate, health, Notifier(), reloader))
    # Told to stop before it serves: there is nothing to bring to an end. Later, `run` itself waits for the fate.
    fate.on_sealed = lambda: None if health.is_serving else _cancel(running)
    try:
        return await running
    except asyncio.CancelledError:
        return (await fate.wait()).code
    except (StartRefused, JournalRefused, PermissionDenied) as error:
        log.error("start.refused", error=str(error))
        return EXIT_BAD_CONFIG
    except (StartLater, BusError, LeadershipLost) as error:
        log.error("start.failed", error=str(error))
        return EXIT_TEMPORARY


def _cancel(task: asyncio.Task[int]) -> None:
    task.cancel()


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        given = sys.argv[1:] if arguments is None else arguments
        config = parse_arguments(given)
    except BadConfig as error:
        print(f"gpuyard-daemon: {error}", file=sys.stderr)  # noqa: T201  before there is a logger
        sys.exit(EXIT_BAD_CONFIG)
    logging_setup.set_up(config.log_level)
    gc.set_threshold(*GC_THRESHOLDS)
    sys.exit(uvloop.run(_serve_guarded(config, Reloader(config, lambda: parse_arguments(given)))))


async def _serve_guarded(config: DaemonConfig, reloader: Reloader) -> int:
    code = await serve(config, reloader)
    guard = threading.Timer(EXIT_GRACE_S, os._exit, (code,))
    guard.daemon = True
    guard.start()
    return code
