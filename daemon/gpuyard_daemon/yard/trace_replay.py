"""A recorded workload as jobs: `gpuyard demo --trace FILE`.

Reads the columns job_id, num_gpu, submit_time (ms), iterations, iteration_time (ms). A replayed job is a real process
that holds its GPUs for what the recorded one took, divided by the speed; arrivals are sped up by the same, so that
the queue is the recorded one's. Jobs of up to a node's cards stay on one node; larger ones become gangs over whole
nodes.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpuyard_daemon.yard.demo_workload import Arrival
from gpuyard_daemon.yard.home import YardTrouble
from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.units import Cpus, Memory

COLUMNS = ("job_id", "num_gpu", "submit_time", "iterations", "iteration_time")
#: Service time over iterations × iteration_time, as the trace's authors give it.
SERVICE_FACTOR = 1.015
#: Small, so that GPUs are what the replay is about.
CPUS, MEMORY = Cpus(500), Memory(256)


class TraceJob(NamedTuple):
    """One recorded job."""

    name: str
    gpus: int
    submit_ms: float
    lasts_ms: float


class Replay(NamedTuple):
    """A trace at a speed."""

    arrivals: list[Arrival]
    #: How long each job holds its cards when replayed, and how many: in the order of the arrivals.
    lengths_s: list[float]
    cards: list[int]

    @property
    def card_seconds(self) -> float:
        return sum(length * cards for length, cards in zip(self.lengths_s, self.cards, strict=True))


def read_trace(path: Path, limit: int | None) -> list[TraceJob]:
    """The first `limit` jobs by time of submission; `YardTrouble` names the line that cannot be read."""
    jobs = sorted(_rows(path), key=lambda job: job.submit_ms)
    if not jobs:
        raise YardTrouble(f"{path} holds no jobs")
    return jobs[:limit]


def _rows(path: Path) -> Iterator[TraceJob]:
    try:
        with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise YardTrouble(f"{path} has no column {missing[0]!r}: expected {', '.join(COLUMNS)}")
            for row in reader:
                try:
                    yield _job(row)
                except (TypeError, ValueError) as error:
                    raise YardTrouble(f"{path}, line {reader.line_num}: {error}") from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise YardTrouble(f"cannot read {path}: {error}") from None


def _job(row: dict[str, str]) -> TraceJob:
    gpus = int(row["num_gpu"])
    if gpus < 1:
        raise ValueError(f"num_gpu is {gpus}; expected 1 or more")
    lasts_ms = float(row["iterations"]) * float(row["iteration_time"]) * SERVICE_FACTOR
    return TraceJob(row["job_id"], gpus, float(row["submit_time"]), lasts_ms)


def replay(jobs: list[TraceJob], speed: float, cards_per_node: int, nodes: int) -> Replay:
    """The jobs, `speed` times faster."""
    begin_ms = jobs[0].submit_ms
    arrivals, lengths_s, cards = [], [], []
    for job in jobs:
        replicas = -(-job.gpus // cards_per_node)
        if replicas > nodes:
            raise YardTrouble(
                f"job {job.name} of the trace needs {job.gpus} GPUs; {nodes} nodes have {nodes * cards_per_node} "
                "(--nodes, --gpus)"
            )
        length_s = job.lasts_ms / 1000 / speed
        request = JobRequest(
            name=f"trace-{job.name}",
            command=["/bin/sleep", f"{length_s:.3f}"],
            replicas=replicas,
            gpus=job.gpus if replicas == 1 else cards_per_node,
            cpus=CPUS,
            memory=MEMORY,
        )
        arrivals.append(Arrival((job.submit_ms - begin_ms) / 1000 / speed, request))
        lengths_s.append(length_s)
        cards.append(job.gpus if replicas == 1 else replicas * cards_per_node)
    return Replay(arrivals, lengths_s, cards)
