"""A fake driver per test, and the real pynvml talking to it in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pynvml
import pytest

from fake_driver.control import FakeDriver


class MakeDriver(Protocol):
    """See `FakeDriver.create`."""

    def __call__(self, model: str = "H100-80GB", count: int = 1, **settings: Any) -> FakeDriver: ...


@pytest.fixture
def make_driver(tmp_path: Path) -> Iterator[MakeDriver]:
    """Makes drivers that are gone with the test."""
    made: list[FakeDriver] = []

    def make(model: str = "H100-80GB", count: int = 1, **settings: Any) -> FakeDriver:
        made.append(FakeDriver.create(tmp_path / f"driver-{len(made)}", model, count, **settings))
        return made[-1]

    yield make
    for driver in made:
        driver.close()


@pytest.fixture
def driver(make_driver: MakeDriver) -> FakeDriver:
    """Two H100 cards."""
    return make_driver(count=2)


@pytest.fixture
def nvml(driver: FakeDriver) -> Iterator[Any]:
    """pynvml, initialised on `driver`."""
    with driver.in_process(pynvml) as module:
        module.nvmlInit()
        yield module


@pytest.fixture
def card(nvml: Any) -> Any:
    """Handle of the first card."""
    return nvml.nvmlDeviceGetHandleByIndex(0)


class Job:
    """A running fake CUDA program."""

    def __init__(self, driver: FakeDriver, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [driver.program("fake-cuda"), *arguments],
            stdout=subprocess.PIPE,
            env={"PATH": os.defpath, **environment},
            text=True,
        )
        self.pid = self.process.pid

    def line(self) -> dict[str, Any]:
        """Its next line; empty at the end of its output."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        facts: dict[str, Any] = json.loads(text) if text else {}
        return facts

    def until(self, event: str) -> dict[str, Any]:
        """Its next line of that kind."""
        while facts := self.line():
            if facts["event"] == event:
                return facts
        raise AssertionError(f"the job ended with {self.process.wait()} and never said {event!r}")

    def freeze(self) -> None:
        """SIGSTOP, and wait until every thread of it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def exit_code(self) -> int:
        """When it has ended."""
        return self.process.wait(timeout=10)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


StartJob = Callable[..., Job]


@pytest.fixture
def start_job(driver: FakeDriver) -> Iterator[StartJob]:
    """Starts fake CUDA programs on `driver` (arguments of the program; environment as keywords)."""
    jobs: list[Job] = []

    def start(*arguments: str, **environment: str) -> Job:
        jobs.append(Job(driver, *arguments, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing and can stand for anything."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def until(condition: Callable[[], object], deadline_s: float = 10) -> None:
    """Waits for another process to get there."""
    pause = threading.Event()
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        pause.wait(0.005)


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., None]:
    """`until(condition)`: waits for another process to get there."""
    return until
