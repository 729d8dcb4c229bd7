"""Finding a command before anybody executes it: what `execvp` would do, said in advance.

For launchers that hand a command to somebody else (systemd), who would only say that it did not work. As far as modes
and files tell; what only shows at the exec itself (an interpreter that is not there) is explained afterwards.
"""

from __future__ import annotations

import os
import stat

from gpuyard_agent.launch.base import Account, ProcessSpec
from gpuyard_agent.launch.job_files import StartRefused

_HEAD_BYTES = 128


def resolve(spec: ProcessSpec, argv: list[str]) -> tuple[str, list[str]]:
    """The program's absolute path, and its arguments with the first. Raises `StartRefused`."""
    if not argv:
        raise StartRefused("CommandNotFound", "the command is empty")
    everything = [*argv, spec.cwd, *spec.env, *spec.env.values()]
    if any("\0" in text for text in everything):
        raise StartRefused("StartFailed", "the command or its environment cannot be passed on: embedded null byte")
    path = _find(spec, argv[0])
    if _is_text_without_first_line(path):
        return "/bin/sh", ["/bin/sh", path, *argv[1:]]  # as shells have always taken it
    return path, argv


def _find(spec: ProcessSpec, command: str) -> str:
    cwd = spec.cwd or spec.job_dir
    if "/" in command:
        candidates = [os.path.join(cwd, command)]
    else:
        folders = spec.env.get("PATH", "/bin:/usr/bin").split(":")
        candidates = [os.path.join(cwd, folder, command) for folder in folders]
    is_forbidden = False
    for candidate in candidates:
        try:
            found = os.stat(candidate)
        except PermissionError:
            return candidate  # we may not look, the account perhaps may
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode) and _may_execute(found, spec.account):
            return candidate
        is_forbidden = True
    if is_forbidden:
        raise StartRefused("PermissionDenied", f"{spec.account.name} may not execute {command!r}")
    searched = "" if "/" in command else f" in PATH={spec.env.get('PATH', '')}"
    raise StartRefused("CommandNotFound", f"there is no {command!r}{searched}")


def _may_execute(found: os.stat_result, account: Account) -> bool:
    if found.st_uid == account.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid in (account.gid, *account.groups):
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)


def _is_text_without_first_line(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return bool(head) and not head.startswith((b"#!", b"\x7fELF")) and b"\0" not in head
