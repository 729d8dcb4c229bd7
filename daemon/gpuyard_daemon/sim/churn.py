"""Churn: pods arrive and depart on a cluster kept near its load; how much GPU demand has to wait for a place.

Poisson arrivals, exponential lifetimes. The run starts from the steady state's number of pods, with lifetimes that need
no warm-up because they are memoryless; places do, so a first part is not counted. What arrives when, and how long it
lives, depends on the seed alone: policies are compared on the same pods.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import msgspec

from gpuyard_daemon.sim.openb import Ask
from gpuyard_daemon.sim.pods import Pods
from gpuyard_daemon.sim.typical import TypicalTasks

LIFETIME_S = 3600.0
WARM_UP_S = 3600.0
MEASURED_S = 3 * 3600.0
#: What a pod has longer to live after each time it was taken off its host: a checkpoint is written and read.
RESTART_S = 60.0


class ChurnResult(msgspec.Struct, frozen=True):
    """Time averages over the measured part."""

    #: GPU demand of waiting pods in per cent of all GPU demand in the system.
    blocked_pct: float
    #: Unusable idle GPU in per cent of capacity, sampled each minute.
    frag_pct: float
    #: Running pods moved or taken off, per 100 placed.
    moves_per_100: float
    #: From arrival to start, over pods that started in the measured part.
    avg_wait_s: float


class _Pod:
    """One pod in the system."""

    __slots__ = ("came_s", "ends_s", "left_s", "milli", "started")

    def __init__(self, milli: int, came_s: float, left_s: float) -> None:
        self.milli = milli
        self.came_s = came_s
        #: What it has still to live when it next starts; while it runs, `ends_s` counts.
        self.left_s = left_s
        #: -1: it does not run.
        self.ends_s = -1.0
        self.started = False


class Churn:
    """One run. Pods are numbered in order of arrival."""

    def __init__(self, pods: Pods, asks: Sequence[Ask], load: float, seed: int) -> None:
        self._yard = pods
        self._asks = asks
        self._dice = random.Random(seed)
        self._load_milli = load * pods.capacity_milli
        mean_milli = sum(ask.total_milli for ask in asks) / len(asks)
        self._gap_s = LIFETIME_S * mean_milli / self._load_milli
        self.now_s = 0.0
        self._pods: dict[int, _Pod] = {}
        self._ends: list[tuple[float, int]] = []
        self._waiting_milli = self._running_milli = 0
        self._arrived = 0
        self._blocked_area = self._demand_area = 0.0
        self._waits_s = 0.0
        self._starts = self._firsts = self._moves = 0

    def run(self, typical: TypicalTasks) -> ChurnResult:
        while self._running_milli + self._waiting_milli < self._load_milli:
            self._arrive()
            self._settle()
        end_s = WARM_UP_S + MEASURED_S
        next_arrival_s = self._dice.expovariate(1 / self._gap_s)
        next_sample_s = WARM_UP_S
        fragmentation: list[float] = []
        while self.now_s < end_s:
            depart_s = self._next_end_s(end_s)
            wake_s = self._yard.wake_s(self.now_s)
            self._pass_until(min(depart_s, next_arrival_s, next_sample_s, end_s, end_s if wake_s is None else wake_s))
            if self.now_s == next_sample_s:
                fragmentation.append(100.0 * self._yard.unusable_milli(typical) / self._yard.capacity_milli)
                next_sample_s += 60.0
                continue
            if self.now_s == depart_s:
                self._depart(heapq.heappop(self._ends)[1])
            elif self.now_s == next_arrival_s:
                self._arrive()
                next_arrival_s += self._dice.expovariate(1 / self._gap_s)
            self._settle()
        return ChurnResult(
            blocked_pct=100.0 * self._blocked_area / self._demand_area,
            frag_pct=sum(fragmentation) / len(fragmentation),
            moves_per_100=100.0 * self._moves / max(1, self._starts),
            avg_wait_s=self._waits_s / max(1, self._firsts),
        )

    def _next_end_s(self, otherwise_s: float) -> float:
        ends = self._ends
        while ends and ((pod := self._pods.get(ends[0][1])) is None or pod.ends_s != ends[0][0]):
            heapq.heappop(ends)
        return ends[0][0] if ends else otherwise_s

    def _pass_until(self, moment_s: float) -> None:
        if self.now_s >= WARM_UP_S:
            passed = moment_s - self.now_s
            self._blocked_area += passed * self._waiting_milli
            self._demand_area += passed * (self._waiting_milli + self._running_milli)
        self.now_s = moment_s

    def _arrive(self) -> None:
        ask = self._asks[self._dice.randrange(len(self._asks))]
        self._pods[self._arrived] = _Pod(ask.total_milli, self.now_s, self._dice.expovariate(1 / LIFETIME_S))
        self._waiting_milli += ask.total_milli
        self._yard.arrive(self._arrived, ask)
        self._arrived += 1

    def _depart(self, number: int) -> None:
        self._running_milli -= self._pods.pop(number).milli
        self._yard.depart(number)

    def _settle(self) -> None:
        counts = self.now_s >= WARM_UP_S
        for number, runs in self._yard.settle(self.now_s):
            pod = self._pods[number]
            change = pod.milli if runs else -pod.milli
            self._running_milli += change
            self._waiting_milli -= change
            if not runs:
                pod.left_s, pod.ends_s = pod.ends_s - self.now_s + RESTART_S, -1.0
                self._moves += counts
                continue
            pod.ends_s = self.now_s + pod.left_s
            heapq.heappush(self._ends, (pod.ends_s, number))
            self._starts += counts
            if not pod.started and counts:
                self._firsts += 1
                self._waits_s += self.now_s - pod.came_s
            pod.started = True
