"""What jobs bring along: kept on the node by tenant and content while they are used, unpacked for each replica.

    <state>/uploads/<tenant>/<sha256>, .part      as the daemon brings them, piece by piece
    <jobs>/<job>/<attempt>/<replica>/             where a replica finds what is in it

A replica that needs one waits for it. A tar file is somebody's input (`unpacking`): what is in it becomes the
account's, and nothing in it says who owns what.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tarfile
import time
from pathlib import Path

from gpuyard_agent.directories import make_passage
from gpuyard_agent.launch.base import Account
from gpuyard_agent.unpacking import unpack
from gpuyard_protocol.names import Tenant
from gpuyard_protocol.nodes import TakeUpload
from gpuyard_protocol.uploads import UPLOAD_BYTES_MAX, UploadHeld, is_upload

#: How long a replica waits for what it brings along. A gang has 30 s to get prepared.
WAIT_S = 25.0
#: On a node: beyond it the oldest go.
KEPT_BYTES_MAX = 4 * 1024 * 1024 * 1024
#: A tar file may hold more than its own size (holes); no more than this is unpacked.
UNPACKED_BYTES_MAX = 4 * UPLOAD_BYTES_MAX
_MODE = 0o750


class UploadMissing(Exception):
    """What a replica brings along is not to be had; the text says why."""

    code = "UploadMissing"


class Uploads:
    """One node's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        #: Who waits, by tenant and upload.
        self._awaited: dict[tuple[Tenant, str], asyncio.Future[str]] = {}

    async def take(self, piece: TakeUpload) -> UploadHeld:
        """A piece that the daemon brings."""
        if not is_upload(piece.upload) or not piece.size <= UPLOAD_BYTES_MAX:
            return UploadHeld(upload=piece.upload[:80], error="this is no upload")
        if not piece.size:
            held = UploadHeld(upload=piece.upload, error="the head does not have it (any more): hand it in again")
        else:
            held = await asyncio.to_thread(self._take, piece)
        waiting = self._awaited.get((piece.tenant, piece.upload))
        if (held.complete or held.error) and waiting is not None and not waiting.done():
            waiting.set_result(held.error)
        return held

    async def unpack(self, tenant: Tenant, upload: str, job_dir: Path, account: Account) -> None:
        """Into a replica's own directory. Raises `UploadMissing`, `OSError`."""
        if not upload:
            return
        await self._wait(tenant, upload)
        try:
            await asyncio.to_thread(_unpack, self._path(tenant, upload), job_dir, account)
        except tarfile.TarError as error:
            raise UploadMissing(f"{upload} cannot be unpacked: {error}") from None

    async def _wait(self, tenant: Tenant, upload: str) -> None:
        key = (tenant, upload)
        if self._path(tenant, upload).exists():
            return
        waiting = self._awaited.get(key)
        if waiting is None or waiting.done():
            waiting = self._awaited[key] = asyncio.get_running_loop().create_future()
        try:
            error = await asyncio.wait_for(asyncio.shield(waiting), WAIT_S)
        except TimeoutError:
            raise UploadMissing(f"{upload} was not brought within {WAIT_S:g} s") from None
        finally:
            self._awaited.pop(key, None)
        if error:
            raise UploadMissing(f"{upload}: {error}")

    def _path(self, tenant: Tenant, upload: str) -> Path:
        return self._directory / tenant / upload.removeprefix("sha256:")

    def _take(self, piece: TakeUpload) -> UploadHeld:
        whole = self._path(piece.tenant, piece.upload)
        if whole.exists():
            os.utime(whole)
            return UploadHeld(upload=piece.upload, held=piece.size, complete=True)
        part = whole.with_name(whole.name + ".part")
        held = part.stat().st_size if part.exists() else 0
        if piece.offset != held or not piece.data:
            return UploadHeld(upload=piece.upload, held=held)
        part.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        if not held:
            self._make_room(piece.size)
        with part.open("ab") as file:
            file.write(piece.data)
            held = file.tell()
        if held < piece.size:
            return UploadHeld(upload=piece.upload, held=held)
        with part.open("rb") as file:
            is_right = hashlib.file_digest(file, "sha256").hexdigest() == whole.name
        if not is_right:
            part.unlink()
            return UploadHeld(upload=piece.upload, held=0)
        part.rename(whole)
        return UploadHeld(upload=piece.upload, held=held, complete=True)

    def _make_room(self, size: int) -> None:
        found = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._directory.glob("*/*"))
        total = size + sum(entry[1] for entry in found)
        for used_s, its_size, path in found:
            # Not what came just now: somebody may be about to unpack it.
            if total > KEPT_BYTES_MAX and used_s < time.time() - WAIT_S:
                path.unlink(missing_ok=True)
                total -= its_size


def _unpack(archive: Path, job_dir: Path, account: Account) -> None:
    """The directory is ours until all of it is there, so that a half made one is made anew."""
    make_passage_above(job_dir)
    shutil.rmtree(job_dir, ignore_errors=True)
    job_dir.mkdir(_MODE)
    unpack(archive, job_dir, UNPACKED_BYTES_MAX)
    if os.geteuid() == 0:
        for _, directories, files, descriptor in os.fwalk(job_dir, follow_symlinks=False):
            for name in (*directories, *files):
                os.chown(name, account.uid, account.gid, dir_fd=descriptor, follow_symlinks=False)
        os.chown(job_dir, account.uid, account.gid)
    os.chmod(job_dir, _MODE)


def make_passage_above(job_dir: Path) -> None:
    """The attempt's directory and the job's."""
    job_dir.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    make_passage(job_dir.parent.parent)
    make_passage(job_dir.parent)
