"""A yard as docs/install.md puts it up, on a machine with a real systemd: our units, and jobs as transient services.

One machine, booted once; every test finds it with the yard running. These tests do not skip where a machine cannot be
booted: they fail and say what is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machine_yard import (
    CONTEXT,
    UNITS,
    cancel,
    is_forgotten,
    output,
    running,
    state_of,
    submit,
    unit,
    until,
    yard_inside,
)
from support.nspawn import PREFIX, PYTHON, SOURCE_INSIDE, Machine, machine

pytestmark = pytest.mark.machine

#: A watchdog that a test can wait for.
IMPATIENT = "[Service]\nWatchdogSec=1s\n"
#: How much systemd may keep at the bus, a fourth of the default: more than that many starts at once are tried below.
NARROW = '<busconfig><limit name="max_match_rules_per_connection">128</limit></busconfig>'


def narrow_and_impatient(made: Machine) -> None:
    dropin = made.etc / "systemd" / "system" / "gpuyard-agent.service.d"
    dropin.mkdir()
    (dropin / "impatient.conf").write_text(IMPATIENT)
    bus = made.etc / "dbus-1"
    bus.mkdir()
    (bus / "system-local.conf").write_text(NARROW)


@pytest.fixture(scope="module")
def yard() -> Iterator[Machine]:
    with yard_inside('quantum = "200ms"\n', prepare=narrow_and_impatient) as made:
        yield made


def agent_pid(yard: Machine) -> int:
    return int(yard.show("gpuyard-agent", "MainPID"))


@pytest.mark.parametrize(
    ("launcher", "account"),
    [("systemd", ()), ("supervisor", ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))],
    ids=["systemd", "supervisor without control groups"],
)
def test_the_contract_of_launchers_holds(yard: Machine, launcher: str, account: tuple[str, ...]) -> None:
    """By transient services; and by a supervisor that is nobody, may make no control group, and has signals alone."""
    tests = f"{SOURCE_INSIDE}/tests/agents/test_launcher_contract.py"
    done = yard.run(
        *(*account, PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", SOURCE_INSIDE),
        *("-c", f"{SOURCE_INSIDE}/pyproject.toml", tests),
        env={"GPUYARD_TEST_LAUNCHER": launcher},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed in", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 25


def test_nothing_on_the_machine_has_failed(yard: Machine) -> None:
    assert yard.systemctl("--failed", "--plain", "--no-legend").strip() == ""
    assert "SystemdLauncher" in yard.journal("gpuyard-agent")


def test_a_job_is_a_transient_service_of_its_account(yard: Machine) -> None:
    job, pid = running(yard, "id -u; exec sleep 1000", "--gpus", "1")
    assert output(yard, job).split() == ["ready", "65534"]
    assert yard.show(unit(job), "Slice") == "gpuyard-jobs.slice"
    assert yard.show(unit(job), "KillMode") == "control-group"
    assert f"gpuyard-jobs.slice/{unit(job)}" in yard.run("cat", f"/proc/{pid}/cgroup").stdout
    cancel(yard, job)


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_jobs_outlive_their_agent_and_are_adopted_once(yard: Machine, way: str) -> None:
    jobs = dict(running(yard, "exec sleep 1000", "--cpus", "0.1") for _ in range(2))
    before = agent_pid(yard)
    if way == "restart":
        yard.systemctl("restart", "gpuyard-agent")
    else:
        yard.run("kill", "-KILL", str(before))
    until(lambda: agent_pid(yard) not in (0, before), "the agent is back")
    until(lambda: yard.show("gpuyard-agent", "ActiveState") == "active", "it is ready")
    assert {job: int(yard.show(unit(job), "MainPID")) for job in jobs} == jobs
    for job in jobs:
        assert output(yard, job) == "ready\n", "started once"
    shown = yard.run(f"{PREFIX}/bin/gpuyard", "jobs", env=CONTEXT).stdout
    assert shown.count("running") == len(jobs), shown
    cancel(yard, *jobs)


def test_an_end_while_the_agent_is_away_is_known_afterwards(yard: Machine) -> None:
    go = yard.state / "go"
    wait = f"while [ ! -e /var/lib/gpuyard/{go.name} ]; do sleep 0.05; done"
    job, _ = running(yard, f"{wait}; exit 7")
    killed, _ = running(yard, f"{wait}; kill -SEGV $$")
    stays, _ = running(yard, "exec sleep 1000")
    yard.systemctl("stop", "gpuyard-agent")
    assert yard.show(unit(stays), "ActiveState") == "active", "stopping the agent stops no job"
    go.touch()
    for one in (job, killed):
        until(lambda one=one: yard.show(unit(one), "ActiveState") == "failed", f"job {one} has ended")  # type: ignore[misc]
    yard.systemctl("start", "gpuyard-agent")
    for one in (job, killed):
        until(lambda one=one: is_forgotten(yard, one), f"the end of job {one} is durable")  # type: ignore[misc]
    until(lambda: "failed" in state_of(yard, killed), "the daemon knows both")
    assert re.search(r"\b7\b", state_of(yard, job))
    cancel(yard, stays)


def test_a_systemd_that_leaves_the_bus_loses_no_job(yard: Machine) -> None:
    """Whatever it said in between was heard by nobody."""
    go = yard.state / "go-on"
    job, pid = running(yard, f"while [ ! -e /var/lib/gpuyard/{go.name} ]; do sleep 0.05; done; exit 7")
    before = agent_pid(yard)
    yard.systemctl("daemon-reexec")
    after = [submit(yard, f"echo ready; exit {code}") for code in (0, 9)]
    until(lambda: all(is_forgotten(yard, one) and output(yard, one) for one in after), "jobs start and end as before")
    assert int(yard.show(unit(job), "MainPID")) == pid
    go.touch()
    until(lambda: is_forgotten(yard, job), "its end is durable")
    for one, code in ((job, 7), (after[1], 9)):
        until(lambda one=one, code=code: re.search(rf"\b{code}\b", state_of(yard, one)), "how it ended is known")  # type: ignore[misc]
    assert [output(yard, one) for one in (job, *after)] == ["ready\n"] * 3, "each started once"
    assert agent_pid(yard) == before


def test_an_agent_that_hangs_is_replaced_and_its_jobs_do_not_notice(yard: Machine) -> None:
    job, pid = running(yard, "exec sleep 1000")
    before = agent_pid(yard)
    restarts = int(yard.show("gpuyard-agent", "NRestarts"))
    yard.run("kill", "-STOP", str(before))
    until(lambda: int(yard.show("gpuyard-agent", "NRestarts")) > restarts, "systemd restarts it")
    until(lambda: yard.show("gpuyard-agent", "ActiveState") == "active", "it is ready")
    assert int(yard.show(unit(job), "MainPID")) == pid
    cancel(yard, job)


def test_jobs_outlive_daemon_and_server(yard: Machine) -> None:
    job, pid = running(yard, "exec sleep 1000")
    yard.systemctl("kill", "--signal=KILL", "gpuyard-daemon", "gpuyard-nats")
    until(
        lambda: all(yard.show(name, "ActiveState") == "active" for name in UNITS) and "running" in state_of(yard, job),
        "both are back",
    )
    assert int(yard.show(unit(job), "MainPID")) == pid
    cancel(yard, job)


#: Requests that nobody can read, large, until the stream has to begin a file that it cannot make.
SEND_UNTIL_NOTHING_IS_STORED = """
import asyncio
import gpuyard
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.nats import connect

