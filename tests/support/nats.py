"""A real nats-server for tests: own directory, free port, own process group, gone at the end of the test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

START_DEADLINE_S = 10.0

OPEN_CONFIG = """
listen: "127.0.0.1:{port}"
max_payload: 8MB
jetstream {{ store_dir: "{directory}/store", max_file: 2GB, max_mem: 64MB, sync_interval: always, strict: true }}
feature_flags {{ js_ack_fc_v2: false }}
"""


def server_binary() -> str:
    """The pinned server beside this interpreter; a suite without it fails, it does not skip."""
    beside = Path(sys.executable).parent / "nats-server"
    found = os.environ.get("NATS_SERVER") or (str(beside) if beside.exists() else shutil.which("nats-server"))
    if not found:
        raise RuntimeError("no nats-server found: install the extra [daemon], or set NATS_SERVER")
    return found


class NatsProcess:
    """One server that can be killed and started again on the same port and store."""

    def __init__(self, directory: Path, config: str = OPEN_CONFIG) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        #: With the fields {port} and {directory}; may be changed before `start` or `reload`.
        self.config = config
        self.port = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def write_config(self) -> Path:
        path = self.directory / "nats.conf"
        path.write_text(self.config.format(port=self.port, directory=self.directory))
        return path

    def start(self) -> None:
        for old in self.directory.glob("*.ports"):
            old.unlink()
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [server_binary(), "-c", str(self.write_config()), "--ports_file_dir", str(self.directory)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._read_port, START_DEADLINE_S, lambda: f"nats-server did not start:\n{self.log}")
        except BaseException:
            self.kill()
            raise

    def _read_port(self) -> bool:
        for path in self.directory.glob("*.ports"):
            text = path.read_text()
            if text.endswith("}"):
                self.port = int(json.loads(text)["nats"][0].rsplit(":", 1)[1])
                return True
        return False

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, as an upgrade would end it: in a cluster it hands on what it leads first."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(START_DEADLINE_S)
            self._process = None

    def signal(self, number: int) -> None:
        os.killpg(self.pid, number)

    def reload(self) -> None:
        self.write_config()
        reloads = self.log.count("Reloaded server configuration")
        self.signal(signal.SIGHUP)
        wait_until(
            lambda: self.log.count("Reloaded server configuration") > reloads, 5.0, lambda: f"no reload:\n{self.log}"
        )


def wait_until(is_true: Callable[[], bool], deadline_s: float, complaint: Callable[[], str]) -> None:
    """Block until `is_true` (for things outside the loop, which send no event)."""
    end = time.monotonic() + deadline_s
    while not is_true():
        if time.monotonic() > end:
            raise AssertionError(complaint())
        time.sleep(0.002)


@pytest.fixture
def nats_process(tmp_path: Path) -> Iterator[NatsProcess]:
    """A running server of this test's own, without accounts."""
    server = NatsProcess(tmp_path / "nats")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsProcess]:
    """A running server for tests that only need one: names of streams and subjects must be their own."""
    server = NatsProcess(tmp_path_factory.mktemp("shared-nats"))
    server.start()
    yield server
    server.kill()
