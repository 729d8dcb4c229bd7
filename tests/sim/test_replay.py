"""A yard's journal, lived again: the same without a change, better with more nodes, worse with a quota."""

from __future__ import annotations

import gzip
import heapq
import random
from pathlib import Path

import msgspec
import pytest
from typer import Typer
from typer.testing import CliRunner

from gpuyard_daemon.archive import ArchivedRecord
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.state.turn import Record
from gpuyard_daemon.core.tenants.policy import Policy, TenantLimits
from gpuyard_daemon.sim import commands
from gpuyard_daemon.sim.core_jobs import node_of
from gpuyard_daemon.sim.recorded_events import Recorded, RecordedJob, understand
from gpuyard_daemon.sim.recording import Recording, read_recording
from gpuyard_daemon.sim.replaying import Changed, Lived, Replay, as_recorded, lived_measures, ordered
from gpuyard_daemon.sim.simulated_yard import BEGIN_MS, SimulatedYard
from gpuyard_daemon.sim.trace_files import TraceError
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended
from gpuyard_protocol.resources import ResourceNeed
from support.builders import CoreHarness, job, node

OLD_JOURNAL = Path(__file__).parent.parent / "replay" / "journal-v1.jsonl"


def _spec(gpus: int, replicas: int = 1, **more: object) -> JobSpec:
    need = ResourceNeed(gpus=gpus, cpu_milli=100, memory_mib=100)
    return JobSpec(argv=("x",), need=need, replicas=replicas, preemption="never", **more)  # type: ignore[arg-type]


def _record_a_day(seed: int, jobs: int = 60, nodes: int = 2) -> list[Record]:
    """Two tenants on a few nodes; some jobs fail once and are tried again, some are cancelled while they wait."""
    dice = random.Random(seed)
    yard = SimulatedYard([node_of(f"node-{number + 1}", 4) for number in range(nodes)], keep_records=True)
    submits = sorted(dice.randrange(40_000) for _ in range(jobs))
    ends: list[tuple[int, int]] = []
    fails: set[int] = set()
    runs_ms: dict[int, int] = {}
    while submits or ends:
        now_ms = min([BEGIN_MS + submits[0]] if submits else [], default=1 << 60)
        deadline_ms = yard.core.next_deadline_ms()
        now_ms = min(now_ms, ends[0][0] if ends else now_ms, deadline_ms or now_ms)
        yard.at(now_ms)
        while ends and ends[0][0] <= now_ms:
            job = heapq.heappop(ends)[1]
            yard.end(job, 1 if job in fails else 0)
            fails.discard(job)
        specs = []
        while submits and BEGIN_MS + submits[0] <= now_ms:
            submits.pop(0)
            replicas = dice.choice((1, 1, 1, 2))
            specs.append((dice.choice(("ann", "bob")), _spec(dice.choice((1, 2, 4)), replicas, retries=1)))
        for job in yard.submit(specs):
            runs_ms[job] = dice.randrange(500, 9000)
            if dice.random() < 0.2:
                fails.add(job)
        for change in yard.changes():
            assert change.runs
            heapq.heappush(ends, (yard.now_ms + runs_ms[change.job], change.job))
        waiting = sorted(yard.core.cluster.waiting)
        if waiting and dice.random() < 0.05:
            job = yard.core.cluster.jobs[waiting[-1]]
            yard.take([yard.cancel(job.tenant, job.id)])
    assert yard.records is not None
    return yard.records


def _recorded(records: list[Record]) -> Recorded:
    return understand(Recording(None, tuple(records)))


def _wait_s(lived: Lived) -> float:
    return float(str(lived_measures(lived)["avg_wait_s"]))


@pytest.mark.parametrize("seed", range(3))
def test_without_a_change_the_same_happens_again(seed):
    recorded = _recorded(_record_a_day(seed))
    before, after = as_recorded(recorded), Replay(recorded, Changed()).go()
    assert len(before.jobs) > 30
    assert after.jobs == before.jobs
    assert after.held_milli_ms == before.held_milli_ms
    assert after.capacity_milli_ms == before.capacity_milli_ms
    assert after.preemptions == before.preemptions


def test_a_job_that_its_node_refused_holds_nothing_in_a_replay():
    """It never ran, so it has no run time of its own; it must not run until the end of the recording instead."""
    yard = CoreHarness()
    yard.join(node("n-1", 4))
    wrong = yard.submit(job(gpus=4))
    yard.report("n-1", Ended(key=AssignmentKey(wrong, 1, 0), outcome="refused", at_ms=0, code="CommandNotFound"))
    assert yard.state(wrong) == "failed"
    yard.now_ms += 1000
    right = yard.submit(job(gpus=4))
    yard.run(right)
    yard.now_ms += 60_000
    yard.ended(right)
    lived = Replay(_recorded(yard.records), Changed()).go()
    assert lived.held_milli_ms < 4000 * 60_100
    assert lived_measures(lived)["ended_in_time"] == 2


def test_more_nodes_shorten_waits_and_fewer_lengthen_them():
    recorded = _recorded(_record_a_day(1))
    more = Replay(recorded, Changed(more={"node-1": 2})).go()
    fewer = Replay(recorded, Changed(without=frozenset({"node-2"}))).go()
    assert _wait_s(more) < _wait_s(as_recorded(recorded)) < _wait_s(fewer)
    assert more.capacity_milli_ms == 2 * as_recorded(recorded).capacity_milli_ms