async def main():
    found = gpuyard.load_context()
    bus = await connect(found.url, name="flood", inbox_prefix=f"_INBOX.{found.user}", seed=found.key)
    for _ in range(200):
        try:
            await bus.stream_publish(f"sub.{found.tenant}.{found.user}.submit", b"x" * 250_000, timeout=3.0)
        except BusError:
            break
    else:
        raise SystemExit("everything is stored")
    await bus.close()

asyncio.run(main())
"""


def test_a_server_that_stores_nothing_is_started_again_while_jobs_go_on(yard: Machine) -> None:
    """The watch and the server are two units; what a failed write does to a stream only a new process undoes."""
    yard.systemctl("start", "gpuyard-nats-watch")
    until(lambda: yard.show("gpuyard-nats-watch", "ActiveState") == "active", "the watch runs")
    job, pid = running(yard, "exec sleep 1000")
    before = yard.show("gpuyard-nats", "MainPID")
    # From here on every write of this process fails, as on a full disk; what it stored is there for the next one.
    yard.run("prlimit", "--pid", before, "--fsize=0")
    yard.run(PYTHON, "-c", SEND_UNTIL_NOTHING_IS_STORED, env=CONTEXT)
    until(lambda: yard.show("gpuyard-nats", "MainPID") not in (before, "0"), "systemd has started the server again")
    assert "stores nothing" in yard.journal("gpuyard-nats-watch")
    until(lambda: "running" in state_of(yard, job), "the daemon answers again")
    assert int(yard.show(unit(job), "MainPID")) == pid
    done = submit(yard, "echo done")
    until(lambda: output(yard, done) == "done\n", "work goes on")
    yard.systemctl("stop", "gpuyard-nats-watch")
    cancel(yard, job)


def test_shares_of_a_card_take_turns_by_freezing_units(yard: Machine) -> None:
    options = ("--gpu", "0.4", "--isolation", "none", "--gpu-memory", "1Gi", "--cpus", "0.1")
    jobs = dict(running(yard, "while :; do :; done", *options) for _ in range(2))
    cards = {
        yard.run("sh", "-c", f"tr '\\0' '\\n' < /proc/{pid}/environ | grep CUDA_VIS").stdout for pid in jobs.values()
    }
    frozen = dict.fromkeys(jobs, 0)

    def both_were() -> bool:
        for job in jobs:
            frozen[job] += yard.show(unit(job), "FreezerState") == "frozen"
        return len(cards) > 1 or all(frozen.values())

    until(both_were, "each of them has been halted")
    assert len(cards) == 1, f"they share no card: {cards}"
    cancel(yard, *jobs)


def test_what_systemd_can_enforce_is_found_and_not_assumed(yard: Machine) -> None:
    """It takes a memory limit without the controller for it, and keeps none: whether there is one is the host's."""
    program = (
        "import msgspec; from gpuyard_agent.launch.limits import probe_systemd;"
        "print(msgspec.json.encode(probe_systemd()).decode())"
    )
    found = json.loads(yard.run(PYTHON, "-c", program).stdout)
    controllers = yard.run("cat", "/sys/fs/cgroup/cgroup.controllers").stdout.split()
    assert found["freeze"] == "cgroup-v2"
    names = {"cpu": "cpu", "memory": "memory", "tasks": "pids"}
    assert {name: found[name] for name in names} == {name: part in controllers for name, part in names.items()}


