"""The directory in which a job finds its checkpoints again: one for a job, the same for each of its attempts.

    <jobs>/<job>/checkpoint               on this node, where nothing else was set
    <checkpoints>/<tenant>/<job>          on storage that all nodes share, so that an attempt elsewhere finds it too

The job's account owns it. An attempt in another mode may run as another account (shares under MPS run as the tenant's):
what is there is then handed over, but for files with a second name, which may be somebody else's.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

from gpuyard_agent.directories import make_own_directory, make_passage
from gpuyard_agent.launch.base import Account
from gpuyard_protocol.names import JobId, Tenant

LOCAL_NAME = "checkpoint"
_MODE = 0o700


class CheckpointDirectories:
    """`shared`: a directory that every node sees under this path; None: on the node."""

    def __init__(self, jobs: Path, shared: Path | None = None) -> None:
        self._jobs = jobs
        self._shared = shared

    def path(self, tenant: Tenant, job: JobId) -> Path:
        if self._shared is None:
            return self._jobs / str(job) / LOCAL_NAME
        return self._shared / tenant / str(job)

    async def make(self, tenant: Tenant, job: JobId, account: Account) -> None:
        """Raises `OSError`. A shared file system may take its time, so it is asked from a thread."""
        path = self.path(tenant, job)
        if self._shared is None:
            _make(path, account)
        else:
            await asyncio.to_thread(_make, path, account)


def _make(path: Path, account: Account) -> None:
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    make_passage(path.parent)
    if make_own_directory(path, _MODE, account.uid, account.gid):
        return
    if os.geteuid() == 0 and path.lstat().st_uid != account.uid:
        _hand_over(path, account)


def _hand_over(path: Path, account: Account) -> None:
    for _, directories, files, descriptor in os.fwalk(path, follow_symlinks=False):
        for name in (*directories, *files):
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                os.chown(name, account.uid, account.gid, dir_fd=descriptor, follow_symlinks=False)
    os.chown(path, account.uid, account.gid)
