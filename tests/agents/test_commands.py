"""What comes in on `cmd.<node>`: who is obeyed, and what is answered without the core."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_agent.commands import WAITING_MAX, CommandDoor
from gpuyard_agent.core.events import OrdersReceived, SyncReceived
from gpuyard_agent.inbox import Inbox
from gpuyard_agent.logs import Followers, LogStore
from gpuyard_agent.metrics import Metrics
from gpuyard_agent.uploads import Uploads
from gpuyard_protocol.bus.base import Message
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Desired, FollowLog, LogChunk, OrderAnswer, OrderBatch, ReadLog, Sync, SyncPart
from support.agents import start_order

BATCH = OrderBatch(node="node-1", instance="i", epoch=1, first=1, orders=(start_order(1, "true"),))


class Desk:
    """A command door, the inbox behind it, and what was answered to whom."""

    def __init__(self, jobs: Path, group: asyncio.TaskGroup) -> None:
        broker = MemoryBroker()
        self.bus = MemoryBus(broker)
        self.inbox = Inbox()
        self.metrics = Metrics(dict, lambda: 0)
        self.answers: asyncio.Queue[Message] = asyncio.Queue()
        store = LogStore(jobs, lambda _: False)
        self.door = CommandDoor(
            self.bus,
            self.inbox,
            store,
            Followers(self.bus, store),
            self.metrics,
            group.create_task,
            Uploads(jobs.parent / "uploads"),
            must_be_forwarded=True,
        )
        files = store.files(AssignmentKey(17, 1, 0))
        files.out.parent.mkdir(parents=True)
        files.out.write_bytes(b"output")

    def say(self, data: bytes, reply: str = "_R_.abc") -> None:
        self.door.on_message(Message("cmd.node-1", data, reply))

    async def answered(self) -> Message:
        async with asyncio.timeout(5):
            return await self.answers.get()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            made = Desk(tmp_path, group)
            await made.bus.subscribe("_R_.>", made.answers.put_nowait)
            yield made
            await made.bus.close()


@pytest.mark.parametrize("reply", ["", "_INBOX_A.node-2.x", "R_.abc", "cmd.node-1"])
async def test_what_was_not_forwarded_from_the_daemons_account_is_dropped(desk: Desk, reply: str) -> None:
    """Clients cannot forge the prefix that the server gives to replies between accounts."""
    desk.say(encode(BATCH), reply)
    desk.say(b"nonsense", reply)
    desk.say(encode(BATCH), "_R_.honest")
    (only,) = await desk.inbox.take()
    assert isinstance(only, OrdersReceived)
    desk.door.answer(only.request, OrderAnswer(status="ok", applied=1))
    assert (await desk.answered()).subject == "_R_.honest"
    assert 'gpuyard_agent_orders_total{answer="forged"} 2.0' in desk.metrics.text().decode()


async def test_orders_and_syncs_are_for_the_core_and_answered_when_it_says_so(desk: Desk) -> None:
    desk.say(encode(BATCH), "_R_.one")
    desk.say(encode(Sync(node="node-1", instance="i", epoch=1, n=1, desired=())), "_R_.two")
    orders, sync = await desk.inbox.take()
    assert isinstance(orders, OrdersReceived)
    assert isinstance(sync, SyncReceived)
    assert orders.batch == BATCH
    desk.door.answer(sync.request, OrderAnswer(status="ok", applied=1))
    answer = await desk.answered()
    assert (answer.subject, decode(OrderAnswer, answer.data).applied) == ("_R_.two", 1)
    desk.door.answer(sync.request, OrderAnswer(status="ok", applied=1))  # nobody waits for it any more
    desk.door.answer(orders.request, OrderAnswer(status="gap"))
    assert (await desk.answered()).subject == "_R_.one"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b'{"type":"reboot"}', b'{"type":"sync","n":"x"}', b"[" * 5000]
)
async def test_poison_is_answered_and_counted(desk: Desk, data: bytes) -> None:
    desk.say(data)
    answer = decode(OrderAnswer, (await desk.answered()).data)
    assert answer.status == "malformed"
    assert answer.detail
    assert 'gpuyard_agent_orders_total{answer="malformed"} 1.0' in desk.metrics.text().decode()


async def test_questions_about_output_need_no_core(desk: Desk) -> None:
    desk.say(encode(ReadLog(job=17)))
    assert decode(LogChunk, (await desk.answered()).data).data == b"output"
    desk.say(encode(FollowLog(tenant="acme", job=17)))
    assert decode(LogChunk, (await desk.answered()).data).offset == len(b"output")


async def test_an_answer_that_cannot_be_sent_harms_nobody(desk: Desk) -> None:
    desk.say(encode(BATCH))
    (orders,) = await desk.inbox.take()
    assert isinstance(orders, OrdersReceived)
    desk.bus.broker.stop()
    desk.door.answer(orders.request, OrderAnswer(status="ok", applied=1))
    await asyncio.sleep(0)
    desk.bus.broker.start()
    desk.say(encode(ReadLog(job=17)))
    assert decode(LogChunk, (await desk.answered()).data).data == b"output"


# --- a desired set in pieces ------------------------------------------------------------------------------------------


def part(number: int, parts: int, *jobs: int, n: int = 5, instance: str = "i") -> SyncPart:
    desired = tuple(Desired(start=start_order(job, "true")) for job in jobs)
    return SyncPart(node="node-1", instance=instance, epoch=1, n=n, part=number, parts=parts, desired=desired)


async def test_a_desired_set_in_pieces_is_acted_on_when_it_is_whole(desk: Desk) -> None:
    for number in (1, 2):
        desk.say(encode(part(number, 3, number)))
        assert decode(OrderAnswer, (await desk.answered()).data) == OrderAnswer(status="ok")
    desk.say(encode(part(3, 3, 3)))
    (whole,) = await desk.inbox.take()
    assert isinstance(whole, SyncReceived)
    assert (whole.sync.n, [entry.start.key.job for entry in whole.sync.desired]) == (5, [1, 2, 3])


@pytest.mark.parametrize(
    "before",
    [[], [part(1, 3, 1)], [part(1, 2, 1, n=4)], [part(1, 2, 1, instance="another")], [part(1, 2, 1), part(2, 2, 2)]],
)
async def test_a_piece_without_the_one_before_it_is_a_gap(desk: Desk, before: list[SyncPart]) -> None:
    wrong = part(3, 3, 3) if before and before[0].parts == 3 else part(2, 2, 2)
    for piece in before:
        desk.say(encode(piece))
        if piece.part < piece.parts:
            await desk.answered()
    desk.say(encode(wrong))
    assert decode(OrderAnswer, (await desk.answered()).data).status == "gap"


async def test_a_first_piece_begins_anew(desk: Desk) -> None:
    for piece in (part(1, 2, 1), part(1, 2, 7), part(2, 2, 8)):
        desk.say(encode(piece))
    (whole,) = await desk.inbox.take()
    assert isinstance(whole, SyncReceived)
    assert [entry.start.key.job for entry in whole.sync.desired] == [7, 8]


async def test_no_more_commands_are_taken_than_can_wait(desk: Desk) -> None:
    """Whoever keeps to the protocol has one under way; a flood of them is not answered, and costs no memory."""
    for number in range(WAITING_MAX + 50):
        desk.say(encode(BATCH), reply=f"_R_.{number}")
    desk.say(encode(Sync(node="node-1", instance="i", epoch=1, n=1, desired=())))
    taken = [*await desk.inbox.take()]
    assert len(taken) == WAITING_MAX
    assert all(isinstance(event, OrdersReceived) for event in taken)
    desk.door.answer(1, OrderAnswer(status="ok"))
    desk.say(encode(BATCH), reply="_R_.again")
    assert len(await desk.inbox.take()) == 1
