"""What one decision of the scheduler's core costs in a large yard: nearly full, a long queue, work coming and going.

No daemon, no bus: the production core, inputs made beforehand, the time of `handle` alone; with it the encoding of the
record, the fork for a snapshot (every 10,000 decisions; its child writes the state as the daemon's does, while turns go
on), and whatever the garbage collector does meanwhile.

The yard: `--gpus` cards of a kind that can be cut every way on each of `--nodes` nodes, fourteen shapes of all modes
(whole cards, gangs, shares by MPS, MIG instances, shares in turns, CPUs alone), fifty tenants. Each has a queue with a
nominal part, a limit to what it borrows and one to what it lends; ten of them stand under a department's, and those
under one that is granted 93 % of the cards. After the fill and `--queued` jobs more, each turn brings one job's end and
one new job; the queue stays as long as it was.

One decision is one start, or the proof with which a turn's round ends: that nothing of all that waits fits (or may
start) any more, counted once however many queues it took. A turn's time is shared out among its decisions.

    python -m bench.core --nodes 10000 --gpus 8 --queued 100000 --json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.core_life import PROFILES
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.facts import JobPlaced
from gpuyard_daemon.core.state.inputs import Cursors, Input, JobSubmitted, NodeReported, PolicyChanged
from gpuyard_daemon.core.state.turn import Turn
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_daemon.snapshots import SnapshotStore, start_child
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Go, Inventory, Joined, Prepared, Report, Start, Started, Stop
from gpuyard_protocol.resources import Device, ResourceNeed

TENANTS = 50
DEPARTMENTS = 5
FULL_MILLI = 930
#: Of its nominal part, in thousandths: what a department may borrow and lends, and what a tenant's queue does.
DEPARTMENT_LIMITS = (100, 900)
TENANT_LIMITS = (500, 750)
SNAPSHOT_EVERY = 10_000
#: From one turn to the next; rounds of preemption and of fairness come by this clock.
TICK_MS = 10
#: As the daemon sets them.
GC_THRESHOLDS = (1000, 1000, 100)


class ShapeSpec(NamedTuple):
    """One of the shapes, with how often it comes and what it counts for."""

    weight: int
    need: ResourceNeed
    replicas: int = 1

    @property
    def milli(self) -> int:
        need = self.need
        mig = {"1g.10gb": 142, "2g.20gb": 285, "3g.40gb": 428}.get(need.mig, 0)
        return self.replicas * (need.gpus * 1000 or need.share_milli or mig)


def _need(cpu: int, memory_gib: int, **fields: object) -> ResourceNeed:
    return ResourceNeed(cpu_milli=cpu * 1000, memory_mib=memory_gib * 1024, **fields)  # type: ignore[arg-type]  # a mix


SHAPES = (
    ShapeSpec(30, _need(8, 64, gpus=1)),
    ShapeSpec(8, _need(16, 128, gpus=2)),
    ShapeSpec(5, _need(32, 256, gpus=4)),
    ShapeSpec(3, _need(64, 512, gpus=8)),
    ShapeSpec(1, _need(64, 512, gpus=8), 2),
    ShapeSpec(1, _need(16, 128, gpus=2), 4),
    ShapeSpec(10, _need(2, 16, share_milli=250)),
    ShapeSpec(8, _need(4, 32, share_milli=500, share_memory_mib=20_000)),
    ShapeSpec(6, _need(2, 16, share_milli=300, share_memory_mib=40_000)),
    ShapeSpec(8, _need(2, 16, mig="1g.10gb", isolation="hard")),
    ShapeSpec(5, _need(4, 32, mig="2g.20gb", isolation="hard")),
    ShapeSpec(3, _need(6, 48, mig="3g.40gb", isolation="hard")),
    ShapeSpec(6, _need(2, 16, share_milli=400, isolation="none")),
    ShapeSpec(6, _need(4, 16)),
)


class World:
    """The core, its clock, and nodes that do as they are told."""

    def __init__(self, nodes: int, cards: int, seed: int) -> None:
        self.core = Scheduler()
        self.now_ms = 1_700_000_000_000
        self.dice = random.Random(seed)
        self.capacity_milli = nodes * cards * 1000
        self._cursor = 0
        self._submissions = 0
        self._reported: dict[str, int] = {}
        #: Replicas that run, in no order; a job ends as a whole.
        self.running: list[tuple[str, AssignmentKey]] = []
        self._at: dict[AssignmentKey, int] = {}
        self._node: dict[AssignmentKey, str] = {}
        #: Reports that nodes owe for the last turn's orders.
        self._owed: list[tuple[str, Report]] = []
        self.proofs = 0
        self._count_blocks()
        for number in range(1, nodes + 1):
            self.turn([self._report(f"n-{number}", Joined(inventory=inventory(f"n-{number}", cards)))])
        self.turn([PolicyChanged(policy=queue_policy(self.capacity_milli))])

    def _count_blocks(self) -> None:
        """Proofs that something does not fit are decisions, and leave no fact to count them by."""
        line = self.core._line
        block, hold_back = line.block, line.hold_back

        def counted_block(*given: object, **named: object) -> None:
            self.proofs += 1
            block(*given, **named)  # type: ignore[arg-type]  # passed on as given

        def counted_hold_back(*given: object, **named: object) -> None:
            self.proofs += 1
            hold_back(*given, **named)  # type: ignore[arg-type]  # passed on as given

        line.block, line.hold_back = counted_block, counted_hold_back  # type: ignore[method-assign]  # to count

    def turn(self, inputs: list[Input]) -> tuple[Turn, int]:
        """One turn, and the nanoseconds it took with its record's bytes."""
        self._cursor += 1
        self.now_ms += TICK_MS
        began = time.perf_counter_ns()
        turn = self.core.handle(inputs, self.now_ms, Cursors(self._cursor, self._cursor))
        if turn.record is not None:
            encode(turn.record)
        took = time.perf_counter_ns() - began
        for batch in turn.orders:
            for order in batch.orders:
                self._obey(batch.node, order)
        return turn, took

    def _obey(self, node: str, order: object) -> None:
        match order:
            case Start(key=key, hold=True):
                self._owed.append((node, Prepared(key=key, port=29_500)))
            case Start(key=key) | Go(key=key):
                self._owed.append((node, Started(key=key, at_ms=self.now_ms)))
                self._at[key] = len(self.running)
                self.running.append((node, key))
            case Stop(key=key):
                self._owed.append((node, Ended(key=key, outcome="stopped", at_ms=self.now_ms)))
                self._forget(key)

    def _forget(self, key: AssignmentKey) -> None:
        place = self._at.pop(key, None)
        if place is not None:
            last = self.running.pop()
            if last[1] != key:
                self.running[place] = last
                self._at[last[1]] = place

    def _report(self, node: str, *reports: Report) -> NodeReported:
        first = self._reported.get(node, 0) + 1
        self._reported[node] = first + len(reports) - 1
        return NodeReported(node=node, instance="a", boot_id="b", first=first, reports=reports)

    def owed(self) -> list[Input]:
        owed, self._owed = self._owed, []
        return [self._report(node, report) for node, report in owed]

    def submission(self, shape: ShapeSpec | None = None) -> JobSubmitted:
        self._submissions += 1
        chosen = shape or self.dice.choices(SHAPES, [each.weight for each in SHAPES])[0]
        spec = JobSpec(argv=("/bin/true",), need=chosen.need, replicas=chosen.replicas, allow_pending=True)
        tenant = f"t{self.dice.randrange(TENANTS):02d}"
        return JobSubmitted(tenant=tenant, user="u", submission_id=f"s{self._submissions}", spec=spec)

    def departure(self) -> list[Input]:
        """The end of some job that runs: of all its replicas."""
        _, key = self.running[self.dice.randrange(len(self.running))]
        job = self.core.cluster.jobs[key.job]
        reports: list[Input] = []
        for assignment in job.assignments:
            if assignment.key in self._at:
                self._forget(assignment.key)
                ended = Ended(key=assignment.key, outcome="exited", at_ms=self.now_ms)
                reports.append(self._report(assignment.node, ended))
        return reports


