"""The command line: what it prints, its exit codes, and what it says when something is wrong. Against a real yard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import gpuyard
from gpuyard.cli.app import build_app
from gpuyard.cli.options import default_cwd
from support.yard import Yard

SMALL = ("--cpus", "0.1", "--memory", "64Mi")


@pytest.fixture(scope="module")
def sdk(yard: Yard) -> Iterator[gpuyard.SyncClient]:
    """For what a test only looks at: a command takes half a second to start."""
    with gpuyard.connect_sync(yard.context) as client:
        yield client


def number(printed: str) -> int:
    assert printed.startswith("Submitted job "), printed
    return int(printed.removeprefix("Submitted job "))


def ok(yard: Yard, *arguments: str, stdin: bytes = b"") -> str:
    done = yard.cli(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(yard: Yard, *arguments: str) -> Any:
    return json.loads(ok(yard, *arguments, "--json"))


def test_submit_show_and_logs(yard: Yard) -> None:
    job = number(ok(yard, "submit", "-g", "1", "-n", "tour", "--env", "A=b c", *SMALL, "--", "sh", "-c", 'echo "$A"'))
    assert ok(yard, "logs", "-f", str(job)) == "b c\n"
    shown = read(yard, "job", "show", str(job))
    assert (shown["state"], shown["name"], shown["wants"]) == ("succeeded", "tour", "1×GPU")
    text = ok(yard, "job", "show", str(job))
    assert "succeeded" in text
    assert "exit code   0" in text
    assert f"job {job} has succeeded\n" in ok(yard, "why", str(job))
    assert "tour" in ok(yard, "jobs", "--state", "succeeded")


def test_a_dry_run_tells_and_submits_nothing(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    before = [view.job for view in sdk.jobs(all=True, limit=1)]
    told = ok(yard, "submit", "--dry-run", "-g", "2", *SMALL, "--", "true")
    assert told.startswith("it would start at once on node-1\n  replica 0: node-1, 2 whole on ")
    refused = yard.cli("submit", "--dry-run", "-g", "20", "--", "true")
    assert refused.stdout.endswith("\n  --gpus: found 20×GPU; expected at most 8; nearest: 8\n")
    senseless = yard.cli("submit", "--dry-run", "-g", "90", "--", "true")
    assert senseless.stdout == (
        "it would be rejected: --gpus: found 90; expected a number between 0 and 64 (per replica)\n"
    )
    refused = yard.cli("submit", "--dry-run", "--json", "-g", "20", "--", "true")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["refusal"]["nearest"] == "8"
    assert [view.job for view in sdk.jobs(all=True, limit=1)] == before


def test_a_deadline_that_cannot_be_kept_is_told_to_whoever_submits(yard: Yard) -> None:
    asked = ("-g", "1", *SMALL, "--estimate", "10m", "--deadline", "+1m", "--", "true")
    told = yard.cli("submit", *asked)
    assert told.returncode == 0
    assert "deadline" in told.stderr
    assert "deadline" in json.loads(ok(yard, "submit", "--json", *asked))["note"]


def test_a_drained_node_takes_nothing_until_it_is_let_again(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    held = sdk.submit(command="sleep 60", gpus=1, cpus="0.1", memory="64Mi")
    _until(lambda: held.view().state == "running")
    assert "node-1 takes nothing new; 1 replicas are there" in ok(yard, "cordon", "node-1", "--reason", "new cables")
    assert "draining" in ok(yard, "nodes")
    late = sdk.submit(command="true", gpus=1, cpus="0.1", memory="64Mi")
    assert "cordoned" in late.why().summary
    impatient = yard.cli("drain", "node-1", "--timeout", "0.2")
    assert impatient.returncode == 1
    assert f"jobs {held.number}" in impatient.stderr
    assert "node-1: empty" in ok(yard, "drain", "node-1", "--requeue")
    assert held.view().state == "pending"
    assert "cordoned by" in ok(yard, "nodes")
    ok(yard, "uncordon", "node-1")
    assert late.wait(timeout=20).state == "succeeded"
    held.cancel()
    held.wait(timeout=20)
    unknown = yard.cli("cordon", "node-7")
    assert unknown.returncode == 1
    assert "node-1" in unknown.stderr


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_top_shows_cards_and_jobs_once_where_there_is_no_terminal(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    job = sdk.submit(command="sleep 60", gpus=8, name="wide", cpus="0.1", memory="64Mi")
    late = sdk.submit(command="true", gpus=1, name="late", cpus="0.1", memory="64Mi")
    lines = ok(yard, "top").splitlines()
    assert "8 of 8 GPUs held" in lines[0]
    assert "node-1  W W W W W W W W  8/8" in lines[1]
    assert any(f"{job.number} wide" in line and "8×GPU on node-1" in line for line in lines)
    assert any(f"{late.number} late" in line and "no such card free" in line for line in lines)
    shown = read(yard, "top")
    assert job.number in [view["job"] for view in shown["running"]]
    assert late.number in [view["job"] for view in shown["waiting"]]
    late.cancel()
    job.cancel()
    job.wait(timeout=20)


@pytest.mark.parametrize("command", [("jobs", "--all"), ("nodes",), ("services",), ("stats",), ("why", "1")])
def test_every_read_has_json(yard: Yard, sdk: gpuyard.SyncClient, command: tuple[str, ...]) -> None:
    sdk.submit(command="true", cpus="0.1", memory="64Mi")
    assert isinstance(read(yard, *command), dict if command[0] in ("stats", "why") else list)


def test_parsable_prints_the_number_and_nothing_else(yard: Yard) -> None:
    printed = ok(yard, "submit", "--parsable", *SMALL, "true")
    assert printed.strip().isdigit()
    answer = json.loads(ok(yard, "submit", "--json", *SMALL, "true"))
    assert answer["job"] == int(printed) + 1


def test_run_shows_the_output_and_ends_as_the_job_ends(yard: Yard) -> None:
    done = yard.cli("run", "-g", "1", *SMALL, "--", "sh", "-c", "echo to out; echo to err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, "to out\n")
    assert "to err\n" in done.stderr
    assert "exit code 7" in done.stderr


def test_run_of_a_gang_names_the_replicas(yard: Yard) -> None:
    done = yard.cli("run", "-q", "-r", "2", *SMALL, "--", "sh", "-c", "echo $RANK of $WORLD_SIZE")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[0] 0 of 2", "[1] 1 of 2"]


def test_ctrl_c_lets_go_of_a_running_job(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    """It says how to come back, and the job is none the worse."""
    go_on = yard.scratch / "go-on"
    script = f"echo begun; until [ -e {go_on} ]; do sleep 0.1; done; echo done"
    command = [sys.executable, "-m", "gpuyard.cli", "run", *SMALL, "--", "sh", "-c", script]
    process = subprocess.Popen(
        command,
        env={**os.environ, "GPUYARD_CONTEXT": str(yard.context)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    job = next(word for word in err.split() if word.isdigit())
    assert f"gpuyard logs -f {job}" in err
    assert f"gpuyard cancel {job}" in err
    assert "Traceback" not in err
    go_on.touch()
    assert sdk.handle(int(job)).wait(timeout=20).state == "succeeded"
    assert ok(yard, "logs", job, "--tail", "1") == "done\n"


def test_job_files_and_flags_on_top(yard: Yard, sdk: gpuyard.SyncClient, tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "- {name: one, command: [echo, one], cpus: 0.1, memory: 64Mi, env: {N: 1}}\n"
        "- {name: two, command: 'echo $N', cpus: 0.1, memory: 64Mi, env: {N: 2}}\n"
    )
    printed = ok(yard, "submit", "-f", str(path), "--priority", "1", "--env", "M=3").splitlines()
    shown = [sdk.job(number(line)) for line in printed]
    assert [(view.name, view.priority) for view in shown] == [("one", 1), ("two", 1)]
    specs = [view.spec for view in shown if view.spec is not None]
    assert [dict(spec.env) for spec in specs] == [{"M": "3", "N": "1"}, {"M": "3", "N": "2"}]


def test_a_job_file_from_standard_input_and_a_bare_time_in_minutes(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    job = number(ok(yard, "submit", "-f", "-", "-t", "90", stdin=b"command: ['true']\ncpus: 0.1\n"))
    spec = sdk.job(job).spec
    assert spec is not None
    assert (spec.time_limit_ms, spec.need.cpu_milli) == (90 * 60_000, 100)


def test_a_waiting_job_says_why_in_the_list(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    job = number(ok(yard, "submit", "-g", "8", "--node", "node-9", "--allow-pending", *SMALL, "true"))
    [row] = [line for line in ok(yard, "jobs").splitlines() if line.strip().startswith(f"{job} ")]
    assert "pending" in row
    assert sdk.why(job).summary in row
    sdk.cancel(job)


def test_cancel_many_fails_where_one_is_unknown(yard: Yard, sdk: gpuyard.SyncClient) -> None:
    job = sdk.submit(command="sleep 60", cpus="0.1", memory="64Mi").number
    done = yard.cli("cancel", str(job), "999999")
    assert (done.returncode, done.stdout) == (1, f"Cancelled job {job}\n")
    assert "999999" in done.stderr
    assert done.stderr.count("\n") == 1


def test_services_from_file_to_deletion(yard: Yard, sdk: gpuyard.SyncClient, tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(
        "name: chat\ncommand: 'while :; do sleep 0.2; done'\nmin_replicas: 0\nmax_replicas: 2\n"
        "target_concurrency: 4\nstop_grace: 1s\nreplica: {mig: 1g.10gb, cpus: 0.1, memory: 64Mi}\n"
    )
    assert ok(yard, "apply", "-f", str(path)) == "Applied service chat\n"
    ok(yard, "load", "chat", "8")
    deadline = time.monotonic() + 20
    while sdk.services("chat")[0].running < 2:
        assert time.monotonic() < deadline
    assert "chat" in ok(yard, "services")
    done = yard.cli("load", "chatt", "8")
    assert (done.returncode, "did you mean 'chat'?" in done.stderr) == (1, True)
    assert ok(yard, "delete", "chat") == "Deleted service chat\n"


def test_nodes_and_stats(yard: Yard) -> None:
    assert "node-1" in ok(yard, "nodes")
    assert ok(yard, "nodes", "node-1").count("H100") == 8
    done = yard.cli("nodes", "nod-1")
    assert (done.returncode, "did you mean 'node-1'?" in done.stderr) == (1, True)
    assert "GPUs" in ok(yard, "stats")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("submit", "--gpu-memory", "5", "true"), 1, "gpuyard: --gpu-memory: found '5'; expected an amount of memory"),
        (("submit", "--gpus", "-1", "true"), 1, "gpuyard: --gpus: found -1; expected a number between 0 and 64"),
        (("run", "--time", "soon", "true"), 1, "gpuyard: --time: found 'soon'; expected a length of time"),
        (
            ("submit", "--submission-id", "two words", "true"),
            1,
            "gpuyard: --submission-id: found 'two words'; expected",
        ),
        (("submit", "--gpus", "two", "true"), 2, "--gpus' / '-g': found 'two'; expected a whole number"),
        (("submit", "--depends-on", "17", "true"), 1, "gpuyard: --depends-on: found '17'; expected 'afterok:JOB'"),
        (("submit", "--throughput", "A30=3", "-g", "1", "true"), 1, "gpuyard: --throughput A30: found 3.0; expected a"),
        (("submit", "--gpu-model", "A30", "true"), 1, "gpuyard: --gpu-model: found 'A30'; expected --gpus, --gpu,"),
        (("submit", "--gpu-load", "x", "--gpu", "0.1", "true"), 1, "expected one of: compute, light, memory"),
        (("submit", "--preemption", "x", "true"), 1, 'gpuyard: --preemption: found "x"; expected one of: checkpoint,'),
        (("load", "chat", "-1"), 2, "'CONCURRENCY': found -1; expected a whole number of at least 0"),
        (("load", "chat", "1", "--for", "soon"), 2, "'--for': found 'soon'; expected a length of time"),
        (("audit", "-n", "0"), 2, "found 0; expected a whole number from 1 to 1,000,000"),
        (("logs", "1", "--tail", "some"), 2, "found 'some'; expected a whole number of at least 0"),
        (("top", "--every", "nan"), 2, "found 'nan'; expected a number of seconds of at least 0.2, such as 0.5"),
        (("drain", "node-1", "--timeout", "-1"), 2, "found '-1'; expected a length of time"),
        (("up", "--nodes", "0"), 2, "'--nodes': found 0; expected a whole number from 1 to 256"),
        (("simulate", "trace.csv", "--nodes", "few"), 2, "found 'few'; expected a whole number of at least 1"),
        (("logs", "1", "-r", "7"), 1, "job 1 has no replica 7: its replicas are 0 to 0"),
        (("logs", "1", "--attempt", "9"), 1, "job 1 has had no attempt 9: the newest is 1"),
        (("cancel", "1"), 1, "gpuyard: job 1 has succeeded already (see: gpuyard why 1)\n"),
        (("submit", "--gpu-model", "H1000", "-g", "1", "true"), 1, "H1000"),
        (("submit", "-f", "none.yaml"), 1, "cannot read none.yaml"),
        (("job", "show", "999999"), 1, "there is no job 999999"),
        (("submit",), 2, "a command to run is missing"),
        (("submit", "--gpu-mem", "5Gi", "true"), 2, "--gpu-memory"),
        (("submit", "--env", "AB", "true"), 2, "expected NAME=VALUE"),
        (("submit", "--throughput", "A30=fast", "true"), 2, "expected a number from 0.001 to 1"),
        (("jobs", "--state", "runing"), 2, "did you mean 'running'?"),
        (("job", "show", "seventeen"), 2, "found 'seventeen'; expected a job's number, such as 17"),
        (("jbos",), 2, "Did you mean 'jobs'"),
    ],
)
def test_errors_name_what_is_wrong(yard: Yard, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = yard.cli(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("gpuyard: ")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("one.yaml", "command: a\ngpus: two\n", 'one.yaml: $.gpus: found "two"; expected an integer or null'),
        ("one.yaml", "comand: a\n", "(did you mean 'command'?)"),
        ("two.yaml", "- command: a\n- command: b\n  gpuss: 2\n", "job 2 of {}: $.gpuss: found an unknown field"),
        ("two.yaml", "- command: a\n  gpus: 2\n- command: b\n  gpus: 90\n", "job 2 of {}: $.gpus: found 90; expected"),
    ],
)
def test_a_refusal_of_a_file_names_it_and_the_job_in_it(
    yard: Yard, tmp_path: Path, name: str, text: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    done = yard.cli("submit", "-f", str(path))
    assert done.returncode == 1
    assert says.format(path) in done.stderr


def test_without_a_yard_every_command_says_how_to_get_one(tmp_path: Path) -> None:
    environment = {**os.environ, "GPUYARD_CONTEXT": str(tmp_path / "context.toml")}
    command = [sys.executable, "-m", "gpuyard.cli", "jobs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "start a yard with `gpuyard up`" in done.stderr


def test_a_command_whose_component_is_missing_names_the_extra() -> None:
    """A bare install has the client alone: `up` is listed, and says what brings it."""
    program = "import sys\nsys.modules['psutil'] = None\nfrom gpuyard.cli import main\nmain(['up'])\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "psutil" in done.stderr
    assert "pip install 'gpuyard[daemon,agent]'" in done.stderr


def test_root_in_a_closed_directory_sends_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    tmp_path.chmod(0o700)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert default_cwd() is None
    monkeypatch.chdir("/")
    assert default_cwd() == "/"


def test_the_list_of_commands_says_of_each_in_full_what_it_does() -> None:
    """What does not fit a line of a terminal is cut there."""
    root: Any = typer.main.get_command(build_app())
    commands = [*root.commands.values(), *(each for group in root.commands.values() for each in _within(group))]
    assert len(commands) > 40
    assert [command.name for command in commands if command.get_short_help_str(90).endswith("...")] == []


def _within(group: Any) -> list[Any]:
    return list(getattr(group, "commands", {}).values())


def test_help_does_not_load_what_only_the_work_needs() -> None:
    """`gpuyard --help` answers at once: no message library, no tables, nothing of the components."""
    program = (
        "import sys\n"
        "from gpuyard.cli.app import build_app\n"
        "build_app()\n"
        "heavy = {'nats', 'rich.table', 'uvloop', 'psutil', 'aiohttp.client', 'yaml', 'orjson'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_is_no_error(yard: Yard) -> None:
    line = f"{sys.executable} -m gpuyard.cli jobs --all --limit 0 | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "GPUYARD_CONTEXT": str(yard.context)}
    done = subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert "Traceback" not in done.stderr
