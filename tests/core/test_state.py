"""Same inputs, same bytes; a snapshot is the state; and what must not be is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.inputs import Cursors
from gpuyard_daemon.core.state.model import Job, Verdict
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.states import ASSIGNMENT_MOVES, JOB_MOVES, InvariantViolated, check_assignment_move
from gpuyard_daemon.core.state.turn import Record
from gpuyard_protocol.jobs import FINAL_STATES, JobSpec, JobView, Why
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.queries import JobsQuery
from gpuyard_protocol.resources import NoGpu
from support.builders import START_MS, CoreHarness, job, node
from support.core_scenario import digest, play

ROOT = Path(__file__).parents[2]


def test_the_same_day_gives_the_same_bytes_under_any_hash_seed() -> None:
    """Sets and dicts of strings are ordered by the hash seed where somebody iterates over them."""
    here = digest(play(7))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["protocol", "daemon", "client", "agents", "tests"])}
    found = [
        subprocess.run(
            [sys.executable, "-m", "support.core_scenario", "7"],
            cwd=ROOT,
            env={**env, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for seed in ("0", "4242")
    ]
    assert found == [here, here]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_replaying_records_leads_to_the_same_state_and_the_same_next_decision(seed: int, told: bool) -> None:
    """Whether or not anybody wants to know what they led to."""
    records = play(seed)
    replayed, halfway = Scheduler(), Scheduler()
    for record in records[: len(records) // 2]:
        halfway.apply(record)
    restored = Scheduler.restore(halfway.snapshot())
    turns = [replayed.apply(record, told=told) for record in records]
    assert any(turn.orders or turn.notices for turn in turns) is not told
    for record in records[len(records) // 2 :]:
        restored.apply(record)
    assert restored.digest() == replayed.digest()
    check(restored.cluster)
    more = [CoreHarness().submission(job(gpus=1)), CoreHarness().submission(job(share_milli=100))]
    turns = [core.handle(more, core.now_ms + 1000, Cursors(9, 9)) for core in (replayed, restored)]
    assert turns[0] == turns[1]


def test_a_core_that_restarts_after_every_turn_decides_like_one_that_never_does() -> None:
    def day(harness: CoreHarness) -> list[Record]:
        harness.join(node("n-1", 2), node("n-2", 4))
        numbers = harness.submit_many([job(gpus=2), job(gpus=3), job(share_milli=300), job(replicas=3, gpus=1)])
        harness.settle(most_ms=40_000)
        for number in numbers:
            if harness.state(number) == "starting":
                harness.run(number)
                harness.ended(number, exit_code=number % 2)
        harness.settle(most_ms=4_000_000)
        return harness.records

    assert day(CoreHarness()) == day(CoreHarness(restart_every=1))


def test_settings_change_decisions_and_never_a_replay() -> None:
    records = play(5)
    other = Scheduler(CoreSettings(starts_per_turn=1, prepare_timeout_ms=1, finished_kept_ms=1))
    plain = Scheduler()
    for record in records:
        other.apply(record)
        plain.apply(record)
    assert other.digest() == plain.digest()


def test_a_snapshot_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="not a snapshot"):
        Scheduler.restore(b"\x00garbage")
    plain = msgspec.msgpack.decode(Scheduler().snapshot())
    plain["v"] = 99
    with pytest.raises(ValueError, match="format 99"):
        Scheduler.restore(msgspec.msgpack.encode(plain))


def test_records_are_applied_in_order_only() -> None:
    records = play(1, steps=5)
    core = Scheduler()
    with pytest.raises(InvariantViolated, match="does not follow"):
        core.apply(records[1])


def test_records_of_a_newer_version_may_have_more_fields() -> None:
    """Facts are arrays: what stands behind the known fields is skipped."""
    harness = CoreHarness()
    harness.submit(job(gpus=1))
    plain = msgspec.json.decode(msgspec.json.encode(harness.records[-1]))
    plain["facts"][0].append("new")
    plain["later"] = {"x": 1}
    assert msgspec.json.decode(msgspec.json.encode(plain), type=Record) == harness.records[-1]


def test_a_record_stays_within_its_bound_however_much_text_jobs_carry() -> None:
    """Jobs of a hundred kilobytes retire together: a few a turn, each record far below what a message may have."""
    harness = CoreHarness(CoreSettings(finished_kept_max=1, retired_per_turn=500))
    harness.join(node("n-1", 0))
    script = JobSpec(script="x" * 100_000)
    for _ in range(12):
        number = harness.submit(script)
        harness.run(number)
        harness.ended(number)
    harness.settle(most_ms=8_000_000)
    sizes = [len(msgspec.json.encode(record)) for record in harness.records]
    assert max(sizes) < 1024 * 1024
    assert harness.core.jobs_page(None, JobsQuery(all=True)).jobs == ()


# --- states ----------------------------------------------------------------------------------------------------------


def test_final_states_lead_nowhere_and_every_state_can_be_left_or_reached() -> None:
    assert {state for state, moves in JOB_MOVES.items() if not moves} == FINAL_STATES
    assert {state for moves in JOB_MOVES.values() for state in moves} == set(JOB_MOVES)
    assert {state for moves in ASSIGNMENT_MOVES.values() for state in moves} | {"ordered"} == set(ASSIGNMENT_MOVES)


def test_an_illegal_move_is_told_with_the_jobs_story() -> None:
    harness = CoreHarness()
    harness.join(node("n-1", 1))
    number = harness.submit(job(gpus=1))
    found = harness.core.cluster.jobs[number]
    with pytest.raises(InvariantViolated, match=r"ordered → released .*accepted; .*attempt 1 placed on n-1"):
        check_assignment_move(found, found.assignments[0], "released")


@pytest.mark.parametrize(
    "fact",
    [
        f.JobEnded(1, "succeeded"),
        f.JobWoken(1),
        f.JobRetired(
            1,
            JobView(
                job=1,
                tenant="acme",
                user="alice",
                name="",
                state="failed",
                submission_id="s1",
                priority=0,
                replicas=1,
                wants="",
                submitted_ms=0,
            ),
        ),
        f.JobEnded(7, "failed"),
        f.JobPlaced(1, ()),
        f.JobPlaced(1, (f.Placement("n-1", NoGpu()), f.Placement("n-1", NoGpu()))),
        f.JobRequeued(1, False, Why("x", "y"), 0, 0),
        f.ReplicaStarted(AssignmentKey(1, 2, 0)),
        f.ReplicaEnded(AssignmentKey(1, 1, 5), "exited"),
        f.GangReleased(1),
        f.AnswerRepeated("acme", "never-asked"),
        f.JobAccepted(9, "acme", "alice", "s9", JobSpec(), 0),
    ],
)
def test_an_illegal_fact_raises(fact: f.Fact) -> None:
    harness = CoreHarness()
    harness.join(node("n-1", 1))
    harness.submit(job(gpus=1))
    with pytest.raises(InvariantViolated):
        harness.core.cluster.apply_fact(fact, START_MS, Effects())


# --- invariants ------------------------------------------------------------------------------------------------------


def _break_memory(cluster: Cluster) -> None:
    cluster.pool.spaces["n-1"].cards[0].memory_mib -= 1


def _break_totals(cluster: Cluster) -> None:
    cluster.pool.spaces["n-1"].cpu_free_milli += 1


def _give_twice(cluster: Cluster) -> None:
    cluster.jobs[2].assignments[0].partition = cluster.jobs[1].assignments[0].partition


def _forget_a_live_one(cluster: Cluster) -> None:
    cluster.jobs[1].assignments[0].state = "ended"


def _end_too_soon(cluster: Cluster) -> None:
    cluster.jobs[1].state = "succeeded"


def _wait_unseen(cluster: Cluster) -> None:
    cluster.waiting.clear()


def _condemn_and_run(cluster: Cluster) -> None:
    cluster.jobs[1].verdict = Verdict("fail", Why("x", "y"), "peer-failed")


def _miscount(cluster: Cluster) -> None:
    cluster.lists["acme"].counts["pending"] += 1


def _lose_a_job(cluster: Cluster) -> None:
    del cluster.jobs[3]


def _idle_wrong(cluster: Cluster) -> None:
    cluster.pool.spaces["n-1"].idle_cards += 1


@pytest.mark.parametrize(
    "damage",
    [
        _break_memory,
        _break_totals,
        _give_twice,
        _forget_a_live_one,
        _end_too_soon,
        _wait_unseen,
        _condemn_and_run,
        _miscount,
        _lose_a_job,
        _idle_wrong,
    ],
)
def test_damage_is_found(damage: Callable[[Cluster], None]) -> None:
    harness = CoreHarness()
    harness.join(node("n-1", 2))
    harness.submit_many([job(gpus=1), job(gpus=1), job(gpus=1)])
    check(harness.core.cluster)
    damage(harness.core.cluster)
    with pytest.raises(InvariantViolated):
        check(harness.core.cluster)


def test_a_jobs_story_is_bounded_and_keeps_its_beginning() -> None:
    found = Job(1, "acme", "alice", "s1", JobSpec(), 0)
    for number in range(200):
        found.note(number, f"line {number}")
    assert len(found.story) == 50
    assert found.story[0] == (0, "line 0")
    assert found.story[-1] == (199, "line 199")


def test_settings_that_make_no_sense_are_told() -> None:
    CoreSettings().validate()
    with pytest.raises(ValueError, match="starts_per_turn"):
        CoreSettings(starts_per_turn=0).validate()
    with pytest.raises(ValueError, match="retry_backoff_max_ms"):
        CoreSettings(retry_backoff_max_ms=10).validate()
    with pytest.raises(ValueError, match="timeslice_milli_max"):
        CoreSettings(timeslice_milli_max=10).validate()