def queue_policy(capacity_milli: int) -> Policy:
    """The tree: all, departments, tenants."""
    full = capacity_milli * FULL_MILLI // 1000
    queues = [_queue("all", "", full, (0, 1000))]
    queues += [_queue(f"d{number}", "all", full // DEPARTMENTS, DEPARTMENT_LIMITS) for number in range(DEPARTMENTS)]
    queues += [
        _queue(f"q{number:02d}", f"d{number % DEPARTMENTS}", full // TENANTS, TENANT_LIMITS)
        for number in range(TENANTS)
    ]
    tenants = tuple([(f"t{number:02d}", TenantLimits(queue=f"q{number:02d}")) for number in range(TENANTS)])
    return Policy(tenants=tenants, queues=tuple(queues))


def _queue(name: str, parent: str, nominal: int, limits: tuple[int, int]) -> QueuePolicy:
    borrow, lend = [nominal * each // 1000 for each in limits]
    grant = Grant(model="H100", nominal_milli=nominal, borrow_milli=borrow, lend_milli=lend)
    return QueuePolicy(name=name, parent=parent, grants=(grant,))


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
    labels = (("rack", f"r{int(node.rpartition('-')[2]) // 16}"),)
    return Inventory(
        hostname=node, address="10.0.0.1", cpu_milli=128_000, memory_mib=1_048_576, devices=devices, labels=labels
    )


def fill(world: World, queued: int) -> None:
    """Submit until nothing starts any more, and then until so many wait."""
    waiting = world.core.cluster.waiting
    while len(waiting) < queued:
        world.turn([*world.owed(), *[world.submission() for _ in range(min(500, queued - len(waiting) or 1))]])
    while world._owed:
        world.turn(world.owed())


class Snapshots:
    """Snapshots as the daemon makes them: a forked child writes, and the turns go on meanwhile."""

    def __init__(self, core: Scheduler, directory: Path) -> None:
        self._core = core
        self._store = SnapshotStore(directory, "bench")
        self._since = 0
        self._child = 0
        self.made = 0
        #: The longest time that the turns stood still for one.
        self.fork_ns = 0

    def begin_if_due(self, decisions: int) -> int:
        """Nanoseconds that it took."""
        self._since += decisions
        if self._since < SNAPSHOT_EVERY or not self._has_ended():
            return 0
        self._since = 0
        began = time.perf_counter_ns()
        self._child = start_child(self._store, self._core.turn, self._core.turn, self._core.snapshot)
        took = time.perf_counter_ns() - began
        self.fork_ns = max(self.fork_ns, took)
        self.made += 1
        return took

    def _has_ended(self) -> bool:
        return not self._child or os.waitpid(self._child, os.WNOHANG)[0] != 0

    def finish(self) -> None:
        if self._child:
            os.waitpid(self._child, 0)


def measure(nodes: int, cards: int, queued: int, turns: int, seed: int) -> dict[str, float | int]:
    gc.set_threshold(*GC_THRESHOLDS)
    world = World(nodes, cards, seed)
    fill(world, queued)
    for _ in range(min(200, turns)):
        world.turn([*world.owed(), *world.departure(), world.submission()])
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="gpuyard-core-") as name:
        snapshots = Snapshots(world.core, Path(name))
        spent, samples = _turns(world, snapshots, turns)
        snapshots.finish()
    samples.sort()
    count = len(samples)
    held = world.core.cluster.pool.held_milli
    print(
        f"{count} decisions, {held / world.capacity_milli:.1%} held, {snapshots.made} snapshots, "
        f"longest fork {snapshots.fork_ns / 1e6:.1f} ms",
        file=sys.stderr,
    )
    return {
        "nodes": nodes,
        "gpus": nodes * cards,
        "queued": len(world.core.cluster.waiting),
        "decisions_per_s": round(count * 1e9 / spent),
        "p50_us": round(samples[count // 2] / 1000, 1),
        "p99_us": round(samples[int(0.99 * count)] / 1000, 1),
        "max_us": round(samples[-1] / 1000, 1),
        "rss_mib": round(psutil.Process().memory_info().rss / 2**20),
    }


def _turns(world: World, snapshots: Snapshots, turns: int) -> tuple[int, list[int]]:
    """Nanoseconds spent, and those of each decision."""
    spent = 0
    samples: list[int] = []
    for _ in range(turns):
        before = world.proofs
        turn, took = world.turn([*world.owed(), *world.departure(), world.submission()])
        facts = turn.record.facts if turn.record else ()
        starts = sum(1 for fact in facts if isinstance(fact, JobPlaced))
        made = starts + min(1, world.proofs - before)
        took += snapshots.begin_if_due(made)
        spent += took
        if made:
            samples += [took // made] * made
    return spent, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=8, help="cards per node")
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--seed-base", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args()
    figures = measure(given.nodes, given.gpus, given.queued, given.turns, given.seed_base)
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:22} {value:>12,}")


if __name__ == "__main__":
    main()
