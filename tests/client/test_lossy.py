"""What the SDK does when messages are lost: against a daemon's part played over the in-memory bus."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from gpuyard import Client, Context, JobView
from gpuyard.errors import NoRoom, OutcomeUnknown, QueryFailed, Rejected, Unreachable
from gpuyard.events import Events
from gpuyard.job import Job
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, Message, Unanswered
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.jobs import JobEvent, SubmissionAnswer, Why
from gpuyard_protocol.names import given_submission_id
from gpuyard_protocol.nodes import LogChunk
from gpuyard_protocol.queries import JobQuery, LogsQuery, QueryError, Stats, SubmissionQuery, SubmissionStatus

NO_STATS: dict[str, Any] = {
    "yard": "main",
    "now_ms": 1,
    "jobs": {},
    "nodes": {},
    "gpus": 0,
    "held_milli": 0,
    "held_milli_ms": 0,
    "capacity_milli_ms": 0,
}
CONTEXT = Context(yard="main", url="memory", tenant="acme", user="alice")


class Daemon:
    """Answers questions from what a test put here; publishes nothing by itself."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.answers: dict[str, SubmissionAnswer] = {}
        self.views: dict[int, JobView] = {}
        self.output = b""
        self.asked: list[str] = []
        self.alarms: tuple[str, ...] = ()

    async def open(self) -> None:
        await self.bus.ensure_stream(subjects.streams("main", 64 * 1024 * 1024).submissions)
        await self.bus.subscribe(subjects.ALL_QUERIES, self._on_question)

    def _on_question(self, message: Message) -> None:
        verb = message.subject.split(".")[3]
        self.asked.append(verb)
        asyncio.ensure_future(self.bus.publish(message.reply, encode(self._answer(verb, message.data))))  # noqa: RUF006

    def _answer(self, verb: str, data: bytes) -> object:
        match verb:
            case "stats":
                return Stats(**NO_STATS, alarms=self.alarms)
            case "submission":
                return SubmissionStatus(answer=self.answers.get(decode(SubmissionQuery, data).submission_id))
            case "job":
                job = decode(JobQuery, data).job
                return self.views.get(job) or QueryError(code="UnknownJob", text=f"there is no job {job}", nearest="7")
            case "logs":
                query = decode(LogsQuery, data)
                piece = self.output[query.offset :][: query.limit] if query.stream == "out" else b""
                size = len(self.output) if query.stream == "out" else 0
                return LogChunk(
                    job=query.job, attempt=1, replica=0, stream=query.stream, offset=query.offset, data=piece, size=size
                )
        raise AssertionError(verb)


class World:
    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.daemon = Daemon(MemoryBus(self.broker, name="daemon"))

    async def client(self, change: Callable[[MemoryBus], None] = lambda _: None) -> Client:
        async def connector(_: Context) -> Bus:
            bus = MemoryBus(self.broker, name="alice")
            change(bus)
            return bus

        await self.daemon.open()
        return await Client(CONTEXT, connector=connector).open()


def view(job: int, state: str, attempt: int = 1) -> JobView:
    return JobView(
        job=job, tenant="acme", user="alice", name="", state=state, submission_id="", priority=0, replicas=1,  # type: ignore[arg-type]
        wants="", submitted_ms=1, attempt=attempt,
    )  # fmt: skip


async def test_a_decision_whose_event_was_lost_is_asked_for() -> None:
    world = World()
    client = await world.client()
    world.daemon.answers["s1"] = SubmissionAnswer(submission_id="s1", accepted=True, job=17)
    assert (await client.submit(command="true")).number == 17
    assert "submission" in world.daemon.asked


async def test_a_decision_that_comes_before_anybody_waits_is_kept() -> None:
    world = World()
    client = await world.client()
    events = await client.events()
    answer = SubmissionAnswer(submission_id="mine", accepted=True, job=3)
    heard = asyncio.Event()
    await client.listen(lambda _: heard.set())
    await world.daemon.bus.publish(subjects.submission_events("acme", "mine"), encode(answer))
    await world.daemon.bus.publish(subjects.job_events("acme", 3), encode(JobEvent(job=3, state="pending", at_ms=1)))
    await asyncio.wait_for(heard.wait(), 5)
    assert await events.decisions(["mine"], _never_asked, 5.0) == [answer]


async def _never_asked(submission_id: str) -> SubmissionAnswer | None:
    raise AssertionError(f"asked for {submission_id} although its event had come")


async def test_a_rejection_carries_everything_the_daemon_said() -> None:
    world = World()
    client = await world.client()
    world.daemon.answers["s1"] = SubmissionAnswer(
        submission_id="s1", accepted=False, reason=Why("Impossible", "no node has a B200"), nearest="H100"
    )
    with pytest.raises(Rejected, match=r"no node has a B200.*did you mean 'H100'") as caught:
        await client.submit(command="true", gpu_model="B200", gpus=1)
    assert (caught.value.reason, caught.value.submission_id) == ("Impossible", "s1")


def lose_words_of_storage(times: int) -> Callable[[MemoryBus], None]:
    """The message is stored, and the word that it was is lost, so many times."""

    def change(bus: MemoryBus) -> None:
        publish: Callable[..., Awaitable[object]] = bus.stream_publish
        left = [times]

        async def lossy(subject: str, data: bytes, **options: object) -> object:
            ack = await publish(subject, data, **options)
            if left[0]:
                left[0] -= 1
                raise Unanswered("no answer within 5 s")
            return ack

        bus.stream_publish = lossy  # type: ignore[method-assign,assignment]

    return change


