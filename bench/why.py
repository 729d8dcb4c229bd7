"""What the answer to `why` costs the daemon while many jobs wait: the whole answer, encoded, of jobs anywhere in line.

The yard is full, with jobs of 50 tenants in 14 shapes of all modes behind it; between two questions some jobs end and
others start, so nothing is asked twice of the same state.

    python -m bench.why --queued 100000 --json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time

from bench.core_life import PROFILES
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import Cursors, Input, JobSubmitted, NodeReported
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Inventory, Joined, Report, Start, Started
from gpuyard_protocol.resources import Device, ResourceNeed

TENANTS = 50
START_MS = 1_700_000_000_000
#: (need, replicas): whole cards, gangs, shares in both dimensions, MIG, time-slice, CPU alone.
SHAPES = (
    (ResourceNeed(gpus=1), 1),
    (ResourceNeed(gpus=2), 1),
    (ResourceNeed(gpus=4), 1),
    (ResourceNeed(gpus=8), 1),
    (ResourceNeed(gpus=8), 4),
    (ResourceNeed(gpus=1), 8),
    (ResourceNeed(gpus=1, models=("H100",)), 1),
    (ResourceNeed(share_milli=300), 1),
    (ResourceNeed(share_milli=500, share_memory_mib=20_480), 1),
    (ResourceNeed(share_memory_mib=10_240), 1),
    (ResourceNeed(mig="1g.10gb"), 1),
    (ResourceNeed(mig="3g.40gb"), 1),
    (ResourceNeed(share_milli=250, isolation="hard"), 1),
    (ResourceNeed(share_milli=500, isolation="none"), 1),
)


class World:
    """A core, and nodes that report what they are told to."""

    def __init__(self, nodes: int, gpus: int, seed: int) -> None:
        self.core = Scheduler()
        self.rng = random.Random(seed)
        self.now_ms = START_MS
        self.gpus = nodes * gpus
        self.waiting_to_end: list[tuple[str, AssignmentKey]] = []
        self._cursor = 0
        self._jobs = 0
        self._reported: dict[str, int] = {}
        for first in range(1, nodes + 1, 100):
            names = [f"n-{number}" for number in range(first, min(first + 100, nodes + 1))]
            self.turn([self._report(name, Joined(inventory=inventory(name, gpus))) for name in names])

    def turn(self, inputs: list[Input]) -> None:
        self._cursor += 1
        self.now_ms += 5
        turn = self.core.handle(inputs, self.now_ms, Cursors(self._cursor, self._cursor))
        started: dict[str, list[Report]] = {}
        for batch in turn.orders:
            for order in batch.orders:
                if isinstance(order, Start):
                    self.waiting_to_end.append((batch.node, order.key))
                    started.setdefault(batch.node, []).append(Started(key=order.key, at_ms=self.now_ms))
        if started:
            self.turn([self._report(node, *reports) for node, reports in started.items()])

    def submit(self, count: int) -> None:
        self.turn([self._submission() for _ in range(count)])

    def _submission(self) -> JobSubmitted:
        self._jobs += 1
        need, replicas = SHAPES[self._jobs % len(SHAPES)]
        # Half say how long they may take, in whole hours.
        limit_ms = self.rng.choice((0, self.rng.randint(1, 24) * 3_600_000))
        spec = JobSpec(argv=("/bin/true",), need=need, replicas=replicas, time_limit_ms=limit_ms, allow_pending=True)
        tenant = f"tenant-{self.rng.randrange(TENANTS)}"
        return JobSubmitted(tenant=tenant, user="alice", submission_id=f"s{self._jobs}", spec=spec)

    def end_some(self, count: int) -> None:
        """Some replicas of single jobs end, anywhere; as many jobs come."""
        inputs: list[Input] = []
        for _ in range(count):
            place = self.rng.randrange(len(self.waiting_to_end))
            self.waiting_to_end[place], self.waiting_to_end[-1] = self.waiting_to_end[-1], self.waiting_to_end[place]
            node, key = self.waiting_to_end.pop()
            inputs.append(self._report(node, Ended(key=key, outcome="exited", at_ms=self.now_ms)))
        self.turn([*inputs, *[self._submission() for _ in range(count)]])

    def _report(self, node: str, *reports: Report) -> NodeReported:
        first = self._reported.get(node, 0) + 1
        self._reported[node] = first + len(reports) - 1
        return NodeReported(node=node, instance="a", boot_id="b", first=first, reports=reports)


def inventory(node: str, gpus: int) -> Inventory:
    model, memory_mib = ("NVIDIA H100 80GB HBM3", 81_152) if hash_of(node) % 3 else ("NVIDIA A100-SXM4-80GB", 81_152)
    devices = tuple(
        Device(
            uuid=f"GPU-{node}-{index:02d}-5f2c-4e0a-9b1d-000000000000",
            index=index,
            model=model,
            memory_mib=memory_mib,
            modes=("whole", "mig", "mps", "timeslice"),
            mig_slices=8,
            mig_compute_slices=7,
            mig_profiles=PROFILES,
        )
        for index in range(gpus)
    )
    return Inventory(hostname=node, address="10.0.0.1", cpu_milli=128_000, memory_mib=1_048_576, devices=devices)


def hash_of(node: str) -> int:
    """The same in every process."""
    return int(node.removeprefix("n-"))


def measure(queued: int, nodes: int, gpus: int, questions: int, seed: int) -> dict[str, float]:
    world = World(nodes, gpus, seed)
    while len(world.core.cluster.waiting) < queued:
        world.submit(min(500, max(1, queued - len(world.core.cluster.waiting))))
    gc.collect()
    gc.freeze()
    numbers = list(world.core.cluster.waiting)
    encode(world.core.why(numbers[0], world.now_ms))
    times: list[float] = []
    for _ in range(questions):
        world.end_some(4)
        job = world.rng.choice(numbers)
        began = time.perf_counter()
        answer = world.core.why(job, world.now_ms)
        encode(answer)
        times.append((time.perf_counter() - began) * 1000)
    times.sort()
    return {
        "queued": len(world.core.cluster.waiting),
        "p50_ms": round(times[len(times) // 2], 3),
        "p99_ms": round(times[len(times) * 99 // 100], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures = measure(given.queued, given.nodes, given.gpus, given.questions, given.seed)
    print(
        json.dumps(figures) if given.json else "\n".join(f"{name:10} {value:>12,}" for name, value in figures.items())
    )


if __name__ == "__main__":
    main()
