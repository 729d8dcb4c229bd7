"""Pods under a baseline's placement policy: each alone in order of arrival, and whoever fits passes whoever does not.

The same shape as `core_pods`, so that fills and churn treat baselines and the core alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from gpuyard_daemon.sim.hosts import Board, PlacementPolicy
from gpuyard_daemon.sim.openb import Ask, HostShape
from gpuyard_daemon.sim.pods import PodChange
from gpuyard_daemon.sim.typical import TypicalTasks


class BoardPods:
    """A board, the pods on it, and those that wait."""

    def __init__(self, hosts: Sequence[HostShape], policy: PlacementPolicy) -> None:
        self.board = Board(hosts, policy)
        self.capacity_milli = self.board.capacity_milli
        #: By pod: its ask, host and GPUs.
        self._placed: dict[int, tuple[Ask, int, tuple[int, ...]]] = {}
        #: Waiting pods of each ask, oldest first.
        self._waiting: dict[Ask, deque[int]] = {}
        self._new: list[tuple[int, Ask]] = []
        #: Hosts that pods left.
        self._left: dict[int, None] = {}

    @property
    def held_milli(self) -> int:
        return self.board.held_milli

    def unusable_milli(self, typical: TypicalTasks) -> float:
        return sum(typical.of(host) for host in self.board.hosts)

    def place_round(self, asks: Sequence[Ask]) -> list[int]:
        took = []
        for ask in asks:
            began = time.perf_counter_ns()
            self.board.place(ask)
            took.append(time.perf_counter_ns() - began)
        return took

    def arrive(self, pod: int, ask: Ask) -> None:
        self._new.append((pod, ask))

    def depart(self, pod: int) -> None:
        ask, number, positions = self._placed.pop(pod)
        self.board.remove(ask, number, positions)
        self._left[number] = None

    def settle(self, now_s: float) -> list[PodChange]:
        changes: list[PodChange] = []
        for number in self._left:
            self._let_in(number, changes)
        self._left = {}
        for pod, ask in self._new:
            if ask in self._waiting or not self._start(pod, ask, changes):
                self._waiting.setdefault(ask, deque()).append(pod)
        self._new = []
        return changes

    def wake_s(self, now_s: float) -> float | None:
        return None

    def _start(self, pod: int, ask: Ask, changes: list[PodChange]) -> bool:
        place = self.board.place(ask)
        if place is None:
            return False
        self._placed[pod] = (ask, *place)
        changes.append(PodChange(pod, runs=True))
        return True

    def _let_in(self, number: int, changes: list[PodChange]) -> None:
        """Start the waiting pods that the changed host has room for, oldest first."""
        host = self.board.hosts[number]
        while True:
            fitting = [(queue[0], ask) for ask, queue in self._waiting.items() if host.fits(ask)]
            if not fitting:
                return
            pod, ask = min(fitting)
            self._waiting[ask].popleft()
            if not self._waiting[ask]:
                del self._waiting[ask]
            self._start(pod, ask, changes)
