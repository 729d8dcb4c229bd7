"""Packets that are lost, repeated, late or withheld one way, under real processes: the short version of the bench."""

from __future__ import annotations

import pytest

from faults.packets import run

pytestmark = pytest.mark.machine

SEED = 1
SECONDS = 20.0


def test_a_network_that_cannot_be_trusted_loses_nothing_and_runs_nothing_twice() -> None:
    figures, told = run(SEED, SECONDS)
    again = f"again with: python -m faults.packets --seconds {SECONDS:g} --seed {SEED} ({told})"
    assert figures.problems == [], again
    assert figures.is_clean, again
    assert figures.acknowledged == figures.submitted > 0
