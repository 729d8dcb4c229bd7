"""The state directory of a yard: who holds it, what runs from it, and how clients find it.

One conductor at a time: an exclusive lock on `up.lock`, which the kernel drops with the process, says whether a yard
runs; the text of `up.json` only says where. Whatever `up.json` names after the lock is free was left behind by a
conductor that was killed, and is ended before the next one starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import socket
import stat
from pathlib import Path

import msgspec

from gpuyard.context import Context, default_state_dir, load_context, render_context
from gpuyard.errors import NoYard
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.processes import ProcessMark
from gpuyard_protocol.names import NodeId, is_name

LOCK_FILE = "up.lock"
RUNNING_FILE = "up.json"
CONTEXT_FILE = "context.toml"


class YardTrouble(Exception):
    """The yard cannot do what was asked of it here; the text says what to do."""


class Running(msgspec.Struct, kw_only=True):
    """`up.json`: a yard that runs, or was killed."""

    #: The conductor: `gpuyard up`.
    conductor: ProcessMark
    url: str
    http: str
    #: Daemon, agents and nats-server by name, as far as they are started.
    children: dict[str, ProcessMark] = {}
    #: What `gpuyard up` said when the yard took jobs; "" until then.
    announcement: str = ""


class Home:
    """One state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    @property
    def keys_dir(self) -> Path:
        return self.path / "keys"

    @property
    def context_file(self) -> Path:
        return self.path / CONTEXT_FILE

    def agent_dir(self, node: NodeId) -> Path:
        return self.path / "agents" / node

    def is_usual(self) -> bool:
        """Where clients look when nobody says otherwise."""
        return self.path == default_state_dir()

    # -- the lock -----------------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Hold the directory until the process ends, or say who does."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Jobs of other accounts live below it: they pass through, and list nothing.
            self.path.chmod(0o711)
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise YardTrouble(
                f"cannot use {self.path}: {error.strerror or error} (another place: gpuyard up --state DIR)"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise YardTrouble(self._who_runs()) from None
        self._lock = descriptor

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_held(self) -> bool:
        """Whether a yard runs from here, by another process."""
        try:
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _who_runs(self) -> str:
        running = self.read_running()
        who = f"process {running.conductor.pid}, NATS at {running.url}" if running else "it is just starting"
        return (
            f"a yard runs from {self.path} already ({who}): use it with "
            f"`export GPUYARD_CONTEXT={self.context_file}`, or stop it with `gpuyard down --state {self.path}`"
        )

    # -- what runs ----------------------------------------------------------------------------------------------------

    def read_running(self) -> Running | None:
        try:
            return msgspec.json.decode((self.path / RUNNING_FILE).read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            return None

    def write_running(self, running: Running) -> None:
        _replace(self.path / RUNNING_FILE, msgspec.json.encode(running).decode())

    def forget_running(self) -> None:
        (self.path / RUNNING_FILE).unlink(missing_ok=True)

    # -- clients ------------------------------------------------------------------------------------------------------

    def read_context(self) -> Context | None:
        """As an earlier start left it."""
        try:
            return load_context(self.context_file)
        except NoYard:
            return None

    def write_context(self, context: Context) -> None:
        _replace(self.context_file, render_context(context))

    def write_context_for(self, account: pwd.struct_passwd, context: Context, keys: YardKeys) -> Path:
        """A context that another account may read, with a copy of its user's key and no operator's."""
        directory = self.path / "clients" / account.pw_name
        directory.mkdir(parents=True, exist_ok=True)
        directory.parent.chmod(0o711)
        seed = directory / "user.seed"
        _replace(seed, keys.user(context.tenant, context.user).read_text())
        plain = msgspec.structs.replace(context, key=seed.name, operator="", operator_key="")
        _replace(directory / CONTEXT_FILE, render_context(plain))
        directory.chmod(0o700)
        for path in (directory, seed, directory / CONTEXT_FILE):
            os.chown(path, account.pw_uid, account.pw_gid)
        return directory / CONTEXT_FILE


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, for its owner alone."""
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


# --- accounts ---------------------------------------------------------------------------------------------------------


def job_account(wanted: str) -> str:
    """Whom jobs run as: the one named; for root the sudo user, else `nobody`; anybody else: himself."""
    if os.geteuid() != 0:
        own = pwd.getpwuid(os.geteuid()).pw_name
        if wanted not in ("", own):
            raise YardTrouble(f"only root can run jobs as {wanted}: start with sudo, or without --run-as")
        return own
    name = wanted or os.environ.get("SUDO_USER", "") or "nobody"
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise YardTrouble(f"there is no account {name!r} on this machine to run jobs as (--run-as USER)") from None
    if account.pw_uid == 0:
        if wanted:
            raise YardTrouble("jobs never run as root: name another account with --run-as")
        return "nobody"
    return name


def user_name(wanted: str) -> str:
    """The yard's name of whoever started it: his login, in letters that names may have."""
    login = wanted or os.environ.get("SUDO_USER", "") or pwd.getpwuid(os.geteuid()).pw_name
    name = re.sub(r"[^a-z0-9-]+", "-", login.lower()).strip("-")[:63]
    return name if is_name(name) else "user"


def first_closed_parent(path: Path, account: str) -> Path | None:
    """The first directory on the way that `account` may not pass through; None if the way is open."""
    entry = pwd.getpwnam(account)
    if entry.pw_uid == os.geteuid():
        return None
    for part in reversed(path.parents):
        found = part.stat()
        bit = stat.S_IXUSR if found.st_uid == entry.pw_uid else stat.S_IXOTH
        if not found.st_mode & (bit | stat.S_IXOTH):
            return part
    return None


def free_port(host: str, *candidates: int) -> int:
    """The first of the candidates that is free, or any free one."""
    for port in (*candidates, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            bound: int = probe.getsockname()[1]
            return bound
    raise YardTrouble(f"no free port on {host}")


__all__ = [
    "Home",
    "Running",
    "YardTrouble",
    "first_closed_parent",
    "free_port",
    "job_account",
    "user_name",
]
