"""What every bus does with streams: what is stored, refused, dropped and found. In memory and on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gpuyard_protocol.bus.base import (
    NoResponders,
    PublishRefused,
    StreamSpec,
    StreamUnavailable,
    Unanswered,
)
from support.bus_world import DEADLINE_S, Echo, World, publish_numbered, spec

# --- streams: storing ---


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


# --- streams: looking ---


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
