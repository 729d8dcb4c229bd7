"""A real daemon process on a real nats-server, and a tenant's way of talking to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.jobs import SubmissionAnswer
from gpuyard_protocol.queries import QueryError, SubmissionQuery, SubmissionStatus
from gpuyard_protocol.subjects import query, submission
from support.nats import wait_until

T = TypeVar("T")

DEADLINE_S = 20.0
#: Snapshots often, so that they are in the way of whatever a test does to the daemon.
SETTINGS = """
[journal]
budget = "256Mi"
snapshot_records = 40
"""


class DaemonProcess:
    """One state directory; the process can be killed and started again."""

    def __init__(self, directory: Path, url: str, *, settings: str = "", authenticate: bool = False) -> None:
        self.directory = directory
        self.state = directory / "state"
        self._url = url
        self._authenticate = authenticate
        self.http = "127.0.0.1:0"
        self._process: subprocess.Popen[bytes] | None = None
        #: Module that is started, and its first arguments.
        self.entry: tuple[str, ...] = ("gpuyard_daemon",)
        self.environment: dict[str, str] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self._config = directory / "daemon.toml"
        self._config.write_text(settings or SETTINGS)

    def start(self) -> None:
        """Start and wait until it is ready; one that does not come so far is ended, since its test never begins."""
        self._start(self._is_ready, "is not ready")

    def _start(self, is_so_far: Callable[[], bool], lacking: str) -> None:
        (self.state / "daemon" / "http.url").unlink(missing_ok=True)
        self.spawn()
        try:
            wait_until(is_so_far, DEADLINE_S, lambda: f"the daemon {lacking}:\n{self.log}")
        except BaseException:
            self.kill()
            raise

    def spawn(self) -> None:
        arguments = ["--config", str(self._config), "--state", str(self.state), "--nats", self._url]
        arguments += ["--http", self.http]
        arguments += [] if self._authenticate else ["--no-authentication"]
        with (self.directory / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.entry, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # For entries that are tests' own.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    **self.environment,
                },
            )

    def start_standby(self) -> None:
        """Start and wait until it stands by and is up to date."""
        self._start(self._stands_by, "does not stand by")

    def _stands_by(self) -> bool:
        self._must_run()
        return (self.state / "daemon" / "http.url").exists() and "standby.up-to-date" in self.log

    def _must_run(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self._process.returncode}:\n{self.log}")
        time.sleep(0.02)

    def wait_ready(self) -> None:
        """Wait until it leads."""
        wait_until(self._is_ready, DEADLINE_S, lambda: f"the daemon is not ready:\n{self.log}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _is_ready(self) -> bool:
        self._must_run()
        return (self.state / "daemon" / "http.url").exists() and self.get("/readyz")[0] == 200

    @property
    def log(self) -> str:
        return (self.directory / "daemon.log").read_text(errors="replace")

    def get(self, path: str) -> tuple[int, str]:
        url = (self.state / "daemon" / "http.url").read_text().strip()
        try:
            with urllib.request.urlopen(url + path, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metric(self, name: str) -> float:
        """One sample of `/metrics`, by its name and labels as printed."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        assert self._process is not None
        code = self._process.wait(DEADLINE_S)
        self._process = None
        return code


class Tenant:
    """Submits and asks as `acme.alice`."""

    def __init__(self, bus: Bus, tenant: str = "acme", user: str = "alice") -> None:
        self.bus = bus
        self._tenant, self._user = tenant, user

    async def submit(self, payload: object, verb: str = "submit") -> str:
        """Durable once it returns; the submission's id."""
        data = payload if isinstance(payload, bytes) else encode(payload)
        ack = await self.bus.stream_publish(submission(self._tenant, self._user, verb), data)
        if isinstance(payload, dict) and payload.get("submission_id"):
            return str(payload["submission_id"])
        return f"s{ack.sequence}"

    async def answer(self, submission_id: str) -> SubmissionAnswer:
        """Wait until the submission is decided."""

        async def decided() -> SubmissionAnswer | None:
            status = await self.ask("submission", SubmissionQuery(submission_id=submission_id), SubmissionStatus)
            return status.answer

        return await until(decided, f"an answer to {submission_id}")

    async def ask(self, verb: str, question: object, kind: type[T]) -> T:
        reply = await self.bus.request(query(self._tenant, self._user, verb), encode(question))
        return decode(kind, reply.data, max_bytes=2**24)

    async def error(self, verb: str, payload: bytes) -> QueryError:
        reply = await self.bus.request(query(self._tenant, self._user, verb), payload)
        assert "code" in json.loads(reply.data), reply.data
        return decode(QueryError, reply.data)


async def until(probe: Callable[[], Awaitable[T | None]], what: str, deadline_s: float = DEADLINE_S) -> T:
    """What `probe` returns once it is neither None nor False; the daemon being away in between is no failure."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            found = await probe()
        except BusError:
            found = None
        if found:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"no {what} within {deadline_s:g} s")
