"""How the daemon ends: its exit codes, and who may call for an end.

One place decides, the first word counts: what comes after it is the noise of a process that is going down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

log = structlog.get_logger("daemon")

EXIT_OK = 0
#: An invariant of the core does not hold: a fault of ours, for systemd to restart and for people to read.
EXIT_INVARIANT = 70
#: Another daemon leads, or a server is away at the start: try again later.
EXIT_TEMPORARY = 75


class Ending(NamedTuple):
    code: int
    reason: str


class Fate:
    """Resolved once, with the reason why the process ends."""

    def __init__(self) -> None:
        self._future: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        #: Called once, when the fate is sealed.
        self.on_sealed: Callable[[], None] | None = None

    def seal(self, code: int, reason: str) -> None:
        if not self._future.done():
            (log.info if code == EXIT_OK else log.error)("ending", code=code, reason=reason)
            self._future.set_result(Ending(code, reason))
            if self.on_sealed is not None:
                self.on_sealed()

    @property
    def is_sealed(self) -> bool:
        return self._future.done()

    async def wait(self) -> Ending:
        return await asyncio.shield(self._future)
