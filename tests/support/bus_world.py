"""What the suite of buses is played on: a broker, in memory or real, and what tests do with its buses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import (
    Bus,
    Message,
    StoredMessage,
    StreamSpec,
)
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from support.nats import OPEN_CONFIG, NatsProcess

DEADLINE_S = 5.0


LIMITED = (
    OPEN_CONFIG
    + """
accounts {{ A {{ jetstream: enabled
  users: [
    {{ user: full, password: x }}
    {{ user: limited, password: x, permissions: {{
        publish: ["ok.>", "$JS.API.>"], subscribe: ["_INBOX.>", "ok.>"] }} }} ] }} }}
no_auth_user: full
"""
)


class World:
    """One broker, memory or real, and the buses made on it."""

    def __init__(self, server: NatsProcess | None) -> None:
        self.server = server
        self.broker = MemoryBroker()
        self._buses: list[Bus] = []

    async def join(self, name: str = "one", *, is_limited: bool = False) -> Bus:
        bus: Bus
        if self.server is None:
            allowed = ["ok.>"] if is_limited else None
            bus = MemoryBus(self.broker, name=name, may_publish=allowed, may_subscribe=allowed)
        else:
            url = self.server.url.replace("//", "//limited:x@") if is_limited else self.server.url
            bus = await nats.connect(url, name=name, inbox_prefix="_INBOX", reconnect_jitter_s=(0.01, 0.02))
        self._buses.append(bus)
        return bus

    def stop(self) -> None:
        if self.server is None:
            self.broker.stop()
        else:
            self.server.kill()

    def start(self) -> None:
        if self.server is None:
            self.broker.start()
        else:
            self.server.start()

    async def leave(self) -> None:
        for bus in self._buses:
            await bus.close()


def spec(root: str, **settings: object) -> StreamSpec:
    values: dict[str, object] = {"max_bytes": 4_000_000, **settings}
    return StreamSpec(root.replace(".", "_"), (f"{root}.s.>",), **values)  # type: ignore[arg-type]


class Collector:
    """A handler that can be waited on."""

    def __init__(self) -> None:
        self.messages: list[StoredMessage] = []
        self.batch_sizes: list[int] = []
        self._changed = asyncio.Event()

    def __call__(self, batch: list[StoredMessage]) -> None:
        self.batch_sizes.append(len(batch))
        self.messages.extend(batch)
        self._changed.set()

    @property
    def texts(self) -> list[str]:
        return [message.data.decode() for message in self.messages]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.messages) < count:
                self._changed.clear()
                await self._changed.wait()


class Echo:
    """Answers each request with its own data, in upper case."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.seen: list[Message] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, message: Message) -> None:
        self.seen.append(message)
        answer = self.bus.publish(message.reply, message.data.upper(), headers={"From": "echo"})
        task = asyncio.ensure_future(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def publish_numbered(bus: Bus, subject: str, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        await bus.stream_publish(subject, str(number).encode())


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)
