"""One MPS control daemon: started for one account on one card, asked whether it serves, told to quit.

One daemon for each card, since a fault spreads over every card that a daemon's clients share; and one for each uid,
since a daemon serves one uid at a time and lets the others wait in silence. It runs as the account it serves, in a
session of its own, and outlives the agent: a restarted agent finds it by the pid file that it keeps in its pipe
directory, and asks it.

It counts as ready when it answers a question, not when its files are there: the socket stays behind after a clean end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, TypeVar

from gpuyard_agent.devices.base import DeviceTrouble
from gpuyard_agent.launch.base import Account
from gpuyard_protocol.names import DeviceUuid

_T = TypeVar("_T")

#: From its start until it must answer; the driver wakes a card that nobody used, which takes seconds.
READY_S = 20.0
#: One question to a daemon that serves.
ANSWER_S = 5.0
#: From `quit` until it is killed.
QUIT_S = 10.0
_POLL_S = 0.05
#: Unix socket addresses end at 108 bytes, and the longest name in the pipe directory is `control_privileged`.
PIPE_DIRECTORY_MAX = 85
_QUESTION = "get_default_active_thread_percentage"
_SERVER_PROGRAM = b"nvidia-cuda-mps-server"
_PID_FILE = "nvidia-cuda-mps-control.pid"


class MpsDaemon:
    """The daemon of one (card, uid), running or not."""

    def __init__(self, control: str, directory: Path, device: DeviceUuid, account: Account) -> None:
        """`control`: path of nvidia-cuda-mps-control. `directory`: of this daemon alone. `device`: a card or a MIG
        instance, by UUID."""
        self.directory = directory
        self.pipe_dir = directory / "pipe"
        self.log_dir = directory / "log"
        self._control = control
        self._device = device
        self._account = account
        #: The process if this agent started it; None if it was found.
        self._process: subprocess.Popen[bytes] | None = None
        #: Its servers when it last told of them: they must not outlive it.
        self._servers: tuple[int, ...] = ()
        if len(str(self.pipe_dir)) > PIPE_DIRECTORY_MAX:
            raise DeviceTrouble(
                f"the MPS pipe directory {self.pipe_dir} is longer than {PIPE_DIRECTORY_MAX} characters, "
                "which its Unix sockets cannot bear: choose a shorter run directory"
            )

    async def ensure(self) -> None:
        """Running and answering after this. Raises `DeviceTrouble`, and then nothing is left of it."""
        if await self.answers():
            return
        await self.quit()
        try:
            await asyncio.to_thread(self._start)
        except OSError as error:
            raise DeviceTrouble(f"cannot start {self._control}: {error.strerror} ({error.filename})") from None
        try:
            await self._wait_ready()
        except (DeviceTrouble, asyncio.CancelledError):
            await self.quit()
            raise

    async def answers(self) -> bool:
        """Whether a daemon is there and serves."""
        return self.pid() is not None and await asyncio.to_thread(self._ask, _QUESTION) is not None

    async def state(self) -> Literal["serving", "fault", "silent", "gone"]:
        """`fault`: a client of a server had a fatal fault, and the server takes nobody until all its clients are gone.
        `silent`: it does not answer in time, `gone`: there is no daemon."""
        if self.pid() is None:
            return "gone"
        servers = await self._list("get_server_list")
        if servers is None:
            return "silent"
        self._servers = servers
        if not servers:
            return "serving"
        status = await asyncio.to_thread(self._ask, "\n".join(f"get_server_status {server}" for server in servers))
        if status is None:
            return "silent"
        return "fault" if "FAULT" in status else "serving"

    async def terminate(self, pids: Collection[int]) -> int:
        """Ends the work of those that are clients, and how many were; the processes themselves stay. Takes as long as
        their work on the card does: to be called with a deadline."""
        ended = 0
        for server in await self._list("get_server_list") or ():
            for client in await self._list(f"get_client_list {server}") or ():
                if client in pids:
                    await asyncio.to_thread(self._ask, f"terminate_client {server} {client}")
                    ended += 1
        return ended

    async def _list(self, question: str) -> tuple[int, ...] | None:
        """Process ids, one a line; None: no answer."""
        answer = await asyncio.to_thread(self._ask, question)
        return tuple(int(line) for line in answer.split() if line.isdigit()) if answer is not None else None

    def pid(self) -> int | None:
        """The daemon's process, None if there is none."""
        if self._process is not None:
            return self._process.pid if self._process.poll() is None else None
        try:
            pid = int((self.pipe_dir / _PID_FILE).read_text())
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes()
            owner = os.stat(f"/proc/{pid}").st_uid
        except (OSError, ValueError):
            return None
        # The pid may be another's by now, and the file is the account's to write: the daemon is known by name and uid.
        is_ours = Path(self._control).name.encode() in cmdline and owner == self._account.uid
        return pid if is_ours else None

    async def quit(self) -> None:
        """Ends it; one that is not there is no error. Raises `DeviceTrouble` if it cannot be ended."""
        pid = self.pid()
        if pid is None:
            self._end_servers()
            return
        await asyncio.to_thread(self._ask, "quit")
        if not await _until(lambda: self.pid() != pid, QUIT_S):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if not await _until(lambda: self.pid() != pid, QUIT_S):
                raise DeviceTrouble(f"the MPS control daemon {pid} of card {self._device} cannot be ended")
        self._end_servers()
        self._process = None

    def _end_servers(self) -> None:
        """A server whose daemon is gone serves nobody and may hold the card."""
        for server in self._servers:
            with contextlib.suppress(OSError):
                if _SERVER_PROGRAM in Path(f"/proc/{server}/cmdline").read_bytes():
                    os.kill(server, signal.SIGKILL)
        self._servers = ()

    def abandon(self) -> None:
        """Let go of it without ending it: the agent ends and its jobs go on."""
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0  # or the object would warn of a child nobody waits for
        self._process = None

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not await self.answers():
            if self.pid() is None:
                raise DeviceTrouble(f"the MPS control daemon of card {self._device} ended at once{self._last_words()}")
            if time.monotonic() > deadline:
                raise DeviceTrouble(f"the MPS control daemon of card {self._device} did not answer in {READY_S:.0f} s")
            await asyncio.sleep(_POLL_S)

    def _start(self) -> None:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        for way in (self.directory.parent, self.directory.parent.parent):
            # Whatever the agent's umask: the account must come through to its sockets.
            with contextlib.suppress(PermissionError):
                way.chmod(way.stat().st_mode | 0o011)
        for directory in (self.pipe_dir.parent, self.pipe_dir, self.log_dir):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o755)
            os.chown(directory, self._account.uid, self._account.gid)
        with open(self.log_dir / "daemon.out", "ab") as output:
            self._process = subprocess.Popen(
                [self._control, "-f"],
                env=self._env(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                user=self._switch(self._account.uid),
                group=self._switch(self._account.gid),
                extra_groups=self._switch(self._account.groups),
            )

    def _switch(self, value: _T) -> _T | None:
        """For Popen: what to become, None where the account is this process's own and nothing may be switched."""
        return None if self._account.uid == os.geteuid() else value

    def _ask(self, question: str) -> str | None:
        """The daemon's answer, None if it gives none in time. Blocks: to be called in a thread."""
        try:
            answer = subprocess.run(
                [self._control],
                input=question + "\n",
                capture_output=True,
                text=True,
                env=self._env(),
                cwd="/",
                timeout=ANSWER_S,
                check=False,
                user=self._switch(self._account.uid),
                group=self._switch(self._account.gid),
                extra_groups=self._switch(self._account.groups),
            )
        except (subprocess.TimeoutExpired, OSError):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    def _env(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "CUDA_VISIBLE_DEVICES": self._device,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_dir),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log_dir),
        }

    def _last_words(self) -> str:
        try:
            lines = (self.log_dir / "daemon.out").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1]}" if lines else ""


async def _until(condition: Callable[[], bool], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(_POLL_S)
    return True
