"""Room that is kept in the streams' file system and given up when there is no other.

A stream that meets a full disk stays dead until the server is started again, and a server needs some room to start.
The ballast is a file beside the store, its blocks taken for real; `release` lets go of them, `restore` takes them
again once there is enough for everybody.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

NAME = "ballast"
BYTES_MAX = 64 * 1024**2
BYTES_MIN = 4 * 1024**2
#: Of what the streams may take: small yards keep a small ballast.
PART_OF_STORE = 20
#: It is taken again when so many times its size is free.
FREE_TIMES = 4


class Ballast:
    def __init__(self, directory: Path, store_bytes: int) -> None:
        self.path = directory / NAME
        self.bytes = max(BYTES_MIN, min(BYTES_MAX, store_bytes // PART_OF_STORE))

    @property
    def is_there(self) -> bool:
        try:
            return self.path.stat().st_size >= self.bytes
        except OSError:
            return False

    @property
    def free_bytes(self) -> int:
        """What is free in its file system for this account."""
        return shutil.disk_usage(self.path.parent).free

    def restore(self) -> bool:
        """Take it, if there is plenty of room; whether it is there now."""
        if self.is_there:
            return True
        if self.free_bytes < self.bytes * FREE_TIMES:
            return False
        descriptor = -1
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(descriptor, 0, self.bytes)
        except OSError:
            # Somebody was quicker: what was taken so far must not stand in the way.
            self.release()
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True

    def release(self) -> bool:
        """Give its room to others; whether there was any to give."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True
