"""Churn: pods arrive and depart on a cluster kept near its load; how much GPU demand has to wait for a place.

Poisson arrivals, exponential lifetimes, a queue in which whoever fits passes whoever does not. The run starts from the
steady state's number of pods, with lifetimes that need no warm-up because they are memoryless; places do, so a first
part is not counted.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence

import msgspec

from gpuyard_daemon.sim.hosts import Board, PlacementPolicy
from gpuyard_daemon.sim.openb import Ask, HostShape
from gpuyard_daemon.sim.typical import TypicalTasks

LIFETIME_S = 3600.0
WARM_UP_S = 3600.0
MEASURED_S = 3 * 3600.0


class ChurnResult(msgspec.Struct, frozen=True):
    """Time averages over the measured part."""

    #: GPU demand of waiting pods in per cent of all GPU demand in the system.
    blocked_pct: float
    #: Unusable idle GPU in per cent of capacity, sampled each minute.
    frag_pct: float
    #: Pods moved per 100 placed.
    moves_per_100: float
    #: From arrival to start, over pods that started in the measured part.
    avg_wait_s: float


class Mover:
    """A policy's right to move what runs so that something waiting fits; the default moves nothing."""

    def make_room(self, churn: Churn, ask: Ask) -> bool:
        """Whether moves were made after which `ask` fits somewhere."""
        return False


class Churn:
    """One run. Pods are numbered in order of arrival."""

    def __init__(
        self, hosts: Sequence[HostShape], asks: Sequence[Ask], policy: PlacementPolicy, load: float, seed: int,
        mover: Mover | None = None,
    ) -> None:  # fmt: skip
        self.board = Board(hosts, policy)
        self._asks = asks
        self._dice = random.Random(seed)
        self._mover = mover or Mover()
        self._load_milli = load * self.board.capacity_milli
        mean_milli = sum(ask.total_milli for ask in asks) / len(asks)
        self._gap_s = LIFETIME_S * mean_milli / self._load_milli
        self.now_s = 0.0
        #: By pod: its ask, host and GPUs.
        self.placed: dict[int, tuple[Ask, int, tuple[int, ...]]] = {}
        #: Pods on each host.
        self.on_host: list[set[int]] = [set() for _ in hosts]
        self._ends: list[tuple[float, int]] = []
        #: Waiting pods of each ask, oldest first, and when each came.
        self._waiting: dict[Ask, deque[int]] = {}
        self._came_s: dict[int, float] = {}
        self._waiting_milli = 0
        self._pods = 0
        self._blocked_area = self._demand_area = 0.0
        self._waits_s = 0.0
        self.starts = 0
        self.moves = 0

    def run(self, typical: TypicalTasks) -> ChurnResult:
        while self.board.held_milli + self._waiting_milli < self._load_milli:
            self._arrive()
        end_s = WARM_UP_S + MEASURED_S
        next_arrival_s = self._dice.expovariate(1 / self._gap_s)
        next_sample_s = WARM_UP_S
        fragmentation: list[float] = []
        while self.now_s < end_s:
            depart_s = self._ends[0][0] if self._ends else end_s
            self._pass_until(min(depart_s, next_arrival_s, next_sample_s, end_s))
            if self.now_s == next_sample_s:
                unusable = sum(typical.of(host) for host in self.board.hosts)
                fragmentation.append(100.0 * unusable / self.board.capacity_milli)
                next_sample_s += 60.0
            elif self.now_s == depart_s:
                self._depart(heapq.heappop(self._ends)[1])
            elif self.now_s == next_arrival_s:
                self._arrive()
                next_arrival_s += self._dice.expovariate(1 / self._gap_s)
        return ChurnResult(
            blocked_pct=100.0 * self._blocked_area / self._demand_area,
            frag_pct=sum(fragmentation) / len(fragmentation),
            moves_per_100=100.0 * self.moves / max(1, self.starts),
            avg_wait_s=self._waits_s / max(1, self.starts),
        )

    def _pass_until(self, moment_s: float) -> None:
        if self.now_s >= WARM_UP_S:
            passed = moment_s - self.now_s
            self._blocked_area += passed * self._waiting_milli
            self._demand_area += passed * (self._waiting_milli + self.board.held_milli)
        self.now_s = moment_s

    def _arrive(self) -> None:
        ask = self._asks[self._dice.randrange(len(self._asks))]
        pod = self._pods
        self._pods += 1
        self._came_s[pod] = self.now_s
        if ask not in self._waiting and (self._start(pod, ask) or self._start_by_moving(pod, ask)):
            return
        self._waiting.setdefault(ask, deque()).append(pod)
        self._waiting_milli += ask.total_milli

    def _start(self, pod: int, ask: Ask) -> bool:
        place = self.board.place(ask)
        if place is None:
            return False
        self.placed[pod] = (ask, *place)
        self.on_host[place[0]].add(pod)
        heapq.heappush(self._ends, (self.now_s + self._dice.expovariate(1 / LIFETIME_S), pod))
        waited_s = self.now_s - self._came_s.pop(pod)
        if self.now_s >= WARM_UP_S:
            self.starts += 1
            self._waits_s += waited_s
        return True

    def _start_by_moving(self, pod: int, ask: Ask) -> bool:
        return self._mover.make_room(self, ask) and self._start(pod, ask)

    def move(self, pod: int) -> bool:
        """Take a pod off its host and place it where the policy likes it best; False: it stays where it was."""
        ask, number, positions = self.placed[pod]
        self.board.remove(ask, number, positions)
        place = self.board.place(ask)
        if place is None or place[0] == number:
            return False
        self.placed[pod] = (ask, *place)
        self.on_host[number].discard(pod)
        self.on_host[place[0]].add(pod)
        if self.now_s >= WARM_UP_S:
            self.moves += 1
        return True

    def _depart(self, pod: int) -> None:
        ask, number, positions = self.placed.pop(pod)
        self.on_host[number].discard(pod)
        self.board.remove(ask, number, positions)
        self._let_in(number)

    def _let_in(self, number: int) -> None:
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
            self._waiting_milli -= ask.total_milli
            self._start(pod, ask)
