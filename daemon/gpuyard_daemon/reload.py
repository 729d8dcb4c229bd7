"""Reading the configuration again while the daemon runs, on SIGHUP.

What tenants are granted and when a silent node counts as suspected or lost take effect at once. Everything else
(addresses, keys, streams, the scheduler's own settings) is read at the start alone: a change there is named in the log
and waits for the next start. A file that makes no sense changes nothing: the complaint is logged with file, key, value
and what is allowed, and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from gpuyard_daemon.config import DaemonConfig
from gpuyard_protocol.service.settings_file import BadConfig

log = structlog.get_logger("reload")

RELOADABLE = ("tenants", "queues", "gpu_speeds", "nodes")


class Reloader:
    """The configuration in force, and the way to a newer one."""

    def __init__(self, config: DaemonConfig, read: Callable[[], DaemonConfig]) -> None:
        self.config = config
        self._read = read
        #: Told of each new configuration whose reloadable part differs; set once the daemon leads.
        self.apply: Callable[[DaemonConfig], None] | None = None
        self.reloads = 0
        self.failed = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self) -> None:
        """Begin to read; from a signal handler."""
        task = asyncio.get_running_loop().create_task(self.reload(), name="reload")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reload(self) -> None:
        try:
            found = await asyncio.to_thread(self._read)
        except BadConfig as error:
            self.failed += 1
            log.error("config.refused", error=str(error), consequence="the settings stay as they were")
            return
        self.reloads += 1
        changed = [
            name for name in DaemonConfig.__struct_fields__ if getattr(found, name) != getattr(self.config, name)
        ]
        waiting = [name for name in changed if name not in RELOADABLE]
        if waiting:
            log.warning("config.waits_for_restart", keys=waiting)
        log.info("config.reloaded", changed=[name for name in changed if name in RELOADABLE])
        self.config = found
        if self.apply is not None:
            self.apply(found)
