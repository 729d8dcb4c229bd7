"""What the demo's yard is given to do: a mix of jobs over time, and services under a wave of load.

Everything is decided by a seeded generator before anything runs, so that two demos are given the same. The jobs are
real processes that print and sleep: they hold their partitions for as long as a real job would hold its own, and
leave the machine's few cores to the yard.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.services import ServiceRequest

SEED = 20
#: Of the demo's length: jobs arrive until here, and the services are deleted here, so that it ends on time.
ARRIVALS_UNTIL = 0.72
SERVICES_UNTIL = 0.85
#: Compute that arrives, as a part of what the cards could do in that time: somewhat more, so that a queue builds up.
OFFERED_LOAD = 1.05
STEP_S = 0.5

#: Prints a line every half second for $1 seconds, as a training loop would.
_STEPS = 'n=0; while [ $n -lt $0 ]; do n=$((n+1)); echo "step $n of $0 on $GPUYARD_NODE"; sleep 0.5; done'
#: Fails on its first attempt: the second is its retry.
_UNLUCKY = '[ "$GPUYARD_ATTEMPT" -gt 1 ] || { echo "out of luck" >&2; exit 3; }; echo "second try"; exec sleep $0'
_SERVE = 'echo "serving on port $PORT"; trap "exit 0" TERM; while :; do sleep 0.5; done'


class Arrival(NamedTuple):
    """A job and when it is handed in."""

    #: Since the demo's beginning.
    at_s: float
    request: JobRequest


class LoadWave(NamedTuple):
    """A service and the load that comes and goes on it."""

    request: ServiceRequest
    #: Highest concurrency, and how many times it comes.
    peak: int
    waves: float
    #: Where in its first wave it begins, as a part of one.
    phase: float

    def concurrency(self, progress: float) -> int:
        """The load at a point of the demo, 0 … 1; never quite nothing but at its troughs."""
        turn = 2 * math.pi * (self.waves * progress + self.phase)
        return max(0, round(self.peak * (1 - math.cos(turn)) / 2 - self.peak * 0.03))


class _Kind(NamedTuple):
    """One kind of job in the mix."""

    name: str
    #: How many of a hundred jobs are of it.
    weight: int
    fields: dict[str, Any]
    #: Shortest and longest run, seconds of a demo of 60.
    shortest_s: float
    longest_s: float
    #: Cards that it takes, for the offered load.
    cards: float


_KINDS = (
    _Kind("pretrain", 3, {"replicas": 2, "gpus": 8}, 4, 7, 16),
    _Kind("finetune", 6, {"replicas": 2, "gpus": 2}, 4, 9, 4),
    _Kind("train", 14, {"gpus": 2}, 4, 10, 2),
    _Kind("train-one", 12, {"gpus": 1, "gpu_model": "H100"}, 3, 9, 1),
    _Kind("share", 15, {"gpu": "0.25", "gpu_memory": "16Gi"}, 3, 9, 0.25),
    _Kind("share-half", 10, {"gpu": "0.5"}, 3, 8, 0.5),
    _Kind("mig-small", 9, {"mig": "1g.10gb"}, 3, 9, 0.14),
    _Kind("mig-large", 6, {"mig": "3g.40gb", "isolation": "hard"}, 3, 8, 0.5),
    _Kind("notebook", 10, {"gpu": "0.5", "gpu_memory": "12Gi", "isolation": "none"}, 4, 10, 0.25),
    _Kind("quick", 12, {"gpu": "0.1", "gpu_memory": "4Gi"}, 0.1, 0.6, 0.1),
    _Kind("prepare", 3, {}, 1, 4, 0),
)
#: Small, so that the machine's own cores and memory are not what the demo is about.
_HOST = {"cpus": "0.5", "memory": "256Mi"}


def jobs(seconds: float, cards: int, nodes: int) -> list[Arrival]:
    """The jobs of a demo of this length on so many cards, in the order of their arrival."""
    generator = random.Random(SEED)
    kinds = [kind for kind in _KINDS if kind.fields.get("replicas", 1) <= nodes and kind.cards <= cards * 0.75]
    budget = OFFERED_LOAD * cards * seconds * ARRIVALS_UNTIL
    scale = seconds / 60
    chosen: list[JobRequest] = []
    while budget > 0:
        kind = generator.choices(kinds, [kind.weight for kind in kinds])[0]
        lasts_s = scale * generator.uniform(kind.shortest_s, kind.longest_s)
        budget -= max(kind.cards, 0.05) * lasts_s
        chosen.append(_request(kind, lasts_s, len(chosen) + 1, generator))
    times = sorted(_arrival(generator) * seconds * ARRIVALS_UNTIL for _ in chosen)
    arrivals = [Arrival(at_s, request) for at_s, request in zip(times, chosen, strict=True)]
    unlucky_at_s = times[len(times) // 3]
    unlucky = JobRequest(name="unlucky", command=["/bin/sh", "-c", _UNLUCKY, "1"], gpus=1, retries=1, env={})
    return sorted([*arrivals, Arrival(unlucky_at_s, unlucky)], key=lambda arrival: arrival.at_s)


def _arrival(generator: random.Random) -> float:
    """Two rushes on an even flow: a queue builds up and drains."""
    kind = generator.random()
    if kind < 0.25:
        return generator.uniform(0.0, 0.05)
    if kind < 0.4:
        return generator.uniform(0.5, 0.55)
    return generator.random()


def _request(kind: _Kind, lasts_s: float, number: int, generator: random.Random) -> JobRequest:
    from gpuyard.requests import job_request

    steps = max(1, round(lasts_s / STEP_S))
    if lasts_s < 1:
        command = ["/bin/sh", "-c", 'echo "quick work on $GPUYARD_NODE"; exec sleep $0', f"{lasts_s:.2f}"]
    else:
        command = ["/bin/sh", "-c", _STEPS, str(steps)]
    priority = generator.choices((0, 1, -1), (8, 1, 1))[0]
    fields = {"name": f"{kind.name}-{number}", "command": command, "priority": priority}
    return job_request(None, {**_HOST, **kind.fields, **fields})


def services(cards: int) -> list[LoadWave]:
    """Two services whose waves do not meet."""
    most = max(2, cards // 4)
    chat = _service("chat", "llama-8b", {"mig": "3g.40gb"}, minimum=1, maximum=most, target=4)
    embed = _service("embed", "bge-m3", {"gpu": "0.25", "isolation": "soft"}, minimum=0, maximum=most, target=8)
    return [LoadWave(chat, most * 4, 2.0, 0.0), LoadWave(embed, most * 8, 2.0, 0.5)]


def _service(
    name: str, model: str, replica: dict[str, Any], *, minimum: int, maximum: int, target: int
) -> ServiceRequest:
    from gpuyard.requests import service_request

    fields: dict[str, Any] = {
        "name": name,
        "model": model,
        "command": ["/bin/sh", "-c", _SERVE],
        "replica": {**_HOST, **replica},
        "min_replicas": minimum,
        "max_replicas": maximum,
        "target_concurrency": target,
        "scale_down_after": "3s",
        "stop_grace": "3s",
    }
    return service_request(None, fields)
