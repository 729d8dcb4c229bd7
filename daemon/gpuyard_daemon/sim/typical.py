"""The typical tasks of a workload, and how much idle GPU they could not use: the measure of fragmentation.

A task shape m with weight p_m cannot use, on one host: all idle GPU, if it does not fit there by CPU, model or number
of GPUs (or wants no GPU at all); else the idle part of GPUs that have less free than it needs of each. Memory does not
count: the published definition leaves it out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gpuyard_daemon.sim.hosts import Host
from gpuyard_daemon.sim.openb import WHOLE, Ask

#: Share of all tasks that the typical ones cover.
COVERED = 0.95


class _Kind(NamedTuple):
    """Typical tasks alike but for their CPUs and models."""

    gpus: int
    milli: int


class TypicalTasks:
    """Weights of the shapes that make up most of a workload, and fragmentation measured by them."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        counts = Counter(ask._replace(memory_mib=0) for ask in asks)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        chosen, total = [], 0
        for ask, count in ranked:
            if total >= COVERED * len(asks):
                break
            chosen.append((ask, count))
            total += count
        self.weights: tuple[tuple[Ask, float], ...] = tuple((ask, count / total) for ask, count in chosen)
        self._cpus = sorted({ask.cpu_milli for ask, _ in self.weights})
        #: By (model, CPU step): weight of each kind that fits by model and CPU.
        self._fitting: dict[tuple[str, int], tuple[tuple[_Kind, float], ...]] = {}
        self._known: dict[tuple[str, int, tuple[int, ...]], float] = {}

    def idle_unusable(self, model: str, cpu_free: int, gpus_free: Sequence[int]) -> float:
        """Expected unusable idle thousandths on a host in this state."""
        step = bisect_right(self._cpus, cpu_free)
        key = (model, step, tuple(sorted(gpus_free)))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._measure(model, step, key[2])
        return known

    def of(self, host: Host) -> float:
        return self.idle_unusable(host.model, host.cpu_free, host.gpus_free)

    def _measure(self, model: str, step: int, gpus_free: tuple[int, ...]) -> float:
        idle = sum(gpus_free)
        usable = 0.0
        for (gpus, milli), weight in self._fitting_kinds(model, step):
            enough = [free for free in gpus_free if free >= milli]
            if len(enough) >= gpus:
                usable += weight * sum(enough)
        return idle - usable

    def _fitting_kinds(self, model: str, step: int) -> tuple[tuple[_Kind, float], ...]:
        found = self._fitting.get((model, step))
        if found is None:
            limit = self._cpus[step - 1] if step else -1
            sums: dict[_Kind, float] = {}
            for ask, weight in self.weights:
                if ask.gpus and ask.cpu_milli <= limit and (not ask.models or model in ask.models):
                    kind = _Kind(ask.gpus, ask.milli)
                    sums[kind] = sums.get(kind, 0.0) + weight
            found = self._fitting[(model, step)] = tuple(sorted(sums.items()))
        return found


def alternatives(host: Host, ask: Ask) -> list[tuple[int, ...]]:
    """The GPUs an ask could take, one choice for each that leads to a different state of the host."""
    if not ask.gpus:
        return [()]
    if ask.milli == WHOLE:
        return [tuple([position for position, free in enumerate(host.gpus_free) if free == WHOLE][: ask.gpus])]
    seen: set[int] = set()
    found: list[tuple[int, ...]] = []
    for position, free in enumerate(host.gpus_free):
        if free >= ask.milli and free not in seen:
            seen.add(free)
            found.append((position,))
    return found


def after(host: Host, ask: Ask, positions: tuple[int, ...]) -> tuple[int, ...]:
    """Free thousandths of each GPU after the ask took these."""
    free = list(host.gpus_free)
    for position in positions:
        free[position] -= ask.milli
    return tuple(free)
