"""What the scheduler's core spends on a job over its whole life: submitted, placed, started, ended, retired.

No daemon, no bus, no files: inputs made beforehand, one turn for each batch, time of `handle` alone. Eight nodes of
eight cards, a few shapes. `--waiting` keeps so many more jobs queued that fit nowhere, to show that they cost nothing.

    python -m bench.core_life --jobs 5000 --json
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import Cursors, Input, JobSubmitted, NodeReported
from gpuyard_daemon.core.state.turn import Turn
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Inventory, Joined, Report, Start, Started
from gpuyard_protocol.resources import Device, MigProfileFacts, ResourceNeed

PROFILES = (
    MigProfileFacts("1g.10gb", 9_984, 1, (0, 1, 2, 3, 4, 5, 6), 1, 7),
    MigProfileFacts("2g.20gb", 20_096, 2, (0, 2, 4), 2, 3),
    MigProfileFacts("3g.40gb", 40_448, 4, (0, 4), 3, 2),
    MigProfileFacts("4g.40gb", 40_448, 4, (0,), 4, 1),
    MigProfileFacts("7g.80gb", 81_152, 8, (0,), 7, 1),
)
NEEDS = {
    "whole": (ResourceNeed(gpus=1),),
    "mixed": (
        ResourceNeed(gpus=1),
        ResourceNeed(share_milli=300),
        ResourceNeed(mig="1g.10gb"),
        ResourceNeed(gpus=4),
        ResourceNeed(share_milli=500, isolation="none"),
    ),
}


class World:
    """Nodes that answer every start with `Started` and then `Ended`, and the clock of the core."""

    def __init__(self, nodes: int, cards: int) -> None:
        self.core = Scheduler()
        self.now_ms = 1_700_000_000_000
        self.spent_s = 0.0
        self.longest_s = 0.0
        self.turns = 0
        self._cursor = 0
        self._reported: dict[str, int] = {}
        self.running: deque[tuple[str, AssignmentKey]] = deque()
        for number in range(1, nodes + 1):
            self.turn([self._report(f"n-{number}", Joined(inventory=inventory(f"n-{number}", cards)))])

    def turn(self, inputs: list[Input]) -> Turn:
        self._cursor += 1
        self.now_ms += 3
        began = time.perf_counter()
        turn = self.core.handle(inputs, self.now_ms, Cursors(self._cursor, self._cursor))
        spent = time.perf_counter() - began
        self.spent_s += spent
        self.longest_s = max(self.longest_s, spent)
        self.turns += 1
        for batch in turn.orders:
            self.running.extend((batch.node, order.key) for order in batch.orders if isinstance(order, Start))
        return turn

    def _report(self, node: str, *reports: Report) -> NodeReported:
        first = self._reported.get(node, 0) + 1
        self._reported[node] = first + len(reports) - 1
        return NodeReported(node=node, instance="a", boot_id="b", first=first, reports=reports)

    def finish(self, most: int) -> list[Input]:
        """Reports of the oldest running replicas: started in this turn, ended as well."""
        reports: list[Input] = []
        for _ in range(min(most, len(self.running))):
            node, key = self.running.popleft()
            reports.append(
                self._report(
                    node, Started(key=key, at_ms=self.now_ms), Ended(key=key, outcome="exited", at_ms=self.now_ms)
                )
            )
        return reports


def inventory(node: str, cards: int) -> Inventory:
    devices = tuple(
        Device(
            uuid=f"GPU-{node}-{index:02d}-5f2c-4e0a-9b1d-000000000000",
            index=index,
            model="NVIDIA H100 80GB HBM3",
            memory_mib=81_152,
            modes=("whole", "mig", "mps", "timeslice"),
            mig_slices=8,
            mig_compute_slices=7,
            mig_profiles=PROFILES,
        )
        for index in range(cards)
    )
    return Inventory(hostname=node, address="10.0.0.1", cpu_milli=512_000, memory_mib=4_194_304, devices=devices)


def submission(number: int, need: ResourceNeed, priority: int = 0) -> JobSubmitted:
    spec = JobSpec(argv=("/bin/true",), need=need, priority=priority, allow_pending=True)
    return JobSubmitted(tenant="acme", user="alice", submission_id=f"s{number}", spec=spec)


def measure(jobs: int, nodes: int, cards: int, batch: int, waiting: int, mix: str) -> dict[str, float]:
    world = World(nodes, cards)
    for first in range(0, waiting, 500):
        # As many shapes as a large yard would see, none of which fits.
        many = [submission(10**6 + n, ResourceNeed(gpus=cards + 1 + n % 50), 2) for n in range(first, first + 500)]
        world.turn(list(many))
    world.spent_s = world.longest_s = 0.0
    world.turns = 0
    needs = NEEDS[mix]
    submissions: deque[Input] = deque(submission(n, needs[n % len(needs)]) for n in range(1, jobs + 1))
    facts = 0
    while submissions or world.running:
        arriving = [submissions.popleft() for _ in range(min(batch, len(submissions)))]
        turn = world.turn([*arriving, *world.finish(batch)])
        facts += len(turn.record.facts) if turn.record else 0
    done = world.core.stats(world.now_ms).finished
    if done != jobs:
        raise SystemExit(f"{done} of {jobs} jobs ended")
    spent_s = world.spent_s
    longest_s, turns = world.longest_s, world.turns
    # An hour later they leave for the history.
    world.now_ms += 2 * 3_600_000
    while world.core.next_deadline_ms() is not None and world.core.metrics().jobs["succeeded"]:
        world.turn([])
    began = time.perf_counter()
    snapshot = world.core.snapshot()
    snapshot_s = time.perf_counter() - began
    began = time.perf_counter()
    Scheduler.restore(snapshot)
    return {
        "jobs": jobs,
        "us_per_job": round((world.spent_s) * 1e6 / jobs, 1),
        "us_per_job_without_retiring": round(spent_s * 1e6 / jobs, 1),
        "turns": turns,
        "turn_ms_mean": round(spent_s * 1e3 / turns, 3),
        "turn_ms_max": round(longest_s * 1e3, 3),
        "facts_per_job": round(facts / jobs, 1),
        "waiting": waiting,
        "snapshot_s": round(snapshot_s, 3),
        "restore_s": round(time.perf_counter() - began, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="submissions and ends in one turn")
    parser.add_argument("--waiting", type=int, default=0, help="jobs queued all the while that fit nowhere")
    parser.add_argument("--mix", choices=sorted(NEEDS), default="mixed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures = measure(given.jobs, given.nodes, given.cards, given.batch, given.waiting, given.mix)
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:32} {value:>12,}")


if __name__ == "__main__":
    main()
