"""A supervisor of its own for a test, real processes in it, and no trace of either afterwards."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import msgspec

from gpuyard_agent.launch.base import Account, Launcher, LauncherGone, ProcessExit, ProcessSpec, Refused, Started
from gpuyard_agent.launch.client import SupervisorLauncher
from gpuyard_agent.launch.kernel import facts_of
from gpuyard_agent.launch.systemd import SystemdLauncher
from gpuyard_protocol.names import AssignmentKey

DEADLINE_S = 20.0
#: Which launcher the contract is tried on.
KIND = os.environ.get("GPUYARD_TEST_LAUNCHER", "supervisor")

#: Leaves two sessions of its own behind, one of them without the job's environment, and says their pids.
SCATTER = (
    'setsid sh -c "echo \\$\\$; exec sleep 1000" & env -i /usr/bin/setsid /bin/sh -c "echo \\$\\$; exec sleep 1001" &'
)


def key(job: int) -> AssignmentKey:
    return AssignmentKey(job, 1, 0)


def job_account() -> Account:
    """Somebody else where this process may become somebody else, so that the switch is tried wherever it can be."""
    uid = os.getuid()
    entry = pwd.getpwnam("nobody") if uid == 0 else pwd.getpwuid(uid)
    return Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def alive(pid: int) -> bool:
    facts = facts_of(pid)
    return facts is not None and facts.state != "Z"


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for something outside this process that tells nobody when it happens."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")
        await asyncio.sleep(0.005)


class LaunchYard:
    """One node as its agents see it: a supervisor of its own, or units of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.account = job_account()
        self.launchers: list[SupervisorLauncher] = []
        self.supervisors: set[int] = set()
        self.services: list[SystemdLauncher] = []
        #: Goes into the names of units.
        self.node = f"t{os.getpid()}-{directory.name[-8:].lower().replace('_', '-')}"

    async def agent(self) -> SupervisorLauncher:
        """An agent that has just started."""
        if KIND == "systemd":
            service = SystemdLauncher(self.node, leases=self.directory / "leases.json")
            await service.open()
            self.services.append(service)
            return cast("SupervisorLauncher", service)  # a `Launcher`: the tests of the contract use no more of it
        launcher = SupervisorLauncher(self.directory / "supervisor.sock", self.directory / "state")
        self.launchers.append(launcher)
        await launcher.open()
        self.supervisors.add(launcher.supervisor_pid)
        return launcher

    async def abandon(self, launcher: Launcher) -> None:
        """As when the agent is killed."""
        if isinstance(launcher, SupervisorLauncher):
            assert launcher._writer is not None
            launcher._writer.transport.abort()
        else:
            await launcher.close()

    def job_dir(self, job: int) -> Path:
        return self.directory / "jobs" / str(job) / "1"

    def spec(self, job: int, *argv: str, **changes: object) -> ProcessSpec:
        job_dir = self.job_dir(job)
        spec = ProcessSpec(
            key=key(job),
            argv=argv,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            account=self.account,
            job_dir=str(job_dir),
            stdout=str(job_dir / "0.out"),
            stderr=str(job_dir / "0.err"),
        )
        return msgspec.structs.replace(spec, **changes)

    def shell(self, job: int, text: str, **changes: object) -> ProcessSpec:
        return self.spec(job, "/bin/sh", "-c", text, **changes)

    def output(self, job: int) -> str:
        path = self.job_dir(job) / "0.out"
        return path.read_text() if path.exists() else ""

    async def printed(self, job: int, lines: int) -> list[str]:
        """The job's output once it has this many lines."""
        await until(lambda: self.output(job).count("\n") >= lines, f"{lines} lines of output of job {job}")
        return self.output(job).split()

    async def run(self, launcher: Launcher, spec: ProcessSpec) -> ProcessExit:
        await start(launcher, spec)
        return await ended(launcher, spec.key)

    def memory_limit_mib(self, job: int, pid: int) -> int | None:
        """As whoever keeps it says; None: nobody keeps it here."""
        if KIND == "systemd":
            unit = f"gpuyard-{self.node}-{key(job)}.service"
            told = subprocess.run(
                ["systemctl", "show", "--value", "-p", "MemoryMax", unit], capture_output=True, text=True, check=True
            ).stdout.strip()
        else:
            group = next(line[3:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line[:3] == "0::")
            files = [Path(f"{root}{group}/memory.max") for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")]
            told = next((file.read_text().strip() for file in files if file.exists()), "")
        return int(told) // 2**20 if told.isdigit() else None

    def supervisor_log(self) -> str:
        return (self.directory / "state" / "supervisor.log").read_text()


async def start(launcher: Launcher, spec: ProcessSpec) -> Started:
    (result,) = await launcher.start([spec])
    assert isinstance(result, Started), result
    return result


async def refusal(launcher: Launcher, spec: ProcessSpec) -> Refused:
    (result,) = await launcher.start([spec])
    assert isinstance(result, Refused), result
    return result


async def ended(launcher: Launcher, wanted: AssignmentKey) -> ProcessExit:
    return (await all_ended(launcher, [wanted]))[wanted]


async def all_ended(launcher: Launcher, wanted: Iterable[AssignmentKey]) -> dict[AssignmentKey, ProcessExit]:
    """The ends of these, whichever comes first; ends of others that come in between are an error."""
    missing = set(wanted)
    found: dict[AssignmentKey, ProcessExit] = {}
    exits = launcher.exits()
    async with asyncio.timeout(DEADLINE_S):
        while missing:
            told = await anext(exits)
            assert told.key in missing, f"unexpected: {told}"
            missing.discard(told.key)
            found[told.key] = told
    return found


@asynccontextmanager
async def launch_yard() -> AsyncIterator[LaunchYard]:
    # Not pytest's own directory: other accounts may not enter it.
    directory = Path(tempfile.mkdtemp(prefix="gpuyard-test-"))
    directory.chmod(0o711)
    yard = LaunchYard(directory)
    try:
        yield yard
        if KIND == "systemd":
            await _clear_units(yard)
        else:
            await _clear(yard)
    finally:
        for pid in yard.supervisors:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)


async def _clear(yard: LaunchYard) -> None:
    """End what runs, and see that a supervisor with nothing to do ends as soon as its agent leaves."""
    last = await yard.agent()
    running = [state for state in await last.list() if state.exit is None]
    for state in running:
        await last.stop(state.key, 0)
    await until_none_runs(last)
    for launcher in yard.launchers:
        if launcher is not last:
            await launcher.close()
    await last.close()
    await until(lambda: not any(alive(pid) for pid in yard.supervisors), "the supervisor ends with its agent")


async def _clear_units(yard: LaunchYard) -> None:
    last = await yard.agent()
    for state in await last.list():
        await last.stop(state.key, 0)
    await until_none_runs(last)
    await last.forget([state.key for state in await last.list()])
    for service in yard.services:
        await service.close()


async def until_none_runs(launcher: Launcher) -> None:
    end = time.monotonic() + DEADLINE_S
    try:
        while any(state.exit is None for state in await launcher.list()):
            assert time.monotonic() < end, "processes that do not end"
            await asyncio.sleep(0.005)
    except LauncherGone as gone:
        raise AssertionError("the supervisor went away") from gone
