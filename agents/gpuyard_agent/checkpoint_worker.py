"""The process that makes the CUDA checkpoint calls, as a `CheckpointBackend`: started when needed, ended when idle.

One request at a time, each with a deadline. A worker that does not answer in time is killed and another one started
with the next request: what the driver had begun it may still finish, which the next question for a process's standing
shows. A worker that ends by itself (a driver that crashes) fails the one request it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec

import gpuyard_agent
import gpuyard_protocol
from gpuyard_agent.checkpoint import CheckpointTrouble, ProcessStanding
from gpuyard_agent.cuda_checkpoint import MODULE, Answer, Request

#: A worker begins CUDA, which wakes every card.
_BEGIN_S = 30.0
_SHORT_S = 15.0
#: Without a request for so long, the worker ends and lets go of the cards.
IDLE_S = 30.0

_ANSWER = msgspec.json.Decoder(Answer)


class CheckpointWorker:
    """`environment`: of the worker, the agent's own if left out."""

    def __init__(self, environment: Mapping[str, str] | None = None, *, idle_s: float = IDLE_S) -> None:
        self._environment = _worker_environment(os.environ if environment is None else environment)
        self._idle_s = idle_s
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def problem(self) -> str:
        if not _has_bindings():
            return "the package cuda-bindings is not installed"
        try:
            async with self._one_at_a_time:
                answer = await self._ask_worker(Request(do="problem"), _BEGIN_S)
        except CheckpointTrouble as trouble:
            return str(trouble)
        return answer.said

    async def standing(self, pid: int) -> ProcessStanding:
        answer = await self._ask(Request(do="standing", pid=pid), _SHORT_S)
        return cast("ProcessStanding", answer.said)

    async def lock(self, pid: int, timeout_ms: int) -> None:
        await self._ask(Request(do="lock", pid=pid, timeout_ms=timeout_ms), timeout_ms / 1000 + _SHORT_S)

    async def checkpoint(self, pid: int, deadline_s: float) -> None:
        await self._ask(Request(do="checkpoint", pid=pid), deadline_s)

    async def restore(self, pid: int, deadline_s: float) -> None:
        await self._ask(Request(do="restore", pid=pid), deadline_s)

    async def unlock(self, pid: int) -> None:
        await self._ask(Request(do="unlock", pid=pid), _SHORT_S)

    async def close(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._ending is not None:
            await self._ending
        await self._end_worker()

    # --- the process ---

    async def _ask(self, request: Request, deadline_s: float) -> Answer:
        async with self._one_at_a_time:
            if self._process is None:  # beginning CUDA may take longer than what is asked
                await self._ask_worker(Request(do="problem"), _BEGIN_S)
            answer = await self._ask_worker(request, deadline_s)
        if answer.trouble:
            raise CheckpointTrouble(answer.trouble)
        return answer

    async def _ask_worker(self, request: Request, deadline_s: float) -> Answer:
        what = f"{request.do} process {request.pid}" if request.pid else "begin CUDA"
        process = self._process or await self._start()
        if process.stdin is None or process.stdout is None:
            raise CheckpointTrouble(f"{what}: the worker has no pipes")
        try:
            async with asyncio.timeout(deadline_s):
                process.stdin.write(msgspec.json.encode(request) + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
            answer = _ANSWER.decode(line)
        except TimeoutError:
            await self._end_worker()
            raise CheckpointTrouble(f"{what}: no answer from the driver in {deadline_s:.0f} s") from None
        except (OSError, msgspec.DecodeError):
            await self._end_worker()
            raise CheckpointTrouble(f"{what}: the process that asks the driver ended") from None
        self._rest_later()
        return answer

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "gpuyard_agent.cuda_checkpoint"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        return self._process

    def _rest_later(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._rest)

    def _rest(self) -> None:
        if self._one_at_a_time.locked():
            self._rest_later()
        else:
            self._ending = asyncio.create_task(self._end_worker())

    async def _end_worker(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # One that hangs in the driver dies when that lets it go; nobody waits for it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.wait()


def _has_bindings() -> bool:
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:
        return False


def _worker_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The agent's, where the modules are found, and every card visible."""
    roots = [str(Path(next(iter(package.__path__))).parent) for package in (gpuyard_agent, gpuyard_protocol)]
    roots += filter(None, given.get("PYTHONPATH", "").split(os.pathsep))
    kept = {name: value for name, value in given.items() if not name.startswith("CUDA_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(roots))}
