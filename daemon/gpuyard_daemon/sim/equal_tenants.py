"""Tenants of equal weight who all want more than there is, each with jobs of another shape.

What a fair scheduler is to be judged by: every tenant asks for the same GPU time, and together they ask for more than
the cluster has, day after day. One floods it with short jobs, one has long gangs, one arrays of middling jobs that come
at once, one a mixture with a heavy tail. Shortest first gives almost everything to the first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final, TypeAlias

from gpuyard_daemon.sim.jobs_run import DAY_S
from gpuyard_daemon.sim.trace_jobs import TraceJob

#: What is submitted at once: (GPUs, seconds) of each job.
_Batch: TypeAlias = list[tuple[int, float]]
_LEAST_S: Final = 30.0
_ARRAY_SIZE: Final = 32


def _short(dice: random.Random, node_gpus: int) -> _Batch:
    return [(1, dice.expovariate(1 / 900.0))]


def _gangs(dice: random.Random, node_gpus: int) -> _Batch:
    return [(2 * node_gpus, dice.lognormvariate(math.log(2 * 3600.0), 0.8))]


def _arrays(dice: random.Random, node_gpus: int) -> _Batch:
    return [(1, dice.lognormvariate(math.log(3600.0), 0.5)) for _ in range(_ARRAY_SIZE)]


def _mixed(dice: random.Random, node_gpus: int) -> _Batch:
    gpus = dice.choice([size for size in (1, 2, 4, 8) if size <= node_gpus])
    return [(gpus, dice.lognormvariate(math.log(3600.0), 1.2))]


_SHAPES: Final[dict[str, Callable[[random.Random, int], _Batch]]] = {
    "short": _short, "gangs": _gangs, "arrays": _arrays, "mixed": _mixed,
}  # fmt: skip


def equal_tenants(load: float, days: float, gpus: int, node_gpus: int, seed: int) -> tuple[TraceJob, ...]:
    """Jobs in order of submission. `load`: GPU time wanted a day over what `gpus` have, all tenants together."""
    each = load * gpus / len(_SHAPES)
    found: list[tuple[float, str, int, float]] = []
    for tenant, shape in _SHAPES.items():
        dice = random.Random(f"{seed}/{tenant}")
        at_s = 0.0
        while True:
            batch = [(wanted, max(_LEAST_S, run_s)) for wanted, run_s in shape(dice, node_gpus)]
            # At even distances: whoever asks next waits until what it asked for before would be through at its rate.
            found += [(at_s, tenant, wanted, run_s) for wanted, run_s in batch]
            at_s += sum(wanted * run_s for wanted, run_s in batch) / each
            if at_s >= days * DAY_S:
                break
    found.sort()
    return tuple(
        TraceJob(number, at_s, wanted, run_s, tenant=tenant)
        for number, (at_s, tenant, wanted, run_s) in enumerate(found)
    )
