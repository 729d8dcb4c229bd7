"""A daemon process from its configuration to its exit code: lock, page, connections, history, then lead, then the end.

What must be there before anybody leads is opened here, in an order in which it can be closed again; what leads is put
together by `assembly`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import secrets
import time
from collections.abc import Callable

import structlog

from gpuyard_daemon import recovery
from gpuyard_daemon.assembly import Foundations, lead
from gpuyard_daemon.config import DaemonConfig
from gpuyard_daemon.connecting import open_bus
from gpuyard_daemon.exits import EXIT_INVARIANT, EXIT_OK, Fate
from gpuyard_daemon.health import BEAT_S, Health
from gpuyard_daemon.history import History
from gpuyard_daemon.history_copy import HistoryCopy
from gpuyard_daemon.http import opening
from gpuyard_daemon.leadership import Presence
from gpuyard_daemon.recovery import StartLater
from gpuyard_daemon.reload import Reloader
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_protocol.service.sd_notify import Notifier

log = structlog.get_logger("daemon")


async def run(config: DaemonConfig, fate: Fate, health: Health, notifier: Notifier, reloader: Reloader) -> int:
    """Serve until the fate is sealed; returns the exit code. `StartRefused` or a `BusError` if there is no start."""
    directory = recovery.prepare_directory(config)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, _lock(directory / "daemon.lock"))
        page = await opening.begin(config, health, fate)
        if page is not None:
            stack.push_async_callback(page.close)
        beat = asyncio.get_running_loop().create_task(_beat(health, notifier), name="heartbeat")
        stack.callback(beat.cancel)
        bus, api_bus = await open_bus(config, "daemon", "_INBOX_D"), await open_bus(config, "api", "_INBOX_API")
        stack.push_async_callback(bus.close)
        stack.push_async_callback(api_bus.close)
        health.is_connected = lambda: bus.is_connected and api_bus.is_connected
        for connection in (bus, api_bus):
            connection.on_error(lambda error: log.warning("bus.error", error=str(error)))
        history = History(directory / "history.sqlite", config.history_days, config.history_max * 2**20)
        await history.open()
        stack.push_async_callback(history.close)
        store = SnapshotStore(directory / "snapshots", config.yard)
        presence = Presence(bus, secrets.token_hex(8))
        await presence.open()
        stack.callback(presence.close)
        copies = HistoryCopy(history, presence)
        base = Foundations(config, fate, health, bus, api_bus, history, store, reloader, presence, notifier, copies)
        daemon = await lead(base)
        gc.freeze()
        await daemon.start()
        if page is not None:
            page.show(daemon.sources())
            await page.opened()
        notifier.ready(f"scheduling yard {config.yard}")
        log.info("serving", yard=config.yard, epoch=daemon.journal.epoch, turn=daemon.core.turn)
        ending = await fate.wait()
        notifier.stopping(ending.reason)
        await daemon.stop(is_orderly=ending.code == EXIT_OK or daemon.is_leaving)
        return ending.code


def _lock(path: os.PathLike[str]) -> int:
    """Hold the state directory as long as this process lives; two daemons would only depose each other in turn."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StartLater(f"another daemon runs from this state directory ({path} is locked)") from None
    return descriptor


async def _beat(health: Health, notifier: Notifier) -> None:
    """The loop's own pulse, and systemd's watchdog, which is fed only while the daemon gets on."""
    interval_s = notifier.watchdog_interval_s
    fed_at = 0.0
    while True:
        await asyncio.sleep(BEAT_S)
        health.beat()
        now = time.monotonic()
        if interval_s is not None and now - fed_at >= min(interval_s, 10.0) and not health.stalled_because():
            notifier.alive()
            fed_at = now


def handle_loop_exception(fate: Fate) -> Callable[[asyncio.AbstractEventLoop, dict[str, object]], None]:
    """What nobody awaited. A message handler that failed may have lost a message: the process must start anew."""

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        message = str(context.get("message", ""))
        trace = error if isinstance(error, BaseException) else None
        log.error("loop.exception", message=message, exc_info=trace)
        if message.startswith("bus "):
            fate.seal(EXIT_INVARIANT, f"{message}: {error!r}")

    return handle
