"""A tar file from somebody else, unpacked into a directory of ours, and nowhere else.

Plain files, directories and links that stay inside are taken, by names without a way up; what a name begins with is
cut off if it is a slash. Nothing is written through a link, so where a link leads matters to whoever follows it, later
and as himself. Python's own filters for that are missing in the versions that Debian 12 ships.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from posixpath import dirname, isabs, join, normpath
from typing import Any

#: Nothing asks for trust where Python would ask: `_checked` is what decides.
_TRUSTED: dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}


def unpack(archive: Path, root: Path, bytes_max: int) -> None:
    """All of it below `root`, which is there and ours alone. Raises `tarfile.TarError`, `OSError`."""
    with tarfile.open(archive, "r:") as tar:
        if sum(member.size for member in tar) > bytes_max:
            raise tarfile.TarError(f"it holds more than {bytes_max} bytes")
        for member in tar:
            tar.extract(_checked(member, root), root, **_TRUSTED)


def _checked(member: tarfile.TarInfo, root: Path) -> tarfile.TarInfo:
    """As it may be written: ours, with no more rights than a file needs."""
    name = normpath(member.name.lstrip("/"))
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise tarfile.TarError(f"{member.name!r} is no file, directory or link")
    _stay_inside(member, name)
    _meet_no_link(member, root, name.split("/"))
    if member.issym():
        _stay_inside(
            member, member.linkname if isabs(member.linkname) else normpath(join(dirname(name), member.linkname))
        )
    elif member.islnk():
        # It becomes a second name of what is there already: a file of this archive, and of nobody else.
        member.linkname = normpath(member.linkname)
        _stay_inside(member, member.linkname)
        _meet_no_link(member, root, member.linkname.split("/"))
    member.name, member.uname, member.gname = name, "", ""
    member.uid, member.gid = os.geteuid(), os.getegid()
    member.mode = (member.mode & 0o755) | (0o700 if member.isdir() else 0o600)
    return member


def _stay_inside(member: tarfile.TarInfo, path: str) -> None:
    if isabs(path) or path.split("/")[0] == ".." or "\0" in path:
        raise tarfile.TarError(f"{member.name!r} leads out of the directory")


def _meet_no_link(member: tarfile.TarInfo, root: Path, parts: Sequence[str]) -> None:
    at = root
    for part in parts:
        at = at / part
        if at.is_symlink():
            raise tarfile.TarError(f"{member.name!r} goes through a link")
