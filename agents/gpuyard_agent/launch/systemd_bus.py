"""systemd's manager over D-Bus: calls with a deadline, results of jobs, and which units changed.

The one place that knows dbus-fast. It says what systemd says and draws no conclusions.

Two limits of the bus are kept from here, both dbus-daemon's defaults. It refuses more than 128 waiting replies of one
connection; so at most 32 calls are under way at once, more would only queue in PID 1. And it refuses systemd itself
more than 512 match rules, of which systemd takes one for each start or stop under way; it then gives up its connection,
and with it every answer and every subscription. So at most 64 starts are under way at once.

systemd may leave the bus for other reasons (`systemctl daemon-reexec`, a bus that was started again). What changed
meanwhile is told to nobody, so that is the end of this connection too: whoever uses it connects again and reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.errors import AuthError, DBusError, InvalidAddressError

from gpuyard_agent.launch.base import LauncherGone

_SERVICE = "org.freedesktop.systemd1"
_MANAGER_PATH = "/org/freedesktop/systemd1"
_UNIT_PATH = "/org/freedesktop/systemd1/unit/"
_MANAGER = "org.freedesktop.systemd1.Manager"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_BUS = "org.freedesktop.DBus"
UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"

#: Error names that callers tell apart.
UNIT_EXISTS = "org.freedesktop.systemd1.UnitExists"
NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"
NO_SUCH_PROCESS = "org.freedesktop.systemd1.NoSuchProcess"
NOT_SUPPORTED = "org.freedesktop.DBus.Error.NotSupported"

#: Of the bus, when systemd left it before it answered: what was asked may have happened.
_GONE = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("NoReply", "Disconnected", "NameHasNoOwner", "ServiceUnknown", "TimedOut")
)

_CALLS_AT_ONCE = 32
_STARTS_AT_ONCE = 64
_CALL_S = 30.0

Property = tuple[str, str, Any]
"""Name, D-Bus signature, value."""


class SystemdRefused(Exception):
    """systemd answered with an error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name.rpartition('.')[2]}: {text}")
        self.name = name
        self.text = text

    @property
    def is_about_unknown(self) -> bool:
        """There is no such unit."""
        return self.name == NO_SUCH_UNIT or self.name.endswith("UnknownObject")


