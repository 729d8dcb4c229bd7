"""One start: directories, script, output files, working directory, process.

Everything that can go wrong with what a tenant asked for ends in a `StartRefused` with a code and a sentence, before or
instead of a process. The process leads a session of its own, so that its group can be told apart from all others, and
inherits nothing but the environment it was given, /dev/null and its output files.

No Python runs in the child (no preexec_fn): for the supervisor's own account the kernel starts it by vfork, and for
another by fork and setuid inside `_posixsubprocess`. The working directory is entered beforehand, in this process and
as the account, so that a home directory which root may not enter (NFS) is entered nevertheless, and one which the
account may not enter is refused with a clear text. For that reason this module may only be used by a process with one
thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator, Sequence

from gpuyard_agent.launch.base import Account, ProcessSpec
from gpuyard_agent.launch.job_files import StartRefused, check_account, command_of, make_job_dir, open_outputs

#: Names the start in the environment of every process of it: `<supervisor's state id>/<key>`.
MARK = "GPUYARD_LAUNCH"
#: What the host has run out of, and no command can help.
_HOST_IS_FULL = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC})


def spawn(spec: ProcessSpec, mark: str) -> int:
    """The pid of the new process, leader of its session. Raises `StartRefused`."""
    check_account(spec.account)
    make_job_dir(spec)
    argv = command_of(spec)
    if not argv:
        raise StartRefused("CommandNotFound", "the command is empty")
    out, err = open_outputs(spec)
    try:
        return _start(spec, argv, {**spec.env, MARK: mark}, out, err)
    finally:
        for descriptor in {out, err}:
            os.close(descriptor)


def _start(spec: ProcessSpec, argv: list[str], env: dict[str, str], out: int, err: int) -> int:
    account = spec.account
    switches = account.uid != os.geteuid()
    _enter(spec.cwd or spec.job_dir, account)
    try:
        return _popen(
            argv,
            env,
            (out, err),
            umask=spec.umask,
            user=account.uid if switches else None,
            group=account.gid if switches else None,
            groups=account.groups if switches else None,
        )
    except OSError as error:
        raise _explain(error, spec, argv) from None
    except ValueError as error:  # a NUL byte in an argument or a variable
        raise StartRefused("StartFailed", f"the command or its environment cannot be passed on: {error}") from None
    finally:
        os.chdir("/")


def _popen(
    argv: Sequence[str],
    env: dict[str, str],
    outputs: tuple[int, int],
    *,
    umask: int,
    user: int | None,
    group: int | None,
    groups: Sequence[int] | None,
) -> int:
    try:
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=outputs[0],
            stderr=outputs[1],
            start_new_session=True,
            umask=umask,
            user=user,
            group=group,
            extra_groups=groups,
        )
    except OSError as error:
        if error.errno != errno.ENOEXEC or argv[0] == "/bin/sh":
            raise
        # A script without its first line, as shells have always taken it.
        shell = ("/bin/sh", *argv)
        return _popen(shell, env, outputs, umask=umask, user=user, group=group, groups=groups)
    # The supervisor waits for all of its children itself; the object must neither wait nor warn.
    process.returncode = 0
    return process.pid


def _explain(error: OSError, spec: ProcessSpec, argv: list[str]) -> StartRefused:
    command = argv[0]
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if os.path.exists(command):
            return StartRefused(
                "CommandNotFound", f"{command} is there, but the interpreter that its first line names is not"
            )
        searched = "" if "/" in command else f" in PATH={spec.env.get('PATH', '')}"
        return StartRefused("CommandNotFound", f"there is no {command!r}{searched}")
    if isinstance(error, PermissionError):
        return StartRefused("PermissionDenied", f"{spec.account.name} may not execute {command!r}")
    code = "LauncherFailed" if error.errno in _HOST_IS_FULL else "StartFailed"
    return StartRefused(code, f"cannot start {command!r}: {error.strerror}")


@contextlib.contextmanager
def acting_as(account: Account) -> Iterator[None]:
    """File accesses inside are the account's. Only root can change; only in a process with one thread."""
    if os.geteuid() == account.uid or os.getuid() != 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups(account.groups)
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _enter(directory: str, account: Account) -> None:
    try:
        with acting_as(account):
            os.chdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        raise StartRefused("WorkingDirectoryMissing", f"there is no directory {directory} on this node") from None
    except PermissionError:
        raise StartRefused("PermissionDenied", f"{account.name} may not enter the directory {directory}") from None
    except OSError as error:
        raise StartRefused("WorkingDirectoryMissing", f"cannot enter {directory}: {error.strerror}") from None
