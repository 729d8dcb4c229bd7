"""One seed, one yard, one fate. Run as a module it plays seeds and says how to repeat one that fails.

PYTHONPATH=tests:protocol:client:daemon:agents python -m faults.simulate --seed 7 --steps 120 [--count 100] [--log]
… --nodes 200 --hours 24 plays one yard for a day.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import structlog

from faults.long_run import LargeYard, Sample, growth
from faults.virtual_time import SimulatedLoop
from faults.world import Kind, World
from gpuyard_daemon import journal

STEPS = 80


class Played(NamedTuple):
    """What happened in one simulation; `digest` is equal for equal runs."""

    digest: str
    simulated_s: float
    records: int
    processes: int
    log: list[str]
    #: How often something came about that not every seed brings.
    seen: Counter[str]


class SimulationFailed(AssertionError):
    """Says which seed, what went wrong, and what happened last."""


def simulate(seed: int, steps: int = STEPS, kind: Kind = "crashes") -> Played:
    """Play one seed to its end, or `SimulationFailed`."""
    command = f"python -m faults.simulate --seed {seed} --steps {steps} --kind {kind} --log"
    return _play(lambda: World(seed), lambda world: world.suffer(steps, kind), command)


def simulate_hours(
    seed: int, nodes: int, hours: int, on_sample: Callable[[Sample], None] = lambda sample: None
) -> tuple[Played, list[Sample]]:
    """Hours of many nodes, or `SimulationFailed`, also where what is kept grows."""
    command = f"python -m faults.simulate --seed {seed} --nodes {nodes} --hours {hours}"
    yards: list[LargeYard] = []

    def begin() -> World:
        yards.append(LargeYard(seed, nodes))
        yards[0].on_sample = on_sample
        return yards[0]

    played = _play(begin, lambda _: yards[0].suffer_hours(hours), command)
    samples = yards[0].samples
    if grown := growth(samples):
        raise SimulationFailed(f"{'; '.join(grown)}\n\nAgain with: {command}")
    return played, samples


def _play(begin: Callable[[], World], suffer: Callable[[World], Coroutine[Any, Any, None]], command: str) -> Played:
    loop = SimulatedLoop()
    world: list[World] = []

    async def play() -> None:
        world.append(begin())
        world[0].start()
        await suffer(world[0])
        await world[0].heal()
        world[0].is_over = True
        for party in [*world[0].heads, *world[0].agents.values(), world[0].tenants]:
            party.kill()

    with _silence(), _proofs_age_with(loop):
        try:
            loop.run_until_complete(play())
        except Exception as error:
            last = "\n".join(world[0].log[-40:]) if world else ""
            raise SimulationFailed(f"{error}\n\nWhat happened last:\n{last}\n\nAgain with: {command}") from error
        finally:
            _close(loop)
    done = world[0]
    witness = done.witness
    return Played(witness.twin.digest(), loop.time(), witness.records, witness.processes, done.log, witness.seen)


def _close(loop: SimulatedLoop) -> None:
    import asyncio

    for task in asyncio.all_tasks(loop):
        task.cancel()
    with contextlib.suppress(Exception):
        loop.run_until_complete(asyncio.sleep(0.0))
    loop.close()


@contextlib.contextmanager
def _proofs_age_with(loop: SimulatedLoop) -> Iterator[None]:
    """A daemon's proof that it leads is as old as the simulation says."""
    before, journal._boot_s = journal._boot_s, loop.time
    try:
        yield
    finally:
        journal._boot_s = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The parts' own logs say what is expected here: trouble."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


def _hours(seed: int, nodes: int, hours: int) -> int:
    began = time.perf_counter()
    print("  ".join(Sample._fields), flush=True)

    def show(sample: Sample) -> None:
        row = [str(value).rjust(len(name)) for name, value in zip(Sample._fields, sample, strict=True)]
        print("  ".join(row), flush=True)

    try:
        played, _ = simulate_hours(seed, nodes, hours, show)
    except SimulationFailed as failure:
        traceback.print_exception(failure)
        return 1
    took = time.perf_counter() - began
    print(
        f"{nodes} nodes, {played.simulated_s / 3600:.1f} simulated hours in {took:.0f} s: 0 violations, nothing grows"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Play seeds of the simulated yard with faults.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1, help="so many seeds, from --seed on")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kind", choices=("crashes", "partitions"), default="crashes", help="what happens most")
    parser.add_argument("--log", action="store_true", help="what happened, line by line")
    parser.add_argument("--nodes", type=int, default=200, help="with --hours: a yard of so many nodes")
    parser.add_argument("--hours", type=int, default=0, help="one yard for so long, with what it keeps at each hour")
    options = parser.parse_args()
    if options.hours:
        return _hours(options.seed, options.nodes, options.hours)
    failed = []
    began = time.perf_counter()
    hours = 0.0
    seen: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.count):
        try:
            played = simulate(seed, options.steps, options.kind)
        except SimulationFailed as failure:
            failed.append(seed)
            if options.count <= 3:
                traceback.print_exception(failure)
            else:
                print(f"seed {seed}: {str(failure).splitlines()[0][:300]}", flush=True)
            continue
        hours += played.simulated_s / 3600
        seen += played.seen
        if options.log:
            print("\n".join(played.log))
        if options.count == 1:
            print(f"seed {seed}: {played.simulated_s:.0f} s, {played.records} records, {played.processes} processes,")
            print(f"digest {played.digest}")
    took = time.perf_counter() - began
    print(f"{options.count} seeds, {len(failed)} failed, {hours:.1f} simulated hours in {took:.1f} s")
    print(", ".join(f"{what}: {times}" for what, times in sorted(seen.items())))
    if failed:
        again = f"--seed {failed[0]} --steps {options.steps} --kind {options.kind} --log"
        print(f"failed: {failed}; again with: python -m faults.simulate {again}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
