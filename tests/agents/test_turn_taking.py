"""Turns carried out on real processes through the supervisor: measured in the CPU time that each of them got."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from gpuyard_agent.launch.turn_taking import TurnTakingLauncher
from gpuyard_agent.launch.usage import cpu_ms_of_tree
from gpuyard_agent.partitions.turns import TurnSettings
from gpuyard_protocol.names import AssignmentKey
from support.launch import LaunchYard, ended, key, launch_yard, start, until

SETTINGS = TurnSettings(quantum_ms=60, shortest_ms=15, idle_ms=300)
SPIN = "echo ready; while :; do :; done"


def clock_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
async def launch() -> AsyncIterator[LaunchYard]:
    async with launch_yard() as yard:
        yield yard


async def taking_turns(launch: LaunchYard) -> TurnTakingLauncher:
    launcher = TurnTakingLauncher(
        await launch.agent(), SETTINGS, book=launch.directory / "turns", clock_ms=clock_ms, wall_ms=wall_ms
    )
    await launcher.open()
    return launcher


async def spin(launch: LaunchYard, launcher: TurnTakingLauncher, weights: Mapping[int, int]) -> dict[int, int]:
    """A busy job of each weight on one card; their pids."""
    pids = {}
    for job, weight in weights.items():
        launcher.admit(key(job), "GPU-a", weight)
        pids[job] = (await start(launcher, launch.shell(job, SPIN))).pid
        await launch.printed(job, 1)
    return pids


def used_ms(pids: Mapping[int, int]) -> dict[int, int]:
    return {job: cpu_ms_of_tree(pid) for job, pid in pids.items()}


async def shares(pids: Mapping[int, int], cpu_ms: int) -> dict[int, float]:
    """How the next so many milliseconds of CPU time are divided."""
    before = used_ms(pids)
    await until(lambda: sum(used_ms(pids).values()) - sum(before.values()) >= cpu_ms, "CPU time is used")
    after = used_ms(pids)
    had = {job: after[job] - before[job] for job in pids}
    return {job: ms / sum(had.values()) for job, ms in had.items()}


async def test_busy_jobs_share_a_card_by_weight(launch: LaunchYard) -> None:
    launcher = await taking_turns(launch)
    pids = await spin(launch, launcher, {1: 700, 2: 300})
    had = await shares(pids, 700)
    assert 0.55 < had[1] < 0.85, had
    await launcher.close()


async def test_an_end_and_a_stop_give_the_card_away(launch: LaunchYard) -> None:
    launcher = await taking_turns(launch)
    pids = await spin(launch, launcher, {1: 500, 2: 500, 3: 500})
    await launcher.stop(key(1), 0)
    assert (await ended(launcher, key(1))).stopped
    launcher.dismiss(key(1))
    await launcher.stop(key(2), 60_000)
    assert (await ended(launcher, key(2))).signal, "asked while it was halted, or while it had its turn"
    launcher.dismiss(key(2))
    assert (await shares({3: pids[3]}, 300))[3] == 1
    assert launcher.thawed_ms(key(1)) == 0
    await launcher.close()


async def test_one_that_sleeps_gives_its_turn_away_and_is_not_halted(launch: LaunchYard) -> None:
    launcher = await taking_turns(launch)
    pids = await spin(launch, launcher, {1: 500})
    launcher.admit(key(2), "GPU-a", 500)
    go = launch.directory / "go"
    sleepy = launch.shell(2, f"echo ready; while [ ! -e {go} ]; do sleep 0.2; done; {SPIN}")
    pids[2] = (await start(launcher, sleepy)).pid
    await until(lambda: launcher.frozen_ms(key(1)) > 0, "the sleeper had a turn")
    had = await shares(pids, 450)
    assert had[1] > 0.85, had
    go.touch()
    await launch.printed(2, 2)
    had = await shares(pids, 450)
    assert 0.3 < had[2] < 0.7, had
    await launcher.close()


async def test_one_that_computes_without_any_cpu_keeps_its_turn(launch: LaunchYard) -> None:
    """It waits for its card in the driver, which alone knows that it works."""
    launcher = await taking_turns(launch)
    launcher.is_busy = lambda one: True if one == key(2) else None
    pids = await spin(launch, launcher, {1: 500})
    launcher.admit(key(2), "GPU-a", 500)
    pids[2] = (await start(launcher, launch.shell(2, "sleep 1000"))).pid
    await until(lambda: launcher.frozen_ms(key(1)) > 0, "the other had a turn")
    halted_ms, began_ms = launcher.frozen_ms(key(1)), clock_ms()
    await shares(pids, 450)
    had = 1 - (launcher.frozen_ms(key(1)) - halted_ms) / (clock_ms() - began_ms)
    assert 0.3 < had < 0.7, had
    await launcher.close()


async def test_time_halted_is_no_time_of_its_own_also_after_a_restart_of_the_agent(launch: LaunchYard) -> None:
    launcher = await taking_turns(launch)
    pids = await spin(launch, launcher, {1: 500, 2: 500})
    await shares(pids, 350)
    frozen = launcher.frozen_ms(key(1))
    assert frozen >= 60
    started_ms = next(state.at_ms for state in await launcher.list() if state.key == key(1))
    assert abs(launcher.thawed_ms(key(1)) - (wall_ms() - started_ms - launcher.frozen_ms(key(1)))) <= 5
    await launch.abandon(launch.launchers[-1])

    again = await taking_turns(launch)
    assert again.frozen_ms(key(1)) >= frozen - SETTINGS.quantum_ms * 2
    for job in (1, 2):
        again.admit(key(job), "GPU-a", 500)
    had = await shares(pids, 350)
    assert 0.3 < had[1] < 0.7, had
    await launcher.close()
    await again.close()


async def test_replicas_of_one_job_run_together(launch: LaunchYard) -> None:
    launcher = await taking_turns(launch)
    gang = [AssignmentKey(1, 1, replica) for replica in range(2)]
    pids = {}
    for number, one in enumerate(gang):
        launcher.admit(one, f"GPU-{number}", 500)
        spec = launch.shell(1, SPIN, key=one, stdout=str(launch.job_dir(1) / f"{number}.out"))
        pids[number] = (await start(launcher, spec)).pid
    launcher.admit(key(2), "GPU-0", 500)
    pids[2] = (await start(launcher, launch.shell(2, SPIN))).pid
    await until(lambda: launcher.frozen_ms(gang[1]) > 150, "the second waits with the first, whose card is wanted")
    assert abs(launcher.frozen_ms(gang[0]) - launcher.frozen_ms(gang[1])) <= 30
    await launcher.close()


def test_the_book_of_frozen_times_may_be_missing_or_broken(tmp_path: Path) -> None:
    (tmp_path / "book").write_text("{")
    for book in (tmp_path / "book", tmp_path / "none"):
        launcher = TurnTakingLauncher(
            None,  # type: ignore[arg-type]  # nothing is launched
            SETTINGS,
            book=book,
            clock_ms=clock_ms,
            wall_ms=wall_ms,
        )
        assert launcher.frozen_ms(key(1)) == 0
