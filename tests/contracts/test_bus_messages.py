"""What every bus does with messages: requests, subscriptions, permissions. In memory and on a real server.

A simulation is worth as much as this suite is complete: whatever a component relies on stands here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gpuyard_protocol.bus.base import (
    BusError,
    Message,
    NoResponders,
    PermissionDenied,
    PublishRefused,
    Unanswered,
)
from support.bus_world import Echo, World, eventually

# --- requests and subscriptions ---


async def test_a_request_gets_its_answer_with_headers(world: World, root: str) -> None:
    asker, echo = await world.join("asker"), Echo(await world.join("answerer"))
    await echo.bus.subscribe(f"{root}.q", echo)
    reply = await asker.request(f"{root}.q", b"hello", headers={"Trace": "7"})
    assert (reply.data, reply.headers) == (b"HELLO", {"From": "echo"})
    assert echo.seen[0].headers == {"Trace": "7"}


async def test_many_requests_at_once_each_get_their_own_answer(world: World, root: str) -> None:
    asker, echo = await world.join("asker"), Echo(await world.join("answerer"))
    await echo.bus.subscribe(f"{root}.q.*", echo)
    replies = await asyncio.gather(*(asker.request(f"{root}.q.{n}", f"n{n}".encode()) for n in range(200)))
    assert [reply.data for reply in replies] == [f"N{n}".encode() for n in range(200)]


async def test_a_request_nobody_listens_to_fails_at_once(world: World, root: str) -> None:
    with pytest.raises(NoResponders, match=rf"{root}\.q"):
        await (await world.join()).request(f"{root}.q", b"", timeout=60)


async def test_a_request_nobody_answers_is_unanswered_after_its_deadline(world: World, root: str) -> None:
    bus = await world.join()
    await bus.subscribe(f"{root}.q", lambda _: None)
    with pytest.raises(Unanswered, match=r"0\.05 s"):
        await bus.request(f"{root}.q", b"", timeout=0.05)


async def test_a_cancelled_request_leaves_the_bus_usable(world: World, root: str) -> None:
    bus = await world.join()
    await bus.subscribe(f"{root}.mute", lambda _: None)
    echo = Echo(bus)
    await bus.subscribe(f"{root}.q", echo)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await bus.request(f"{root}.mute", b"", timeout=60)
    assert (await bus.request(f"{root}.q", b"x")).data == b"X"


async def test_messages_of_one_sender_arrive_in_order(world: World, root: str) -> None:
    sender, receiver = await world.join("a"), await world.join("b")
    got: list[bytes] = []
    await receiver.subscribe(f"{root}.x", lambda message: got.append(message.data))
    for number in range(500):
        await sender.publish(f"{root}.x", str(number).encode())
    await eventually(lambda: len(got) == 500)
    assert got == [str(number).encode() for number in range(500)]


async def test_wildcards_match_as_the_server_matches(world: World, root: str) -> None:
    bus = await world.join()
    star: list[str] = []
    rest: list[str] = []
    await bus.subscribe(f"{root}.*.end", lambda message: star.append(message.subject))
    await bus.subscribe(f"{root}.>", lambda message: rest.append(message.subject))
    for tail in ("a.end", "b.end", "a.b.end", "a"):
        await bus.publish(f"{root}.{tail}", b"")
    await eventually(lambda: len(rest) == 4)
    assert star == [f"{root}.a.end", f"{root}.b.end"]


async def test_a_queue_group_gets_each_message_once(world: World, root: str) -> None:
    sender = await world.join("sender")
    got: list[tuple[int, bytes]] = []

    def handler(number: int) -> Callable[[Message], None]:
        return lambda message: got.append((number, message.data))

    for number in range(3):
        member = await world.join(f"member{number}")
        await member.subscribe(f"{root}.x", handler(number), queue="workers")
    for number in range(60):
        await sender.publish(f"{root}.x", str(number).encode())
    await eventually(lambda: len(got) >= 60)
    await sender.flush()
    assert sorted(int(data) for _, data in got) == list(range(60))
    assert len({member for member, _ in got}) > 1


async def test_after_unsubscribe_nothing_arrives(world: World, root: str) -> None:
    bus = await world.join()
    got: list[bytes] = []
    subscription = await bus.subscribe(f"{root}.x", lambda message: got.append(message.data))
    await subscription.unsubscribe()
    await bus.publish(f"{root}.x", b"late")
    await bus.flush()
    await asyncio.sleep(0)
    assert got == []


async def test_a_reply_subject_is_handed_over_as_sent(world: World, root: str) -> None:
    bus = await world.join()
    got: list[Message] = []
    await bus.subscribe(f"{root}.x", got.append)
    await bus.publish(f"{root}.x", b"", reply=f"{root}.back")
    await eventually(lambda: bool(got))
    assert got[0].reply == f"{root}.back"


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0", "a..b", ".a", "a.", "a\tb", "a\x00b"])
async def test_what_is_no_subject_is_refused_before_it_is_sent(world: World, subject: str) -> None:
    bus = await world.join()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: bus.publish(subject, b""),
        lambda: bus.request(subject, b""),
        lambda: bus.stream_publish(subject, b""),
        lambda: bus.subscribe(subject, lambda _: None),
    ]
    for call in calls:
        with pytest.raises(BusError, match="is not a subject"):
            await call()


@pytest.mark.parametrize("headers", [{"Bad Name": "x"}, {"A": "x\r\nB: y"}, {"": "x"}])
async def test_headers_that_would_break_the_message_are_refused(world: World, headers: dict[str, str]) -> None:
    with pytest.raises(BusError, match="header"):
        await (await world.join()).publish("ok.x", b"", headers=headers)


async def test_a_message_above_the_servers_limit_is_refused_and_the_connection_lives(world: World, root: str) -> None:
    bus = await world.join()
    with pytest.raises(PublishRefused, match="more than the server takes"):
        await bus.publish(f"{root}.x", bytes(8 * 1024 * 1024 + 1))
    got: list[bytes] = []
    await bus.subscribe(f"{root}.x", lambda message: got.append(message.data))
    await bus.publish(f"{root}.x", bytes(8 * 1024 * 1024))
    await eventually(lambda: bool(got))
    assert len(got[0]) == 8 * 1024 * 1024


# --- permissions ---


async def test_refused_calls_raise_at_once(world: World, root: str) -> None:
    bus = await world.join(is_limited=True)
    errors: list[BusError] = []
    bus.on_error(errors.append)
    async with asyncio.timeout(1.0):
        with pytest.raises(PermissionDenied, match=r"Forbidden\.x"):
            await bus.request("Forbidden.x", b"", timeout=60)
        with pytest.raises(PermissionDenied, match=r"forbidden\.x"):
            await bus.stream_publish("forbidden.x", b"", timeout=60)
        with pytest.raises(PermissionDenied, match=r"forbidden\.x"):
            await bus.subscribe("forbidden.x", lambda _: None)
    echo = Echo(await world.join("free"))
    await echo.bus.subscribe(f"{root}.q", echo)
    assert (await bus.request(f"{root}.q", b"still here")).data == b"STILL HERE"
    assert errors == []


async def test_a_refused_publish_shows_in_on_error(world: World, root: str) -> None:
    bus = await world.join(is_limited=True)
    errors: list[BusError] = []
    bus.on_error(errors.append)
    await bus.publish("forbidden.x", b"")
    await eventually(lambda: bool(errors))
    assert isinstance(errors[0], PermissionDenied)
    assert "forbidden.x" in str(errors[0])
