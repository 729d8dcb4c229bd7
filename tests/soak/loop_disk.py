"""A file system of its own in a file: it can be full, and it can be looked at as a power cut would leave it.

Needs root: it mounts. The copy holds what had reached the (modelled) disk; what was only in the page cache of the
file system on it is gone, as after a power cut.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


def require_root() -> None:
    if os.geteuid() != 0:
        raise SystemExit("this mounts a file system: run it as root")


def make_image(image: Path, size_mib: int) -> None:
    with image.open("wb") as file:
        file.truncate(size_mib * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)


@contextlib.contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """The image's file system at `directory`; whoever still uses it at the end is the caller's fault."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def copy_as_cut(image: Path, copy: Path) -> None:
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
