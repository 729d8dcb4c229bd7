"""A directory as jobs bring it along: one tar file, the same for the same content, named by what is in it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

from gpuyard.errors import GpuyardError
from gpuyard_protocol.units import format_mib
from gpuyard_protocol.uploads import UPLOAD_BYTES_MAX

_MIB = 1024 * 1024


def pack(directory: Path) -> tuple[str, bytes]:
    """(name, bytes) of what is in a directory. Who owns it stays behind; links that lead out of it are an error."""
    if not directory.is_dir():
        raise GpuyardError(f"{directory} is no directory")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(directory.rglob("*")):
            if not (path.is_symlink() or path.is_dir() or path.is_file()):
                raise GpuyardError(f"{path} is neither a file nor a directory nor a link: leave it out")
            tar.add(path, arcname=path.relative_to(directory).as_posix(), recursive=False, filter=_anonymous)
            if buffer.tell() > UPLOAD_BYTES_MAX:
                most = format_mib(UPLOAD_BYTES_MAX // _MIB)
                raise GpuyardError(f"{directory} holds more than {most}, the most that a job may bring along")
    data = buffer.getvalue()
    if len(data) > UPLOAD_BYTES_MAX:
        raise GpuyardError(f"{directory} holds more than {format_mib(UPLOAD_BYTES_MAX // _MIB)}")
    return "sha256:" + hashlib.sha256(data).hexdigest(), data


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = int(member.mtime)
    return member
