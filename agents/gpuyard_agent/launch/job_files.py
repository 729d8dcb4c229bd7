"""What a start needs on disk, whoever makes the process: the job's directory, its script, its output files.

Everything that can go wrong with what a tenant asked for ends in a `StartRefused` with a code and a sentence.

Output files are opened by a process that may be root, in directories that the account may write to. So the last step
never follows a link, never waits for a reader, and refuses whatever is no plain file with one name. Nothing here acts
as the account, so it may be used in a thread.
"""

from __future__ import annotations

import contextlib
import os
import stat

from gpuyard_agent.directories import make_own_directory, make_passage
from gpuyard_agent.launch.base import Account, ProcessSpec

_JOB_DIR_MODE = 0o750
_OUTPUT_MODE = 0o640
_SCRIPT_MODE = 0o700


class StartRefused(Exception):
    """This start cannot be done as asked."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def check_account(account: Account) -> None:
    own = os.geteuid()
    if account.uid == 0:
        raise StartRefused("AccountMissing", "nothing runs as uid 0: give the tenant an account of its own")
    if own != 0 and account.uid != own:
        raise StartRefused(
            "AccountMissing",
            f"cannot run as {account.name} (uid {account.uid}): the agent is not root and may only use uid {own}",
        )


def make_job_dir(spec: ProcessSpec) -> None:
    """The job's directory and those above its output, however far an earlier try came."""
    account = spec.account
    try:
        for attempt in dict.fromkeys(map(os.path.dirname, (spec.job_dir, spec.stdout, spec.stderr))):
            _make_passages(attempt)
        make_own_directory(spec.job_dir, _JOB_DIR_MODE, account.uid, account.gid)
    except NotADirectoryError as error:
        raise StartRefused("OutputUnavailable", str(error)) from None
    except OSError as error:
        raise StartRefused("OutputUnavailable", f"cannot make {spec.job_dir}: {error.strerror}") from None


def _make_passages(attempt: str) -> None:
    """The attempt's directory and the job's above it are the agent's."""
    job = os.path.dirname(attempt)
    os.makedirs(os.path.dirname(job), exist_ok=True)
    make_passage(job)
    make_passage(attempt)


def _give(path: str | int, account: Account) -> None:
    if os.geteuid() == 0:
        os.chown(path, account.uid, account.gid)


def open_output(path: str, account: Account) -> int:
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


def open_outputs(spec: ProcessSpec) -> tuple[int, int]:
    """For standard output and errors: one descriptor twice where both go to one file."""
    out = open_output(spec.stdout, spec.account)
    try:
        return out, out if spec.stderr == spec.stdout else open_output(spec.stderr, spec.account)
    except StartRefused:
        os.close(out)
        raise


def command_of(spec: ProcessSpec) -> list[str]:
    """What is to be executed, whatever goes before it; a script is written first."""
    return [*spec.wrapper, *(write_script(spec) if spec.script else ()), *spec.argv]


def write_script(spec: ProcessSpec) -> list[str]:
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
