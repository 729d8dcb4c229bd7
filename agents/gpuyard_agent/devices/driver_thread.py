"""One thread for all calls into the driver, and a deadline for each.

The driver's library may be called from any thread, but a call can take seconds (a card that wakes) or for ever (a card
that hangs). Here every call has its turn in one thread of its own, and the caller waits for its answer no longer than
its deadline. A call that hangs makes the ones behind it time out too, until it returns: they then say which one hangs.
The thread is a daemon thread, so that a hanging driver cannot keep the agent from ending.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from gpuyard_agent.devices.base import DeviceTrouble

T = TypeVar("T")


class _Call(Generic[T]):
    """One call that waits for its turn."""

    def __init__(self, name: str, function: Callable[[], T]) -> None:
        self.name = name
        self.function = function
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[T] = self.loop.create_future()

    def run(self) -> None:
        """In the thread."""
        if self.answer.cancelled():
            return  # its deadline passed while it waited
        try:
            result = self.function()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the caller and not to this thread
            self._tell(partial(self.answer.set_exception, error))
        else:
            self._tell(partial(self.answer.set_result, result))

    def _tell(self, act: Callable[[], None]) -> None:
        try:
            self.loop.call_soon_threadsafe(lambda: None if self.answer.done() else act())
        except RuntimeError:
            return  # the loop is closed: nobody waits any more


class DriverThread:
    """Runs functions one after another."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        #: The call being carried out now, "" between calls.
        self._present = ""
        self._thread = threading.Thread(target=self._run, name="driver", daemon=True)
        self._thread.start()

    async def call(self, name: str, function: Callable[[], T], deadline_s: float) -> T:
        """What the function returns or raises; `DeviceTrouble` if that takes longer than the deadline."""
        call = _Call(name, function)
        self._calls.put(call)
        try:
            return await asyncio.wait_for(call.answer, deadline_s)
        except TimeoutError:
            behind = "" if self._present in ("", name) else f" (the driver hangs in: {self._present})"
            raise DeviceTrouble(f"{name}: no answer from the driver in {deadline_s:.0f} s{behind}") from None

    def end(self) -> None:
        """After the calls that wait."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._present = call.name
            call.run()
            self._present = ""
