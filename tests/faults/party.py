"""A process of the simulation: tasks that live and die together, with one connection to the bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from faults.network import FaultyBus


class Party:
    """`on_failure` is told what no process should ever raise."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self.is_alive = True
        self.bus: FaultyBus | None = None
        self._on_failure = on_failure
        #: In the order in which they began: they are cancelled in that order, in every run.
        self._tasks: dict[asyncio.Task[None], None] = {}
        #: The process dies when it passes the point of this name; "" for none.
        self.doomed_at = ""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    def passes(self, point: str) -> None:
        """A fault point: here the process may have to die."""
        if self.is_alive and self.doomed_at == point:
            self.kill()
            raise asyncio.CancelledError

    def kill(self) -> None:
        """At once and without a word, as SIGKILL does."""
        if not self.is_alive:
            return
        self.is_alive = False
        for task in list(self._tasks):
            task.cancel()
        if self.bus is not None:
            self.bus.drop()
        self.on_death()

    def on_death(self) -> None:
        """What outlives the process takes note."""
