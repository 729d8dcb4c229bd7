"""Placement policies to compare with, as their authors define them.

Scores are whole numbers from 0 to 100 where the authors' are; the first of equal hosts wins, as it does there, in an
order that the seed draws, as there. GpuPacking and GpuClustering score coarsely and depend on it by two points (in the
order of the file both come out a point below the published figures, against it two above); FGD and BestFit by a tenth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Final

import numpy as np

from gpuyard_daemon.sim.hosts import UNFIT, Host, PlacementPolicy, snuggest_gpu, whole_gpus
from gpuyard_daemon.sim.openb import WHOLE, Ask, HostShape
from gpuyard_daemon.sim.typical import TypicalTasks, after, alternatives

_TOP: Final = 100
_CPU_MAX: Final = 128_000
_GPU_MAX: Final = 8 * WHOLE
Scores = np.ndarray[tuple[int], np.dtype[np.int64]]


def tie_order(hosts: Sequence[HostShape], seed: int) -> tuple[HostShape, ...]:
    """The hosts in the order in which equal ones are preferred."""
    order = list(hosts)
    random.Random(seed).shuffle(order)
    return tuple(order)


class _Baseline:
    """The first of the best hosts; the fullest GPU with room."""

    name = ""

    def pick(self, scores: Scores) -> int:
        return int(scores.argmax())

    def gpus(self, host: Host, ask: Ask) -> tuple[int, ...]:
        if ask.milli == WHOLE:
            return whole_gpus(host, ask.gpus)
        return (snuggest_gpu(host, ask.milli),)

    def score(self, host: Host, ask: Ask) -> int:
        raise NotImplementedError


class Random(_Baseline):
    """Any host, any GPU."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def score(self, host: Host, ask: Ask) -> int:
        return 0

    def pick(self, scores: Scores) -> int:
        fitting = np.flatnonzero(scores > UNFIT)
        return int(fitting[self._random.randrange(len(fitting))]) if len(fitting) else 0

    def gpus(self, host: Host, ask: Ask) -> tuple[int, ...]:
        room = [position for position, free in enumerate(host.gpus_free) if free >= ask.milli]
        return tuple(self._random.sample(room, ask.gpus))


class FirstFit(_Baseline):
    """The first host, the first GPU."""

    name = "firstfit"

    def score(self, host: Host, ask: Ask) -> int:
        return 0

    def gpus(self, host: Host, ask: Ask) -> tuple[int, ...]:
        room = [position for position, free in enumerate(host.gpus_free) if free >= ask.milli]
        return tuple(room[: ask.gpus])


class BestFit(_Baseline):
    """Where the least CPU and GPU are left over, both as parts of the largest host's."""

    name = "bestfit"

    def score(self, host: Host, ask: Ask) -> int:
        cpu = (host.cpu_free - ask.cpu_milli) / _CPU_MAX
        gpu = (sum(host.gpus_free) - ask.total_milli) / _GPU_MAX
        return int((1.0 - 0.5 * cpu - 0.5 * gpu) * _TOP)


class DotProd(_Baseline):
    """Where what is asked for and what is free point the least alike."""

    name = "dotprod"

    def score(self, host: Host, ask: Ask) -> int:
        cpu = (host.cpu_free / _CPU_MAX) * (ask.cpu_milli / _CPU_MAX)
        gpu = (sum(host.gpus_free) / _GPU_MAX) * (ask.total_milli / _GPU_MAX)
        return int((1.0 - (cpu + gpu) / 2) * _TOP)


class GpuPacking(_Baseline):
    """GPUs in use first, then idle GPUs of hosts in use, then idle hosts."""

    name = "gpupacking"

    def score(self, host: Host, ask: Ask) -> int:
        if not ask.gpus:
            return 0
        idle = host.idle_gpus
        if idle == host.shape.gpus:
            return max(_TOP // 3 - idle, idle)
        used = sorted([free for free in host.gpus_free if free >= ask.milli])[: ask.gpus]
        broken = used.count(WHOLE)
        if broken:
            return max(_TOP // 2 - broken, _TOP // 3)
        return max(_TOP - sum(free // 10 for free in used) // 10, _TOP // 2)


class GpuClustering(_Baseline):
    """Beside asks for as many GPUs (all shares count as one kind), on hosts of that kind alone where possible."""

    name = "gpuclustering"

    def score(self, host: Host, ask: Ask) -> int:
        if not ask.gpus:
            return 0
        kinds = {_kind(held) for held in host.tenants if held.gpus}
        fullness = _TOP // 4 * (_GPU_MAX - sum(host.gpus_free)) // _GPU_MAX
        if _kind(ask) in kinds:
            return fullness + (_TOP * 3 // 4 if len(kinds) == 1 else _TOP // 2)
        return fullness + (0 if kinds else _TOP // 4)


def _kind(ask: Ask) -> int:
    return ask.gpus if ask.milli == WHOLE else 0


class Fgd(_Baseline):
    """Where the unusable idle GPU grows least (steepest descent of fragmentation)."""

    name = "fgd"

    def __init__(self, typical: TypicalTasks) -> None:
        self._typical = typical

    def score(self, host: Host, ask: Ask) -> int:
        return self._best(host, ask)[0]

    def gpus(self, host: Host, ask: Ask) -> tuple[int, ...]:
        return self._best(host, ask)[1]

    def _best(self, host: Host, ask: Ask) -> tuple[int, tuple[int, ...]]:
        typical, cpu = self._typical, host.cpu_free - ask.cpu_milli
        now = typical.of(host)
        best = -1
        chosen: tuple[int, ...] = ()
        for positions in alternatives(host, ask):
            gain = now - typical.idle_unusable(host.model, cpu, after(host, ask, positions))
            score = int(_TOP / (1.0 + math.exp(-gain / WHOLE)))
            if score > best:
                best, chosen = score, positions
        return best, chosen


PLACEMENT_POLICIES = (
    "gpuyard", "random", "firstfit", "bestfit", "dotprod", "gpupacking", "gpuclustering", "fgd",
)  # fmt: skip


def placement_policy(name: str, typical: TypicalTasks, seed: int) -> PlacementPolicy:
    """A baseline by name; `KeyError` for an unknown one, and for `gpuyard`, which is no baseline."""
    simple: dict[str, type[_Baseline]] = {
        policy.name: policy for policy in (FirstFit, BestFit, DotProd, GpuPacking, GpuClustering)
    }
    match name:
        case "random":
            return Random(seed)
        case "fgd":
            return Fgd(typical)
        case _:
            return simple[name]()
