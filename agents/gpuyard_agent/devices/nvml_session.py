"""The agent's one session with NVIDIA's driver: its threads, and how it is begun anew.

The driver's library is opened once, for the agent's life, and its handles are kept. A thread for the driver as a whole,
one for each card, so that a card that hangs delays itself alone, and one for events. When a card was lost, the driver
gives it to a new session only (and its index order may have moved): then every thread is brought to a stop outside the
library, which is closed and opened again. A thread that does not stop, because its card hangs inside the driver, makes
that impossible; the session then goes on as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import pynvml

from gpuyard_agent.devices.base import DeviceTrouble, NoDriver
from gpuyard_agent.devices.driver_thread import DriverThread
from gpuyard_agent.devices.nvml_calls import Lost, code_of, optional
from gpuyard_agent.devices.nvml_events import CardEvent, EventThread
from gpuyard_protocol.names import DeviceUuid

T = TypeVar("T")

#: The first call wakes cards that nobody keeps awake, seconds each.
OPEN_S = 60.0
#: For a thread to come out of the library.
PARK_S = 5.0
CLOSE_S = 5.0


class NvmlSession:
    """Open between `open` and `close`."""

    def __init__(self, on_event: Callable[[CardEvent], None]) -> None:
        self._on_event = on_event
        self._whole: DriverThread | None = None
        self._cards: dict[DeviceUuid, DriverThread] = {}
        self._events: EventThread | None = None

    async def open(self) -> None:
        """Raises `NoDriver`."""
        whole = DriverThread()
        try:
            await whole.call("initialise", _initialise, OPEN_S)
        except (NoDriver, DeviceTrouble) as problem:
            whole.end()
            raise NoDriver(str(problem)) from None
        self._whole = whole
        self._events = EventThread(self._on_event)

    async def close(self) -> None:
        whole, self._whole = self._whole, None
        if self._events is not None:
            await self._events.end(CLOSE_S)
            self._events = None
        for thread in self._cards.values():
            thread.end()
        self._cards.clear()
        if whole is not None:
            with contextlib.suppress(DeviceTrouble, Lost):
                await whole.call("shut down", lambda: optional(pynvml.nvmlShutdown), CLOSE_S)
            whole.end()

    @property
    def events(self) -> EventThread:
        if self._events is None:
            raise DeviceTrouble("the driver is not open")
        return self._events

    async def call(self, name: str, function: Callable[[], T], deadline_s: float, card: DeviceUuid = "") -> T:
        """In the thread of the card, or of the driver as a whole. Raises what the function raises, and `DeviceTrouble`
        where the answer does not come in time."""
        if self._whole is None:
            raise DeviceTrouble("the driver is not open")
        thread = self._whole
        if card:
            if card not in self._cards:
                self._cards[card] = DriverThread(f"driver-{card[4:12]}")
            thread = self._cards[card]
        return await thread.call(name, function, deadline_s)

    async def restart(self) -> None:
        """A new session: every handle of the old one is void. Raises `DeviceTrouble`: then the old one goes on, or
        (the driver no longer opens) every call fails until a later `restart` succeeds."""
        if self._whole is None:
            raise DeviceTrouble("the driver is not open")
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.events.parked(PARK_S))
            for thread in self._cards.values():
                await stack.enter_async_context(thread.parked(PARK_S))
            try:
                await self._whole.call("begin a new session", _restart, OPEN_S)
            except NoDriver as problem:
                raise DeviceTrouble(str(problem)) from None


def _initialise() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if code_of(error) == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            raise NoDriver("there is no NVIDIA driver on this node: libnvidia-ml.so.1 cannot be loaded") from None
        raise NoDriver(f"the NVIDIA driver does not work here: {error}") from None


def _restart() -> None:
    with contextlib.suppress(Lost):
        optional(pynvml.nvmlShutdown)
    _initialise()
