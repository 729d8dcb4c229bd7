"""Output of replicas: ranges, following, rotation, removal."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_agent import logs
from gpuyard_agent.logs import RANGE_BYTES_MAX, Followers, LogStore
from gpuyard_protocol.bus.base import Message
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import decode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import FollowLog, LogChunk, ReadLog

KEY = AssignmentKey(17, 1, 0)


class Files:
    """A store, and a job that writes into it."""

    def __init__(self, root: Path) -> None:
        self.live = {KEY}
        self.store = LogStore(root, lambda key: key in self.live)

    def write(self, data: bytes, stream: logs.Stream = "out", key: AssignmentKey = KEY) -> Path:
        path = self.store.files(key).of(stream)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(data)
        return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_range_is_cut_to_what_there_is(files: Files) -> None:
    files.write(b"0123456789")
    chunk = files.store.read(ReadLog(job=17, offset=4, limit=3))
    assert (chunk.attempt, chunk.offset, chunk.data, chunk.size, chunk.ended) == (1, 4, b"456", 10, False)
    assert files.store.read(ReadLog(job=17, offset=99)).offset == 10
    assert files.store.read(ReadLog(job=17, offset=-3)).data == b"789"
    assert files.store.read(ReadLog(job=17, offset=-99)).data == b"0123456789"


def test_an_answer_is_bounded(files: Files) -> None:
    files.write(b"x" * (RANGE_BYTES_MAX + 10))
    assert len(files.store.read(ReadLog(job=17, limit=10**9)).data) == RANGE_BYTES_MAX
    assert files.store.read(ReadLog(job=17, limit=-5)).data == b""


def test_the_newest_attempt_is_read_unless_another_is_named(files: Files) -> None:
    for attempt in (1, 2, 10):
        files.write(f"attempt {attempt}".encode(), key=AssignmentKey(17, attempt, 0))
    assert files.store.read(ReadLog(job=17)).data == b"attempt 10"
    assert files.store.read(ReadLog(job=17, attempt=2)).data == b"attempt 2"


def test_the_end_is_said_only_at_the_end(files: Files) -> None:
    files.write(b"0123456789")
    files.live.clear()
    assert not files.store.read(ReadLog(job=17, limit=9)).ended
    assert files.store.read(ReadLog(job=17)).ended


def test_output_that_is_not_here_is_an_answer_in_words(files: Files) -> None:
    for request in (ReadLog(job=18), ReadLog(job=17, replica=3), ReadLog(job=17, attempt=7)):
        assert "no output of replica" in files.store.read(request).error


def test_a_link_in_the_place_of_output_is_not_followed(files: Files, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = files.write(b"")
    path.unlink()
    path.symlink_to(secret)
    chunk = files.store.read(ReadLog(job=17))
    assert (chunk.data, "symbolic links" in chunk.error) == (b"", True)


def test_a_pipe_in_the_place_of_output_keeps_nobody_waiting(files: Files) -> None:
    path = files.write(b"")
    path.unlink()
    os.mkfifo(path)
    assert files.store.read(ReadLog(job=17)).data == b""


def test_a_file_that_has_grown_too_long_is_rotated_in_place(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ROTATE_BYTES", 100)
    path = files.write(b"x" * 101)
    with path.open("ab") as still_open:
        files.store.tidy(path.stat().st_mtime)
        still_open.write(b"after")
    assert path.read_bytes() == b"after"
    assert path.with_name("0.out.1").read_bytes() == b"x" * 101


def test_old_output_is_removed_unless_its_assignment_lives(files: Files) -> None:
    live = files.write(b"live")
    old = files.write(b"old", key=AssignmentKey(5, 1, 0))
    now_s = live.stat().st_mtime + logs.KEPT_S + 10
    os.utime(old, (1, 1))
    files.store.tidy(live.stat().st_mtime)
    assert old.exists()  # its directory was touched just now
    files.store.tidy(now_s)
    assert live.exists()
    assert not old.parent.exists()


# --- following ---


class Listener:
    """A follower, and what it was sent."""

    def __init__(self) -> None:
        broker = MemoryBroker()
        self.bus = MemoryBus(broker)
        self.ear = MemoryBus(broker)
        self.chunks: list[LogChunk] = []
        self._news = asyncio.Condition()

    async def open(self) -> None:
        await self.ear.subscribe("log.acme.17.0", self._on_message)

    def _on_message(self, message: Message) -> None:
        self.chunks.append(decode(LogChunk, message.data))

    def text(self, stream: str = "out") -> bytes:
        return b"".join(chunk.data for chunk in self.chunks if chunk.stream == stream)

    async def until_ended(self) -> None:
        async with asyncio.timeout(5):
            while not (self.chunks and self.chunks[-1].ended):
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def following(files: Files, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Listener, Followers]]:
    monkeypatch.setattr(logs, "LOOK_S", 0.005)
    listener = Listener()
    await listener.open()
    followers = Followers(listener.bus, files.store)
    task = asyncio.create_task(followers.run())
    try:
        yield listener, followers
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await listener.bus.close()
        await listener.ear.close()


async def test_a_follower_gets_what_is_written_from_then_on_and_the_end(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(b"before ")
    async with following(files, monkeypatch) as (listener, followers):
        answer = followers.follow(FollowLog(tenant="acme", job=17))
        assert (answer.attempt, answer.offset) == (1, 7)
        files.write(b"live")
        files.write(b"trouble", "err")
        files.live.clear()
        await listener.until_ended()
        assert (listener.text(), listener.text("err")) == (b"live", b"trouble")
        assert [chunk.ended for chunk in listener.chunks].count(True) == 1
        assert (listener.chunks[0].offset, listener.chunks[-1].offset) == (7, 11)


async def test_a_large_piece_comes_whole_in_bounded_chunks(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(b"")
    monkeypatch.setattr(logs, "LOOK_BYTES_MAX", 100_000)
    async with following(files, monkeypatch) as (listener, followers):
        followers.follow(FollowLog(tenant="acme", job=17))
        data = os.urandom(500_000)
        files.write(data)
        files.live.clear()
        await listener.until_ended()
        assert listener.text() == data
        assert max(len(chunk.data) for chunk in listener.chunks) == logs.CHUNK_BYTES_MAX


async def test_a_new_attempt_is_followed_from_its_beginning(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(b"first")
    second = AssignmentKey(17, 2, 0)
    files.live.add(second)
    async with following(files, monkeypatch) as (listener, followers):
        followers.follow(FollowLog(tenant="acme", job=17))
        files.write(b"second", key=second)
        files.live.clear()
        await listener.until_ended()
        assert listener.text() == b"second"
        assert listener.chunks[-1].attempt == 2


async def test_a_follower_that_asks_no_more_is_sent_no_more(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(b"")
    async with following(files, monkeypatch) as (listener, followers):
        followers.follow(FollowLog(tenant="acme", job=17, for_ms=10))
        async with asyncio.timeout(5):
            while followers._follows:
                await asyncio.sleep(0.005)
        files.write(b"unheard")
        assert listener.chunks == []


async def test_followers_are_bounded(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FOLLOWERS_MAX", 1)
    async with following(files, monkeypatch) as (_, followers):
        followers.follow(FollowLog(tenant="acme", job=17))
        assert "followed on this node already" in followers.follow(FollowLog(tenant="acme", job=18)).error
        assert not followers.follow(FollowLog(tenant="acme", job=17)).error
