"""Which processes belong to a replica, where only its first one is known."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def descendants(pids: Collection[int]) -> frozenset[int]:
    """These processes, what they started, and what shares a session with them, as far as /proc shows now."""
    wanted = set(pids)
    rows: list[tuple[int, int, int]] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name, which may hold anything: state, parent, process group, session.
            facts = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        rows.append((int(entry.name), int(facts[1]), int(facts[3])))
    sessions = set(pids)
    while True:
        found = {pid for pid, parent, session in rows if parent in wanted or session in sessions} - wanted
        if not found:
            return frozenset(wanted)
        wanted |= found
