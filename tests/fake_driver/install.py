"""Lays out a fake driver's folder like an installed driver: libraries in `lib/`, programs in `bin/`.

The programs are wrappers that say where their state is, so that they work with no environment at all; each becomes the
Python program in the same process, so its pid is the one that was started.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys

_SYSTEM = "/usr/bin/python3"
_SCRIPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin")


def install(root: str, nvml: str, cuda: str) -> None:
    """Fills `root`, which must not have been filled before."""
    library, programs = os.path.join(root, "lib"), os.path.join(root, "bin")
    os.makedirs(library)
    os.makedirs(programs)
    for path in (nvml, cuda):
        shutil.copy(path, library)
    for name in ("nvidia-cuda-mps-control", "nvidia-smi", "fake-cuda"):
        _write_wrapper(os.path.join(programs, name), root, os.path.join(_SCRIPTS, name))


def _interpreter() -> str:
    """This one, or the system's where this one lies in a home that the accounts of jobs may not enter."""
    real = os.path.realpath(sys.executable)
    folders = [os.path.dirname(real)]
    while folders[-1] != "/":
        folders.append(os.path.dirname(folders[-1]))
    is_open = os.geteuid() != 0 or all(os.stat(folder).st_mode & 0o001 for folder in folders)
    return sys.executable if is_open or not os.path.exists(_SYSTEM) else _SYSTEM


def _write_wrapper(path: str, root: str, script: str) -> None:
    """A program of this driver: the script of bin/, told where its state is, in the same process."""
    settings = {
        "FAKENVML_STATE": os.path.join(root, "state"),
        "FAKENVML_LIBRARY": os.path.join(root, "lib", "libnvidia-ml.so.1"),
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    command = shlex.join([_interpreter(), "-IS", script])
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\n{exports}exec {command} "$@"\n')
    os.chmod(path, 0o755)
