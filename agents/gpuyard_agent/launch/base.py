"""What the agent asks of whatever runs processes for it.

A `Launcher` starts replicas so that they outlive the agent, tells how each ended exactly as the kernel said it, and
keeps that knowledge until it is told to forget. Two things implement it: the supervisor process (`client`), and, where
systemd is PID 1, transient services. It knows nothing of cards, ledgers or NATS; time limits are the agent's own.

Rules that every launcher keeps:

- A key names one start, for ever: `start` of a key it knows starts nothing and answers with what it knows.
- When the main process of a replica has ended, nothing of its tree is left when the exit is told.
- An exit is told until `forget`: also to an agent that was away when it happened, possibly more than once.
- Trouble of one start is an answer (`Refused`) and touches no other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeAlias

import msgspec

from gpuyard_protocol.names import AssignmentKey


class LauncherGone(Exception):
    """The launcher cannot be reached, or was cut off during a request: whether that was carried out is not known.
    `open` again and look with `list`; asking again for the same key is safe."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """A Unix account that replicas run as, resolved on this node."""

    name: str
    uid: int
    gid: int
    #: Supplementary groups.
    groups: tuple[int, ...] = ()
    home: str = "/"
    shell: str = "/bin/sh"


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one replica may use. A launcher keeps those that its host can keep (`limits.py` says which); none of them is
    the reason for a refusal. 0: none."""

    #: More than this and the kernel kills it.
    memory_mib: int = 0
    #: CPU time for each second, 1000 for one whole CPU.
    cpu_milli: int = 0
    #: Processes and threads at once.
    tasks: int = 0
    #: A backstop for the case that the agent is not there to keep the job's time limit: well above it.
    run_max_ms: int = 0
    #: Device files that it may open besides null, zero, full, random, urandom, tty and ptys; None: all that the
    #: account may.
    devices: tuple[str, ...] | None = None


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One replica's process, complete: nothing is inherited from the launcher or the agent."""

    key: AssignmentKey
    #: The command, or, with `script`, the arguments given to it.
    argv: tuple[str, ...] = ()
    #: Goes before the whole command, the script's interpreter included: a container engine's command line.
    wrapper: tuple[str, ...] = ()
    #: Text of a script, written to `<job_dir>/script` and started by its `#!` line, or by /bin/sh without one.
    script: str = ""
    #: The whole environment. The supervisor adds GPUYARD_LAUNCH, by which it finds strays.
    env: dict[str, str]
    #: "" means `job_dir`. Must exist and be open to the account.
    cwd: str = ""
    account: Account
    #: The replica's own directory: made if missing, 0750, owned by the account; missing parents 0711.
    job_dir: str
    #: Files for output, appended to; made if missing, 0640, owned by the account.
    stdout: str
    stderr: str
    umask: int = 0o027
    limits: Limits = Limits()
    #: It is ended, with this grace, once `renewed_ms` (of the clock that counts from boot and while the host sleeps) or
    #: a later `renew` is so long ago, whether the agent is there or not; 0: never.
    lease_ms: int = 0
    lease_grace_ms: int = 0
    renewed_ms: int = 0


class Started(msgspec.Struct, frozen=True, tag="started", kw_only=True, omit_defaults=True):
    """The process runs (or ran: a start that is asked again of a replica that has ended answers so too)."""

    key: AssignmentKey
    pid: int
    #: Clock ticks between boot and the start of `pid`: with the pid, a name that is never used twice.
    start_time: int
    #: Wall time.
    at_ms: int


class Refused(msgspec.Struct, frozen=True, tag="refused", kw_only=True, omit_defaults=True):
    """Nothing was started. `code`: `WorkingDirectoryMissing`, `CommandNotFound`, `PermissionDenied`, `StartFailed` (the
    command cannot be passed on); `AccountMissing`, `OutputUnavailable`, `LauncherFailed` (the host's fault)."""

    key: AssignmentKey
    code: str
    detail: str


StartResult: TypeAlias = Started | Refused


class ProcessExit(msgspec.Struct, frozen=True, tag="exited", kw_only=True, omit_defaults=True):
    """The replica's main process has ended, and all of its tree with it."""

    key: AssignmentKey
    #: Status of a normal end; 0 with `signal` or `lost` set.
    exit_code: int = 0
    #: The signal that ended it, 0 for none.
    signal: int = 0
    #: Nobody saw how it ended (a restart of the node, or the launcher was killed); then `detail` says why.
    lost: bool = False
    #: A `stop` had been asked before it ended.
    stopped: bool = False
    started_ms: int = 0
    at_ms: int = 0
    detail: str = ""
    #: Its lease had run out.
    expired: bool = False


class ProcessState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the launcher knows of one key: running while `exit` is None."""

    key: AssignmentKey
    pid: int
    start_time: int
    at_ms: int
    #: A stop is under way.
    stopping: bool = False
    exit: ProcessExit | None = None


class Launcher(Protocol):
    """Runs processes for the agent."""

    async def open(self) -> tuple[ProcessState, ...]:
        """Connect (starting what is needed) and tell everything known. To be called again after `LauncherGone`."""
        ...

    async def close(self) -> None:
        """Disconnect. Every process goes on."""
        ...

    async def start(self, specs: Sequence[ProcessSpec]) -> tuple[StartResult, ...]:
        """Start all of these, answers in their order. Raises `LauncherGone`."""
        ...

    async def stop(self, key: AssignmentKey, grace_ms: int) -> None:
        """SIGTERM to the group; after the grace SIGKILL to the whole tree. Returns once the request is taken; the end
        is told as an exit. A later stop with a shorter grace shortens it; unknown and ended keys are no error."""
        ...

    async def freeze(self, keys: Sequence[AssignmentKey], *, frozen: bool) -> None:
        """Halt the whole trees of these, or let them go on. Unknown and ended keys are no error; asked again, it
        changes nothing. A frozen replica is still killed by a stop, and thawed for its grace. When nobody is there to
        thaw it (the agent is gone), the supervisor does, and under systemd the next `open`."""
        ...

    async def limit_memory(self, key: AssignmentKey, memory_mib: int) -> None:
        """From now on it may use so much memory; nothing happens where the host keeps no such limit, or it was started
        without one. Unknown and ended keys are no error."""
        ...

    async def renew(self, renewed_ms: int) -> None:
        """Leases count from this time on, those that count from a later one excepted."""
        ...

    async def list(self) -> tuple[ProcessState, ...]:
        """Everything known and not forgotten. Raises `LauncherGone`."""
        ...

    def exits(self) -> AsyncIterator[ProcessExit]:
        """Every exit not forgotten, as it happens; those found by `open` first. Each key once per `Launcher` object.
        Ends with `LauncherGone` when the connection is lost: `open` again and go on iterating. One consumer."""
        ...

    async def forget(self, keys: Sequence[AssignmentKey]) -> None:
        """These exits are durable elsewhere. A key that still runs is refused silently: it stays known."""
        ...
