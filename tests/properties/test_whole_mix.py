"""Long stories of the yard in which everything happens: equal under every hash seed, across restarts, to the byte.

The stories are made from seeds, so that thousands can be told outside the suite:
`PYTHONPATH=tests:protocol:client:daemon python -m support.mixed_yard SEED STEPS` prints one's fingerprint.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from msgspec.structs import replace

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import Input
from gpuyard_daemon.core.state.turn import Turn
from support.builders import CoreHarness
from support.judge import JudgedHarness
from support.mixed_yard import MixedYard, story

STEPS = 100


@pytest.mark.parametrize("seed", [11])
def test_two_hash_seeds_tell_the_same_story(seed: int) -> None:
    prints = []
    for hash_seed in ("1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "support.mixed_yard", str(seed), str(STEPS)]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert told.returncode == 0, told.stderr
        prints.append(told.stdout.strip())
    assert prints[0] == prints[1]


class RestoredHarness(CoreHarness):
    """Before each turn a second core is made of the first one's snapshot; both must decide the same."""

    def turn(self, *inputs: Input, after_ms: int = 0) -> Turn:
        before = self.core.snapshot()
        turn = super().turn(*inputs, after_ms=after_ms)
        other = Scheduler.restore(before, self.settings)
        again = other.handle(inputs, self.now_ms, self._cursors)
        # What was found to fit nowhere before is found so again: that counts as work, and decides nothing.
        assert replace(again, decisions=0) == replace(turn, decisions=0)
        assert other.digest() == self.core.digest()
        return turn


@pytest.mark.parametrize("seed", [21, 30, 40, 51])
def test_a_restored_core_decides_as_the_one_that_went_on(seed: int) -> None:
    """What is derived is derived anew each time, and no decision rests on how it came about."""
    yard = MixedYard(RestoredHarness())
    for move in story(seed, STEPS):
        yard.play(*move)


@pytest.mark.parametrize("seed", [1, 6, 10, 26, 48, 53, 92])
def test_a_story_is_well_judged_and_ends_well(seed: int) -> None:
    """Among them one in which something was found once: a size was changed in the very moment of a start."""
    yard = MixedYard(JudgedHarness())
    for move in story(seed, 80):
        yard.play(*move)
    yard.heal()


def test_the_judge_is_asked_about_every_kind_of_decision() -> None:
    """A judge of nothing would be content with everything."""
    judged: Counter[str] = Counter()
    for seed in (3, 16, 22, 33, 39, 47, 49):
        harness = JudgedHarness()
        yard = MixedYard(harness)
        for name, a, b in story(seed, 80):
            yard.play(name, a, b)
        yard.heal()
        judged.update(harness.twin.judged)
    asked = {
        "free place", "kept place", "resumption", "reserve", "guest", "eviction by suspend", "eviction by checkpoint",
        "eviction by requeue", "eviction by shrink", "eviction by force", "wide start", "grown", "grown for its owner",
        "shrunk by its owner", "shrunk for its tenant's limit", "drain", "card taken back", "guest sent away",
    }  # fmt: skip
    assert asked <= judged.keys(), judged