#: Opens two device files under a policy that names the first, and under none.
OPEN_DEVICES = """
import asyncio
from gpuyard_agent.launch.base import Account, Limits, ProcessSpec
from gpuyard_agent.launch.systemd import SystemdLauncher
from gpuyard_protocol.names import AssignmentKey

async def main():
    launcher = SystemdLauncher("devices")
    await launcher.open()
    nobody = Account(name="nobody", uid=65534, gid=65534)
    read = "for n in 0 1; do ( : < /dev/nvidia$n ) && echo $n; done; : < /dev/null && echo null"
    for job, devices in ((1, ("/dev/nvidia0",)), (2, None)):
        key, folder = AssignmentKey(job, 1, 0), f"/tmp/devices/{job}"
        spec = ProcessSpec(
            key=key, argv=("sh", "-c", read), env={"PATH": "/usr/bin"}, job_dir=folder, account=nobody,
            stdout=f"{folder}/out", stderr=f"{folder}/err", limits=Limits(devices=devices),
        )
        await launcher.start([spec])
        await anext(launcher.exits())
        await launcher.forget([key])
    await launcher.close()

asyncio.run(main())
"""


def test_cards_of_others_cannot_be_opened(yard: Machine) -> None:
    """The card is another device that anybody may open; what systemd and the kernel do with it is real."""
    for number, (major, minor) in enumerate(((10, 229), (10, 200))):
        yard.run("mknod", "-m", "666", f"/dev/nvidia{number}", "c", str(major), str(minor))
    yard.run(PYTHON, "-c", OPEN_DEVICES)
    assert yard.run("cat", "/tmp/devices/1/out").stdout.split() == ["0", "null"]
    assert yard.run("cat", "/tmp/devices/2/out").stdout.split() == ["0", "1", "null"]


def test_a_reboot_loses_the_processes_and_nothing_else(yard: Machine) -> None:
    """Last: the machine is another afterwards."""
    job, _ = running(yard, "exec sleep 1000")
    done = submit(yard, "echo done")
    until(lambda: output(yard, done) == "done\n" and is_forgotten(yard, done), "another has ended")
    yard.crash()
    yard.start()
    until(lambda: "ready" in output(yard, job, attempt=2), "it has a second attempt after the reboot")
    assert "succeeded" in state_of(yard, done)
    cancel(yard, job)
    yard.off()


def test_no_trace_of_a_machine_is_left() -> None:
    with machine() as made:
        made.start()
        name, stage = made.name, made.stage
        made.off()
    assert not stage.exists()
    left = list(Path("/sys/fs/cgroup").glob(f"*/{name}*"))
    assert left == []
    assert not [entry for entry in os.listdir("/proc") if entry.isdigit() and name.encode() in _command_of(entry)]


def _command_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
