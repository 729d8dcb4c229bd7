"""Shared cards: what is over its limit ends, its neighbours do not; and whose process is whose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpuyard_agent.core.model import Assignment
from gpuyard_agent.idle import IdleWatch
from gpuyard_agent.owners import owners_of
from gpuyard_agent.watchdog import GRACE_MIB, Limit, MemoryWatch, Use
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import DeviceSample, IdleGpu, JobSample
from gpuyard_protocol.resources import MigInstance, MpsShare, NoGpu, Partition, TimeSliceShare, WholeCards
from support.agents import Commander, agent_room, start_order

ONE, TWO = AssignmentKey(1, 1, 0), AssignmentKey(2, 1, 0)
LIMITS = {ONE: Limit(8_000, 1), TWO: Limit(8_000)}
WELL = Use(8_000, 1)
OVER = Use(8_001 + GRACE_MIB, 1)


# --- the judge ---


def test_two_looks_in_a_row_over_limit_and_grace_end_a_job_and_only_that() -> None:
    watch = MemoryWatch()
    assert watch.judge({ONE: OVER, TWO: Use(8_000 + GRACE_MIB, 1)}, LIMITS) == {}
    verdicts = watch.judge({ONE: OVER, TWO: Use(8_000 + GRACE_MIB, 1)}, LIMITS)
    assert {key: verdict.code for key, verdict in verdicts.items()} == {ONE: "OutOfPartitionMemory"}


def test_a_look_in_between_that_finds_it_well_counts_anew() -> None:
    watch = MemoryWatch()
    for use in (OVER, WELL, OVER):
        assert watch.judge({ONE: use}, LIMITS) == {}
    assert watch.judge({ONE: OVER}, LIMITS)


def test_a_look_that_the_driver_did_not_answer_changes_nothing() -> None:
    watch = MemoryWatch()
    watch.judge({ONE: OVER}, LIMITS)
    assert watch.judge({}, LIMITS) == {}
    assert watch.judge({ONE: OVER}, LIMITS)


def test_the_grace_of_a_large_share_is_a_part_of_it() -> None:
    watch, limits = MemoryWatch(), {ONE: Limit(40_000)}
    for _ in range(2):
        assert watch.judge({ONE: Use(42_000, 1)}, limits) == {}
    watch.judge({ONE: Use(42_001, 1)}, limits)
    assert watch.judge({ONE: Use(42_001, 1)}, limits)


def test_more_processes_than_declared_end_a_job() -> None:
    watch = MemoryWatch()
    crowd = Use(100, 2)
    assert watch.judge({ONE: crowd, TWO: Use(100, 9)}, LIMITS) == {}
    verdicts = watch.judge({ONE: crowd, TWO: Use(100, 9)}, LIMITS)
    assert {key: verdict.code for key, verdict in verdicts.items()} == {ONE: "TooManyGpuProcesses"}


# --- whose process ---


def test_a_process_is_its_ancestors_or_carries_the_mark() -> None:
    """One child in the tree, one that left it, and one of nobody."""
    code = (
        "import os, subprocess, sys, time\n"
        "inner = subprocess.Popen(['sleep', '60'])\n"
        "outer = int(subprocess.check_output(['setsid', 'sh', '-c', 'sleep 60 >/dev/null & echo $!']))\n"
        "print(inner.pid, outer, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "GPUYARD_ASSIGNMENT": str(ONE)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True) as main:
        assert main.stdout is not None
        inner, outer = map(int, main.stdout.readline().split())
        try:
            found = owners_of([main.pid, inner, outer, os.getpid(), 2**22 + 1], {main.pid: ONE})
            assert found == {main.pid: ONE, inner: ONE, outer: ONE}
            assert owners_of([outer], {main.pid: TWO}) == {}
        finally:
            for pid in (inner, outer, main.pid):
                os.kill(pid, 9)


# --- idle cards ---


def running(partition: Partition, **launch: object) -> dict[AssignmentKey, Assignment]:
    start = start_order(1, "true", partition=partition, **launch)
    return {ONE: Assignment(key=ONE, start=start, boot_id="b", state="running", pid=1)}


def samples(**load: int | None) -> list[DeviceSample]:
    return [DeviceSample(uuid=uuid, utilization_pct=pct) for uuid, pct in load.items()]


def test_a_job_on_idle_cards_is_warned_of_once_and_then_ended() -> None:
    watch = IdleWatch(IdleGpu(warn_ms=4_000, release_ms=8_000))
    live, told = running(WholeCards(("A", "B"))), []
    for now_ms in range(1_000, 11_000, 2_000):
        warnings, verdicts = watch.look(samples(A=0, B=1), live, now_ms)
        told.append((len(warnings), len(verdicts)))
    assert told == [(0, 0), (0, 0), (1, 0), (0, 0), (0, 1)]
    assert verdicts[ONE].code == "IdleGpu"


@pytest.mark.parametrize(
    ("partition", "load"),
    [(WholeCards(("A", "B")), {"A": 0, "B": 50}), (WholeCards(("A",)), {"A": None}), (NoGpu(), {})],
)
def test_a_job_that_computes_or_cannot_be_seen_is_not_idle(partition: Partition, load: dict[str, int | None]) -> None:
    watch = IdleWatch(IdleGpu(release_ms=1_000))
    for now_ms in range(1_000, 60_000, 2_000):
        assert watch.look(samples(**load), running(partition), now_ms) == ([], {})


def test_a_job_on_a_mig_instance_is_idle_by_the_load_of_that() -> None:
    live = running(MigInstance("A", "1g.10gb", 0, 1, 9_984, 1))

    def released(load: dict[AssignmentKey, int | None], card_pct: int | None = None) -> bool:
        watch = IdleWatch(IdleGpu(release_ms=4_000))
        ends = [watch.look(samples(A=card_pct), live, at, (), load)[1] for at in range(1_000, 9_000, 2_000)]
        return any(ends)

    assert released({ONE: 0})
    assert not released({ONE: 40})
    assert not released({ONE: None}), "before Hopper nothing is told"
    assert not released({}, 0), "its card is idle: that says nothing of it"


def test_work_in_between_and_missing_samples_do_not_count_as_idle() -> None:
    watch = IdleWatch(IdleGpu(release_ms=30_000))
    live = running(WholeCards(("A",)))
    for now_ms, pct in ((1_000, 0), (10_000, 0), (12_000, 90), (14_000, 0), (1_000_000, 0)):
        assert watch.look(samples(A=pct), live, now_ms) == ([], {})


def test_a_job_is_told_of_stage_by_stage_each_once() -> None:
    watch, told = IdleWatch(IdleGpu(warn_ms=2_000, suspend_ms=4_000)), []
    for now_ms in range(1_000, 20_000, 2_000):
        steps, verdicts = watch.look(samples(A=0), running(WholeCards(("A",))), now_ms)
        told += steps
        assert verdicts == {}
    assert told == [(ONE, 2_000, "warn", 0), (ONE, 4_000, "suspend", 0)]


def test_the_rule_of_a_jobs_queue_goes_before_the_nodes() -> None:
    watch = IdleWatch(IdleGpu(release_ms=4_000))
    patient = running(WholeCards(("A",)), idle=IdleGpu(warn_ms=6_000))
    for now_ms in range(1_000, 20_000, 2_000):
        steps, verdicts = watch.look(samples(A=0), patient, now_ms)
        assert verdicts == {}
        assert [step.stage for step in steps] == (["warn"] if now_ms == 7_000 else [])


def test_a_job_is_judged_by_its_own_processes_where_the_driver_tells_of_them() -> None:
    live = running(TimeSliceShare("A", 500, 1_000))

    def released(own_pct: int | None, card_pct: int, processes: int = 1) -> bool:
        watch, ends = IdleWatch(IdleGpu(release_ms=4_000)), False
        for now_ms in range(1_000, 9_000, 2_000):
            use = JobSample(key=ONE, utilization_pct=own_pct, processes=processes)
            ends = ends or bool(watch.look(samples(A=card_pct), live, now_ms, [use])[1])
        return ends

    assert released(0, 90), "its neighbour computes"
    assert not released(80, 0), "the sample of the card came between two steps"
    assert released(None, 0)
    assert not released(None, 90)
    assert not released(0, 90, processes=0), "what is not seen is judged by the card"


def test_without_a_policy_nobody_is_idle() -> None:
    watch = IdleWatch(IdleGpu())
    for now_ms in (1_000, 10**9):
        assert watch.look(samples(A=0), running(WholeCards(("A",))), now_ms) == ([], {})


# --- a real agent ---


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
async def test_a_job_that_takes_more_than_its_share_ends_and_its_neighbour_goes_on(mode: str) -> None:
    async with agent_room() as room:
        commander = await room.commander()
        await room.start_agent()
        joined = await commander.joined()
        card = joined.inventory.devices[0].uuid
        share: Partition = MpsShare(card, 400, 20_000) if mode == "mps" else TimeSliceShare(card, 400, 20_000)
        assert (await commander.sync()).status == "ok"
        greedy = start_order(1, 'echo "$$ 30000" > "$GPUYARD_JOB_DIR/simulated-gpu-use"; sleep 60', partition=share)
        modest = start_order(2, 'echo "$$ 19000" > "$GPUYARD_JOB_DIR/simulated-gpu-use"; sleep 60', partition=share)
        await commander.order(greedy, modest)
        ended = await commander.ended(greedy.key)
        assert (ended.outcome, ended.signal, ended.code) == ("signalled", 9, "OutOfPartitionMemory")
        assert "30000 MiB" in ended.detail
        await _still_runs(commander, modest.key)


async def test_more_processes_than_declared_end_the_job() -> None:
    async with agent_room() as room:
        commander = await room.commander()
        await room.start_agent()
        share = MpsShare((await commander.joined()).inventory.devices[0].uuid, 400, 20_000, 1)
        assert (await commander.sync()).status == "ok"
        crowd = start_order(
            1, 'printf "%s 10\\n" "$$" "$PPID" > "$GPUYARD_JOB_DIR/simulated-gpu-use"; sleep 60', partition=share
        )
        await commander.order(crowd)
        assert (await commander.ended(crowd.key)).code == "TooManyGpuProcesses"


async def _still_runs(commander: Commander, key: AssignmentKey) -> None:
    """It runs after another heartbeat."""
    beat = commander.heartbeat
    await commander.until(lambda: commander.heartbeat is not beat)
    assert commander.heartbeat is not None
    assert commander.heartbeat.running == 1
    assert key not in [ended.key for ended in commander.reports.values() if hasattr(ended, "outcome")]
