"""A machine of its own with a real systemd as PID 1, in a container: booted in half a second, gone afterwards.

`/usr` is the host's, read-only; `/etc` is staged, `/var` and `/tmp` are empty. This installation of gpuyard is found
inside under /opt/gpuyard, as the units expect it. The machine has a network of its own with nothing but a loopback.

Needs root, systemd-nspawn and a cgroup version 2 hierarchy. Where one is missing, a test that asks for a machine fails:
what it shows is shown nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2]
SOURCE_INSIDE = "/opt/source"
PREFIX = "/opt/gpuyard"
PYTHON = f"{PREFIX}/bin/python"
BOOT_S = 60.0
OFF_S = 30.0
_SIGRTMIN = int(signal.SIGRTMIN)


def _hierarchies() -> list[Path]:
    """Where a group has to be made: version 2, and systemd's own of version 1 where the host has both."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(Path(folder))
    return found


def missing() -> str:
    """What this host lacks for a machine, "" for nothing."""
    if os.geteuid() != 0:
        return "root"
    if shutil.which("systemd-nspawn") is None:
        return "systemd-nspawn (Debian package systemd-container)"
    if not any((folder / "cgroup.procs").exists() for folder in _hierarchies()):
        return "a cgroup version 2 hierarchy"
    return ""