class SystemdManager:
    """One connection to the system bus. After `LauncherGone` it is of no more use."""

    def __init__(self, address: str | None, on_changed: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        """`address`: of the bus; None for the system's own. `on_changed` gets the name of a unit whose state may be
        another now; `on_lost` is called once."""
        self._address = address
        self._on_changed = on_changed
        self._on_lost = on_lost
        self._bus: MessageBus | None = None
        self._at_once = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._starts_at_once = asyncio.Semaphore(_STARTS_AT_ONCE)
        #: Done when the connection is gone.
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None
        #: Starts under way, by unit.
        self._jobs: dict[str, asyncio.Future[str]] = {}

    async def open(self, prefix: str) -> None:
        """Connect, and be told of every unit. `prefix`: of the units' names that matter."""
        self._prefix = prefix
        try:
            self._bus = await MessageBus(
                bus_address=self._address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True
            ).connect()
        except (OSError, AuthError, InvalidAddressError, DBusError, EOFError) as error:
            raise LauncherGone(f"the system bus cannot be reached: {error}") from None
        self._watching = asyncio.create_task(self._watch(self._bus), name="system-bus")
        self._bus.add_message_handler(self._on_message)
        for rule in (
            f"type='signal',sender='{_SERVICE}',interface='{_MANAGER}',member='JobRemoved'",
            f"type='signal',sender='{_SERVICE}',interface='{_PROPERTIES}',member='PropertiesChanged',arg0='{UNIT}'",
            f"type='signal',sender='{_BUS}',interface='{_BUS}',member='NameOwnerChanged',arg0='{_SERVICE}'",
        ):
            await self._send(_BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", [rule])
        await self.call("Subscribe")

    async def _watch(self, bus: MessageBus) -> None:
        try:
            await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus-fast has no types here
        except (OSError, EOFError):
            pass  # the same as its end
        finally:
            self._lose()

    def _lose(self) -> None:
        if self._lost.done():
            return
        self._lost.set_result(None)
        for waiting in self._jobs.values():
            if not waiting.done():
                waiting.set_result("lost")
        if self._bus is not None:
            self._bus.disconnect()
        self._on_lost()

    async def close(self) -> None:
        if self._bus is not None:
            self._bus.disconnect()
        if self._watching is not None:
            await asyncio.wait([self._watching], timeout=1.0)
            self._watching.cancel()

    # --- calls ---

    async def call(
        self, member: str, signature: str = "", body: Sequence[Any] = (), descriptors: Sequence[int] = ()
    ) -> list[Any]:
        """A method of the manager. Raises `SystemdRefused` and `LauncherGone`."""
        return await self._send(_SERVICE, _MANAGER_PATH, _MANAGER, member, signature, body, descriptors)

    async def get(self, unit: str, interface: str, names: Iterable[str]) -> tuple[Any, ...]:
        """Properties of a unit."""
        path = unit_path(unit)
        answers = await asyncio.gather(
            *(self._send(_SERVICE, path, _PROPERTIES, "Get", "ss", [interface, name]) for name in names)
        )
        return tuple(body[0].value for body in answers)

    async def manager_property(self, name: str) -> Any:
        body = await self._send(_SERVICE, _MANAGER_PATH, _PROPERTIES, "Get", "ss", [_MANAGER, name])
        return body[0].value

    async def start_transient(self, unit: str, properties: Sequence[Property], descriptors: Sequence[int]) -> str:
        """Start it and wait for the outcome: `done`, or in systemd's word what became of it."""
        async with self._starts_at_once:
            finished = asyncio.get_running_loop().create_future()
            self._jobs[unit] = finished
            try:
                variants = [[name, Variant(signature, value)] for name, signature, value in properties]
                await self.call("StartTransientUnit", "ssa(sv)a(sa(sv))", [unit, "fail", variants, []], descriptors)
                outcome: str = await finished
            finally:
                del self._jobs[unit]
        if outcome == "lost":
            raise LauncherGone("the connection to systemd was lost during a start")
        return outcome

    async def units(self, pattern: str) -> tuple[str, ...]:
        """Names of all that are loaded and match."""
        (rows,) = await self.call("ListUnitsByPatterns", "asas", [[], [pattern]])
        return tuple(row[0] for row in rows)

    async def describe(self, unit: str, description: str) -> None:
        """Change what stands in its description, until the unit goes."""
        await self.set_property(unit, ("Description", "s", description))

    async def set_property(self, unit: str, wanted: Property) -> None:
        """Change one that systemd lets be changed while the unit runs, until the unit goes."""
        name, signature, value = wanted
        await self.call("SetUnitProperties", "sba(sv)", [unit, True, [[name, Variant(signature, value)]]])

    async def _send(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        descriptors: Sequence[int] = (),
    ) -> list[Any]:
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(descriptors),
        )
        bus = self._bus
        async with self._at_once:
            if bus is None or self._lost.done():
                raise LauncherGone("not connected to systemd")
            asked: asyncio.Future[Any] = asyncio.ensure_future(bus.call(message))
            waiting: tuple[asyncio.Future[Any], ...] = (asked, self._lost)
            try:
                await asyncio.wait(waiting, timeout=_CALL_S, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    raise LauncherGone(f"systemd does not answer {member}")
                reply = asked.result()
            except (OSError, EOFError) as error:
                raise LauncherGone(f"the connection to systemd broke: {error}") from None
            finally:
                asked.cancel()
        if reply is None:
            raise LauncherGone("the connection to systemd was closed")
        if reply.message_type is MessageType.ERROR and reply.error_name in _GONE:
            self._lose()
            raise LauncherGone(f"systemd left the bus before it answered {member}")
        if reply.message_type is MessageType.ERROR:
            raise SystemdRefused(reply.error_name or "", str(reply.body[0]) if reply.body else "")
        return list(reply.body)

    # --- signals ---

    def _on_message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.member == "JobRemoved":
            unit, outcome = message.body[2], message.body[3]
            waiting = self._jobs.get(unit)
            if waiting is not None and not waiting.done():
                waiting.set_result(outcome)
        elif message.member == "NameOwnerChanged":
            name, before, _ = message.body
            if name == _SERVICE and before:
                self._lose()
        elif message.member == "PropertiesChanged" and message.path is not None:
            unit = unit_of(message.path)
            if unit.startswith(self._prefix):
                self._on_changed(unit)


def unit_path(unit: str) -> str:
    """The object that stands for a unit."""
    escaped = "".join(chr(byte) if chr(byte).isalnum() else f"_{byte:02x}" for byte in unit.encode())
    if escaped[0].isdigit():
        escaped = f"_{ord(escaped[0]):02x}{escaped[1:]}"
    return _UNIT_PATH + escaped


def unit_of(path: str) -> str:
    """The unit that an object stands for, "" for other objects."""
    if not path.startswith(_UNIT_PATH):
        return ""
    head, *rest = path.removeprefix(_UNIT_PATH).split("_")
    return head + "".join(chr(int(part[:2], 16)) + part[2:] for part in rest)
