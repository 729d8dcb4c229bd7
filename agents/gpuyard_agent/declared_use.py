"""What jobs on modelled cards say that their processes would do on real ones: no program runs there that could be seen.

A job writes it into a file of its directory, `simulated-gpu-use`, a line for each process: its pid, the memory in MiB
that it would hold, and its load in per cent, which may be left out. Without the file the model speaks for it. The file
is the job's: it may be anything, and nothing is waited for.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from gpuyard_agent.logs import LogStore
from gpuyard_protocol.names import AssignmentKey

DECLARED_FILE = "simulated-gpu-use"
_BYTES_MAX = 4096


class DeclaredProcess(NamedTuple):
    memory_mib: int
    #: None: it does not say.
    utilization_pct: int | None = None


class DeclaredUse:
    """Reads the files of a node's jobs."""

    def __init__(self, store: LogStore) -> None:
        self._store = store

    def of(self, key: AssignmentKey) -> dict[int, DeclaredProcess]:
        """By pid; empty where the job says nothing that can be understood."""
        path = os.path.join(self._store.files(key).job_dir, DECLARED_FILE)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return {}
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return {}
            lines = os.read(descriptor, _BYTES_MAX).decode("ascii", "replace").splitlines()
            rows = [[int(word) for word in line.split()] for line in lines]
            return {row[0]: DeclaredProcess(*row[1:3]) for row in rows if len(row) > 1}
        except (OSError, ValueError):
            return {}
        finally:
            os.close(descriptor)
