"""`gpuyard up` as people use it: one at a time, stopped in order, killed, started again, in the background."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import gpuyard
from gpuyard.job import Job
from support.nats import NatsProcess, server_binary
from support.yard import Yard, eventually

SMALL = {"cpus": "0.1", "memory": "64Mi"}
START_S = 60.0
#: The promise is 10 s; a test must also pass on a machine that does other things.
DEAD_STOP_S = 15.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every account may pass through; pytest's own are closed."""
    path = Path(tempfile.mkdtemp(prefix="gpuyard-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def yard_in(place: Path) -> Iterator[Yard]:
    """`gpuyard up` on one simulated card, until it says that it is up; may be called again for the same place.

    Stopped at the end if the test has not done so; then nothing of it may be left.
    """
    state, scratch, said = place / "state", place / "scratch", place / "up.log"
    scratch.mkdir(exist_ok=True)
    scratch.chmod(0o777)
    begin = said.stat().st_size if said.exists() else 0
    with said.open("ab") as log:
        command = [sys.executable, "-m", "gpuyard.cli", "up", "--state", str(state), "--port", "0"]
        # Any free port also for the page, as the streams' server has it.
        command += ["--simulate", "1xH100-80GB", "--http", "127.0.0.1:0"]
        up = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: b"The yard is up" in said.read_bytes()[begin:] or up.poll() is not None, "the yard is up")
        assert up.poll() is None, said.read_text()
        yield Yard(state, scratch, up)
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(START_S)
    assert processes_of(place) == []


def gpuyard_command(*arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuyard.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def processes_of(place: Path) -> list[str]:
    """What runs with this place in its command line or environment: a yard's processes, and its jobs'."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("GPUYARD_JOB_DIR", "")]
        except psutil.Error:
            continue
        if any(str(place) in word for word in words) and process.pid != os.getpid():
            found.append(f"{process.pid} {' '.join(words)[:200]}")
    return found


async def started(job: Job) -> bool:
    return (await job.view()).state == "running"


def test_only_one_yard_runs_from_a_directory(place: Path) -> None:
    with yard_in(place) as yard:
        second = gpuyard_command("up", "--state", str(yard.state))
        assert second.returncode == 1
        assert f"a yard runs from {yard.state} already (process {yard.up.pid}" in second.stderr
        assert f"gpuyard down --state {yard.state}" in second.stderr
        assert second.stderr.count("\n") == 1
        assert "GPUYARD_CONTEXT" in (place / "up.log").read_text()
    down = gpuyard_command("down", "--state", str(yard.state))
    assert (down.returncode, "no yard runs from" in down.stderr) == (1, True)


def test_a_stop_puts_jobs_back_uncharged_and_the_next_start_goes_on(place: Path) -> None:
    """Ctrl-C: the running job ends with grace and starts again; the waiting one still waits; no process is left."""
    # The shell outlives its first SIGTERM long enough to say so: there was grace.
    script = (
        'trap "echo grace >> $0; exit 0" TERM; echo "attempt $GPUYARD_ATTEMPT" >> $0; '
        '[ "$GPUYARD_ATTEMPT" -gt 1 ] && exit 0; while :; do sleep 0.05; done'
    )

    async def begin(yard: Yard) -> tuple[int, int]:
        async with yard.connect() as client:
            log = str(yard.scratch / "log")
            runs = await client.submit(command=["/bin/sh", "-c", script, log], gpus=1, **SMALL)
            waits = await client.submit(command="true", gpus=1, **SMALL)
            await eventually(lambda: started(runs), "the first job runs")
            return runs.number, waits.number

    async def finish(yard: Yard, *numbers: int) -> list[tuple[str, int]]:
        async with yard.connect() as client:
            ends = [await client.handle(number).wait(timeout=30) for number in numbers]
            return [(end.state, end.attempt) for end in ends]

    with yard_in(place) as yard:
        numbers = asyncio.run(begin(yard))
        yard.up.send_signal(signal.SIGINT)
        assert yard.up.wait(30) == 0
        assert processes_of(place) == []
    with yard_in(place) as yard:
        assert asyncio.run(finish(yard, *numbers)) == [("succeeded", 2), ("succeeded", 1)]
    assert (yard.scratch / "log").read_text().splitlines() == ["attempt 1", "grace", "attempt 2"]


def test_a_second_signal_stops_at_once_and_still_puts_jobs_back(place: Path) -> None:
    async def begin(yard: Yard) -> int:
        async with yard.connect() as client:
            stubborn = 'trap "" TERM; [ "$GPUYARD_ATTEMPT" -gt 1 ] || while :; do sleep 0.1; done'
            job = await client.submit(command=stubborn, **SMALL)
            await eventually(lambda: started(job), "the job runs")
            return job.number

    async def end(yard: Yard, number: int) -> str:
        async with yard.connect() as client:
            return (await client.handle(number).wait(timeout=30)).state

    with yard_in(place) as yard:
        number = asyncio.run(begin(yard))
        down = gpuyard_command("down", "--state", str(yard.state), "--now")
        assert (down.returncode, yard.up.wait(30)) == (0, 0)
        assert processes_of(place) == []
    with yard_in(place) as yard:
        assert asyncio.run(end(yard, number)) == "succeeded"


@pytest.mark.parametrize("flags", [(), ("--now",)])
def test_a_yard_whose_store_is_dead_stops_within_ten_seconds(place: Path, flags: tuple[str, ...]) -> None:
    """Nobody can be told of a grace any more: what ran is lost, and nothing of the yard is left."""

    async def begin(yard: Yard) -> int:
        async with yard.connect() as client:
            job = await client.submit(command="sleep 1000", **SMALL)
            await eventually(lambda: started(job), "the job runs")
            return job.number

    async def end(yard: Yard, number: int) -> str:
        async with yard.connect() as client:
            return (await client.handle(number).wait(timeout=30)).state

    with yard_in(place) as yard:
        number = asyncio.run(begin(yard))
        server = next(
            child
            for child in psutil.Process(yard.up.pid).children()
            if any("nats-server" in w for w in child.cmdline())
        )
        server.suspend()
        began = time.monotonic()
        gpuyard_command("down", "--state", str(yard.state), *flags)
        assert yard.up.wait(60) == 0
        took_s = time.monotonic() - began
        assert processes_of(place) == []
        assert took_s < DEAD_STOP_S
        assert "nothing is stored any more" in (place / "up.log").read_text()
    with yard_in(place) as yard:
        assert asyncio.run(end(yard, number)) == "failed"


def test_jobs_outlive_a_killed_yard_and_the_next_one_takes_them_over(place: Path) -> None:
    """kill -9 of `up`, with everything it started still running: one job, one attempt, no second set of processes."""

    async def begin(yard: Yard) -> int:
        async with yard.connect() as client:
            job = await client.submit(
                command=["/bin/sh", "-c", "echo x >> $0/starts; while [ ! -e $0/gate ]; do sleep 0.05; done", "."],
                cwd=str(yard.scratch),
                gpus=1,
                **SMALL,
            )
            await eventually(lambda: started(job), "the job runs")
            return job.number

    async def end(yard: Yard, number: int) -> tuple[str, int]:
        async with yard.connect() as client:
            (yard.scratch / "gate").touch()
            view = await client.handle(number).wait(timeout=30)
            return view.state, view.attempt

    with yard_in(place) as yard:
        number = asyncio.run(begin(yard))
        yard.up.kill()
        yard.up.wait(10)
        with yard_in(place) as again:
            assert len(again.processes("-m gpuyard_daemon")) == 1
            assert len(again.processes("nats-server")) == 1
            assert asyncio.run(end(again, number)) == ("succeeded", 1)
    assert (yard.scratch / "starts").read_text() == "x\n"


def test_children_that_die_are_started_again(place: Path) -> None:
    async def works(yard: Yard) -> bool:
        try:
            async with yard.connect() as client:
                job = await client.submit(command="true", **SMALL)
                return (await job.wait(timeout=20)).state == "succeeded"
        except (gpuyard.GpuyardError, TimeoutError):
            return False

    with yard_in(place) as yard:
        assert yard.kill("-m gpuyard_daemon") == 1
        assert yard.kill("-m gpuyard_agent --state") == 1
        assert asyncio.run(works(yard))
        yard.up.send_signal(signal.SIGTERM)
        assert yard.up.wait(30) == 0
    said = (place / "up.log").read_text()
    assert "daemon ended (signal SIGKILL)" in said
    assert "node-1 ended (signal SIGKILL)" in said


def test_in_the_background_and_down_again(place: Path) -> None:
    state = place / "state"
    up = gpuyard_command("up", "--state", str(state), "--simulate", "1xH100-80GB", "--port", "0", "--detach")
    try:
        assert up.returncode == 0, up.stderr
        assert f"stop it with: gpuyard down --state {state}" in up.stdout
        assert gpuyard_command("--context", str(state), "nodes").returncode == 0
        second = gpuyard_command("up", "--state", str(state), "--detach")
        assert (second.returncode, "already" in second.stderr) == (1, True)
    finally:
        down = gpuyard_command("down", "--state", str(state))
    assert (down.returncode, down.stderr) == (0, "")
    assert processes_of(place) == []


def test_on_a_server_of_somebody_else(place: Path) -> None:
    """A server that does not know the yard is refused with what it needs; with that, the yard runs on it."""
    state = place / "state"
    server = NatsProcess(place / "open")
    server.start()
    try:
        refused = gpuyard_command("up", "--state", str(state), "--nats", server.url)
        assert refused.returncode == 1
        assert "lets in anybody" in refused.stderr
        needed = state / "nats" / "needed.conf"
        assert str(needed) in refused.stderr
    finally:
        server.kill()
    server = NatsProcess(
        place / "known", 'listen: "127.0.0.1:{port}"\n' + needed.read_text().replace("{", "{{").replace("}", "}}")
    )
    server.start()
    try:
        arguments = ["--state", str(state), "--nats", server.url, "--simulate", "1xH100-80GB", "--detach"]
        up = gpuyard_command("up", *arguments)
        assert up.returncode == 0, up.stderr
        done = gpuyard_command("--context", str(state), "run", "--cpus", "0.1", "--cwd", "/", "--", "echo", "there")
        assert (done.returncode, done.stdout) == (0, "there\n")
    finally:
        gpuyard_command("down", "--state", str(state))
        server.kill()
    assert processes_of(place) == []


AS_ROOT = os.geteuid() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--nodes", "2"), 2, "more need --simulate"),
        (("--simulate", "8xB9000"), 1, "B9000"),
        (("--run-as", "root" if AS_ROOT else "nobody"), 1, "never run as root" if AS_ROOT else "only root"),
        (("--run-as", "no-such-account"), 1, "no account 'no-such-account'" if AS_ROOT else "only root"),
        (("--tenant", "Not A Name"), 2, "lower-case letters"),
        (("--nats", "nats://127.0.0.1:1"), 1, "no NATS server answers"),
        (("--http", "nowhere"), 2, "HOST:PORT"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(place: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = gpuyard_command("up", "--state", str(place / "state"), "--port", "0", *arguments)
    if "--nats" in arguments:
        done = gpuyard_command("up", "--state", str(place / "state"), *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(says) == 1
    assert "Traceback" not in done.stderr
    assert processes_of(place) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_leaves_nothing(place: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "gpuyard.cli", "up", "--state", str(place / "state"), "--port", "0"]
    up = subprocess.Popen([*command, "--simulate", "1xH100-80GB"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: any(server_binary() in line for line in processes_of(place)), "nats-server is started")
    up.send_signal(number)
    assert up.wait(30) == 0
    assert processes_of(place) == []


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