async def test_an_unanswered_submission_is_not_repeated_without_an_id() -> None:
    world = World()
    client = await world.client(lose_words_of_storage(1))
    with pytest.raises(OutcomeUnknown, match="give it a submission id"):
        await client.submit(command="true")
    assert (await world.daemon.bus.stream_state("SUB_main")).messages == 1


async def test_a_yard_that_ran_out_of_room_meanwhile_is_named_as_the_reason() -> None:
    world = World()
    client = await world.client(lose_words_of_storage(1))
    world.daemon.alarms = ("2 cards are out of order", "the disk of the NATS server is 100% full (0 free)")
    with pytest.raises(NoRoom, match=r"ran out of room \(the disk .* full \(0 free\)\).*give it a submission id"):
        await client.submit(command="true")
    assert issubclass(NoRoom, OutcomeUnknown)


async def test_a_refusal_after_silence_does_not_say_that_nothing_is_stored() -> None:
    """The first attempt may have been taken, whatever the second was told."""
    world = World()
    client = await world.client(lose_words_of_storage(1))
    spec = subjects.streams("main", 64 * 1024 * 1024).submissions
    await world.daemon.bus.ensure_stream(replace(spec, max_messages_per_subject=1))
    with pytest.raises(NoRoom, match="no word came back"):
        await client.submit(command="true", submission_id="night-1")


async def test_an_unanswered_submission_with_an_id_is_repeated() -> None:
    world = World()
    client = await world.client(lose_words_of_storage(2))
    world.daemon.answers["night-1"] = SubmissionAnswer(submission_id="night-1", accepted=True, job=5)
    assert (await client.submit(command="true", submission_id="night-1")).number == 5
    assert (await world.daemon.bus.stream_state("SUB_main")).messages == 3


async def test_a_yard_without_a_daemon_is_unreachable_and_says_what_to_look_at() -> None:
    broker = MemoryBroker()

    async def connector(_: Context) -> Bus:
        return MemoryBus(broker, name="alice")

    client = await Client(CONTEXT, connector=connector).open()
    with pytest.raises(Unreachable, match="gpuyard up"):
        await client.link.ask("stats", {}, SubmissionStatus, timeout_s=0.2)
    with pytest.raises(Unreachable, match="does not take requests"):
        await client.link.send("submit", b"{}", may_repeat=False, timeout_s=0.2)


async def test_a_question_about_nothing_names_the_nearest() -> None:
    client = await World().client()
    with pytest.raises(QueryFailed, match="there is no job 9") as caught:
        await client.job(9)
    assert (caught.value.code, caught.value.nearest) == ("UnknownJob", "7")


async def test_waiting_ends_although_the_last_event_was_lost() -> None:
    world = World()
    client = await world.client()
    world.daemon.views[4] = view(4, "running")
    waiting = asyncio.ensure_future(client.handle(4).wait(timeout=10))
    asked = len(world.daemon.asked)
    async with asyncio.timeout(5):
        while len(world.daemon.asked) == asked:
            await asyncio.sleep(0)
    world.daemon.views[4] = view(4, "succeeded")
    assert (await waiting).state == "succeeded"


async def test_following_fills_the_gaps_of_live_output_and_repeats_nothing() -> None:
    """Live pieces are lost, doubled and out of order; every byte comes once, in order."""
    world = World()
    client = await world.client()
    world.daemon.views[4] = view(4, "running")
    world.daemon.output = b"0123456789"
    got = bytearray()
    done = asyncio.Event()

    async def follow() -> None:
        async for chunk in Job(client, 4).follow(streams=("out",)):
            assert chunk.offset == len(got)
            got.extend(chunk.data)
            if len(got) == 10:
                done.set()

    following = asyncio.ensure_future(follow())
    await asyncio.wait_for(done.wait(), 5)
    whole = b"0123456789abcdefghijklmnopqrstuvwxyz"
    world.daemon.output = whole
    for begin, end in ((8, 12), (10, 14), (20, 24), (14, 20), (24, 30)):
        live = LogChunk(job=4, attempt=1, replica=0, offset=begin, data=whole[begin:end], size=end)
        await world.daemon.bus.publish(subjects.log("acme", 4, 0), encode(live))
    world.daemon.views[4] = view(4, "succeeded")
    await world.daemon.bus.publish(
        subjects.job_events("acme", 4), encode(JobEvent(job=4, state="succeeded", at_ms=2, exit_code=0))
    )
    await asyncio.wait_for(following, 5)
    assert bytes(got) == whole


async def test_what_nobody_can_read_on_the_event_subjects_is_counted_and_skipped() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, name="alice")
    events = Events(bus, "acme")
    await events.begin()
    heard = asyncio.Event()
    events.listen(lambda _: heard.set())
    await bus.publish("evt.acme.17", b"\xff not json")
    await bus.publish("evt.acme.17.more.tokens", b"{}")
    await bus.publish("evt.acme.17", encode(JobEvent(job=17, state="running", at_ms=1)))
    await asyncio.wait_for(heard.wait(), 5)
    assert events.malformed == 1


def test_ids_given_by_the_yard_count_places() -> None:
    assert (given_submission_id(9), given_submission_id(9, 2)) == ("s9", "s9-2")
