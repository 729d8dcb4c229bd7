"""Children of a yard: their logs stay within bounds."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from gpuyard_daemon.yard import processes
from gpuyard_daemon.yard.processes import Child, put_aside


def test_a_log_is_put_aside_when_it_has_grown_and_its_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES_MAX", 100)
    path = tmp_path / "daemon.log"
    with path.open("ab", buffering=0) as log:
        log.write(b"a" * 100)
        assert not put_aside(path)
        log.write(b"b")
        assert put_aside(path)
        log.write(b"c")
    assert (path.read_bytes(), (tmp_path / "daemon.log.1").read_bytes()) == (b"c", b"a" * 100 + b"b")
    assert not put_aside(tmp_path / "missing.log")


async def test_a_child_that_writes_without_end_takes_no_more_than_twice_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES_MAX", 1000)
    monkeypatch.setattr(processes, "LOG_LOOK_S", 0.01)
    log = tmp_path / "child.log"
    writer = "import time\nwhile True: print('x' * 99, flush=True); time.sleep(0.001)"
    child = Child("child", [sys.executable, "-c", writer], log, environment=dict(os.environ))
    await child.start()
    try:
        async with asyncio.timeout(20):
            while not (tmp_path / "child.log.1").exists() or not log.stat().st_size:
                await asyncio.sleep(0.01)
        assert child.pid is not None
    finally:
        await child.stop()
    assert log.stat().st_size < 100_000
