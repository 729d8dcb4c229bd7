"""What every bus does: one suite for the in-memory bus and for the real server.

A simulation is worth as much as this suite is complete: whatever a component relies on stands here.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import (
    Bus,
    BusError,
    Disconnected,
    Message,
    NoResponders,
    PermissionDenied,
    PublishRefused,
    StoredMessage,
    StreamSpec,
    StreamUnavailable,
    Unanswered,
)
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.bus.publisher import WindowedPublisher
from support.nats import OPEN_CONFIG, NatsProcess

DEADLINE_S = 5.0
_numbers = itertools.count(1)

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


@pytest.fixture(scope="module")
def limited_nats(tmp_path_factory: pytest.TempPathFactory) -> NatsProcess:
    server = NatsProcess(tmp_path_factory.mktemp("limited-nats"), LIMITED)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest, limited_nats: NatsProcess) -> AsyncIterator[World]:
    world = World(limited_nats if request.param == "nats" else None)
    yield world
    await world.leave()


@pytest.fixture(params=["memory", "nats"])
async def fragile_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A world of the test's own, which it may stop and start."""
    server = NatsProcess(tmp_path / "nats") if request.param == "nats" else None
    if server is not None:
        server.start()
    world = World(server)
    yield world
    await world.leave()
    if server is not None:
        server.kill()


@pytest.fixture
def root() -> str:
    """A subject that no other test uses; it is under `ok.`, where the limited party may go."""
    return f"ok.t{next(_numbers)}"


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


# -- requests and subscriptions -------------------------------------------------------------------------


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


# -- permissions ----------------------------------------------------------------------------------------


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


# -- streams: storing -----------------------------------------------------------------------------------


async def test_a_stream_acknowledges_with_dense_sequences(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    acks = [await bus.stream_publish(f"{root}.s.x", b"") for _ in range(3)]
    assert [(ack.stream, ack.sequence, ack.duplicate) for ack in acks] == [
        (spec(root).name, number, False) for number in (1, 2, 3)
    ]


async def test_a_publish_no_stream_takes_has_no_responders(world: World, root: str) -> None:
    with pytest.raises(NoResponders):
        await (await world.join()).stream_publish(f"{root}.s.x", b"", timeout=60)


async def test_an_answer_that_is_no_acknowledgement_is_unanswered(world: World, root: str) -> None:
    bus = await world.join()
    await bus.subscribe(f"{root}.s.x", Echo(bus))
    for data in (b"", b"not json", b"{}"):
        with pytest.raises(Unanswered, match="unreadable"):
            await bus.stream_publish(f"{root}.s.x", data)


async def test_the_same_message_id_is_stored_once_within_the_window(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, duplicate_window_s=60.0))
    headers = {"Nats-Msg-Id": "m1"}
    first = await bus.stream_publish(f"{root}.s.x", b"a", headers=headers)
    again = await bus.stream_publish(f"{root}.s.y", b"b", headers=headers)
    assert (again.sequence, again.duplicate) == (first.sequence, True)
    assert (await bus.stream_state(spec(root).name)).messages == 1


async def test_the_duplicate_window_ends(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, duplicate_window_s=0.1))
    headers = {"Nats-Msg-Id": "m1"}
    await bus.stream_publish(f"{root}.s.x", b"a", headers=headers)
    async with asyncio.timeout(DEADLINE_S):
        while (await bus.stream_publish(f"{root}.s.x", b"a", headers=headers)).duplicate:
            await asyncio.sleep(0.02)


async def test_an_expected_last_sequence_that_no_longer_holds_is_refused(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await bus.stream_publish(f"{root}.s.x", b"", headers={"Nats-Expected-Last-Sequence": "0"})
    await bus.stream_publish(f"{root}.s.x", b"", headers={"Nats-Expected-Last-Sequence": "1"})
    with pytest.raises(PublishRefused) as refused:
        await bus.stream_publish(f"{root}.s.x", b"", headers={"Nats-Expected-Last-Sequence": "1"})
    assert refused.value.code == 10071
    assert (await bus.stream_state(spec(root).name)).last_sequence == 2


async def test_a_fence_on_another_subject_holds_until_somebody_claims_it(world: World, root: str) -> None:
    """The journal's fence: appends to one subject name the last message of the leader's subject."""
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    leader = f"{root}.s.leader"
    claim = await bus.stream_publish(leader, b"", headers={"Nats-Expected-Last-Subject-Sequence": "0"})
    fence = {
        "Nats-Expected-Last-Subject-Sequence": str(claim.sequence),
        "Nats-Expected-Last-Subject-Sequence-Subject": leader,
    }
    for _ in range(3):
        await bus.stream_publish(f"{root}.s.e", b"", headers=fence)
    with pytest.raises(PublishRefused):
        await bus.stream_publish(leader, b"", headers={"Nats-Expected-Last-Subject-Sequence": "0"})
    await bus.stream_publish(leader, b"", headers={"Nats-Expected-Last-Subject-Sequence": str(claim.sequence)})
    with pytest.raises(PublishRefused) as refused:
        await bus.stream_publish(f"{root}.s.e", b"", headers=fence)
    assert refused.value.code == 10071


async def test_a_full_subject_refuses_its_writer_and_nobody_else(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, max_messages_per_subject=2, discard_new_per_subject=True))
    await publish_numbered(bus, f"{root}.s.full", 2)
    with pytest.raises(PublishRefused) as refused:
        await bus.stream_publish(f"{root}.s.full", b"")
    assert refused.value.code == 10077
    await bus.stream_publish(f"{root}.s.other", b"")


