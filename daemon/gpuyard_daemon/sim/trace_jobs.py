"""Readers of job traces: Muri, Philly, Chronus and gpuyard's own CSV. All become `TraceJob`s in seconds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gpuyard_daemon.sim.trace_files import Row, TraceError, rows

#: Muri's published service times contain this profiling overhead.
_MURI_OVERHEAD = 1.015
#: Chronus counts time in ticks, by their size minutes.
_CHRONUS_TICK_S = 60.0

#: Seconds without progress at each start on the Muri traces: (model, ((GPUs from, seconds), ...)).
_RESTART_S: dict[str, tuple[tuple[int, float], ...]] = {
    "bert": ((1, 10.0),),
    "gpt2": ((1, 10.0),),
    "vgg16": ((1, 7.0), (4, 8.0), (8, 9.0), (16, 9.0), (32, 10.0)),
    "vgg19": ((1, 7.0), (4, 8.0), (8, 9.0), (16, 10.0), (32, 10.0)),
    "resnet18": ((1, 4.0), (2, 5.0), (8, 7.0)),
    "shufflenet_v2_x1_0": ((1, 4.0), (4, 5.0), (16, 7.0), (32, 8.0)),
    "a2c": ((1, 38.0), (2, 39.0), (8, 46.0)),
    "dqn": ((1, 5.0), (4, 6.0), (16, 8.0)),
}
_RESTART_UNKNOWN_S = 10.0


class TraceJob(msgspec.Struct, frozen=True):
    """One job of a trace."""

    #: Position in order of submission.
    number: int
    submit_s: float
    gpus: int
    #: Run time on the GPUs it asks for.
    service_s: float
    tenant: str = ""
    #: What it trains, where the trace says so.
    model: str = ""
    #: When it should be done, counted from submission; 0: no matter when.
    deadline_s: float = 0.0


def model_restart_s(model: str, gpus: int) -> float:
    """Seconds without progress at each start and restart, by model and GPUs."""
    seconds = _RESTART_UNKNOWN_S
    for least, value in _RESTART_S.get(model, ()):
        if gpus >= least:
            seconds = value
    return seconds


def _muri(row: Row) -> TraceJob:
    service_ms = row.whole("iterations") * row.number("iteration_time") * _MURI_OVERHEAD
    return TraceJob(
        0, row.number("submit_time") / 1000, row.whole("num_gpu", least=1), service_ms / 1000,
        model=row.text("model_name"),
    )  # fmt: skip


def _philly(row: Row) -> TraceJob:
    try:
        stamp = datetime.strptime(row.text("timestamp"), "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        raise row.wrong("timestamp", "YYYY-MM-DD hh:mm:ss") from None
    gpus = row.whole("num_gpus", least=1)
    return TraceJob(0, stamp.timestamp(), gpus, row.number("duration"), tenant=row.text("cluster"))


def _chronus(row: Row) -> TraceJob:
    first = row.text("expect_time_list").strip("[]").split("-")[0].split(" ")[0].split(",")[0]
    try:
        deadline = float(first) if first else 0.0
    except ValueError:
        raise row.wrong("expect_time_list", "ticks") from None
    gpus = row.whole("num_gpu")
    return TraceJob(
        0, row.number("submit_time") * _CHRONUS_TICK_S, gpus, row.number("duration") * _CHRONUS_TICK_S,
        tenant=row.text("user"), model=row.text("model_name"), deadline_s=deadline * _CHRONUS_TICK_S,
    )  # fmt: skip


def _gpuyard(row: Row) -> TraceJob:
    return TraceJob(
        0, row.number("submit_s"), row.whole("gpus", least=1), row.number("duration_s"), tenant=row.text("tenant")
    )


_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], TraceJob]]] = {
    "muri": (("submit_time", "num_gpu", "iterations", "iteration_time", "model_name"), _muri),
    "philly": (("timestamp", "duration", "num_gpus", "cluster"), _philly),
    "chronus": (("submit_time", "num_gpu", "duration", "user", "expect_time_list"), _chronus),
    "gpuyard": (("job_id", "submit_s", "gpus", "duration_s", "tenant"), _gpuyard),
}
JOB_FORMATS = tuple(_FORMATS)


def read_jobs(path: Path, file_format: str) -> tuple[TraceJob, ...]:
    """All jobs in order of submission, the first at second 0. Jobs that ask for no GPU (Chronus) are left out."""
    columns, read = _FORMATS[file_format]
    jobs = [job for job in map(read, rows(path, columns)) if job.gpus]
    if not jobs:
        raise TraceError(f"{path}: no jobs")
    jobs.sort(key=lambda job: job.submit_s)
    begin_s = jobs[0].submit_s
    return tuple(
        msgspec.structs.replace(job, number=number, submit_s=job.submit_s - begin_s) for number, job in enumerate(jobs)
    )
