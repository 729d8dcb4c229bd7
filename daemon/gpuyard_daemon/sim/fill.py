"""Filling a cluster: pods in random order, one try each, nothing departs; how much of the GPUs ends up held."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import msgspec

from gpuyard_daemon.sim.hosts import Board, PlacementPolicy
from gpuyard_daemon.sim.openb import Ask, HostShape
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


def fill(
    hosts: Sequence[HostShape],
    asks: Sequence[Ask],
    policy: PlacementPolicy,
    seed: int,
    batch: int = 1,
    typical: TypicalTasks | None = None,
    rank: Callable[[Ask], tuple[int, ...]] | None = None,
) -> FillResult:
    """Feed all arrivals; `batch` consecutive ones are one round, which places its members in the order of `rank`."""
    board = Board(hosts, policy)
    order = arrivals(asks, board.capacity_milli, seed)
    allocation: list[float] = []
    took: list[int] = []
    demand = 0
    for begin in range(0, len(order), batch):
        together = order[begin : begin + batch]
        if batch > 1 and rank is not None:
            together.sort(key=rank)
        for ask in together:
            start = time.perf_counter_ns()
            board.place(ask)
            took.append(time.perf_counter_ns() - start)
            demand += ask.total_milli
        while len(allocation) < len(MARKS) and demand * 100 >= MARKS[len(allocation)] * board.capacity_milli:
            allocation.append(100.0 * board.held_milli / board.capacity_milli)
    measure = typical or TypicalTasks(asks)
    unusable = sum(measure.of(host) for host in board.hosts)
    fragmentation = 100.0 * unusable / board.capacity_milli
    return FillResult(tuple(allocation), fragmentation, tuple(took))
