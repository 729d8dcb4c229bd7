"""A real yard for a test: `gpuyard up` as a person would start it, in a directory and on a port of its own.

The processes are real: nats-server, daemon, agents with simulated cards, supervisors, jobs. At the end the yard is
stopped as a person would stop it, and whatever is left of it is an error of the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import gpuyard
from gpuyard_protocol.bus import Bus
from gpuyard_protocol.bus.nats import connect as connect_bus

READY_S = 60.0
STOP_S = 60.0


@dataclass
class Yard:
    """A running yard: its state directory, its `up`, and a directory that every job may write to."""

    state: Path
    scratch: Path
    up: subprocess.Popen[bytes]

    @property
    def daemon_settings(self) -> Path:
        """The daemon's configuration file: `up` writes it once, and whoever runs the yard may change it."""
        return self.state / "daemon" / "daemon.toml"

    @property
    def context(self) -> Path:
        return self.state / "context.toml"

    def connect(self) -> gpuyard.Client:
        return gpuyard.connect(self.context)

    async def tenant_bus(self) -> Bus:
        """A bare connection with the tenant's key: for what the SDK would never send."""
        context = gpuyard.load_context(self.context)
        return await connect_bus(context.url, name="test", inbox_prefix=f"_INBOX.{context.user}", seed=str(context.key))

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of this yard whose command line has every one of `words`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if str(self.state) in line and all(word in line for word in words):
                    found.append(process)
        return found

    def kill(self, *words: str) -> int:
        """kill -9 every process of this yard that answers to `words`; how many there were."""
        victims = [process for process in self.processes(*words) if process.pid not in (os.getpid(), self.up.pid)]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return len(victims)

    def cli(self, *arguments: str, stdin: bytes = b"", timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The command line tool against this yard."""
        return subprocess.run(
            [sys.executable, "-m", "gpuyard.cli", *arguments],
            env={**os.environ, "GPUYARD_CONTEXT": str(self.context), "NO_COLOR": "1"},
            input=stdin.decode(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@contextlib.contextmanager
def running_yard(
    *,
    nodes: int = 2,
    simulate: str = "4xH100-80GB",
    settings: str = "",
    flags: tuple[str, ...] = (),
    streams_at: Path | None = None,
) -> Iterator[Yard]:
    """`gpuyard up` until every node has joined; SIGTERM at the end, and nothing of it may be left.

    `settings`: of the daemon, TOML beside its `[journal]`. `flags`: more for `gpuyard up`. `streams_at`: where the NATS
    server keeps its files, for a disk of its own.

    Not below pytest's own temporary directory: every new session of pytest closes that to other accounts, and jobs run
    as one.
    """
    with tempfile.TemporaryDirectory(prefix="gpuyard-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        if streams_at is not None:
            (directory / "state").mkdir()
            (directory / "state" / "nats").symlink_to(streams_at / "nats")
            (streams_at / "nats").mkdir(mode=0o700)
        if settings:
            file = directory / "state" / "daemon" / "daemon.toml"
            file.parent.mkdir(parents=True)
            file.write_text('[journal]\nbudget = "256Mi"\n' + settings)
        with _up(directory, nodes, simulate, flags) as yard:
            yield yard


@contextlib.contextmanager
def _up(directory: Path, nodes: int, simulate: str, flags: tuple[str, ...]) -> Iterator[Yard]:
    state, scratch = directory / "state", directory / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)
    with (directory / "up.log").open("ab") as log:
        arguments = ["up", "--state", str(state), "--port", "0"]
        arguments += ["--nodes", str(nodes), "--simulate", simulate, *flags]
        command = [sys.executable, "-m", "gpuyard.cli", *arguments]
        up = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    yard = Yard(state, scratch, up)
    try:
        asyncio.run(until_ready(yard, nodes, directory / "up.log"))
        yield yard
    finally:
        up.send_signal(signal.SIGTERM)
        try:
            up.wait(STOP_S)
        except subprocess.TimeoutExpired:
            up.kill()
        left = yard.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert not left, f"processes left behind: {left}\n{(directory / 'up.log').read_text(errors='replace')[-3000:]}"


async def until_ready(yard: Yard, nodes: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and yard.up.poll() is None:
        if yard.context.exists():
            with contextlib.suppress(gpuyard.GpuyardError):
                async with yard.connect() as client:
                    if sum(node.state == "ready" for node in await client.nodes()) >= nodes:
                        return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the yard did not become ready:\n{log.read_text(errors='replace')[-4000:]}")


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, *, timeout: float = 30.0) -> None:
    """Return once `condition` holds; an error that says what was waited for otherwise."""
    deadline = time.monotonic() + timeout
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {timeout:g} s: {what}")
        await asyncio.sleep(0.05)