class Machine:
    """One container. `start` boots it; `off`, `crash` and leaving the context end it."""

    def __init__(self, stage: Path, *, nesting: bool = False) -> None:
        """`nesting`: containers can be run inside; for that nothing of its /proc is covered, so root there can more."""
        self.stage = stage
        self._nesting = nesting
        self.name = f"gy{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._process: subprocess.Popen[bytes] | None = None
        #: The container's PID 1, as the host numbers it.
        self.leader = 0
        for folder in ("etc", "state", "opt"):
            (stage / folder).mkdir(parents=True)
        self._stage_etc()
        self._stage_programs()

    @property
    def etc(self) -> Path:
        """The machine's /etc."""
        return self.stage / "etc"

    @property
    def state(self) -> Path:
        """The machine's /var/lib/gpuyard: it survives a crash."""
        return self.stage / "state"

    # --- what is inside ---

    def _stage_etc(self) -> None:
        etc = self.etc
        # With an id of its own this is no first boot, which would start everything that the host has installed.
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "ld.so.conf").write_text("/opt/python/lib\n")
        (etc / "systemd" / "system").mkdir(parents=True)
        for folder in ("sysusers.d", "tmpfiles.d", "gpuyard"):
            (etc / folder).mkdir()

    def _stage_programs(self) -> None:
        """An environment that works wherever it is mounted, unlike a copied one, which holds its build's paths."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        base = self._base_inside()
        programs, packages = self.stage / "opt" / "bin", self.stage / "opt" / "lib" / version / "site-packages"
        programs.mkdir(parents=True)
        packages.mkdir(parents=True)
        (programs / "python").symlink_to(f"{base}/bin/{version}")
        (self.stage / "opt" / "pyvenv.cfg").write_text(f"home = {base}/bin\ninclude-system-site-packages = false\n")
        roots = ["protocol", "client", "daemon", "agents", "tests", "."]
        paths = [*(f"{SOURCE_INSIDE}/{root}" for root in roots), "/opt/site"]
        (packages / "machine.pth").write_text("\n".join(paths) + "\n")
        components = {"gpuyard-daemon": "gpuyard_daemon.__main__", "gpuyard-agent": "gpuyard_agent.__main__"}
        for name, module in {"gpuyard": "gpuyard.cli", **components}.items():
            program = programs / name
            program.write_text(f"#!{PYTHON}\nfrom {module} import main\nmain()\n")
            program.chmod(0o755)
        server = Path(sys.executable).parent / "nats-server"
        shutil.copy(os.environ.get("NATS_SERVER") or server, programs / "nats-server")

    def _base_inside(self) -> str:
        return "/usr" if sys.base_prefix == "/usr" else "/opt/python"

    def install_units(self) -> None:
        """Everything in systemd/, as docs/install.md says."""
        units = SOURCE / "systemd"
        for unit in (*units.glob("*.service"), *units.glob("*.slice")):
            shutil.copy(unit, self.etc / "systemd" / "system")
        for folder in ("sysusers.d", "tmpfiles.d"):
            shutil.copytree(units / folder, self.etc / folder, dirs_exist_ok=True)
        for config in units.glob("*.toml"):
            shutil.copy(config, self.etc / "gpuyard")

    # --- life ---

    def start(self) -> None:
        for folder in self._groups():
            folder.mkdir(exist_ok=True)
        binds = [
            f"--bind={self.etc}:/etc",
            f"--bind={self.state}:/var/lib/gpuyard",
            f"--bind-ro={self.stage / 'opt'}:{PREFIX}",
            f"--bind-ro={Path(pytest_site())}:/opt/site",
            f"--bind-ro={SOURCE}:{SOURCE_INSIDE}",
        ]
        if self._base_inside() != "/usr":
            binds.append(f"--bind-ro={sys.base_prefix}:/opt/python")
        entering = "; ".join(f"echo $$ > {folder}/cgroup.procs" for folder in self._groups())
        command = [
            *("sh", "-c", f'{entering}; exec "$@"', "machine"),
            # This process's end, however it comes, shuts the machine down.
            *("setpriv", "--pdeathsig", "TERM", "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes"),
            *("--register=no", "--keep-unit", "--console=pipe", "--notify-ready=yes", "--link-journal=no"),
            *(
                f"--system-call-filter=bpf{' @keyring' if self._nesting else ''}",
                "--private-network",
                f"--machine={self.name}",
                f"--hostname={self.name}",
            ),
            *binds,
            "--boot",
        ]
        with _notify_socket() as (listener, path), (self.stage / "console").open("ab") as console:
            environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "NOTIFY_SOCKET": path}
            if self._nesting:
                environment["SYSTEMD_NSPAWN_API_VFS_WRITABLE"] = "1"
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment
            )
            self._wait_until_ready(listener)
        if self._base_inside() != "/usr":
            self.run("ldconfig")

    def _wait_until_ready(self, listener: socket.socket) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and process.poll() is None:
            if not select.select([listener], [], [], 0.2)[0]:
                continue
            for line in listener.recv(65536).decode(errors="replace").splitlines():
                name, _, value = line.partition("=")
                if name == "X_NSPAWN_LEADER_PID":
                    self.leader = int(value)
                if line == "READY=1":
                    return
        raise AssertionError(
            f"the machine did not boot: {(self.stage / 'console').read_text(errors='replace')[-3000:]}"
        )

    def _groups(self) -> list[Path]:
        """Its own: otherwise all machines share one tree, and freezing one would freeze the others."""
        return [folder / self.name for folder in _hierarchies()]

    def off(self) -> None:
        """An orderly shutdown."""
        assert self._process is not None
        os.kill(self.leader, _SIGRTMIN + 4)
        self._process.wait(timeout=OFF_S)
        self._sweep()

    def crash(self) -> None:
        """As by a power failure."""
        if self._process is not None and self._process.poll() is None:
            if self.leader:
                # Never nspawn itself: the machine would live on without it.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.leader, signal.SIGKILL)
            else:
                self._process.terminate()
            self._process.wait(timeout=OFF_S)
        self._sweep()

    def _sweep(self) -> None:
        self.leader = 0
        deadline = time.monotonic() + 5
        for group in self._groups():
            while group.exists() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    (group / "cgroup.kill").write_text("1")
                for folder, _, _ in os.walk(group, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)
                if group.exists():
                    time.sleep(0.02)
        with contextlib.suppress(OSError):
            os.rmdir(f"/run/systemd/nspawn/propagate/{self.name}")

    # --- doing things inside ---

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
        shows_errors: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """As root, inside all of its namespaces but outside its control groups; `shows_errors`: as they are written."""
        settings = {"PATH": f"{PREFIX}/bin:/usr/sbin:/usr/bin", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        done = subprocess.run(
            ["nsenter", "--target", str(self.leader), "--all", "env", "--chdir=/", *command],
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if shows_errors else subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout[-6000:]}{(done.stderr or '')[-6000:]}"
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{said}")
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", "--no-pager", *arguments, check=check).stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def journal(self, unit: str = "") -> str:
        chosen = ["-u", unit] if unit else []
        return self.run("journalctl", "--no-pager", "-o", "cat", *chosen, check=False).stdout


def pytest_site() -> str:
    """Where the packages of this environment lie."""
    import pytest

    return str(Path(pytest.__file__).parents[1])


@contextlib.contextmanager
def _notify_socket() -> Iterator[tuple[socket.socket, str]]:
    with tempfile.TemporaryDirectory(prefix="gpuyard-notify-") as folder:
        path = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(path)
            yield listener, path


@contextlib.contextmanager
def machine(*, nesting: bool = False) -> Iterator[Machine]:
    """A machine that is staged and not booted."""
    lacking = missing()
    if lacking:
        raise RuntimeError(f"tests with a real systemd need {lacking}; they are not skipped: nothing replaces them")
    # Short, and not pytest's own directory: other accounts pass through it.
    stage = Path(tempfile.mkdtemp(prefix="gpuyard-machine-"))
    stage.chmod(0o755)
    made = Machine(stage, nesting=nesting)
    try:
        yield made
    finally:
        made.crash()
        shutil.rmtree(stage, ignore_errors=True)
