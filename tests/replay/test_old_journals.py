"""Journals written by earlier versions stay readable: same states of the jobs, and sound books.

`journal-v1.jsonl` is a seeded day as the core wrote it when record version 1 was new. A change of the core that cannot
read it any more loses somebody's jobs at an upgrade: add to facts at their end, with defaults.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.turn import Record

HERE = Path(__file__).parent


def test_a_journal_of_version_1_leads_to_the_states_it_led_to_then() -> None:
    decoder = msgspec.json.Decoder(Record)
    core = Scheduler()
    lines = (HERE / "journal-v1.jsonl").read_bytes().splitlines()
    for line in lines:
        core.apply(decoder.decode(line))
    check(core.cluster)
    expected = json.loads((HERE / "journal-v1.states.json").read_text())
    found = {str(number): [job.state, job.attempt, job.exit_code] for number, job in core.cluster.jobs.items()}
    assert found == expected
    assert core.turn == len(lines)


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
