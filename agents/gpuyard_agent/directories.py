"""Directories that others must come through or own, whole at every instant or made whole by whoever comes next.

Between making a directory and setting its mode and owner, the process may be killed. The next one finds it there and
half made, so being there is never taken for being right: both functions are for a directory in any state.
"""

from __future__ import annotations

import contextlib
import os
import stat

#: Others may pass, and see nothing of what else is there.
PASSAGE_MODE = 0o711


def make_passage(path: str | os.PathLike[str]) -> None:
    """A directory of our own that others may pass. One that is another account's is left as it is.

    Raises `OSError`; its parent must be there.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, PASSAGE_MODE)
    status = os.stat(path)
    if status.st_uid == os.geteuid() and status.st_mode & PASSAGE_MODE != PASSAGE_MODE:
        os.chmod(path, stat.S_IMODE(status.st_mode) | PASSAGE_MODE)


def make_own_directory(path: str | os.PathLike[str], mode: int, uid: int, gid: int) -> bool:
    """A directory of this account, in a directory where only we make names; False: it was there, and somebody's.

    One that is still ours is taken for half made. Raises `OSError`, `NotADirectoryError` for what is none.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        return False
    except OSError:
        raise NotADirectoryError(f"{os.fspath(path)} is there and is no directory") from None
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return False
        os.fchmod(descriptor, mode)  # whatever the umask
        if os.geteuid() == 0:
            os.fchown(descriptor, uid, gid)
    finally:
        os.close(descriptor)
    return True
