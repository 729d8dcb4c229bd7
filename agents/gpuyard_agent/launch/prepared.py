"""What a start under systemd needs of the file system before systemd is asked: directories, script, program, outputs.

systemd executes a program by its path and in a directory that must be there, and says little where that fails; so both
are looked for beforehand, and what is wrong is said in words.
"""

from __future__ import annotations

import os
import stat

import msgspec

from gpuyard_agent.launch.base import ProcessSpec
from gpuyard_agent.launch.command import resolve
from gpuyard_agent.launch.job_files import StartRefused, check_account, command_of, make_job_dir, open_outputs


class Prepared(msgspec.Struct, frozen=True):
    """The program by its path, its arguments, and where its output goes: descriptors that the caller closes."""

    program: str
    argv: list[str]
    out: int
    err: int


def prepare(spec: ProcessSpec) -> Prepared:
    """For a thread: home directories may be on a slow file server. Raises `StartRefused`."""
    check_account(spec.account)
    make_job_dir(spec)
    cwd = spec.cwd or spec.job_dir
    try:
        is_directory = stat.S_ISDIR(os.stat(cwd).st_mode)
    except PermissionError:
        is_directory = True  # we may not look, the account perhaps may
    except OSError:
        is_directory = False
    if not is_directory:
        raise StartRefused("WorkingDirectoryMissing", f"there is no directory {cwd} on this node")
    program, argv = resolve(spec, command_of(spec))
    return Prepared(program, argv, *open_outputs(spec))
