"""`SupervisorLauncher`: the supervisor process as a `Launcher`.

Connects to the node's supervisor and starts one where none listens, detached so that neither the agent's end nor a
Ctrl-C at its terminal reaches it. A broken connection fails whatever waits on it with `LauncherGone`; nothing is
repeated behind the caller's back, since only the caller's ledger knows what was meant. The supervisor's own answers
make repeating safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import gpuyard_agent
import gpuyard_protocol
from gpuyard_agent.launch.base import LauncherGone, ProcessExit, ProcessSpec, ProcessState, StartResult
from gpuyard_agent.launch.messages import (
    BadFrame,
    Exits,
    Forget,
    FrameBuffer,
    FreezeMany,
    Leave,
    LimitMemory,
    ListAll,
    Listing,
    Renew,
    Request,
    Results,
    StartMany,
    StopOne,
    decode_answer,
    encode_frame,
)
from gpuyard_agent.launch.supervisor import ALREADY_RUNS, socket_address
from gpuyard_protocol.names import AssignmentKey

_T = TypeVar("_T")

#: From the first try to connect until `open` gives up: a supervisor's start, and the end of one that is just leaving.
_OPEN_S = 20.0
_RETRY_S = 0.02
_READ_BYTES = 1024 * 1024


class SupervisorLauncher:
    """Launches through the supervisor process of one node."""

    def __init__(self, socket_path: Path, state_dir: Path, log_path: Path | None = None) -> None:
        """`state_dir`: the supervisor's records. `log_path`: its output; `<state_dir>/supervisor.log` if left out."""
        self._socket_path = socket_path
        self._state_dir = state_dir
        self._log_path = log_path or state_dir / "supervisor.log"
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        #: Answers awaited.
        self._starting: dict[AssignmentKey, asyncio.Future[StartResult]] = {}
        self._listing: asyncio.Future[Listing] | None = None
        self._list_lock = asyncio.Lock()
        #: Exits for `exits`, and the keys of all that were put there and are not forgotten.
        self._exits: deque[ProcessExit] = deque()
        self._told: set[AssignmentKey] = set()
        #: Set when there is something new for `exits`, the connection's end included.
        self._news = asyncio.Event()
        #: The supervisor's process, 0 before the first `open`.
        self.supervisor_pid = 0

    async def open(self) -> tuple[ProcessState, ...]:
        deadline = asyncio.get_running_loop().time() + _OPEN_S
        while True:
            await self._disconnect()
            reader, self._writer = await self._connect(deadline)
            self._reading = asyncio.create_task(self._read(reader), name="supervisor-reader")
            try:
                return await self.list()
            except LauncherGone:
                # It was just ending, or being killed: its socket takes connections to the last.
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        """Disconnect. With nothing running the supervisor ends too; otherwise it and all processes go on."""
        if self._writer is not None:
            with contextlib.suppress(LauncherGone):
                await self._send(Leave())
        await self._disconnect()

    async def start(self, specs: Sequence[ProcessSpec]) -> tuple[StartResult, ...]:
        loop = asyncio.get_running_loop()
        new = [spec for spec in specs if spec.key not in self._starting]
        for spec in new:
            self._starting[spec.key] = loop.create_future()
        waiting = [self._starting[spec.key] for spec in specs]
        await self._send(StartMany(tuple(new)))
        # Not gather: a caller that gives up must not cancel what another waits for too.
        return tuple([await asyncio.shield(future) for future in waiting])

    async def stop(self, key: AssignmentKey, grace_ms: int) -> None:
        await self._send(StopOne(key, grace_ms))

    async def freeze(self, keys: Sequence[AssignmentKey], *, frozen: bool) -> None:
        if keys:
            await self._send(FreezeMany(tuple(keys), frozen))

    async def limit_memory(self, key: AssignmentKey, memory_mib: int) -> None:
        await self._send(LimitMemory(key, memory_mib))

    async def renew(self, renewed_ms: int) -> None:
        await self._send(Renew(renewed_ms))

    async def list(self) -> tuple[ProcessState, ...]:
        async with self._list_lock:
            self._listing = asyncio.get_running_loop().create_future()
            await self._send(ListAll())
            listing = await self._listing
        self.supervisor_pid = listing.pid
        self._tell(state.exit for state in listing.states if state.exit is not None)
        return listing.states

    async def exits(self) -> AsyncIterator[ProcessExit]:
        while True:
            while self._exits:
                yield self._exits.popleft()
            if self._writer is None:
                raise LauncherGone("the connection to the supervisor is lost")
            self._news.clear()
            await self._news.wait()

    async def forget(self, keys: Sequence[AssignmentKey]) -> None:
        await self._send(Forget(tuple(keys)))
        self._told.difference_update(keys)

    # --- connection ---

    async def _connect(self, deadline: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            try:
                with socket_address(self._socket_path) as address:
                    return await asyncio.open_unix_connection(address)
            except (FileNotFoundError, ConnectionRefusedError):
                await self._start_supervisor()
            if asyncio.get_running_loop().time() > deadline:
                raise LauncherGone(f"no supervisor answers at {self._socket_path} within {_OPEN_S:.0f} s")
            await asyncio.sleep(_RETRY_S)

    async def _start_supervisor(self) -> None:
        self._state_dir.mkdir(parents=True, exist_ok=True)
        with await asyncio.to_thread(open, self._log_path, "ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "gpuyard_agent.launch.supervisor", "--detach"),
                *("--socket", str(self._socket_path), "--state", str(self._state_dir)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
            status = await process.wait()
        # Another may hold the lock and not listen yet, or not any more: try again.
        if status not in (0, ALREADY_RUNS):
            raise LauncherGone(f"the supervisor ended at its start with {status}: see {self._log_path}")

    async def _send(self, request: Request) -> None:
        writer = self._writer
        if writer is None:
            self._fail_waiting()
            raise LauncherGone("not connected to the supervisor")
        try:
            writer.write(encode_frame(request))
            await writer.drain()
        except OSError as error:
            self._lose(writer)
            raise LauncherGone(f"the connection to the supervisor broke: {error}") from None

    async def _read(self, reader: asyncio.StreamReader) -> None:
        writer = self._writer
        frames = FrameBuffer()
        try:
            while data := await reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    self._take(body)
        except (OSError, BadFrame):
            pass  # the same as its end: whoever waits is told below
        finally:
            if writer is not None:
                self._lose(writer)

    def _take(self, body: bytes) -> None:
        answer = decode_answer(body)
        match answer:
            case Results(results=results):
                for result in results:
                    future = self._starting.pop(result.key, None)
                    if future is not None and not future.done():
                        future.set_result(result)
            case Listing():
                if self._listing is not None and not self._listing.done():
                    self._listing.set_result(answer)
            case Exits(exits=exits):
                self._tell(exits)

    def _tell(self, exits: Iterable[ProcessExit]) -> None:
        for one in exits:
            if one.key not in self._told:
                self._told.add(one.key)
                self._exits.append(one)
        self._news.set()

    def _lose(self, writer: asyncio.StreamWriter) -> None:
        writer.close()
        if self._writer is writer:
            self._writer = None
            self._fail_waiting()
            self._news.set()

    def _fail_waiting(self) -> None:
        for future in self._starting.values():
            _fail(future)
        if self._listing is not None:
            _fail(self._listing)
        self._starting.clear()
        self._listing = None

    async def _disconnect(self) -> None:
        writer, reading = self._writer, self._reading
        self._reading = None
        if writer is not None:
            self._lose(writer)
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if reading is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


def _fail(future: asyncio.Future[_T]) -> None:
    if not future.done():
        future.set_exception(LauncherGone("the connection to the supervisor is lost"))
        future.exception()  # fetched: nobody may be waiting any more


def _environment() -> dict[str, str]:
    """Where the supervisor finds its modules, and no more: jobs get nothing of it anyway."""
    roots = [str(Path(next(iter(package.__path__))).parent) for package in (gpuyard_agent, gpuyard_protocol)]
    roots += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
    return {**inherited, "PYTHONPATH": os.pathsep.join(dict.fromkeys(roots)), "PYTHONUTF8": "1"}
