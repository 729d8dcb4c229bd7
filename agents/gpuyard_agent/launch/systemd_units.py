"""A replica as a transient service, and a transient service as a replica: both directions, without a bus.

Which properties a unit gets, and why:

- `Type=exec`: the start has failed when the program could not be executed, not later.
- `RemainAfterExit`: a success would otherwise be forgotten at once, and an agent that was away would never know of it.
- the command as `ExecStartEx` with `no-env-expand`: `$` in arguments stays what it is.
- output as open files, not by name: they lie in a directory that the account may write to, and systemd, which is root,
  would follow a link that the account put there.
- `UnsetEnvironment`: systemd adds variables of its own; a replica has those it was given and no others.
- `DevicePolicy=closed` with the files of its cards, where the caller names some: the kernel then refuses all others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import msgspec

from gpuyard_agent.launch.base import Limits, ProcessExit, ProcessSpec
from gpuyard_agent.launch.job_files import StartRefused
from gpuyard_agent.launch.systemd_bus import Property
from gpuyard_protocol.names import AssignmentKey

SLICE = "gpuyard-jobs.slice"
#: Said in a unit's description from the first stop on: so the next agent knows, too.
STOPPING = " (stopping)"
#: Said by whoever ended it because its lease had run out.
OVER = " (lease over)"
#: Between SIGTERM and SIGKILL where systemd itself ends a unit: at the backstop and when the host goes down.
_TIMEOUT_STOP_US = 30_000_000
#: As systemd writes that there is no limit.
NO_LIMIT = 2**64 - 1
_NOFILE = 1_048_576
#: Variables that systemd sets by itself.
_OWN_VARIABLES = frozenset(
    (
        "HOME",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "LANG",
        "LOGNAME",
        "MAINPID",
        "MANAGERPID",
        "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE",
        "NOTIFY_SOCKET",
        "PATH",
        "SHELL",
        "SYSTEMD_EXEC_PID",
        "TERM",
        "USER",
        "XDG_RUNTIME_DIR",
    )
)
#: Statuses that systemd gives a process which it could not bring to its exec (systemd.exec(5)).
_EXIT_CHDIR, _EXIT_EXEC, _EXIT_STDIN, _EXIT_STDERR, _EXIT_GROUP, _EXIT_USER = 200, 203, 208, 210, 216, 217
_STATUSES_BEFORE_EXEC = range(200, 246)
#: As waitid gives it: the process exited by itself.
_CLD_EXITED = 1


#: Properties of a service, in the order in which `UnitFacts` has them after `active`.
FACTS = ("ExecMainPID", "ExecMainCode", "ExecMainStatus", "ExecMainStartTimestamp", "ExecMainExitTimestamp", "Result")


class UnitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What systemd says of one unit. Times are wall clock in microseconds, 0 for not yet."""

    active: str
    pid: int
    code: int
    status: int
    started_us: int
    exited_us: int
    #: `success`, `exit-code`, `signal`, `oom-kill`, `timeout` …
    result: str

    @property
    def main_has_ended(self) -> bool:
        return self.exited_us > 0

    @property
    def was_never_executed(self) -> bool:
        """systemd's own process ended before it became the replica's. A replica that ends with such a status before
        systemd has noticed that it runs cannot be told from that."""
        return self.pid == 0 or (self.code == _CLD_EXITED and self.status in _STATUSES_BEFORE_EXEC)

    @property
    def is_at_rest(self) -> bool:
        """systemd does nothing more about it."""
        return self.active in ("active", "failed", "inactive")


def unit_prefix(node: str) -> str:
    """Of every unit of one node; several agents may share a host."""
    return f"gpuyard-{node}-"


def unit_name(node: str, key: AssignmentKey) -> str:
    return f"{unit_prefix(node)}{key}.service"


def key_of(node: str, unit: str) -> AssignmentKey | None:
    """None for a unit that is none of this node's."""
    match = re.fullmatch(rf"{re.escape(unit_prefix(node))}(\d+)\.(\d+)\.(\d+)\.service", unit)
    return AssignmentKey(int(match[1]), int(match[2]), int(match[3])) if match is not None else None


