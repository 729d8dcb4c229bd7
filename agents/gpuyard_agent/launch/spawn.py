"""One start: directories, script, output files, working directory, process.

Everything that can go wrong with what a tenant asked for ends in a `StartRefused` with a code and a sentence, before or
instead of a process. The process leads a session of its own, so that its group can be told apart from all others, and
inherits nothing but the environment it was given, /dev/null and its output files.

No Python runs in the child (no preexec_fn): for the supervisor's own account the kernel starts it by vfork, and for
another by fork and setuid inside `_posixsubprocess`. The working directory is entered beforehand, in this process and
as the account, so that a home directory which root may not enter (NFS) is entered nevertheless, and one which the
account may not enter is refused with a clear text. For that reason this module may only be used by a process with one
thread.

Output files are opened by this process, which may be root, in directories that the account may write to. So the last
step never follows a link, never waits for a reader, and refuses whatever is no plain file with one name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence

from gpuyard_agent.launch.base import Account, ProcessSpec

#: Names the start in the environment of every process of it: `<supervisor's state id>/<key>`.
MARK = "GPUYARD_LAUNCH"
_PARENT_MODE = 0o711
_JOB_DIR_MODE = 0o750
_OUTPUT_MODE = 0o640
_SCRIPT_MODE = 0o700


class StartRefused(Exception):
    """This start cannot be done as asked."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def spawn(spec: ProcessSpec, mark: str) -> int:
    """The pid of the new process, leader of its session. Raises `StartRefused`."""
    _check_account(spec.account)
    _make_job_dir(spec)
    argv = list(spec.argv)
    if spec.script:
        argv = [*_write_script(spec), *argv]
    if not argv:
        raise StartRefused("CommandNotFound", "the command is empty")
    out = _open_output(spec.stdout, spec.account)
    try:
        err = out if spec.stderr == spec.stdout else _open_output(spec.stderr, spec.account)
        try:
            return _start(spec, argv, {**spec.env, MARK: mark}, out, err)
        finally:
            if err != out:
                os.close(err)
    finally:
        os.close(out)


def _check_account(account: Account) -> None:
    own = os.geteuid()
    if account.uid == 0:
        raise StartRefused("AccountMissing", "nothing runs as uid 0: give the tenant an account of its own")
    if own != 0 and account.uid != own:
        raise StartRefused(
            "AccountMissing",
            f"cannot run as {account.name} (uid {account.uid}): the agent is not root and may only use uid {own}",
        )


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
    return StartRefused("StartFailed", f"cannot start {command!r}: {error.strerror}")


# --- directories and files -------------------------------------------------------------------------------------------


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


def _make_job_dir(spec: ProcessSpec) -> None:
    try:
        _make_parents(spec.job_dir)
        try:
            os.mkdir(spec.job_dir, _JOB_DIR_MODE)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(spec.job_dir).st_mode):
                raise StartRefused("OutputUnavailable", f"{spec.job_dir} is there and is no directory") from None
        else:
            os.chmod(spec.job_dir, _JOB_DIR_MODE)
            _give(spec.job_dir, spec.account)
        _make_parents(spec.stdout)
        _make_parents(spec.stderr)
    except OSError as error:
        raise StartRefused("OutputUnavailable", f"cannot make {spec.job_dir}: {error.strerror}") from None


def _make_parents(path: str) -> None:
    missing = []
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, _PARENT_MODE)
            os.chmod(directory, _PARENT_MODE)


def _give(path: str | int, account: Account) -> None:
    if os.geteuid() == 0:
        os.chown(path, account.uid, account.gid)


def _open_output(path: str, account: Account) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, _OUTPUT_MODE)
    except OSError as error:
        raise StartRefused("OutputUnavailable", f"cannot open {path} for output: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise StartRefused("OutputUnavailable", f"{path} is no plain file with one name")
        os.fchmod(descriptor, _OUTPUT_MODE)
        _give(descriptor, account)
        os.set_blocking(descriptor, True)
    except OSError as error:
        os.close(descriptor)
        raise StartRefused("OutputUnavailable", f"cannot prepare {path} for output: {error.strerror}") from None
    except StartRefused:
        os.close(descriptor)
        raise
    return descriptor


def _write_script(spec: ProcessSpec) -> list[str]:
    """The command that runs the script."""
    path = os.path.join(spec.job_dir, "script")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, _SCRIPT_MODE)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(spec.script)
            os.fchmod(descriptor, _SCRIPT_MODE)
            _give(descriptor, spec.account)
    except OSError as error:
        raise StartRefused("OutputUnavailable", f"cannot write the script to {path}: {error.strerror}") from None
    return [path] if spec.script.startswith("#!") else ["/bin/sh", path]
