"""What jobs bring along: kept on the head by tenant and content, and brought to the nodes that start them.

    <state>/uploads/<tenant>/<sha256>         whole, its name checked
    <state>/uploads/<tenant>/<sha256>.part    on its way in

A tenant reads nothing of another's, not even whether it is there. What was not used for a week goes, and the oldest
before that where a tenant has more than its room. A standby on another head has no copy: after it takes over, jobs that
still wait with an upload are told so when they start.

Nodes are given an upload beside their orders and not before them: a node waits for it with the one job that needs it.
Both sides know it by its content, so it does no harm to bring it twice, in pieces that overlap, or after a restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import structlog

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.names import NodeId, Tenant
from gpuyard_protocol.nodes import Start, TakeUpload
from gpuyard_protocol.subjects import commands
from gpuyard_protocol.uploads import (
    PIECE_BYTES,
    UPLOAD_BYTES_MAX,
    UPLOAD_EXPECTED,
    UploadHeld,
    UploadPiece,
    is_upload,
)

log = structlog.get_logger("uploads")

#: Of one question, encoded.
QUESTION_BYTES_MAX = 2 * PIECE_BYTES
TENANT_BYTES_MAX = 2 * 1024 * 1024 * 1024
KEPT_S = 7 * 86_400
ANSWER_TIMEOUT_S = 5.0
RETRY_S = 1.0
#: A node that does not take an upload for so long is given up; its job says that it waited in vain.
BRING_TRIES = 30
ERROR_TRIES = 5
#: Uploads on their way to nodes at the same time.
BRINGING_MAX = 8


class UploadStore:
    """The files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, tenant: Tenant, upload: str) -> Path:
        return self._directory / tenant / upload.removeprefix("sha256:")

    def take(self, tenant: Tenant, piece: UploadPiece) -> UploadHeld:
        """Blocks on the disk."""
        whole = self.path(tenant, piece.upload)
        if whole.exists():
            os.utime(whole)
            return UploadHeld(upload=piece.upload, held=piece.size, complete=True)
        part = whole.with_name(whole.name + ".part")
        held = part.stat().st_size if part.exists() else 0
        if not piece.data or piece.offset != held:
            return UploadHeld(upload=piece.upload, held=held)
        part.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        if not held:
            self._make_room(tenant, piece.size)
        with part.open("ab") as file:
            file.write(piece.data)
            held = file.tell()
            if held < piece.size:
                return UploadHeld(upload=piece.upload, held=held)
            os.fsync(file.fileno())
        if held > piece.size or _digest(part) != piece.upload:
            part.unlink()
            return UploadHeld(upload=piece.upload, error="its bytes are not what its name says: send it anew")
        part.rename(whole)
        return UploadHeld(upload=piece.upload, held=held, complete=True)

    def read(self, tenant: Tenant, upload: str, offset: int) -> tuple[int, bytes] | None:
        """(size, a piece from there on); None: it is not there. Blocks on the disk."""
        try:
            with self.path(tenant, upload).open("rb") as file:
                os.utime(file.fileno())
                file.seek(offset)
                return os.fstat(file.fileno()).st_size, file.read(PIECE_BYTES)
        except FileNotFoundError:
            return None

    def _make_room(self, tenant: Tenant, size: int) -> None:
        """Drop what is old, and the oldest of what is too much."""
        found = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in self._files(tenant))
        total = size + sum(entry[1] for entry in found)
        for used_s, its_size, path in found:
            if total > TENANT_BYTES_MAX or used_s < time.time() - KEPT_S:
                path.unlink(missing_ok=True)
                total -= its_size

    def _files(self, tenant: Tenant) -> list[Path]:
        return [entry for entry in (self._directory / tenant).iterdir() if entry.is_file()]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


async def answer_upload(store: UploadStore, tenant: Tenant, data: bytes) -> UploadHeld:
    """A tenant's piece."""
    piece = decode(UploadPiece, data, max_bytes=QUESTION_BYTES_MAX)
    if not is_upload(piece.upload):
        raise Malformed("$.upload", repr(piece.upload)[:120], UPLOAD_EXPECTED)
    if not 0 < piece.size <= UPLOAD_BYTES_MAX:
        raise Malformed("$.size", str(piece.size), f"a number between 1 and {UPLOAD_BYTES_MAX}")
    try:
        return await asyncio.to_thread(store.take, tenant, piece)
    except OSError as error:
        log.warning("upload.refused", tenant=tenant, error=str(error))
        return UploadHeld(upload=piece.upload, error=f"the head cannot keep it: {error.strerror}")


class Courier:
    """Brings uploads to the nodes that start jobs with them."""

    def __init__(self, bus: Bus, store: UploadStore) -> None:
        self._bus = bus
        self._store = store
        self._places = asyncio.Semaphore(BRINGING_MAX)
        self._on_the_way: set[tuple[NodeId, Tenant, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def starting(self, node: NodeId, starts: Iterable[Start]) -> None:
        """A node is told to start these."""
        for start in starts:
            launch = start.launch
            errand = (node, launch.tenant, launch.upload)
            if launch.upload and errand not in self._on_the_way:
                self._on_the_way.add(errand)
                task = asyncio.get_running_loop().create_task(self._bring(*errand), name=f"upload for {node}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _bring(self, node: NodeId, tenant: Tenant, upload: str) -> None:
        try:
            async with self._places:
                offset, tries = 0, 0
                while tries < BRING_TRIES:
                    found = await asyncio.to_thread(self._store.read, tenant, upload, offset)
                    held = await self._give(node, tenant, upload, offset, found)
                    if held is None or held.error:
                        # An error is told more than once: the job that waits for it may be on its way to the node, too.
                        tries += 1 if held is None else BRING_TRIES // ERROR_TRIES
                        await asyncio.sleep(RETRY_S)
                    elif held.complete:
                        return
                    else:
                        tries = 0 if held.held != offset else tries + 1
                        offset = held.held
        finally:
            self._on_the_way.discard((node, tenant, upload))

    async def _give(
        self, node: NodeId, tenant: Tenant, upload: str, offset: int, found: tuple[int, bytes] | None
    ) -> UploadHeld | None:
        """One piece and its answer; None: it was not taken."""
        size, data = found if found is not None else (0, b"")
        piece = TakeUpload(tenant=tenant, upload=upload, size=size, offset=offset, data=data)
        try:
            reply = await self._bus.request(commands(node), encode(piece), timeout=ANSWER_TIMEOUT_S)
            return decode(UploadHeld, reply.data)
        except (BusError, Malformed) as error:
            log.warning("upload.not-taken", node=node, upload=upload, error=str(error))
            return None