async def test_without_that_rule_a_full_subject_drops_its_oldest(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, max_messages_per_subject=2, discard_old=True))
    await publish_numbered(bus, f"{root}.s.x", 3)
    state = await bus.stream_state(spec(root).name)
    assert (state.first_sequence, state.last_sequence, state.messages) == (2, 3, 2)


async def test_a_full_stream_refuses_and_takes_again_after_a_purge(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, max_bytes=100_000))
    for _ in range(11):
        await bus.stream_publish(f"{root}.s.x", bytes(9_000))
    with pytest.raises(PublishRefused) as refused:
        await bus.stream_publish(f"{root}.s.x", bytes(9_000))
    assert refused.value.code == 10077
    await bus.purge_stream(spec(root).name, up_to=5)
    await bus.stream_publish(f"{root}.s.x", bytes(9_000))


async def test_a_message_above_the_streams_limit_is_refused(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root, max_message_bytes=100))
    await bus.stream_publish(f"{root}.s.x", bytes(100))
    with pytest.raises(PublishRefused) as refused:
        await bus.stream_publish(f"{root}.s.x", bytes(101))
    assert refused.value.code == 10054


# -- streams: looking -----------------------------------------------------------------------------------


async def test_ensuring_a_stream_twice_keeps_it_and_applies_new_settings(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await bus.ensure_stream(spec(root))
    await bus.stream_publish(f"{root}.s.x", b"")
    await bus.ensure_stream(spec(root, max_bytes=5_000_000, max_message_bytes=10))
    state = await bus.stream_state(spec(root).name)
    assert (state.messages, state.max_bytes) == (1, 5_000_000)
    with pytest.raises(PublishRefused):
        await bus.stream_publish(f"{root}.s.x", bytes(11))


async def test_two_streams_cannot_share_subjects(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    with pytest.raises(StreamUnavailable, match="overlap"):
        await bus.ensure_stream(StreamSpec(f"{spec(root).name}-2", (f"{root}.s.x",), max_bytes=1000))


async def test_an_empty_stream_starts_after_its_end(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    fresh = await bus.stream_state(spec(root).name)
    assert (fresh.first_sequence, fresh.last_sequence, fresh.messages, fresh.bytes) == (1, 0, 0, 0)
    await publish_numbered(bus, f"{root}.s.x", 3)
    await bus.purge_stream(spec(root).name, up_to=3)
    purged = await bus.stream_state(spec(root).name)
    assert (purged.first_sequence, purged.last_sequence, purged.messages) == (4, 3, 0)


async def test_the_bytes_of_a_stream_are_counted_as_the_server_counts(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await bus.stream_publish(f"{root}.s.x", bytes(1000))
    plain = (await bus.stream_state(spec(root).name)).bytes
    assert plain == 22 + len(f"{root}.s.x") + 1000 + 8
    await bus.stream_publish(f"{root}.s.x", bytes(1000), headers={"A": "b"})
    assert (await bus.stream_state(spec(root).name)).bytes == 2 * plain + 4 + len("NATS/1.0\r\nA: b\r\n\r\n")


async def test_a_message_is_read_back_by_its_sequence(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await bus.stream_publish(f"{root}.s.x", b"one", headers={"A": "b"})
    found = await bus.get_message(spec(root).name, 1)
    assert found is not None
    assert (found.subject, found.data, found.sequence, found.headers) == (f"{root}.s.x", b"one", 1, {"A": "b"})
    assert found.stored_ms > 1_700_000_000_000
    assert await bus.get_message(spec(root).name, 2) is None


async def test_a_purged_message_is_none_not_the_next_one(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    await publish_numbered(bus, f"{root}.s.x", 3)
    await bus.purge_stream(spec(root).name, up_to=1)
    assert await bus.get_message(spec(root).name, 1) is None


async def test_the_newest_message_of_a_subject(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    name = spec(root).name
    assert await bus.last_message(name, f"{root}.s.x") is None
    await bus.stream_publish(f"{root}.s.x", b"1")
    await bus.stream_publish(f"{root}.s.x", b"2")
    await bus.stream_publish(f"{root}.s.y", b"3")
    for subject, expected in ((f"{root}.s.x", 2), (f"{root}.s.>", 3), (f"{root}.s.*", 3)):
        found = await bus.last_message(name, subject)
        assert found is not None
        assert found.sequence == expected


async def test_purging_one_subject_leaves_the_others(world: World, root: str) -> None:
    bus = await world.join()
    await bus.ensure_stream(spec(root))
    for tail in ("x", "y", "x", "y", "x"):
        await bus.stream_publish(f"{root}.s.{tail}", b"")
    await bus.purge_stream(spec(root).name, up_to=4, subject=f"{root}.s.x")
    left = [number for number in range(1, 6) if await bus.get_message(spec(root).name, number)]
    assert left == [2, 4, 5]


async def test_an_unknown_stream_is_unavailable(world: World) -> None:
    bus = await world.join()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: bus.stream_state("nowhere"),
        lambda: bus.purge_stream("nowhere", up_to=1),
        lambda: bus.get_message("nowhere", 1),
        lambda: bus.last_message("nowhere", "x"),
        lambda: bus.read_stream("nowhere", lambda _: None),
    ]
    for call in calls:
        with pytest.raises(StreamUnavailable, match="nowhere"):
            await call()


# -- streams: reading -----------------------------------------------------------------------------------


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


# -- many publishes at once -----------------------------------------------------------------------------


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


# -- losing the connection ------------------------------------------------------------------------------


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