def properties(
    spec: ProcessSpec, program: str, argv: list[str], foreign_variables: Iterable[str], *, one_output: bool
) -> list[Property]:
    """Of the unit. Descriptors: 0 is standard output, 1 standard error (0 too with `one_output`)."""
    account = spec.account
    unset = (_OWN_VARIABLES | set(foreign_variables)) - spec.env.keys()
    return [
        ("Description", "s", f"gpuyard replica {spec.key}"),
        ("Type", "s", "exec"),
        ("ExecStartEx", "a(sasas)", [[program, argv, ["no-env-expand"]]]),
        ("RemainAfterExit", "b", True),
        ("Slice", "s", SLICE),
        ("User", "s", str(account.uid)),
        ("Group", "s", str(account.gid)),
        ("SupplementaryGroups", "as", [str(group) for group in account.groups]),
        ("UMask", "u", spec.umask),
        ("WorkingDirectory", "s", spec.cwd or spec.job_dir),
        ("Environment", "as", [f"{name}={value}" for name, value in spec.env.items()]),
        ("UnsetEnvironment", "as", sorted(unset)),
        ("StandardInput", "s", "null"),
        ("StandardOutputFileDescriptor", "h", 0),
        ("StandardErrorFileDescriptor", "h", 0 if one_output else 1),
        ("IgnoreSIGPIPE", "b", False),
        ("KillMode", "s", "control-group"),
        ("TimeoutStopUSec", "t", _TIMEOUT_STOP_US),
        ("OOMPolicy", "s", "kill"),
        ("LimitNOFILE", "t", _NOFILE),
        ("LimitMEMLOCK", "t", NO_LIMIT),
        ("LimitCORE", "t", 0),
        *_limits(spec.limits),
    ]


def _limits(limits: Limits) -> list[Property]:
    found: list[Property] = []
    if limits.memory_mib:
        found.append(("MemoryMax", "t", limits.memory_mib * 2**20))
    if limits.cpu_milli:
        found.append(("CPUQuotaPerSecUSec", "t", limits.cpu_milli * 1000))
    found.append(("TasksMax", "t", limits.tasks or NO_LIMIT))
    if limits.run_max_ms:
        found.append(("RuntimeMaxUSec", "t", limits.run_max_ms * 1000))
    if limits.devices is not None:
        found.append(("DevicePolicy", "s", "closed"))
        # ptys are no secret, and interactive jobs need them.
        allowed = [[path, "rw"] for path in (*limits.devices, "char-pts", "/dev/ptmx")]
        found.append(("DeviceAllow", "a(ss)", allowed))
    return found


def exit_of(
    key: AssignmentKey, facts: UnitFacts, *, stopped: bool, expired: bool = False, detail: str = ""
) -> ProcessExit:
    """How it ended, as systemd says it."""
    by_itself = facts.code == _CLD_EXITED
    words = {
        "oom-kill": "killed by the kernel: the replica used more memory than it may",
        "timeout": "ended by systemd: it ran longer than its backstop",
        "watchdog": "ended by systemd's watchdog",
    }
    return ProcessExit(
        key=key,
        exit_code=facts.status if by_itself else 0,
        signal=0 if by_itself else facts.status,
        stopped=stopped,
        expired=expired,
        started_ms=facts.started_us // 1000,
        at_ms=facts.exited_us // 1000,
        detail=detail or words.get(facts.result, ""),
    )


def explain(spec: ProcessSpec, program: str, status: int) -> StartRefused:
    """Why systemd could not bring the process to its exec."""
    name, cwd = spec.account.name, spec.cwd or spec.job_dir
    if status == _EXIT_CHDIR:
        if os.path.isdir(cwd):
            return StartRefused("PermissionDenied", f"{name} may not enter the directory {cwd}")
        return StartRefused("WorkingDirectoryMissing", f"there is no directory {cwd} on this node")
    if status == _EXIT_EXEC:
        if not os.path.exists(program):
            return StartRefused("CommandNotFound", f"there is no {program!r}")
        if _has_reach(spec, program):
            return StartRefused(
                "CommandNotFound", f"{program} is there, but the interpreter that its first line names is not"
            )
        return StartRefused("PermissionDenied", f"{name} may not execute {program!r}")
    if status in (_EXIT_USER, _EXIT_GROUP):
        return StartRefused("AccountMissing", f"systemd knows no account with uid {spec.account.uid} ({name})")
    if _EXIT_STDIN <= status <= _EXIT_STDERR:
        return StartRefused("OutputUnavailable", f"systemd could not set up the output (status {status})")
    return StartRefused("LauncherFailed", f"systemd could not start {program!r} (status {status})")


def _has_reach(spec: ProcessSpec, program: str) -> bool:
    """Whether every directory on the way lets the account pass."""
    account = spec.account
    folder = os.path.dirname(os.path.realpath(program))
    while True:
        found = os.stat(folder)
        shift = 6 if found.st_uid == account.uid else 3 if found.st_gid in (account.gid, *account.groups) else 0
        if not found.st_mode >> shift & 1:
            return False
        if folder == "/":
            return True
        folder = os.path.dirname(folder)
