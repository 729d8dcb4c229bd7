"""Readers of the openb format: GPU nodes, and pods that ask for CPU, memory and GPUs or a part of one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gpuyard_daemon.sim.trace_files import TraceError, rows

#: Thousandths of a GPU in a whole one.
WHOLE = 1000


class HostShape(NamedTuple):
    """One node of a cluster."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    model: str


class Ask(NamedTuple):
    """What one pod asks for. Equal asks are one shape."""

    cpu_milli: int
    memory_mib: int
    #: GPUs, 0 for work without any.
    gpus: int
    #: Thousandths of each of them; below 1000 only for one GPU.
    milli: int
    #: Models it may run on; empty: any.
    models: tuple[str, ...]

    @property
    def total_milli(self) -> int:
        return self.gpus * self.milli


def read_hosts(path: Path) -> tuple[HostShape, ...]:
    hosts = []
    for row in rows(path, ("sn", "cpu_milli", "memory_mib", "gpu", "model")):
        gpus = row.whole("gpu", most=64)
        if gpus:
            host = HostShape(row.text("sn"), row.whole("cpu_milli"), row.whole("memory_mib"), gpus, row.text("model"))
            hosts.append(host)
    if not hosts:
        raise TraceError(f"{path}: no node with a GPU")
    return tuple(hosts)


def read_asks(path: Path) -> tuple[Ask, ...]:
    asks = []
    for row in rows(path, ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")):
        gpus = row.whole("num_gpu", most=64)
        milli = row.whole("gpu_milli", most=WHOLE) if gpus else 0
        if gpus and not milli:
            raise row.wrong("gpu_milli", "1 to 1000 where num_gpu is above 0")
        if gpus > 1 and milli != WHOLE:
            raise row.wrong("gpu_milli", "1000 where num_gpu is above 1")
        models = tuple(sorted(filter(None, row.text("gpu_spec").split("|"))))
        asks.append(Ask(row.whole("cpu_milli"), row.whole("memory_mib"), gpus, milli, models if gpus else ()))
    if not asks:
        raise TraceError(f"{path}: no pods")
    return tuple(asks)
