"""One seed, one yard, one fate. Run as a module it plays seeds and says how to repeat one that fails.

PYTHONPATH=tests:protocol:client:daemon:agents python -m faults.simulate --seed 7 --steps 120 [--count 100] [--log]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import structlog

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


class SimulationFailed(AssertionError):
    """Says which seed, what went wrong, and what happened last."""


def simulate(seed: int, steps: int = STEPS, kind: Kind = "crashes") -> Played:
    """Play one seed to its end, or `SimulationFailed`."""
    loop = SimulatedLoop()
    world: list[World] = []

    async def play() -> None:
        world.append(World(seed))
        world[0].start()
        await world[0].suffer(steps, kind)
        await world[0].heal()
        world[0].is_over = True
        for party in [*world[0].heads, *world[0].agents.values(), world[0].tenants]:
            party.kill()

    with _silence(), _proofs_age_with(loop):
        try:
            loop.run_until_complete(play())
        except Exception as error:
            last = "\n".join(world[0].log[-40:]) if world else ""
            command = f"python -m faults.simulate --seed {seed} --steps {steps} --kind {kind} --log"
            raise SimulationFailed(f"{error}\n\nWhat happened last:\n{last}\n\nAgain with: {command}") from error
        finally:
            _close(loop)
    done = world[0]
    return Played(done.witness.twin.digest(), loop.time(), done.witness.records, len(done.witness.runs), done.log)


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Play seeds of the simulated yard with faults.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1, help="so many seeds, from --seed on")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kind", choices=("crashes", "partitions"), default="crashes", help="what happens most")
    parser.add_argument("--log", action="store_true", help="what happened, line by line")
    options = parser.parse_args()
    failed = []
    began = time.perf_counter()
    hours = 0.0
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
        if options.log:
            print("\n".join(played.log))
        if options.count == 1:
            print(f"seed {seed}: {played.simulated_s:.0f} s, {played.records} records, {played.processes} processes,")
            print(f"digest {played.digest}")
    took = time.perf_counter() - began
    print(f"{options.count} seeds, {len(failed)} failed, {hours:.1f} simulated hours in {took:.1f} s")
    if failed:
        again = f"--seed {failed[0]} --steps {options.steps} --kind {options.kind} --log"
        print(f"failed: {failed}; again with: python -m faults.simulate {again}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
