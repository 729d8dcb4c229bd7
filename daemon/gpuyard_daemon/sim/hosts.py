"""Simulated hosts and the board that knows, for each shape of ask, how much a policy likes each host.

The board judges a host again for a shape only when the host changed since the shape last asked, so a decision costs
the changes since then and one search for the maximum. A policy's judgement must depend on the host and the ask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gpuyard_daemon.sim.openb import WHOLE, Ask, HostShape

#: Score of a host on which an ask does not fit.
UNFIT = -(1 << 62)


class Host:
    """What is free on one simulated host."""

    __slots__ = ("cpu_free", "gpus_free", "idle_gpus", "memory_free", "model", "number", "shape", "tenants")

    def __init__(self, number: int, shape: HostShape) -> None:
        self.number = number
        self.shape = shape
        self.model = shape.model
        self.cpu_free = shape.cpu_milli
        self.memory_free = shape.memory_mib
        #: Free thousandths of each GPU, by position.
        self.gpus_free: tuple[int, ...] = (WHOLE,) * shape.gpus
        self.idle_gpus = shape.gpus
        #: How many of each ask it holds.
        self.tenants: dict[Ask, int] = {}

    def fits(self, ask: Ask) -> bool:
        if self.cpu_free < ask.cpu_milli or self.memory_free < ask.memory_mib:
            return False
        if not ask.gpus:
            return True
        if ask.models and self.model not in ask.models:
            return False
        if ask.milli == WHOLE:
            return self.idle_gpus >= ask.gpus
        return max(self.gpus_free) >= ask.milli

    def take(self, ask: Ask, positions: Sequence[int]) -> None:
        self.tenants[ask] = self.tenants.get(ask, 0) + 1
        self._change(ask, positions, -1)

    def give(self, ask: Ask, positions: Sequence[int]) -> None:
        left = self.tenants[ask] - 1
        if left:
            self.tenants[ask] = left
        else:
            del self.tenants[ask]
        self._change(ask, positions, 1)

    def _change(self, ask: Ask, positions: Sequence[int], sign: int) -> None:
        self.cpu_free += sign * ask.cpu_milli
        self.memory_free += sign * ask.memory_mib
        if positions:
            free = list(self.gpus_free)
            for position in positions:
                free[position] += sign * ask.milli
            self.gpus_free = tuple(free)
            self.idle_gpus = free.count(WHOLE)


def whole_gpus(host: Host, count: int) -> tuple[int, ...]:
    """The first idle GPUs."""
    return tuple([position for position, free in enumerate(host.gpus_free) if free == WHOLE][:count])


def snuggest_gpu(host: Host, milli: int) -> int:
    """The fullest GPU with room for a share; the first of equals."""
    return min((free, position) for position, free in enumerate(host.gpus_free) if free >= milli)[1]


class PlacementPolicy(Protocol):
    """How to choose among the hosts that fit."""

    name: str

    def score(self, host: Host, ask: Ask) -> int:
        """How much it likes a host on which the ask fits; more is better."""
        ...

    def gpus(self, host: Host, ask: Ask) -> tuple[int, ...]:
        """Which GPUs of the chosen host."""
        ...

    def pick(self, scores: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
        """The host, given all hosts' scores; at least one is above `UNFIT`."""
        ...


class Board:
    """All hosts, and each shape's scores over them."""

    def __init__(self, shapes: Sequence[HostShape], policy: PlacementPolicy) -> None:
        self.hosts = [Host(number, shape) for number, shape in enumerate(shapes)]
        self.policy = policy
        self.capacity_milli = WHOLE * sum(shape.gpus for shape in shapes)
        self.held_milli = 0
        #: Numbers of hosts in the order in which they changed.
        self._changes: list[int] = []
        #: By ask: scores of all hosts, and how far of the changes is in them.
        self._scores: dict[Ask, tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]] = {}

    def place(self, ask: Ask) -> tuple[int, tuple[int, ...]] | None:
        """Put one ask on the best host; None if it fits nowhere."""
        scores = self._scores_of(ask)
        number = self.policy.pick(scores)
        if scores[number] == UNFIT:
            return None
        host = self.hosts[number]
        positions = self.policy.gpus(host, ask) if ask.gpus else ()
        host.take(ask, positions)
        self.held_milli += ask.total_milli
        self._changes.append(number)
        return number, positions

    def remove(self, ask: Ask, number: int, positions: tuple[int, ...]) -> None:
        self.hosts[number].give(ask, positions)
        self.held_milli -= ask.total_milli
        self._changes.append(number)

    def _scores_of(self, ask: Ask) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        known = self._scores.get(ask)
        if known is None:
            scores = np.full(len(self.hosts), UNFIT, dtype=np.int64)
            changed: Sequence[int] | set[int] = range(len(self.hosts))
        else:
            scores, read_to = known
            changed = set(self._changes[read_to:])
        hosts, score = self.hosts, self.policy.score
        for number in changed:
            host = hosts[number]
            scores[number] = score(host, ask) if host.fits(ask) else UNFIT
        self._scores[ask] = (scores, len(self._changes))
        return scores
