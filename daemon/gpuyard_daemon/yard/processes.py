"""Child processes of a yard: started, restarted with growing pauses when they die, and ended in order.

Each runs in a session of its own, so that Ctrl-C in the terminal reaches the yard's conductor alone and the order of
the end stays his. Children are told apart from strangers that later got the same process number by the time they
started; what an earlier, killed conductor left behind is found by that and ended before anything new starts on the
same files.

It knows nothing of what the children do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

RESTART_PAUSE_S = 0.2
RESTART_PAUSE_MAX_S = 10.0
#: A child that lived longer is started again at once.
STEADY_S = 10.0
STOP_TIMEOUT_S = 10.0
#: A child that has never worked is given up after so many.
UNPROVEN_RESTARTS_MAX = 3
#: What `sysexits.h` calls a configuration error: starting again cannot help.
EXIT_BAD_CONFIG = 78
LAST_WORDS_BYTES = 64 * 1024
#: A log that has grown so large is put aside, in the place of the one before it; and how often that is looked at.
LOG_BYTES_MAX = 32 * 1024**2
LOG_LOOK_S = 10.0
LAST_WORDS_CHARS = 400


class ProcessMark(msgspec.Struct, frozen=True):
    """One process, and no other that gets its number later."""

    pid: int
    #: When it started, seconds since the epoch, as the kernel counts.
    started: float

    @classmethod
    def of(cls, pid: int) -> ProcessMark | None:
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def find(self) -> psutil.Process | None:
        """The process, if it still runs."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < 1.0
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


class Child:
    """One supervised process. `on_event` hears, in a sentence, of everything that is not normal."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log_file: Path,
        *,
        environment: Mapping[str, str],
        on_event: Callable[[str], None] = lambda _: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.log_file = log_file
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._on_event = on_event
        self._on_restart = on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._log_keeper: asyncio.Task[None] | None = None
        self._is_stopping = False
        #: Resolved with what to say when the child cannot be kept running.
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        #: Starts after the first.
        self.restarts = 0
        #: Size of the log when it was first started here.
        self._log_begin = 0
        #: It has worked once: from then on it is started again for as long as it takes.
        self.is_proven = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it, and keep starting it whenever it ends."""
        with contextlib.suppress(OSError):
            self._log_begin = self.log_file.stat().st_size
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"child {self.name}")
        self._log_keeper = asyncio.create_task(self._keep_log_small(), name=f"log of {self.name}")

    async def _launch(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        # What it says of others' jobs is not for the jobs beside it, which may walk through this directory.
        self.log_file.touch(0o600)
        self.log_file.chmod(0o600)
        with self.log_file.open("ab") as log:
            self._process = await self._spawn(log)

    async def _spawn(self, log: IO[bytes]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment,
            start_new_session=True,
        )

    async def _supervise(self) -> None:
        pause_s = RESTART_PAUSE_S
        while self._process is not None:
            started = time.monotonic()
            status = await self._process.wait()
            if self._is_stopping:
                return
            if status == EXIT_BAD_CONFIG:
                self._fail(f"{self.name} refuses its configuration; {self.last_words()}")
                return
            if not self.is_proven and self.restarts >= UNPROVEN_RESTARTS_MAX:
                self._fail(f"{self.name} does not stay up ({describe_status(status)}); {self.last_words()}")
                return
            is_steady = time.monotonic() - started > STEADY_S
            pause_s = RESTART_PAUSE_S if is_steady else min(pause_s * 2, RESTART_PAUSE_MAX_S)
            self._on_event(f"{self.name} ended ({describe_status(status)}); starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            self.restarts += 1
            try:
                await self._launch()
                self._on_restart()
            except OSError as error:
                self._fail(f"{self.name} cannot be started: {error}")
                return

    async def _keep_log_small(self) -> None:
        while True:
            await asyncio.sleep(LOG_LOOK_S)
            if await asyncio.to_thread(put_aside, self.log_file):
                self._log_begin = 0

    def _fail(self, text: str) -> None:
        """Told once, by whoever waits for `failed`."""
        if not self.failed.done():
            self.failed.set_result(text)

    def last_words(self) -> str:
        """The last line it wrote since it was started here, and where the others are."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(self._log_begin, self.log_file.stat().st_size - LAST_WORDS_BYTES))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            lines = []
        said = next((line.strip(" |") for line in reversed(lines) if any(map(str.isalpha, line))), "nothing")
        return f"it said last: {_told(said)[:LAST_WORDS_CHARS]} (all of it: {self.log_file})"

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, and SIGKILL of its session if that does not end it in time."""
        self._is_stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await process.wait()
            except TimeoutError:
                self._on_event(f"{self.name} did not end within {timeout_s:g} s; killed")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        for task in (self._supervisor, self._log_keeper):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._supervisor = self._log_keeper = None


def put_aside(log_file: Path) -> bool:
    """Move a log that has grown too large to `….1`; its writer goes on at the beginning of the same file."""
    try:
        if log_file.stat().st_size <= LOG_BYTES_MAX:
            return False
        # Its process has the file open, to append: what it writes in between is the price.
        before = log_file.with_name(f"{log_file.name}.1")
        before.touch(0o600)
        before.chmod(0o600)
        shutil.copyfile(log_file, before)
        os.truncate(log_file, 0)
    except OSError:
        return False
    return True


def _told(line: str) -> str:
    """A log line as a person would say it: of a structured one, what went wrong."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError:
        return line
    return str(fields.get("error") or fields.get("reason") or fields.get("why") or line)


def describe_status(status: int) -> str:
    if status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"


async def end_processes(processes: Iterable[psutil.Process], *, grace_s: float) -> int:
    """SIGTERM to each, SIGKILL to those that outlive the grace (at once without one); how many had to be killed."""
    left = list(processes)
    if grace_s:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
    deadline = time.monotonic() + grace_s
    while True:
        left = [process for process in left if is_running(process)]
        if not left or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.02)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(left)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def processes_naming(text: str, *, module: str) -> list[psutil.Process]:
    """Processes of this user that run `python -m module` and name `text` among their arguments."""
    found = []
    for process in psutil.process_iter():
        try:
            arguments = process.cmdline()
        except psutil.Error:
            continue
        if module in arguments and any(text in argument for argument in arguments) and process.pid != os.getpid():
            found.append(process)
    return found


def processes_with(variable: str, prefix: str) -> list[psutil.Process]:
    """Processes in whose environment `variable` begins with `prefix`, as far as we may look."""
    found = []
    for process in psutil.process_iter():
        try:
            value = process.environ().get(variable, "")
        except psutil.Error:
            continue
        if value.startswith(prefix):
            found.append(process)
    return found


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
