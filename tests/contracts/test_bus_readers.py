"""How every bus reads streams and publishes many messages at once. In memory and on a real server."""

from __future__ import annotations

import asyncio

import pytest

from gpuyard_protocol.bus.base import (
    NoResponders,
    Unanswered,
)
from gpuyard_protocol.bus.publisher import WindowedPublisher
from support.bus_world import Collector, World, publish_numbered, spec

# --- streams: reading ---


async def test_a_reader_gets_what_is_there_and_what_comes(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await publish_numbered(bus, f"{root}.s.x", 3)
    got = Collector()
    reader = await bus.read_stream(spec(root).name, got)
    await got.until(3)
    await publish_numbered(bus, f"{root}.s.y", 2, first=3)
    await got.until(5)
    assert got.texts == ["0", "1", "2", "3", "4"]
    assert [message.sequence for message in got.messages] == [1, 2, 3, 4, 5]
    assert got.messages[4].subject == f"{root}.s.y"
    assert reader.position == 5


async def test_a_reader_starts_where_it_is_told(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await publish_numbered(bus, f"{root}.s.x", 5)
    middle, beyond = Collector(), Collector()
    await bus.read_stream(spec(root).name, middle, start=4)
    reader = await bus.read_stream(spec(root).name, beyond, start=7)
    assert reader.position == 6
    await publish_numbered(bus, f"{root}.s.x", 2, first=5)
    await middle.until(4)
    await beyond.until(1)
    assert [message.sequence for message in middle.messages] == [4, 5, 6, 7]
    assert [message.sequence for message in beyond.messages] == [7]


async def test_a_reader_passes_over_purged_messages(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await publish_numbered(bus, f"{root}.s.x", 5)
    await bus.purge_stream(spec(root).name, up_to=3)
    got = Collector()
    await bus.read_stream(spec(root).name, got, start=1)
    await got.until(2)
    assert [message.sequence for message in got.messages] == [4, 5]


async def test_a_reader_with_a_filter_sees_only_that(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    for number in range(6):
        await bus.stream_publish(f"{root}.s.{'ab'[number % 2]}.x", str(number).encode())
    got = Collector()
    reader = await bus.read_stream(spec(root).name, got, filter_subject=f"{root}.s.b.>")
    await got.until(3)
    await bus.stream_publish(f"{root}.s.a.x", b"6")
    await bus.stream_publish(f"{root}.s.b.x", b"7")
    await got.until(4)
    assert got.texts == ["1", "3", "5", "7"]
    assert reader.position == 8


async def test_a_reader_keeps_up_with_more_than_a_batch(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    publisher = WindowedPublisher(bus, window=64)
    for number in range(400):
        await publisher.submit(f"{root}.s.x", str(number).encode())
    await publisher.drain()
    got = Collector()
    await bus.read_stream(spec(root).name, got, batch=16)
    await got.until(400)
    assert got.texts == [str(number) for number in range(400)]
    assert max(got.batch_sizes) <= 16


async def test_readers_do_not_disturb_each_other(world: World, root: str) -> None:
    bus, other = await world.join("a"), await world.join("b")
    await bus.ensure_stream(spec(root))
    collectors = [Collector() for _ in range(3)]
    await bus.read_stream(spec(root).name, collectors[0])
    await bus.read_stream(spec(root).name, collectors[1])
    await other.read_stream(spec(root).name, collectors[2])
    await publish_numbered(bus, f"{root}.s.x", 20)
    for collector in collectors:
        await collector.until(20)
        assert collector.texts == [str(number) for number in range(20)]


async def test_a_closed_reader_hands_over_nothing_more(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    got, witness = Collector(), Collector()
    reader = await bus.read_stream(spec(root).name, got)
    await bus.read_stream(spec(root).name, witness)
    await publish_numbered(bus, f"{root}.s.x", 1)
    await got.until(1)
    await reader.close()
    await publish_numbered(bus, f"{root}.s.x", 3)
    await witness.until(4)
    assert (len(got.messages), reader.position) == (1, 1)


async def test_a_paused_reader_holds_back_and_goes_on_where_it_was(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    got = Collector()
    reader = await bus.read_stream(spec(root).name, got, batch=8)
    reader.pause()
    await publish_numbered(bus, f"{root}.s.x", 40)
    await bus.flush()
    assert len(got.messages) <= 12
    reader.resume()
    await got.until(40)
    assert got.texts == [str(number) for number in range(40)]


async def test_headers_and_times_of_stored_messages_are_read(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await bus.stream_publish(f"{root}.s.x", b"", headers={"A": "b", "C": "d e"})
    got = Collector()
    await bus.read_stream(spec(root).name, got)
    await got.until(1)
    assert got.messages[0].headers == {"A": "b", "C": "d e"}
    assert got.messages == [await bus.get_message(spec(root).name, 1)]


# --- many publishes at once ---


async def test_the_window_bounds_what_is_under_way_and_keeps_the_order(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    publisher = WindowedPublisher(bus, window=8)
    futures = []
    for number in range(200):
        futures.append(await publisher.submit(f"{root}.s.x", str(number).encode()))
        assert publisher.in_flight <= 8
    assert [ack.sequence for ack in await asyncio.gather(*futures)] == list(range(1, 201))
    await publisher.drain()
    assert publisher.in_flight == 0


async def test_refused_publishes_end_their_future_and_free_their_place(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, max_messages_per_subject=5, discard_new_per_subject=True))
    publisher = WindowedPublisher(bus, window=4)
    futures = [await publisher.submit(f"{root}.s.x", b"") for _ in range(30)]
    futures.append(await publisher.submit(f"{root}.nowhere", b""))
    futures.append(await publisher.submit("not a subject", b""))
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == ["PubAck"] * 5 + ["PublishRefused"] * 25 + [
        "NoResponders",
        "BusError",
    ]


async def test_a_cancelled_submit_gives_its_place_back(world: World, root: str) -> None:
    bus = await world.join()
    await bus.subscribe(f"{root}.mute", lambda _: None)
    publisher = WindowedPublisher(bus, window=1, timeout=0.2)
    first = await publisher.submit(f"{root}.mute", b"")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await publisher.submit(f"{root}.mute", b"")
    assert publisher.in_flight == 1
    with pytest.raises(Unanswered):
        await first
    last = await publisher.submit(f"{root}.nowhere", b"")
    with pytest.raises(NoResponders):
        await last
