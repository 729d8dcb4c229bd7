"""Snapshots on disk: written by a child, whole or not at all, and a broken one is passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuyard_daemon import recovery
from gpuyard_daemon.snapshots import SnapshotCorrupt, SnapshotStore, start_child, wait_for_child


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", "main")


async def test_a_child_writes_the_state_of_the_moment_of_the_fork(store: SnapshotStore) -> None:
    state = bytearray(b"before")
    child = start_child(store, 17, 3, lambda: bytes(state))
    state[:] = b"after!"
    assert await wait_for_child(child)
    assert store.paths() == []
    store.reveal(17)
    header, found = store.read(store.path_of(17))
    assert (found, header.sequence, header.turn) == (b"before", 17, 3)


async def test_a_child_that_fails_leaves_no_snapshot(store: SnapshotStore, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> bytes:
        raise RuntimeError("no state")

    assert not await wait_for_child(start_child(store, 17, 3, fail))
    assert store.paths() == []
    assert "snapshot of 17 failed: RuntimeError: no state" in capfd.readouterr().err


def test_the_newest_readable_snapshot_is_restored(store: SnapshotStore) -> None:
    store.write(10, 1, b"old")
    store.reveal(10)
    store.write(20, 2, b"new")
    store.reveal(20)
    assert recovery.restore(store) == (b"new", 20)
    path = store.path_of(20)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert recovery.restore(store) == (b"old", 10)
    store.path_of(10).write_bytes(b"")
    assert recovery.restore(store) == (None, 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "header", "grown"])
def test_any_damage_is_noticed(store: SnapshotStore, damage: str) -> None:
    store.write(10, 1, b"state" * 100)
    store.reveal(10)
    path = store.path_of(10)
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[:-7],
            "flipped": data[:-7] + b"?" + data[-6:],
            "empty": b"",
            "header": data[40:],
            "grown": data + b"x",
        }[damage]
    )
    with pytest.raises(SnapshotCorrupt):
        store.read(path)


def test_another_yards_snapshot_is_none_of_ours(store: SnapshotStore) -> None:
    store.write(10, 1, b"state")
    store.reveal(10)
    with pytest.raises(SnapshotCorrupt, match="belongs to the yard 'main'"):
        SnapshotStore(store.directory, "other").read(store.path_of(10))


def test_two_are_kept_and_half_written_ones_go(store: SnapshotStore) -> None:
    for sequence in (10, 20, 30):
        store.write(sequence, 1, b"state")
        store.reveal(sequence)
    (store.directory / "writing-0000000000000040").write_bytes(b"half")
    assert {os.path.basename(path) for path in store.forget_old()} == {
        "snapshot-0000000000000010.snap",
        "writing-0000000000000040",
    }
