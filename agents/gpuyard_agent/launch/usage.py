"""CPU time of a replica's whole tree, as far as it can be told from its main process."""

from __future__ import annotations

import os
from pathlib import Path

from gpuyard_agent.launch import kernel

_TICK_MS = 1000 // os.sysconf("SC_CLK_TCK")


def cpu_ms_of_tree(pid: int) -> int:
    """Of its control group where it has one to itself, else of its session. Only differences mean anything; a process
    that has ended takes its part with it in the second case."""
    in_group = _of_group(pid)
    return in_group if in_group is not None else _of_session(pid)


def _of_group(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return 0
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    # A group that is shared with others says nothing of this one.
    if path == "/" or path == _own_group():
        return None
    for mount in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        try:
            text = Path(f"{mount}{path}/cpu.stat").read_text()
        except OSError:
            continue
        usage = next((line for line in text.splitlines() if line.startswith("usage_usec ")), "usage_usec 0")
        return int(usage.split()[1]) // 1000
    return None


def _own_group() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _of_session(pid: int) -> int:
    ticks = 0
    for other in kernel.all_pids():
        facts = kernel.facts_of(other)
        if facts is not None and pid in (facts.pid, facts.session):
            ticks += facts.cpu_ticks
    return ticks * _TICK_MS
