"""`gpuyard demo`: its summary, the replay of a trace, and that nothing of it stays."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gpuyard_daemon.yard import demo_workload, trace_replay
from gpuyard_daemon.yard.home import YardTrouble

KEYS = {
    "jobs_submitted", "jobs_done", "jobs_failed", "jobs_lost", "avg_wait_s", "gpu_allocation_pct", "seconds"
}  # fmt: skip
HEADER = "job_id,num_gpu,submit_time,iterations,model_name,iteration_time\n"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuyard.cli", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def processes_of_demos(than: set[int]) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join([*process.cmdline(), process.environ().get("GPUYARD_JOB_DIR", "")])
        except psutil.Error:
            continue
        if "gpuyard-demo-" in line and process.pid not in than:
            found.append(line)
    return found


def write_trace(path: Path, rows: str) -> Path:
    with gzip.open(path, "wt") as file:
        file.write(HEADER + rows)
    return path


def test_the_mixed_workload_runs_to_its_end() -> None:
    """Every kind of job and both services on four small nodes: all done, none lost, one object on standard output."""
    done = demo("--seconds", "5", "--gpus", "2", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert set(summary) == KEYS
    assert summary["jobs_done"] == summary["jobs_submitted"] > 10
    assert (summary["jobs_failed"], summary["jobs_lost"]) == (0, 0)
    assert summary["gpu_allocation_pct"] > 10
    assert "service replicas: chat up to" in done.stderr
    assert f"{summary['jobs_done']} of {summary['jobs_submitted']} jobs done" in done.stderr


def test_a_trace_is_replayed_with_real_processes(tmp_path: Path) -> None:
    """Two nodes of four cards: small jobs side by side, and one of eight cards as a gang over both."""
    rows = "".join(f"{number},{gpus},{number * 1000},1000,m,{1000}\n" for number, gpus in enumerate((1, 2, 4, 8, 1)))
    path = write_trace(tmp_path / "trace.csv.gz", rows)
    done = demo("--trace", str(path), "--speed", "2000", "--nodes", "2", "--gpus", "4", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["jobs_submitted"], summary["jobs_done"], summary["jobs_lost"]) == (5, 5, 0)
    # Each of them holds its cards for 1,000 × 1,000 ms × 1.015 ÷ 2,000.
    assert summary["seconds"] > 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "has no column 'job_id'"),
        (HEADER, "holds no jobs"),
        (HEADER + "1,none,0,1,m,1\n", "line 2: invalid literal"),
        (HEADER + "1,0,0,1,m,1\n", "num_gpu is 0; expected 1 or more"),
        (HEADER + "1,500,0,1,m,1\n", "needs 500 GPUs; 8 nodes have 64"),
    ],
)
def test_a_trace_that_cannot_be_replayed_says_why(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(YardTrouble, match=re.escape(says)):
        trace_replay.replay(trace_replay.read_trace(path, None), 1, 8, 8)


def test_a_trace_that_cannot_be_replayed_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text(HEADER)
    for name, says in (("none.csv", "there is no file"), ("empty.csv", "holds no jobs")):
        done = demo("--trace", str(tmp_path / name))
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr


def test_ctrl_c_cleans_up() -> None:
    before = {process.pid for process in psutil.process_iter()}
    command = [sys.executable, "-m", "gpuyard.cli", "demo", "--seconds", "60", "--gpus", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    directory = next(word for word in process.stderr.readline().split() if "gpuyard-demo-" in word)
    while "running" not in (line := process.stderr.readline()):
        assert line, "the demo ended before anything ran"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not Path(directory).exists()
    assert [line for line in processes_of_demos(before) if directory in line] == []


def test_the_same_demo_is_given_the_same_work_and_a_little_more_than_fits() -> None:
    first, second = (demo_workload.jobs(60, 32, 4) for _ in range(2))
    assert first == second
    assert [arrival.at_s for arrival in first] == sorted(arrival.at_s for arrival in first)
    assert first[-1].at_s <= 60 * demo_workload.ARRIVALS_UNTIL
    modes = {(bool(a.request.mig), a.request.isolation, a.request.replicas > 1) for a in first}
    assert len(modes) >= 4
    for wave in demo_workload.services(32):
        loads = [wave.concurrency(step / 100) for step in range(101)]
        assert min(loads) == 0
        assert max(loads) > wave.request.target_concurrency * wave.request.max_replicas * 0.8


def test_a_replay_keeps_the_order_and_the_proportions(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.csv.gz", "b,12,9000,10,m,2000\na,1,4000,5,m,100\n")
    jobs = trace_replay.read_trace(path, None)
    assert [job.name for job in jobs] == ["a", "b"]
    replay = trace_replay.replay(jobs, 10, 8, 8)
    assert [arrival.at_s for arrival in replay.arrivals] == [0.0, 0.5]
    small, gang = (arrival.request for arrival in replay.arrivals)
    assert (small.replicas, small.gpus, gang.replicas, gang.gpus) == (1, 1, 2, 8)
    assert replay.lengths_s == pytest.approx([5 * 100 * 1.015 / 10_000, 10 * 2000 * 1.015 / 10_000])
    assert trace_replay.read_trace(path, 1) == jobs[:1]
    with pytest.raises(YardTrouble, match="cannot read"):
        trace_replay.read_trace(tmp_path / "none.csv.gz", None)
