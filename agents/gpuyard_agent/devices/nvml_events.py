"""What cards tell of themselves: the driver's events, waited for in one dedicated thread.

Cards are registered whole: MIG instances cannot be, and the event says which instance it is about. Only kinds that the
card supports are asked for, and a card that cannot be registered (an old driver, a missing privilege) is left out and
named: its faults then show only when it is read. Nothing is judged here; events go to `tell` in the loop as they come.

`parked` brings the thread to a stop outside the library, for a new session with the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import msgspec
import pynvml

from gpuyard_agent.devices.base import NoAnswer
from gpuyard_agent.devices.nvml_calls import Lost, checked, code_of, optional
from gpuyard_protocol.names import DeviceUuid

#: One wait; the thread looks at its orders in between. Signals may end it earlier.
WAIT_MS = 500
#: After a wait that failed.
PAUSE_S = 1.0
#: The id of an event that is not about an instance.
_NO_INSTANCE = 0xFFFFFFFF

XID: Final = 0x8
ECC_DOUBLE: Final = 0x2
MIG_CONFIG: Final = 0x100
POISON_FATAL: Final = 0x2000
UNAVAILABLE: Final = 0x4000
RECOVERY_ACTION: Final = 0x8000
_WANTED = XID | ECC_DOUBLE | MIG_CONFIG | POISON_FATAL | UNAVAILABLE | RECOVERY_ACTION


class CardEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event. `device` None: the driver could not say which card, so all are suspect."""

    device: DeviceUuid | None
    #: One of the kinds above; 0: the wait itself failed.
    kind: int
    #: The Xid, where it is one.
    number: int = 0
    #: (GPU instance, compute instance) under MIG, None: about the whole card.
    instance: tuple[int, int] | None = None


class EventThread:
    """Waits until `end`. Made in the loop that `tell` is to be called in."""

    def __init__(self, tell: Callable[[CardEvent], None]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        #: Guards what follows, and wakes the thread where it does not wait for the driver.
        self._changed = threading.Condition()
        self._cards: dict[DeviceUuid, Any] = {}
        self._is_stale = False
        self._is_ended = False
        self._parking: asyncio.Event | None = None
        #: Cards that give no events, and why.
        self.silent: dict[DeviceUuid, str] = {}
        self._thread = threading.Thread(target=self._run, name="driver-events", daemon=True)
        self._thread.start()

    def watch(self, handles: Mapping[DeviceUuid, Any]) -> None:
        """From now on these cards, by their handles of the present session."""
        with self._changed:
            self._cards = dict(handles)
            self._is_stale = True
            self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def parked(self, deadline_s: float) -> AsyncIterator[None]:
        """Inside, the thread is not in the library and has no registrations: `watch` again afterwards."""
        arrived = asyncio.Event()
        with self._changed:
            self._parking = arrived
            self._changed.notify_all()
        try:
            await asyncio.wait_for(arrived.wait(), deadline_s)
            yield
        except TimeoutError:
            raise NoAnswer("the driver hangs while waiting for events") from None
        finally:
            with self._changed:
                self._parking = None
                self._cards = {}
                self._is_stale = True
                self._changed.notify_all()

    async def end(self, deadline_s: float) -> None:
        """Out of the library, if the driver lets go of it in time."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        await asyncio.to_thread(self._thread.join, deadline_s)

    # --- in the thread ---

    def _run(self) -> None:
        event_set: Any = None
        while True:
            with self._changed:
                cards, is_stale = dict(self._cards), self._is_stale
                self._is_stale = False
                must_leave = self._is_ended or self._parking is not None
            if event_set is not None and (is_stale or must_leave):
                _free(event_set)
                event_set = None
            if must_leave:
                if not self._stand_by():
                    return
                continue
            if event_set is None and cards:
                event_set = self._register(cards)
            if event_set is None:
                self._pause()
            elif not self._wait(event_set):
                with self._changed:
                    self._is_stale = True

    def _stand_by(self) -> bool:
        """Waits while the thread is parked. False: it is to end."""
        with self._changed:
            while self._parking is not None and not self._is_ended:
                self._in_loop(self._parking.set)
                self._changed.wait()
            return not self._is_ended

    def _pause(self) -> None:
        """Nothing to wait for: until the orders change, or a new try is due."""
        with self._changed:
            if not (self._is_ended or self._is_stale or self._parking is not None):
                self._changed.wait(PAUSE_S if self._cards else None)

    def _register(self, cards: Mapping[DeviceUuid, Any]) -> Any:
        event_set = optional(pynvml.nvmlEventSetCreate)
        silent: dict[DeviceUuid, str] = {}
        for uuid, handle in cards.items():
            try:
                if event_set is None:
                    raise Lost("the driver has no events")
                kinds = checked(pynvml.nvmlDeviceGetSupportedEventTypes, handle) & _WANTED
                checked(pynvml.nvmlDeviceRegisterEvents, handle, kinds, event_set)
            except (Lost, pynvml.NVMLError) as error:
                silent[uuid] = str(error)
        self.silent = silent
        if len(silent) < len(cards):
            return event_set
        if event_set is not None:
            _free(event_set)
        return None

    def _wait(self, event_set: Any) -> bool:
        """False: registrations are to be made anew."""
        try:
            data = pynvml.nvmlEventSetWait_v2(event_set, WAIT_MS)
        except pynvml.NVMLError as error:
            if code_of(error) == pynvml.NVML_ERROR_TIMEOUT:
                return True
            self._in_loop(lambda: self._tell(CardEvent(device=None, kind=0)))
            self._pause()
            return False
        try:
            uuid: DeviceUuid | None = str(checked(pynvml.nvmlDeviceGetUUID, data.device))
        except (Lost, pynvml.NVMLError):
            uuid = None
        pair = (int(data.gpuInstanceId), int(data.computeInstanceId))
        event = CardEvent(
            device=uuid,
            kind=int(data.eventType),
            number=int(data.eventData),
            instance=None if pair[0] == _NO_INSTANCE else pair,
        )
        self._in_loop(lambda: self._tell(event))
        return True

    def _in_loop(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(act)


def _free(event_set: Any) -> None:
    with contextlib.suppress(Lost):
        optional(pynvml.nvmlEventSetFree, event_set)
