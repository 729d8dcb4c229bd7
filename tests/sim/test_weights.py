"""Under a lasting overload tenants get GPU time by the weights of their queues, and of their own within them."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest

from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_daemon.sim.core_jobs import node_of
from gpuyard_daemon.sim.simulated_yard import SimulatedYard, ms_at
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId, Tenant
from gpuyard_protocol.resources import ResourceNeed

GPUS = 8
#: What nobody asks for there is lent to whoever has nothing of its own.
LENDER = QueuePolicy("idle", grants=(Grant(nominal_milli=1000 * GPUS),))
NOTHING = (Grant(nominal_milli=0),)


class Overload:
    """Eight GPUs, and tenants that each always have more jobs of one GPU than those in line."""

    def __init__(self, tenants: dict[Tenant, TenantLimits], queues: tuple[QueuePolicy, ...], run_s: float) -> None:
        self.yard = SimulatedYard([node_of("n", GPUS)])
        self.yard.take([PolicyChanged(policy=Policy(tenants=tuple(sorted(tenants.items())), queues=queues))])
        self.run_s = run_s
        self.now_s = 0.0
        self.owner: dict[JobId, Tenant] = {}
        self.left_s: dict[JobId, float] = {}
        self.since_s: dict[JobId, float] = {}
        #: (when, job) of those that ran when it was entered.
        self.ends: list[tuple[float, JobId]] = []
        #: GPU time, counted since so long.
        self.had_s: Counter[Tenant] = Counter()
        self.counted_to_s = 0.0
        self.submit([tenant for tenant in tenants for _ in range(GPUS + 4)])

    def submit(self, tenants: list[Tenant]) -> None:
        spec = JobSpec(argv=("work",), need=ResourceNeed(gpus=1), preemption="checkpoint", allow_pending=True)
        jobs = self.yard.submit([(tenant, spec) for tenant in tenants])
        for job, tenant in zip(jobs, tenants, strict=True):
            self.owner[job], self.left_s[job] = tenant, self.run_s
        for change in self.yard.changes():
            if change.runs:
                self.since_s[change.job] = self.now_s
                heapq.heappush(self.ends, (self.now_s + self.left_s[change.job], change.job))
            else:
                self.stop(change.job)

    def stop(self, job: JobId) -> None:
        since_s = self.since_s.pop(job)
        self.had_s[self.owner[job]] += self.now_s - max(since_s, self.counted_to_s)
        self.left_s[job] -= self.now_s - since_s

    def parts(self, hours: float) -> dict[Tenant, float]:
        """Of the GPU time of so many hours, what each had, once it has had to make up for the first few."""
        self.go_on(hours / 2)
        self.had_s.clear()
        self.go_on(hours)
        everything = sum(self.had_s.values())
        assert everything == pytest.approx(GPUS * hours / 2 * 3600, rel=0.01)
        return {tenant: had_s / everything for tenant, had_s in self.had_s.items()}

    def go_on(self, hours: float) -> None:
        """Until so many hours have passed."""
        while self.now_s < hours * 3600:
            wake_s = self.yard.wake_s(self.now_s)
            self.now_s = min(hours * 3600, self.ends[0][0], hours * 3600 if wake_s is None else wake_s)
            self.yard.at(ms_at(self.now_s))
            ended = []
            while self.ends and self.ends[0][0] <= self.now_s:
                at_s, job = heapq.heappop(self.ends)
                # Of one that was stopped and runs again this is not the end.
                if job in self.since_s and self.since_s[job] + self.left_s[job] == at_s:
                    self.stop(job)
                    self.yard.end(job)
                    ended.append(self.owner[job])
            self.submit(ended)
        for job, since_s in self.since_s.items():
            self.had_s[self.owner[job]] += self.now_s - max(since_s, self.counted_to_s)
        self.counted_to_s = self.now_s


def test_tenants_get_their_parts_by_weight():
    tenants = {"a": TenantLimits(weight=1), "b": TenantLimits(weight=2), "c": TenantLimits(weight=5)}
    # What is owed halves in two days and parts swing as slowly, so they are taken over four.
    parts = Overload(tenants, (), run_s=1800).parts(192)
    assert parts == pytest.approx({"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}, abs=0.05)


def test_queues_that_borrow_get_their_parts_by_weight_whatever_tenants_weigh_and_those_without_work_none():
    weights = (("x", 1), ("y", 3), ("z", 9))
    queues = (LENDER, *[QueuePolicy(name, weight=weight, grants=NOTHING) for name, weight in weights])
    tenants = {"a": TenantLimits(queue="x", weight=9), "b": TenantLimits(queue="y")}
    assert Overload(tenants, queues, run_s=7200).parts(24) == pytest.approx({"a": 1 / 4, "b": 3 / 4}, abs=0.03)


def test_parts_go_down_the_tree_and_by_tenants_of_one_queue_in_the_end():
    tree = (("x", "", 1), ("y", "", 3), ("y1", "y", 2), ("y2", "y", 1))
    queues = [QueuePolicy(name, parent=above, weight=weight, grants=NOTHING) for name, above, weight in tree]
    of = {"a": "x", "b": "y1", "c": "y2", "d": "y2"}
    tenants = {name: TenantLimits(queue=queue) for name, queue in of.items()}
    parts = Overload(tenants, (LENDER, *queues), run_s=7200).parts(48)
    assert parts == pytest.approx({"a": 1 / 4, "b": 1 / 2, "c": 1 / 8, "d": 1 / 8}, abs=0.05)
