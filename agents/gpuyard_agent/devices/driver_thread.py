"""A thread for calls into the driver, and a deadline for each call.

The driver's library may be called from any thread, but a call can take seconds (a card that wakes) or for ever (a card
that hangs). Here every call has its turn in one thread, and the caller waits for its answer no longer than its
deadline. A call that hangs makes the ones behind it time out too, until it returns: they then say which one hangs. So
each card has a thread of its own, and one that hangs delays nobody else. The threads are daemon threads: a hanging
driver cannot keep the agent from ending.

`parked` brings a thread to a stop between two calls, for what may only be done while nobody is in the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Generic, TypeVar

from gpuyard_agent.devices.base import NoAnswer

T = TypeVar("T")

#: Calls that wait for a thread; more than that only where its driver hangs.
CALLS_MAX = 256


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

    def __init__(self, name: str = "driver") -> None:
        self._calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        #: The call being carried out now, "" between calls.
        self._present = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def call(self, name: str, function: Callable[[], T], deadline_s: float) -> T:
        """What the function returns or raises; `NoAnswer` if that takes longer than the deadline, and at once if too
        many wait already.
        """
        if self._calls.qsize() >= CALLS_MAX:
            raise NoAnswer(f"{name}: {CALLS_MAX} calls wait for the driver, which hangs in: {self._present}")
        call = _Call(name, function)
        self._calls.put(call)
        try:
            return await asyncio.wait_for(call.answer, deadline_s)
        except TimeoutError:
            behind = "" if self._present in ("", name) else f" (the driver hangs in: {self._present})"
            raise NoAnswer(f"{name}: no answer from the driver in {deadline_s:.0f} s{behind}") from None

    @contextlib.asynccontextmanager
    async def parked(self, deadline_s: float) -> AsyncIterator[None]:
        """Inside, the thread is in no call. `NoAnswer` if it does not come to a stop in time."""
        arrived, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(arrived.set)
                go_on.wait()

        self._calls.put(_Call("stand still", wait))
        try:
            await asyncio.wait_for(arrived.wait(), deadline_s)
            yield
        except TimeoutError:
            raise NoAnswer(f"the driver hangs in: {self._present}") from None
        finally:
            go_on.set()

    def end(self) -> None:
        """After the calls that wait."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._present = call.name
            call.run()
            self._present = ""
