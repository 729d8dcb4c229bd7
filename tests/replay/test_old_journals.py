"""Journals and snapshots written by earlier versions stay readable: same states of the jobs, and sound books.

`journal-v1.jsonl` is a seeded day as the core wrote it when record version 1 was new; `journal-v1-control.jsonl` has
what came next (arrays, holds, limits), and `snapshot-v1.snap` is the file that was written at its end. A change of the
core that cannot read them any more loses somebody's jobs at an upgrade: add to facts and records at their end, with
defaults.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.turn import Record
from gpuyard_daemon.snapshots import SnapshotStore

HERE = Path(__file__).parent


def _states(core: Scheduler) -> dict[str, list[object]]:
    return {str(number): [job.state, job.attempt, job.exit_code] for number, job in core.cluster.jobs.items()}


@pytest.mark.parametrize("name", ["journal-v1", "journal-v1-control"])
def test_a_journal_of_version_1_leads_to_the_states_it_led_to_then(name: str) -> None:
    decoder = msgspec.json.Decoder(Record)
    core = Scheduler()
    lines = (HERE / f"{name}.jsonl").read_bytes().splitlines()
    for line in lines:
        core.apply(decoder.decode(line))
    check(core.cluster)
    assert _states(core) == json.loads((HERE / f"{name}.states.json").read_text())
    assert core.turn == len(lines)


def test_a_snapshot_file_of_version_1_is_read_and_goes_on(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, "main")
    header, state = store.read(HERE / "snapshot-v1.snap")
    assert (header.version, header.sequence) == (1, 1234)
    core = Scheduler.restore(state)
    check(core.cluster)
    assert core.turn == header.turn
    assert _states(core) == json.loads((HERE / "journal-v1-control.states.json").read_text())
    # What is written now says the same, and the next turn can be decided on it.
    assert _states(Scheduler.restore(core.snapshot())) == _states(core)
    core.handle([], core.now_ms + 1, core.cursors)
    check(core.cluster)


def test_a_snapshot_of_before_limits_holds_and_arrays_is_read() -> None:
    decoder = msgspec.json.Decoder(Record)
    core = Scheduler()
    for line in (HERE / "journal-v1.jsonl").read_bytes().splitlines():
        core.apply(decoder.decode(line))
    plain = msgspec.msgpack.decode(core.snapshot())
    for later in ("policy", "usage", "arrays"):
        del plain[later]
    since_then = len(("held_by", "array", "array_index"))
    plain["jobs"] = [job[:-since_then] for job in plain["jobs"]]
    restored = Scheduler.restore(msgspec.msgpack.encode(plain))
    check(restored.cluster)
    assert {job.state for job in restored.cluster.jobs.values()} == {job.state for job in core.cluster.jobs.values()}