def test_run_times_follow_the_speed_of_the_cards():
    slow, fast = (msgspec.structs.replace(node_of(name, 1), hostname=name) for name in ("slow", "fast"))
    slow = msgspec.structs.replace(slow, devices=(msgspec.structs.replace(slow.devices[0], model="T4"),))
    yard = SimulatedYard([slow, fast], keep_records=True)
    yard.take([PolicyChanged(policy=Policy(speeds=(("T4", 500),)))])
    yard.at(BEGIN_MS + 1_000)
    first, second = yard.submit([("ann", _spec(1)), ("ann", _spec(1))])
    assert [place.node for job in (first, second) for place in yard.places(job)] == ["fast", "slow"]
    yard.at(BEGIN_MS + 11_000)
    yard.end(first)
    yard.end(second)
    yard.take([])
    assert yard.records is not None
    recorded = _recorded(yard.records)
    assert [job.attempts[0].run_ms for job in recorded.jobs.values()] == [10_000, 5_000]
    assert Replay(recorded, Changed()).go().jobs == as_recorded(recorded).jobs
    one_by_one = Replay(recorded, Changed(without=frozenset({"fast"}))).go()
    assert [ended - submitted for submitted, _, ended in one_by_one.jobs] == [20_000, 30_000]
    both_fast = Replay(recorded, Changed(without=frozenset({"slow"}), more={"fast": 1})).go()
    assert [ended - submitted for submitted, _, ended in both_fast.jobs] == [10_000, 5_000]


def _is_too_wide(job: RecordedJob) -> bool:
    return job.has_run_time and job.tenant == "ann" and job.spec.replicas * job.spec.need.gpus > 4


def test_a_quota_makes_its_tenant_wait():
    recorded = _recorded(_record_a_day(2))
    limited = Policy(tenants=(("ann", TenantLimits(gpus_max_milli=4000)),))
    replay = Replay(recorded, Changed(policy=limited))
    lived = replay.go()
    held = replay.yard.core.cluster.tenancy.held_milli
    assert max(held.values(), default=0) <= 4000
    # Hers that need more than the quota at once wait for ever.
    assert lived_measures(lived)["never_ended"] == len([job for job in recorded.jobs.values() if _is_too_wide(job)]) > 0
    assert lived.held_milli_ms < as_recorded(recorded).held_milli_ms


def test_a_recording_may_begin_with_a_snapshot(tmp_path):
    records = _record_a_day(4)
    half = len(records) // 2
    core = Scheduler()
    for record in records[:half]:
        core.apply(record)
    store = SnapshotStore(tmp_path, "main")
    store.write(half, half, core.snapshot())
    store.reveal(half)
    _write_segment(tmp_path / "journal-1-2.jsonl.gz", records[half - 3 :])
    recording = read_recording([tmp_path])
    assert recording.records[0].turn == half + 1
    recorded = understand(recording)
    after = Replay(recorded, Changed()).go()
    assert all(started and ended for _, started, ended in after.jobs)
    assert len(after.jobs) == len(as_recorded(recorded).jobs) > 10


def _write_segment(path: Path, records: list[Record]) -> None:
    lines = [
        ArchivedRecord(sequence=record.turn, stored_ms=record.now_ms, record=msgspec.Raw(msgspec.json.encode(record)))
        for record in records
    ]
    path.write_bytes(gzip.compress(b"\n".join(msgspec.json.encode(line) for line in lines) + b"\n"))


def test_what_is_missing_is_named(tmp_path):
    records = _record_a_day(5, jobs=10)
    _write_segment(tmp_path / "journal-1-2.jsonl.gz", [*records[:4], *records[6:]])
    with pytest.raises(TraceError, match="the record of turn 5 is missing"):
        read_recording([tmp_path])
    _write_segment(tmp_path / "journal-1-2.jsonl.gz", records[4:])
    with pytest.raises(TraceError, match="begin with turn 5, and there is no snapshot"):
        read_recording([tmp_path])
    (tmp_path / "journal-1-2.jsonl.gz").write_bytes(b'{"turn": "x"}\n')
    with pytest.raises(TraceError, match="line 1: not a record"):
        read_recording([tmp_path])


def test_other_policies_order_the_same_jobs():
    recorded = _recorded(_record_a_day(6))
    shortest, first = ordered(recorded, "srsf"), ordered(recorded, "fifo")
    assert len(shortest.jobs) == len(first.jobs) == len(as_recorded(recorded).jobs)
    assert sum(ended - submitted for submitted, _, ended in shortest.jobs) < sum(
        ended - submitted for submitted, _, ended in first.jobs
    )


def test_the_command_compares_an_old_journal_with_what_would_be_now():
    root = Typer()
    commands.register(root)
    root.callback()(lambda: None)
    runner = CliRunner()
    result = runner.invoke(root, ["replay", str(OLD_JOURNAL), "--policy", "fifo", "--json"])
    assert result.exit_code == 0, result.output
    runs = [msgspec.json.decode(line) for line in result.output.splitlines()]
    assert [run["run"] for run in runs] == ["recorded", "gpuyard", "fifo"]
    assert runs[0]["jobs"] == runs[1]["jobs"] > 0
    refused = runner.invoke(root, ["replay", str(OLD_JOURNAL), "--without", "n-9"])
    assert refused.exit_code == 2
    assert "no node n-9" in refused.output
