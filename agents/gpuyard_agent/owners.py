"""Whose process is this: from a pid that the driver names to the assignment that it belongs to.

A process belongs to the assignment whose main process is its ancestor. One that left the tree (a daemon of the job's,
adopted by the supervisor) still carries GPUYARD_ASSIGNMENT in its environment; that is believed only of a process of
the same account, which could do its neighbour no more harm by lying than by a signal.

Reads /proc, a few small files a process; what vanishes meanwhile belongs to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from gpuyard_protocol.names import AssignmentKey

_MARK = b"GPUYARD_ASSIGNMENT="
#: No real tree is deeper; a bound against reading a pid that was given anew in between.
_DEPTH_MAX = 256


def owners_of(pids: Iterable[int], mains: Mapping[int, AssignmentKey]) -> dict[int, AssignmentKey]:
    """Those of `pids` that belong to an assignment. `mains`: main processes."""
    by_name = {str(key): (main, key) for main, key in mains.items()}
    found = {}
    for pid in pids:
        key = _by_ancestry(pid, mains) or _by_mark(pid, by_name)
        if key is not None:
            found[pid] = key
    return found


def _by_ancestry(pid: int, mains: Mapping[int, AssignmentKey]) -> AssignmentKey | None:
    for _ in range(_DEPTH_MAX):
        if pid in mains:
            return mains[pid]
        pid = _parent(pid)
        if pid <= 1:
            return None
    return None


def _parent(pid: int) -> int:
    """0: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything; the parent is the second field after it.
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _by_mark(pid: int, by_name: Mapping[str, tuple[int, AssignmentKey]]) -> AssignmentKey | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
        name = next((entry[len(_MARK) :] for entry in entries if entry.startswith(_MARK)), b"")
        main, key = by_name.get(name.decode("ascii", "replace"), (0, None))
        if key is not None and os.stat(f"/proc/{pid}").st_uid == os.stat(f"/proc/{main}").st_uid:
            return key
    except OSError:
        return None
    return None
