"""An event loop whose clock jumps: production coroutines run unchanged, and an hour takes seconds.

Nothing waits for real: where a loop would sleep until its next timer, this one moves its clock there. With everything
else seeded, equal seeds give equal runs.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

from gpuyard_protocol.bus.base import BusError


class StandStill(Exception):
    """Nothing is due any more, and somebody still waits."""


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        #: Seconds since the simulation began.
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandStill("nothing is due any more")
        self.now += max(0.0, timeout)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s. What nobody awaits and nobody catches is collected in `failures`."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        #: In words, with the exception if there was one.
        self.failures: list[tuple[str, BaseException | None]] = []
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        return self._jumping.now

    def _note_failure(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # A process died while it waited: nobody is left to be told.
        if not isinstance(error, BusError):
            self.failures.append((str(context.get("message", "")), error))
