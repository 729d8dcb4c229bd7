"""What every bus does when its server is gone, and when it is back. In memory and on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gpuyard_protocol.bus.base import (
    Disconnected,
    NoResponders,
    StreamUnavailable,
    Unanswered,
)
from support.bus_world import DEADLINE_S, Collector, Echo, World, eventually, publish_numbered, spec


async def test_without_a_connection_every_call_says_so_at_once(fragile_world: World) -> None:
    bus = await fragile_world.join()
    fragile_world.stop()
    await eventually(lambda: not bus.is_connected)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: bus.publish("x", b""),
        lambda: bus.request("x", b""),
        lambda: bus.stream_publish("x", b""),
        lambda: bus.begin_stream_publish("x", b""),
        lambda: bus.subscribe("x", lambda _: None),
        lambda: bus.read_stream("x", lambda _: None),
        lambda: bus.stream_state("x"),
        lambda: bus.flush(),
    ]
    async with asyncio.timeout(1.0):
        for call in calls:
            with pytest.raises(Disconnected):
                await call()


async def test_a_call_under_way_when_the_connection_ends_is_unanswered_at_once(fragile_world: World) -> None:
    bus = await fragile_world.join()
    await bus.subscribe("mute", lambda _: None)
    call = asyncio.ensure_future(bus.request("mute", b"", timeout=60))
    await bus.flush()
    fragile_world.stop()
    async with asyncio.timeout(1.0):
        with pytest.raises(Unanswered, match="mute"):
            await call


async def test_subscriptions_and_readers_go_on_after_the_server_comes_back(fragile_world: World) -> None:
    bus = await fragile_world.join()
    events: list[str] = []
    bus.on_disconnect(lambda: events.append("lost"))
    bus.on_reconnect(lambda: events.append("back"))
    await bus.ensure_stream(spec("r"))
    got, texts = Collector(), []
    await bus.read_stream("r", got)
    await bus.subscribe("r.core", lambda message: texts.append(message.data))
    echo = Echo(bus)
    await bus.subscribe("r.echo", echo)
    await publish_numbered(bus, "r.s.x", 3)
    await got.until(3)
    fragile_world.stop()
    await eventually(lambda: not bus.is_connected)
    fragile_world.start()
    await eventually(lambda: bus.is_connected)
    assert (await bus.request("r.echo", b"hi")).data == b"HI"
    await eventually(lambda: events == ["lost", "back"])
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await publish_numbered(bus, "r.s.x", 2, first=3)
                break
            except (NoResponders, StreamUnavailable):
                await asyncio.sleep(0.01)
    await got.until(5)
    await bus.publish("r.core", b"again")
    await eventually(lambda: bool(texts))
    assert got.texts == ["0", "1", "2", "3", "4"]
