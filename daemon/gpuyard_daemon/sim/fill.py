"""Filling a cluster: pods in random order, one try each, nothing departs; how much of the GPUs ends up held."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import msgspec

from gpuyard_daemon.sim.openb import Ask
from gpuyard_daemon.sim.pods import Pods
from gpuyard_daemon.sim.typical import TypicalTasks

#: Arrived demand, in per cent of capacity, at which the allocation is read.
MARKS = (90, 95, 100, 110, 130)
_LAST = MARKS[-1]


class FillResult(msgspec.Struct, frozen=True):
    """One seed's outcome."""

    #: GPU allocation in per cent at each of `MARKS`.
    allocation: tuple[float, ...]
    #: Unusable idle GPU at the end, in per cent of capacity.
    fragmentation: float
    #: Time of each decision.
    took_ns: tuple[int, ...]


def arrivals(asks: Sequence[Ask], capacity_milli: int, seed: int) -> list[Ask]:
    """The pod list shuffled, then random pods of it until enough GPU was asked for."""
    dice = random.Random(seed)
    order = list(asks)
    dice.shuffle(order)
    limit = capacity_milli * _LAST / 100
    demand = sum(ask.total_milli for ask in order)
    while demand < limit:
        ask = asks[dice.randrange(len(asks))]
        order.append(ask)
        demand += ask.total_milli
    return order


def fill(pods: Pods, asks: Sequence[Ask], seed: int, batch: int, typical: TypicalTasks) -> FillResult:
    """Feed all arrivals; `batch` consecutive ones are one round."""
    capacity = pods.capacity_milli
    order = arrivals(asks, capacity, seed)
    allocation: list[float] = []
    took: list[int] = []
    demand = 0
    for begin in range(0, len(order), batch):
        together = order[begin : begin + batch]
        took += pods.place_round(together)
        demand += sum(ask.total_milli for ask in together)
        while len(allocation) < len(MARKS) and demand * 100 >= MARKS[len(allocation)] * capacity:
            allocation.append(100.0 * pods.held_milli / capacity)
    return FillResult(tuple(allocation), 100.0 * pods.unusable_milli(typical) / capacity, tuple(took))


def read_as_published(pods: Pods, order: Sequence[Ask]) -> tuple[float, float]:
    """Feed all arrivals; mean allocation over those at which arrived demand rounds to 100, and to 130 per cent."""
    capacity = pods.capacity_milli
    held: dict[int, list[float]] = {100: [], 130: []}
    demand = 0
    for ask in order:
        pods.place_round((ask,))
        demand += ask.total_milli
        held.get(round(100 * demand / capacity), []).append(100.0 * pods.held_milli / capacity)
    return statistics.fmean(held[100]), statistics.fmean(held[130])
