"""What the NATS bus survives: hostile bytes, dead and frozen servers, keys taken away, faulty handlers.

Each case ends a client built on nats-py alone, silently or for good; here the connection or its replacement goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpuyard_protocol.bus import client, nats
from gpuyard_protocol.bus.base import (
    BusError,
    Disconnected,
    Message,
    PermissionDenied,
    PubAck,
    StoredMessage,
    StreamSpec,
    Unanswered,
)
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.bus.publisher import WindowedPublisher
from support.nats import OPEN_CONFIG, NatsProcess

DEADLINE_S = 5.0
STREAM = StreamSpec("S", ("s.>",), max_bytes=500_000_000)


@pytest.fixture
async def bus(nats_process: NatsProcess) -> AsyncIterator[NatsBus]:
    bus = await connected(nats_process)
    yield bus
    await bus.close()


async def connected(server: NatsProcess, name: str = "test") -> NatsBus:
    return await nats.connect(server.url, name=name, inbox_prefix="_INBOX_T", reconnect_jitter_s=(0.01, 0.03))


async def eventually(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.002)


def send_raw(server: NatsProcess, commands: bytes) -> None:
    """Say anything to the server, as a hostile client would, and wait until it has taken it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as raw:
        raw.sendall(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n' + commands + b"PING\r\n")
        received = b""
        while b"PONG" not in received:
            chunk = raw.recv(65536)
            assert chunk, f"the server hung up: {received!r}"
            received += chunk


def headed(subject: bytes, block: bytes, data: bytes = b"poison", reply: bytes = b"") -> bytes:
    line = b"HPUB %s %s %d %d\r\n" % (subject, reply, len(block), len(block) + len(data))
    return line + block + data + b"\r\n"


def plain(subject: bytes, data: bytes = b"poison", reply: bytes = b"") -> bytes:
    return b"PUB %s %s %d\r\n%s\r\n" % (subject, reply, len(data), data)


POISON = {
    "subject not UTF-8": plain(b"s.\xff\xfe"),
    "reply not UTF-8": plain(b"s.x", reply=b"r.\xff"),
    "status not UTF-8": headed(b"s.x", b"NATS/1.0 \xff\xfe\xff\r\n\r\n"),
    "status no number": headed(b"s.x", b"NATS/1.0 abc\r\n\r\n"),
    "block without line break": headed(b"s.x", b"NATS/1.0"),
    "block of other bytes": headed(b"s.x", b"\x00\x01\x02\x03"),
    "header value not UTF-8": headed(b"s.x", b"NATS/1.0\r\nA: \xff\r\n\r\n"),
    "header line without colon": headed(b"s.x", b"NATS/1.0\r\nnonsense\r\n\r\n"),
    "header name with white space": headed(b"s.x", b"NATS/1.0\r\nA B: c\r\n\r\n"),
}
#: Strange, but readable: these must arrive, and must not be mistaken for the server's own words.
ODD = {
    "subject with vertical tab": plain(b"s.\x0bx\x0c"),
    "subject with control bytes": plain(b"s.\x01\x7f"),
    "status of a missing heartbeat": headed(b"s.x", b"NATS/1.0 408 Request Timeout\r\n\r\n", b""),
    "status of a deleted consumer": headed(b"s.x", b"NATS/1.0 409 Consumer Deleted\r\n\r\n", b""),
    "status of nobody there": headed(b"s.x", b"NATS/1.0 503\r\n\r\n", b""),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
async def test_a_poisoned_message_is_counted_and_dropped(
    nats_process: NatsProcess, bus: NatsBus, poison: bytes
) -> None:
    got: list[Message] = []
    errors: list[BusError] = []
    bus.on_error(errors.append)
    subscription = await bus.subscribe("s.>", got.append)
    send_raw(nats_process, poison + plain(b"s.good", b"good"))
    await eventually(lambda: bool(got))
    assert [message.data for message in got] == [b"good"]
    assert (bus.reconnects, bus.malformed_messages, subscription.dropped) == (0, 1, 1)
    assert "malformed message on s.>" in str(errors[0])


@pytest.mark.parametrize("poison", (POISON | ODD).values(), ids=(POISON | ODD).keys())
async def test_a_poisoned_message_in_a_stream_is_handed_over_and_passed(
    nats_process: NatsProcess, bus: NatsBus, poison: bytes
) -> None:
    """It has an acknowledgement, so somebody must answer for it; and it is met again at each restart."""
    await bus.ensure_stream(STREAM)
    send_raw(nats_process, poison + plain(b"s.good", b"good"))
    for _ in range(2):
        got: list[StoredMessage] = []
        reader = await bus.read_stream("S", got.extend)
        await eventually(lambda got=got: len(got) >= 2)  # type: ignore[misc]
        assert [message.sequence for message in got] == [1, 2]
        assert got[0].subject.startswith("s.")
        assert got[1].data == b"good"
        await reader.close()
    assert bus.reconnects == 0


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
async def test_odd_but_readable_messages_arrive(nats_process: NatsProcess, bus: NatsBus, odd: bytes) -> None:
    got: list[Message] = []
    await bus.subscribe("s.>", got.append)
    send_raw(nats_process, odd)
    await eventually(lambda: bool(got))
    assert (bus.reconnects, bus.malformed_messages) == (0, 0)


async def test_a_stored_message_cannot_pretend_to_be_another(nats_process: NatsProcess, bus: NatsBus) -> None:
    await bus.ensure_stream(STREAM)
    block = b"NATS/1.0 404 No Message\r\nNats-Sequence: 77\r\nNats-Subject: s.forged\r\n\r\n"
    send_raw(nats_process, headed(b"s.true", block))
    async with asyncio.timeout(DEADLINE_S):
        while not (await bus.stream_state("S")).messages:
            await asyncio.sleep(0.002)
    found = await bus.get_message("S", 1)
    assert found is not None
    assert (found.subject, found.sequence) == ("s.true", 1)


async def test_a_forged_delivery_makes_the_reader_start_over_without_loss(bus: NatsBus) -> None:
    """A gap in the consumer's numbers, whatever made it, is mended from the last position."""
    await bus.ensure_stream(STREAM)
    got: list[StoredMessage] = []
    reader = await bus.read_stream("S", got.extend)
    await bus.stream_publish("s.x", b"1")
    await eventually(lambda: len(got) == 1)
    await bus.publish(f"{reader._inbox}.1", b"forged", reply="$JS.ACK.S.C.1.99.99.0.0")
    await bus.flush()
    for number in (b"2", b"3"):
        await bus.stream_publish("s.x", number)
    await eventually(lambda: len(got) == 3)
    assert [message.data for message in got] == [b"1", b"2", b"3"]


async def test_a_reader_whose_consumer_was_deleted_makes_a_new_one(bus: NatsBus) -> None:
    await bus.ensure_stream(STREAM)
    got: list[StoredMessage] = []
    reader = await bus.read_stream("S", got.extend)
    await bus.flush()
    await bus.request(f"$JS.API.CONSUMER.DELETE.S.{reader._consumer}", b"")
    await bus.stream_publish("s.x", b"1")
    await eventually(lambda: len(got) == 1)


async def test_a_reader_that_hears_nothing_makes_a_new_consumer(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuyard_protocol.bus import reader as reader_module

    monkeypatch.setattr(reader_module, "HEARTBEAT_S", 0.1)
    await bus.ensure_stream(STREAM)
    got: list[StoredMessage] = []
    reader = await bus.read_stream("S", got.extend)
    silenced = reader._consumer
    bus._routes[reader._sid] = lambda *_: None
    await bus.stream_publish("s.x", b"1")
    await eventually(lambda: len(got) == 1)
    assert reader._consumer != silenced


async def test_large_messages_are_read_in_order_without_losing_the_connection(bus: NatsBus) -> None:
    """More than the server keeps unsent for one client before it drops it as too slow (64 MiB)."""
    await bus.ensure_stream(STREAM)
    for number in range(12):
        await bus.stream_publish("s.x", number.to_bytes(1, "big") * (7 * 1024 * 1024))
    got: list[int] = []
    await bus.read_stream("S", lambda batch: got.extend(message.data[0] for message in batch))
    await eventually(lambda: len(got) == 12, 20.0)
    assert got == list(range(12))
    assert bus.reconnects == 0


# -- the server dies


async def test_publishers_and_readers_live_through_kills_of_the_server(nats_process: NatsProcess, bus: NatsBus) -> None:
    """Every future ends; what was acknowledged is read once and in order; the reader is back within a second."""
    other = await connected(nats_process, "reader")
    await bus.ensure_stream(STREAM)
    got: list[StoredMessage] = []
    await other.read_stream("S", got.extend)
    publisher = WindowedPublisher(bus, window=64, timeout=2.0)
    outcomes: list[PubAck | BaseException] = []
    stop = asyncio.Event()

    def ended(future: asyncio.Future[PubAck]) -> None:
        error = future.exception()
        outcomes.append(future.result() if error is None else error)

    async def keep_publishing() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (await publisher.submit("s.x", str(number).encode())).add_done_callback(ended)
            # While disconnected each publish fails at once: without this the loop would only count refusals.
            await asyncio.sleep(0 if bus.is_connected else 0.005)

    publishing = asyncio.ensure_future(keep_publishing())
    for _ in range(3):
        seen = len(got)
        await eventually(lambda seen=seen: len(got) > seen + 100)  # type: ignore[misc]
        await asyncio.to_thread(nats_process.kill)
        await asyncio.to_thread(nats_process.start)
        back = time.monotonic()
        seen = len(got)
        await eventually(lambda seen=seen: len(got) > seen)  # type: ignore[misc]
        assert time.monotonic() - back < 1.0
    stop.set()
    await publishing
    async with asyncio.timeout(DEADLINE_S):
        await publisher.drain()
    acknowledged = {outcome.sequence for outcome in outcomes if isinstance(outcome, PubAck)}
    await eventually(lambda: bool(got) and got[-1].sequence >= max(acknowledged))
    sequences = [message.sequence for message in got]
    assert sequences == list(range(1, len(sequences) + 1))
    assert acknowledged <= set(sequences)
    assert all(isinstance(outcome, PubAck | BusError) for outcome in outcomes)
    await other.close()


async def test_a_frozen_server_is_given_up_and_taken_again(
    nats_process: NatsProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WATCHDOG_INTERVAL_S", 0.05)
    monkeypatch.setattr(client, "WATCHDOG_TIMEOUT_S", 0.1)
    bus = await connected(nats_process)
    await bus.subscribe("s.x", lambda _: None)
    nats_process.signal(signal.SIGSTOP)
    call = asyncio.ensure_future(bus.request("s.x", b"", timeout=60))
    with pytest.raises(Unanswered, match="did not answer 2 pings"):
        async with asyncio.timeout(2.0):
            await call
    assert not bus.is_connected
    nats_process.signal(signal.SIGCONT)
    await eventually(lambda: bus.is_connected)
    await bus.flush()
    await bus.close()


async def test_a_read_loop_that_ends_by_a_fault_is_replaced(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[bytes] = []
    await bus.subscribe("s.x", lambda message: got.append(message.data))
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    connection = bus._connection
    assert connection is not None

    def broken(_: bytes) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(connection._parser, "feed", broken)
    connection.ping()
    await eventually(lambda: bus.reconnects == 1)
    await bus.publish("s.x", b"again")
    await eventually(lambda: got == [b"again"])


async def test_a_faulty_handler_harms_nobody_else(bus: NatsBus) -> None:
    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))

    def broken(_: Message) -> None:
        raise RuntimeError("a fault of the handler")

    got: list[bytes] = []
    await bus.subscribe("s.x", broken)
    await bus.subscribe("s.x", lambda message: got.append(message.data))
    await bus.publish("s.x", b"1")
    await bus.publish("s.x", b"2")
    await eventually(lambda: got == [b"1", b"2"])
    assert len(faults) == 2
    assert "handler of s.x" in str(faults[0]["message"])


# -- keys


KEYED = (
    OPEN_CONFIG
    + """
accounts {{ A {{ jetstream: enabled
  users: [ {{ user: one, password: x }}, {{ user: two, password: x }} ] }} }}
"""
)


async def test_a_key_taken_away_and_given_back(tmp_path: Path) -> None:
    """nats-py is closed for good by this; here the reason is told, and the return needs nobody's help."""
    server = NatsProcess(tmp_path / "nats", KEYED)
    server.start()
    bus = await nats.connect(
        server.url.replace("//", "//two:x@"), name="guest", inbox_prefix="_INBOX", reconnect_jitter_s=(0.01, 0.02)
    )
    errors: list[BusError] = []
    bus.on_error(errors.append)
    got: list[bytes] = []
    await bus.subscribe("s.x", lambda message: got.append(message.data))
    server.config = KEYED.replace(", {{ user: two, password: x }}", "")
    server.reload()
    await eventually(lambda: any(isinstance(error, PermissionDenied) for error in errors))
    assert "refuses guest" in str(errors[-1])
    with pytest.raises(Disconnected, match="refuses guest"):
        await bus.publish("s.x", b"")
    server.config = KEYED
    server.reload()
    await eventually(lambda: bus.is_connected)
    await bus.publish("s.x", b"back")
    await eventually(lambda: got == [b"back"])
    await bus.close()
    server.kill()


# -- connecting


async def test_a_server_that_is_not_there_is_named_within_the_deadline() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(Disconnected, match=rf"no NATS server answers at nats://127\.0\.0\.1:{port} within 0\.3 s"):
            await nats.connect(f"nats://127.0.0.1:{port}", name="x", inbox_prefix="_INBOX", connect_timeout_s=0.3)
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {nonsense\r\n"])
async def test_a_program_that_is_no_nats_server_is_named_within_the_deadline(greeting: bytes) -> None:
    finished = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        finished.set()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as impostor:
        port = impostor.sockets[0].getsockname()[1]
        with pytest.raises(Disconnected, match="no NATS server answers"):
            await nats.connect(f"nats://127.0.0.1:{port}", name="x", inbox_prefix="_INBOX", connect_timeout_s=0.3)
        impostor.close()
        async with asyncio.timeout(DEADLINE_S):
            await finished.wait()


async def test_a_server_that_starts_late_is_waited_for(tmp_path: Path) -> None:
    server = NatsProcess(tmp_path / "nats")
    server.start()
    server.kill()
    connecting = asyncio.ensure_future(connected(server))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(server.start)
    bus = await connecting
    await bus.flush()
    await bus.close()
    server.kill()


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:4222", "ws://127.0.0.1"])
async def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BusError, match="address of a NATS server"):
        await nats.connect(url, name="x", inbox_prefix="_INBOX")


async def test_a_missing_or_damaged_key_file_is_named(nats_process: NatsProcess, tmp_path: Path) -> None:
    with pytest.raises(BusError, match=r"cannot read the key file .*nowhere"):
        await nats.connect(nats_process.url, name="x", inbox_prefix="_INBOX", seed=str(tmp_path / "nowhere"))
    damaged = tmp_path / "damaged.seed"
    for content in (b"", b"SUAB", b"not a seed", b"\xff\xfe", b"S" * 58):
        damaged.write_bytes(content)
        with pytest.raises(BusError, match="holds no nkey seed"):
            await nats.connect(nats_process.url, name="x", inbox_prefix="_INBOX", seed=str(damaged))


# -- being a good neighbour of the event loop


async def test_a_tight_publish_loop_lets_others_run_and_can_be_cancelled(bus: NatsBus) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def flood() -> None:
        while True:
            await bus.publish("s.x", bytes(1024))

    ticking = asyncio.ensure_future(tick())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await flood()
    ticking.cancel()
    assert ticks > 20
    await bus.flush()


async def test_nothing_is_sent_later_for_somebody_who_was_refused(nats_process: NatsProcess, bus: NatsBus) -> None:
    """A message refused while disconnected must not arrive after the reconnect."""
    nats_process.kill()
    await eventually(lambda: not bus.is_connected)
    with pytest.raises(Disconnected):
        await bus.publish("s.late", b"zombie")
    await asyncio.to_thread(nats_process.start)
    witness = await connected(nats_process, "witness")
    got: list[Message] = []
    await witness.subscribe("s.>", got.append)
    await eventually(lambda: bus.is_connected)
    await bus.publish("s.now", b"now")
    await eventually(lambda: bool(got))
    assert [message.subject for message in got] == ["s.now"]
    await witness.close()


async def test_a_closed_bus_leaves_no_task_and_no_socket(nats_process: NatsProcess) -> None:
    await (await connected(nats_process)).close()  # what a loop opens once and keeps
    before = asyncio.all_tasks()
    sockets = len(os.listdir("/proc/self/fd"))
    bus = await connected(nats_process)
    await bus.ensure_stream(STREAM)
    await bus.read_stream("S", lambda _: None)
    await bus.subscribe("s.x", lambda _: None)
    await bus.close()
    await bus.close()
    assert asyncio.all_tasks() == before
    await eventually(lambda: len(os.listdir("/proc/self/fd")) == sockets)
    with pytest.raises(Disconnected):
        await bus.publish("s.x", b"")
