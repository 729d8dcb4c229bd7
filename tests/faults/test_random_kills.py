"""Sixty blows in random order against a real yard at work; every acknowledged job still runs exactly once.

The same bench with a thousand is `python -m bench.kills --kills 1000`; `make soak` runs it.
"""

from __future__ import annotations

from pathlib import Path

from bench import kill_evidence as evidence
from bench.kills import run_kills

KILLS = 60
SEED = 4


def test_sixty_random_kills_lose_nothing_and_run_nothing_twice() -> None:
    figures = run_kills(KILLS, SEED)
    assert figures.problems == [], f"again with: python -m bench.kills --kills {KILLS} --seed {SEED}"
    assert figures.is_clean
    assert figures.acknowledged == figures.submitted > KILLS


def test_random_kills_with_two_daemons_lose_nothing_and_run_nothing_twice() -> None:
    figures = run_kills(KILLS // 2, SEED, standby=True)
    assert figures.problems == [], f"again with: python -m bench.kills --kills {KILLS // 2} --seed {SEED} --standby"
    assert figures.is_clean


def _line(what: str, at: int, key: str, card: str) -> str:
    return f"{what} {at} {key} {card}\n"


def test_the_count_sees_what_ran_twice_what_was_held_twice_and_what_was_lost(tmp_path: Path) -> None:
    lines = [
        _line("start", 10, "1.1.0", "GPU-a") + _line("end", 20, "1.1.0", "GPU-a"),
        _line("start", 15, "2.1.0", "GPU-a") + _line("end", 30, "2.1.0", "GPU-a"),
        _line("start", 40, "3.1.0", "GPU-a") + _line("end", 41, "3.1.0", "GPU-a"),
        _line("start", 42, "3.2.0", "GPU-b") + _line("end", 43, "3.2.0", "GPU-b"),
        _line("start", 50, "4.1.0", "-") + _line("start", 51, "4.1.0", "-") + _line("end", 52, "4.1.0", "-"),
    ]
    (tmp_path / evidence.PROCESSES).write_text("".join(lines))
    acknowledged = [evidence.Acknowledged(f"s{job}", job, job, 1) for job in range(1, 6)]
    verdicts = [evidence.Verdict(f"s{job}", job, "succeeded", 2 if job == 3 else 1, 1) for job in range(1, 5)]
    figures = evidence.count(tmp_path, acknowledged, verdicts, ["process 1"])
    assert (figures.double_held, figures.ran_twice, figures.lost, figures.orphans) == (1, 2, 1, 1)
    assert not figures.is_clean
