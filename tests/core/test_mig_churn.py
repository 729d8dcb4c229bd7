"""MIG instances that come and go at 90 % load: how much of the demand has to wait because of where they were put."""

from __future__ import annotations

import heapq
import random

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.demand import LiveDemand
from gpuyard_daemon.core.placing.feasibility import Shape, carve, judge
from gpuyard_daemon.core.placing.placement import Candidates, Finder
from gpuyard_daemon.core.state.model import Assignment, Node
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Partition
from support.builders import START_MS, need, node

#: By profile: how often it comes, and its part of a card in thousandths.
MIX = {
    "1g.10gb": (35, 143), "2g.20gb": (25, 286), "3g.40gb": (20, 500), "4g.40gb": (10, 572), "7g.80gb": (10, 1000),
}  # fmt: skip
NODES, CARDS, HOURS, WARM_UP_HOURS = 10, 4, 24.0, 4.0


class Churn:
    """Poisson arrivals, exponential lifetimes of an hour, whoever fits passes whoever does not."""

    def __init__(self, seed: int, *, first_fit: bool) -> None:
        self.pool = Pool()
        for number in range(1, NODES + 1):
            made = Node(f"n-{number}", number, state="ready", inventory=node(f"n-{number}", CARDS))
            self.pool.refit(self.pool.add(made), 0, 0)
        self.demand = LiveDemand()
        finder = Finder(self.demand)
        self.shapes = {name: Shape(need(mig=name, isolation="hard"), 1, "acme", "alice") for name in MIX}
        self.candidates = {name: Candidates(shape, finder) for name, shape in self.shapes.items()}
        self.first_fit = first_fit
        self.kinds, self.lives = random.Random(seed), random.Random(seed + 1)
        self.now = 0.0
        self.ends: list[tuple[float, int, NodeSpace, Assignment, int]] = []
        self.waiting: list[str] = []
        self.started = self.held_milli = self.waiting_milli = 0

    def blocked_percent(self) -> float:
        mean = sum(weight * milli for weight, milli in MIX.values()) / sum(weight for weight, _ in MIX.values())
        gap = mean / (0.9 * NODES * CARDS * 1000)
        next_arrival = blocked = asked = 0.0
        while self.now < HOURS:
            moment = min(next_arrival, self.ends[0][0] if self.ends else HOURS)
            if self.now >= WARM_UP_HOURS:
                blocked += (moment - self.now) * self.waiting_milli
                asked += (moment - self.now) * (self.waiting_milli + self.held_milli)
            self.now = moment
            if moment == next_arrival:
                self._arrive()
                next_arrival += self.kinds.expovariate(1 / gap)
            else:
                self._depart()
        return 100 * blocked / asked

    def _arrive(self) -> None:
        name = self.kinds.choices(list(MIX), [weight for weight, _ in MIX.values()])[0]
        self.demand.arrived(self.shapes[name].need, 1, START_MS + int(self.now * 3_600_000))
        if name in self.waiting or not self._start(name):
            self.waiting.append(name)
            self.waiting_milli += MIX[name][1]

    def _depart(self) -> None:
        _, _, space, assignment, milli = heapq.heappop(self.ends)
        self.pool.give(space, assignment)
        self.held_milli -= milli
        for name in list(dict.fromkeys(self.waiting)):
            while name in self.waiting and self._start(name):
                self.waiting.remove(name)
                self.waiting_milli -= MIX[name][1]

    def _start(self, name: str) -> bool:
        found = self._place(name)
        if found is None:
            return False
        space, partition = found
        self.started += 1
        assignment = Assignment(AssignmentKey(self.started, 1, 0), space.node.id, partition)
        self.pool.take(space, assignment, "acme", 0, 0)
        milli = MIX[name][1]
        self.held_milli += milli
        heapq.heappush(self.ends, (self.now + self.lives.expovariate(1), self.started, space, assignment, milli))
        return True

    def _place(self, name: str) -> tuple[NodeSpace, Partition] | None:
        shape = self.shapes[name]
        if not self.first_fit:
            space = self.candidates[name].best(self.pool)
            return (space, self.candidates[name].carve(space)) if space is not None else None
        for space in self.pool.by_number:
            if isinstance(judge(space, shape), int):
                return space, carve(space, shape)
        return None


def test_less_waits_than_with_the_first_fit() -> None:
    ours = [Churn(seed, first_fit=False).blocked_percent() for seed in (1, 2, 3)]
    first = [Churn(seed, first_fit=True).blocked_percent() for seed in (1, 2, 3)]
    assert sum(ours) < 0.9 * sum(first)
