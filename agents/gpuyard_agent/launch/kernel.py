"""What Linux tells of processes: /proc, subreaping, pidfds.

Functions that read, and one that is set once; none decides anything. A pid alone names nothing, since pids are used
again: together with its start time in clock ticks it does, within one boot.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

_PR_SET_CHILD_SUBREAPER = 36
#: ioctl PIDFD_GET_INFO = _IOWR(0xFF, 11, struct pidfd_info) with the struct's first size, 64 bytes (linux/pidfd.h).
_PIDFD_INFO_BYTES = 64
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO_BYTES << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_EXIT_CODE_OFFSET = 60


class ProcessFacts(msgspec.Struct, frozen=True):
    """A process as /proc shows it."""

    pid: int
    #: `R`, `S`, `Z` … as in ps.
    state: str
    parent: int
    group: int
    session: int
    #: Clock ticks from boot to its start.
    start_time: int
    #: As waitpid gives it; the kernel tells it only of zombies, and only to root and its own user.
    wait_status: int
    #: CPU time of its own, in clock ticks.
    cpu_ticks: int = 0


def become_subreaper() -> None:
    """From now on, orphans among our descendants become our children instead of init's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def facts_of(pid: int) -> ProcessFacts | None:
    """None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, second of the fields, is in parentheses and may hold anything, also parentheses and blanks.
    fields = text[text.rindex(b")") + 2 :].split()
    parent, group, session, start_time, wait_status = (int(fields[at]) for at in (1, 2, 3, 19, 49))
    cpu_ticks = int(fields[11]) + int(fields[12])
    return ProcessFacts(pid, fields[0].decode(), parent, group, session, start_time, wait_status, cpu_ticks)


def all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def own_children() -> tuple[int, ...]:
    """Our children, those adopted as their subreaper included, zombies too."""
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children", "rb") as file:
            return tuple(int(pid) for pid in file.read().split())
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        every = (facts_of(pid) for pid in all_pids())
        return tuple(facts.pid for facts in every if facts is not None and facts.parent == me)


def environment_value(pid: int, name: str) -> str | None:
    """A variable of the environment that the process was started with; None if it has none, or is gone or not ours."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return None
    prefix = name.encode() + b"="
    return next((entry[len(prefix) :].decode(errors="replace") for entry in entries if entry.startswith(prefix)), None)


def has_environment(pid: int) -> bool:
    """False for a process whose environment is empty: also for an instant in the middle of its exec. True for zombies
    and for those whose environment we may not see."""
    facts = facts_of(pid)
    if facts is None or facts.state == "Z":
        return True
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return True


def owner_of(pid: int) -> int | None:
    """The uid a process belongs to."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def exit_status_by_pidfd(pidfd: int, pid: int) -> int | None:
    """The wait status of a process that has ended and was not our child; None where the kernel does not tell.

    Linux 6.15 and later keep it for whoever holds a pidfd. Before that, it can be read only while the process is a
    zombie that its parent has not taken notice of.
    """
    info = bytearray(_PIDFD_INFO_BYTES)
    struct.pack_into("=Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        (mask,) = struct.unpack_from("=Q", info)
        if mask & _PIDFD_INFO_EXIT:
            return int(struct.unpack_from("=i", info, _PIDFD_EXIT_CODE_OFFSET)[0])
    except OSError:
        pass
    facts = facts_of(pid)
    # To strangers the kernel shows 0 instead of the status.
    may_see = os.geteuid() in (0, owner_of(pid))
    return facts.wait_status if facts is not None and facts.state == "Z" and may_see else None
