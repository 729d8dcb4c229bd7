"""Builds the fake driver's libraries with gcc, once per content of their sources.

The cache lies under the temporary directory (`GPUYARD_FAKE_DRIVER_CACHE` says otherwise) and is keyed by everything
that goes into the result, so a changed source never meets an old library; and two test runs at once do not disturb each
other: each builds in a folder of its own and moves it into place whole.

`without` leaves symbols out, as an older driver would.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from fake_driver import geometry

SOURCES = Path(__file__).with_name("nvml")

#: Sources, without their ending: in libcuda alone, and in both libraries.
_CUDA_ONLY = {"cuda", "cuda_work"}
_SHARED = {"state", "books", "geometry", "faults", "checkpoint", "models_data"}
_COMPILE = ("-std=c11", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread")
_LINK = ("-shared", "-pthread", "-Wl,-z,defs")


class CannotBuild(Exception):
    """The fake driver could not be built; the text says what is missing."""


@dataclasses.dataclass(frozen=True)
class Built:
    """The libraries of one build."""

    nvml: Path
    cuda: Path


def build(*, without: tuple[str, ...] = ()) -> Built:
    """The libraries, from the cache or made now (about a second)."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise CannotBuild("the tests' NVIDIA driver is written in C and gcc is missing: apt-get install gcc libc6-dev")
    objects = _once(_cache() / _key(compiler, ()), lambda draft: _compile(draft, compiler))
    # A driver without some symbols is linked from the same objects.
    linked = _once(
        _cache() / f"{_key(compiler, without)}-linked", lambda draft: _link(draft, compiler, objects, without)
    )
    return Built(nvml=linked / "libnvidia-ml.so.1", cuda=linked / "libcuda.so.1")


def _cache() -> Path:
    told = os.environ.get("GPUYARD_FAKE_DRIVER_CACHE")
    return Path(told) if told else Path(tempfile.gettempdir()) / f"gpuyard-fake-driver-{os.getuid()}"


def _key(compiler: str, without: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    for part in (version, repr((_COMPILE, _LINK, sorted(without))).encode(), geometry.render().encode()):
        digest.update(part + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled now if nobody has before."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        draft = Path(place) / "done"
        draft.mkdir()
        fill(draft)
        try:
            draft.rename(folder)
        except OSError:
            # Another run was faster; what it made is the same.
            if not folder.is_dir():
                raise
    return folder


def _compile(draft: Path, compiler: str) -> None:
    tables = draft / "models_data.c"
    tables.write_text(geometry.render())
    running = []
    for source in [*sorted(SOURCES.glob("*.c")), tables]:
        command = [compiler, *_COMPILE, "-I", str(SOURCES), "-c", str(source), "-o", str(draft / f"{source.stem}.o")]
        running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    troubles = []
    for source, process in running:
        _, errors = process.communicate()
        if process.returncode != 0:
            troubles.append(f"{source.name}:\n{errors}")
    if troubles:
        raise CannotBuild("the fake driver does not compile\n" + "\n".join(troubles))


def _link(draft: Path, compiler: str, objects: Path, without: tuple[str, ...]) -> None:
    every = sorted(objects.glob("*.o"))
    nvml = [path for path in every if path.stem not in _CUDA_ONLY]
    cuda = [path for path in every if path.stem in _CUDA_ONLY | _SHARED]
    more: tuple[str, ...] = ()
    if without:
        # An anonymous version script: the symbols it lists become local, everything else stays as compiled.
        hidden = draft / "hidden.map"
        hidden.write_text("{ local: " + " ".join(f"{name};" for name in without) + " };")
        more = (f"-Wl,--version-script={hidden}",)
    for target, parts, options in ((draft / "libnvidia-ml.so.1", nvml, more), (draft / "libcuda.so.1", cuda, ())):
        command = [
            compiler,
            *_LINK,
            f"-Wl,-soname,{target.name}",
            *options,
            *map(str, parts),
            "-o",
            str(target),
            "-ldl",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotBuild(f"the fake driver does not link\n{done.stderr}")
