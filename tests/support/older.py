"""This project as it was: an earlier commit's source, run in processes of its own beside today's.

The sources come from git's history. Where that is not at hand (a shallow clone, a tarball), there is nothing to run.
What they import from others is what is installed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import gpuyard
from support.yard import Yard, eventually, until_ready

_REPOSITORY = Path(__file__).parents[2]
_ROOTS = ("protocol", "client", "daemon", "agents")
STOP_S = 60.0


@dataclass(frozen=True)
class Version:
    """`source`: where it lies; None: today's, as the tests import it."""

    source: Path | None = None

    def environment(self) -> dict[str, str]:
        roots = [str(self.source / root) for root in _ROOTS] if self.source else [path for path in sys.path if path]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}

    def command(self, module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments]

    def cli(self, *arguments: str, **settings: str) -> str:
        done = subprocess.run(
            self.command("gpuyard.cli", *arguments),
            env={**self.environment(), "NO_COLOR": "1", **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout


TODAY = Version()


def older(commit: str, directory: Path) -> Version:
    """What the project was at `commit`; skips the test where history does not have it."""
    found = subprocess.run(
        ["git", "-C", str(_REPOSITORY), "archive", commit, *_ROOTS], capture_output=True, check=False, timeout=60
    )
    if found.returncode != 0:
        said = found.stderr.decode(errors="replace").strip()
        # The one condition on which a test of this project is skipped: nothing here can make history up.
        pytest.skip(f"commit {commit} is not in this copy's history, so no older version can be run: {said}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(directory, filter="data")
    version = Version(directory)
    where = "import gpuyard_agent, gpuyard_daemon; print(gpuyard_agent.__file__, gpuyard_daemon.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", where], env=version.environment(), capture_output=True, text=True, check=True
    )
    assert shown.stdout.count(str(directory)) == 2, f"not the older one would run: {shown.stdout}"
    return version


@contextlib.contextmanager
def yard_of(version: Version, directory: Path, *, nodes: int = 1, dies: bool = False) -> Iterator[Yard]:
    """`gpuyard up` of this version on what is in `directory`, with two simulated cards on each node.

    `dies`: at the end everything of the yard is killed at once but for the jobs and who watches over them; else it is
    stopped as a person would stop it, and nothing may be left.
    """
    state, scratch, log_file = directory / "state", directory / "scratch", directory / "up.log"
    scratch.mkdir(exist_ok=True)
    scratch.chmod(0o777)
    arguments = ("up", "--state", str(state), "--port", "0", "--nodes", str(nodes), "--simulate", "2xH100-80GB")
    with log_file.open("ab") as log:
        command = version.command("gpuyard.cli", *arguments)
        up = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=version.environment())
    yard = Yard(state, scratch, up)
    try:
        asyncio.run(until_ready(yard, nodes, log_file))
        yield yard
    except BaseException:
        _strike(yard)
        _clear(yard)
        raise
    if dies:
        _strike(yard)
    else:
        _stop(yard)


def _strike(yard: Yard) -> None:
    yard.up.kill()  # the first: it would start the others again
    yard.up.wait()
    for words in ("gpuyard_agent ", "gpuyard_daemon ", "nats-server"):
        victims = yard.processes(words)
        for victim in victims:
            victim.kill()
        psutil.wait_procs(victims, timeout=10)


def _stop(yard: Yard) -> None:
    yard.up.send_signal(signal.SIGTERM)
    try:
        yard.up.wait(STOP_S)
    except subprocess.TimeoutExpired:
        yard.up.kill()
        yard.up.wait()
    left = _clear(yard)
    log = (yard.state.parent / "up.log").read_text(errors="replace")
    assert not left, f"processes left behind: {left}\n{log[-3000:]}"


def _clear(yard: Yard) -> list[psutil.Process]:
    """Kill what is left; returns that."""
    left = yard.processes()
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return left


@contextlib.contextmanager
def standby_of(version: Version, yard: Yard) -> Iterator[psutil.Process]:
    """A daemon of this version that stands by for the yard's own; yields the one that leads."""
    (leader,) = yard.processes("gpuyard_daemon ")
    arguments = leader.cmdline()[3:]
    arguments[arguments.index("--http") + 1] = "127.0.0.1:0"
    log_file = yard.state / "standby" / "daemon.log"
    log_file.parent.mkdir()
    command = version.command("gpuyard_daemon", *arguments, "--daemon-dir", str(log_file.parent))
    with log_file.open("ab") as log:
        standby = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=version.environment())
    try:

        async def is_up_to_date() -> bool:
            assert standby.poll() is None, log_file.read_text()[-3000:]
            return "standby.up-to-date" in log_file.read_text()

        asyncio.run(eventually(is_up_to_date, "it stands by"))
        yield leader
        assert standby.poll() is None, log_file.read_text()[-3000:]
    finally:
        standby.terminate()
        standby.wait(STOP_S)


@contextlib.contextmanager
def joined_agent(version: Version, yard: Yard, head: Version, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """An agent of this version, on a host of its own as far as the yard can see: it joined with a token.

    `head`: the version of the yard that lets it in."""
    config = yard.state / "joined" / name / "agent.toml"
    log_file = config.with_name("agent.log")
    token = head.cli("node", "token", name, "--state", str(yard.state)).strip()
    places = ("--state", str(yard.state / "agents" / name), "--config", str(config))
    version.cli("node", "join", "--token", token, *places, "--url", gpuyard.load_context(yard.context).url)
    command = version.command("gpuyard_agent", "--config", str(config), "--simulate", "2xH100-80GB")
    if os.geteuid() == 0:
        command += ["--run-as", "nobody"]
    with log_file.open("ab") as log:
        agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=version.environment())
    try:

        async def is_there() -> bool:
            assert agent.poll() is None, log_file.read_text()[-3000:]
            async with yard.connect() as client:
                return any(view.node == name and view.state == "ready" for view in await client.nodes())

        asyncio.run(eventually(is_there, f"{name} is ready"))
        yield agent
    finally:
        agent.terminate()
        agent.wait(STOP_S)
        for process in yard.processes(f"agents/{name}"):
            process.kill()
