"""What every launcher does with real processes: how they start, how they end, and that nothing is left or forgotten.

Run here against the supervisor; inside a machine with a real systemd (`tests/systemd/test_machine.py`) against
transient services, chosen by GPUYARD_TEST_LAUNCHER.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpuyard_agent.launch.base import Account, Limits, ProcessSpec, Started
from gpuyard_agent.launch.leases import boot_clock_ms
from gpuyard_agent.launch.spawn import MARK
from gpuyard_protocol.names import AssignmentKey
from support.launch import KIND, SCATTER, LaunchYard, alive, all_ended, ended, key, launch_yard, refusal, start, until


@pytest.fixture
async def launch() -> AsyncIterator[LaunchYard]:
    async with launch_yard() as yard:
        yield yard


# --- how they start ---


async def test_a_process_has_its_environment_and_nothing_else(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    spec = launch.spec(1, "env", env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert (await launch.run(launcher, spec)).exit_code == 0
    lines = [line for line in launch.output(1).splitlines() if not line.startswith(MARK)]
    assert sorted(lines) == ["CUDA_VISIBLE_DEVICES=GPU-1", "PATH=/usr/bin:/bin"]


async def test_it_runs_as_its_account_in_a_session_of_its_own(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    spec = launch.shell(1, "id -u; id -g; umask; pwd; cut -d ' ' -f 6 /proc/$$/stat; echo $$; cat")
    await launch.run(launcher, spec)
    uid, gid, umask, cwd, session, pid = launch.output(1).split()
    assert (int(uid), int(gid)) == (launch.account.uid, launch.account.gid)
    assert umask == "0027"
    assert cwd == str(launch.job_dir(1))
    assert session == pid


async def test_no_file_of_the_supervisor_is_open_in_a_job(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await launch.run(launcher, launch.spec(1, "ls", "-1", "/proc/self/fd"))
    assert launch.output(1).split() == ["0", "1", "2", "3"], "3 is the directory that ls reads"


async def test_output_belongs_to_the_account_and_is_appended_to(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await launch.run(launcher, launch.shell(1, "echo one; echo wrong >&2"))
    again = launch.shell(1, "echo two", key=AssignmentKey(1, 1, 1))
    await launch.run(launcher, again)
    assert launch.output(1) == "one\ntwo\n"
    assert (launch.job_dir(1) / "0.err").read_text() == "wrong\n"
    file, directory = (launch.job_dir(1) / "0.out").stat(), launch.job_dir(1).stat()
    assert (file.st_uid, stat.S_IMODE(file.st_mode)) == (launch.account.uid, 0o640)
    assert (directory.st_uid, stat.S_IMODE(directory.st_mode)) == (launch.account.uid, 0o750)
    assert stat.S_IMODE(launch.job_dir(1).parent.stat().st_mode) == 0o711


async def test_directories_left_half_made_by_a_kill_are_made_whole(launch: LaunchYard) -> None:
    launch.job_dir(1).mkdir(parents=True)
    for directory in (launch.job_dir(1).parent, launch.job_dir(1)):
        directory.chmod(0o700)
    launcher = await launch.agent()
    assert (await launch.run(launcher, launch.shell(1, "echo run"))).exit_code == 0
    assert launch.output(1) == "run\n"
    assert stat.S_IMODE(launch.job_dir(1).parent.stat().st_mode) == 0o711
    directory = launch.job_dir(1).stat()
    assert (directory.st_uid, stat.S_IMODE(directory.st_mode)) == (launch.account.uid, 0o750)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho $0 $1\n", "{dir}/script x"),
        ("echo no first line: $1\n", "no first line: x"),
        ("#!/usr/bin/env python3\nimport sys; print(sys.argv[1])\n", "x"),
    ],
)
async def test_a_script_is_started_by_its_first_line(launch: LaunchYard, script: str, said: str) -> None:
    launcher = await launch.agent()
    assert (await launch.run(launcher, launch.spec(1, "x", script=script))).exit_code == 0
    assert launch.output(1).strip() == said.format(dir=launch.job_dir(1))
    mode = (launch.job_dir(1) / "script").stat()
    assert (mode.st_uid, stat.S_IMODE(mode.st_mode)) == (launch.account.uid, 0o700)


async def test_an_executable_text_without_a_first_line_is_taken_as_shells_take_it(launch: LaunchYard) -> None:
    program = launch.directory / "program"
    program.write_text("echo ran $1\n")
    program.chmod(0o755)
    launcher = await launch.agent()
    await launch.run(launcher, launch.spec(1, str(program), "it"))
    assert launch.output(1) == "ran it\n"


async def test_what_cannot_start_is_refused_with_a_code_and_a_sentence(launch: LaunchYard) -> None:
    (launch.directory / "plain").write_text("")
    (launch.directory / "orphan").write_text("#!/no/such/interpreter\n")
    (launch.directory / "orphan").chmod(0o755)
    locked = launch.directory / "locked"
    locked.mkdir(mode=0o000)
    root = Account(name="root", uid=0, gid=0)
    name, here = launch.account.name, launch.directory
    launcher = await launch.agent()
    cases = [
        (launch.spec(1, "true", cwd=f"{here}/gone"), "WorkingDirectoryMissing", f"there is no directory {here}/gone"),
        (launch.spec(2, "true", cwd=f"{here}/plain"), "WorkingDirectoryMissing", "there is no directory"),
        (launch.spec(3, "true", cwd=str(locked)), "PermissionDenied", f"{name} may not enter the directory {locked}"),
        (launch.spec(4, "no-such-program"), "CommandNotFound", "no 'no-such-program' in PATH=/usr/local/bin:"),
        (launch.spec(5, "/no/such/program"), "CommandNotFound", "there is no '/no/such/program'"),
        (launch.spec(6, f"{here}/plain"), "PermissionDenied", f"{name} may not execute '{here}/plain'"),
        (launch.spec(7, f"{here}/orphan"), "CommandNotFound", "the interpreter that its first line names is not"),
        (launch.spec(8), "CommandNotFound", "the command is empty"),
        (launch.spec(9, "echo", "a\0b"), "StartFailed", "embedded null byte"),
        (launch.spec(10, "true", account=root), "AccountMissing", "nothing runs as uid 0"),
    ]
    for spec, code, detail in cases:
        refused = await refusal(launcher, spec)
        assert refused.code == code, refused
        assert detail in refused.detail
    assert await launcher.list() == ()
    locked.rmdir()


async def test_output_is_never_written_through_a_link(launch: LaunchYard) -> None:
    """The job's directory is its account's: it could put a link there before the next attempt is started."""
    target = launch.directory / "precious"
    target.write_text("precious")
    launcher = await launch.agent()
    await launch.run(launcher, launch.shell(1, "echo made"))
    out = launch.job_dir(1) / "0.out"
    traps: list[Callable[[], None]] = [
        lambda: out.symlink_to(target),
        lambda: os.link(target, out),
        lambda: os.mkfifo(out),
    ]
    for trap in traps:
        out.unlink()
        trap()
        refused = await refusal(launcher, launch.shell(1, "echo again", key=AssignmentKey(1, 2, 0)))
        assert refused.code == "OutputUnavailable"
    assert target.read_text() == "precious"


async def test_a_key_starts_once_however_often_it_is_asked(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    spec = launch.shell(1, "echo started; exec sleep 1000")
    first = await start(launcher, spec)
    both = await launcher.start([spec, spec])
    other = await launch.agent()
    assert {*both, *await other.start([spec])} == {first}
    assert await launch.printed(1, 1) == ["started"]


async def test_many_starts_are_answered_in_order_and_every_end_is_told(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    began = time.perf_counter()
    specs = [launch.spec(job, "/bin/true" if job % 10 else "/no/such") for job in range(1, 201)]
    results = await launcher.start(specs)
    ends = await all_ended(launcher, [result.key for result in results if isinstance(result, Started)])
    print(f"200 starts and ends in {(time.perf_counter() - began) * 1000:.0f} ms")
    assert [result.key for result in results] == [spec.key for spec in specs]
    assert len(ends) == 180
    assert all(end.exit_code == 0 and not end.lost for end in ends.values())


# --- how they end ---


async def test_an_end_is_told_as_the_kernel_said_it(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    assert (await launch.run(launcher, launch.shell(1, "exit 7"))).exit_code == 7
    by_itself = await launch.run(launcher, launch.shell(2, "kill -SEGV $$"))
    assert (by_itself.signal, by_itself.exit_code, by_itself.stopped) == (signal.SIGSEGV, 0, False)
    assert by_itself.started_ms <= by_itself.at_ms


async def test_a_stop_asks_first(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    polite = launch.shell(1, "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 1000 & wait; done")
    await start(launcher, polite)
    await launch.printed(1, 1)
    await launcher.stop(key(1), 60_000)
    end = await ended(launcher, key(1))
    assert (end.exit_code, end.stopped) == (3, True)
    assert launch.output(1) == "ready\nbye\n"


async def test_who_does_not_listen_is_killed_after_the_grace(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await start(launcher, launch.shell(1, "trap '' TERM; echo ready; while :; do sleep 1000; done"))
    await launch.printed(1, 1)
    began = time.monotonic()
    await launcher.stop(key(1), 150)
    end = await ended(launcher, key(1))
    assert (end.signal, end.stopped) == (signal.SIGKILL, True)
    assert time.monotonic() - began >= 0.15


async def test_a_second_stop_can_shorten_the_grace(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await start(launcher, launch.shell(1, "trap '' TERM; echo ready; while :; do sleep 1000; done"))
    await launch.printed(1, 1)
    await launcher.stop(key(1), 600_000)
    await launcher.stop(key(1), 700_000)
    await launcher.stop(key(1), 0)
    assert (await ended(launcher, key(1))).signal == signal.SIGKILL


async def test_a_process_that_is_halted_sees_its_stop(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    started = await start(launcher, launch.shell(1, "echo ready; kill -STOP $$; exec sleep 1000"))
    await launch.printed(1, 1)
    await until(lambda: Path(f"/proc/{started.pid}/stat").read_text().split()[2] == "T", "halted")
    await launcher.stop(key(1), 60_000)
    assert (await ended(launcher, key(1))).signal == signal.SIGTERM


async def test_stops_of_unknown_and_ended_keys_are_no_error(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await launcher.stop(key(99), 10)
    await launch.run(launcher, launch.spec(1, "true"))
    await launcher.stop(key(1), 10)
    assert [state.key for state in await launcher.list()] == [key(1)]


@pytest.mark.parametrize("way", ["by itself", "stopped", "killed"])
async def test_when_an_end_is_told_nothing_of_the_tree_is_left(launch: LaunchYard, way: str) -> None:
    """Children in the group, in sessions of their own, and without the job's environment: all gone."""
    launcher = await launch.agent()
    first, last = ("", "exit 0") if way == "by itself" else ("trap '' TERM;", "while :; do sleep 1000; done")
    waits = f"while [ $(wc -l < {launch.job_dir(1)}/0.out) -lt 3 ]; do :; done; {last}"
    await start(launcher, launch.shell(1, f"{first} sh -c 'echo $$; exec sleep 1002' & {SCATTER} {waits}"))
    if way != "by itself":
        await launch.printed(1, 3)
        await launcher.stop(key(1), 50 if way == "stopped" else 0)
    end = await ended(launcher, key(1))
    pids = [int(pid) for pid in launch.output(1).split()]
    assert len(pids) == 3
    assert [pid for pid in pids if alive(pid)] == []
    assert end.signal == (0 if way == "by itself" else signal.SIGKILL)


async def test_ending_one_replica_leaves_the_strays_of_others_alone(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await start(launcher, launch.shell(1, f"{SCATTER} exec sleep 1000"))
    await start(launcher, launch.shell(2, f"{SCATTER} exec sleep 1000"))
    first, second = await launch.printed(1, 2), await launch.printed(2, 2)
    await launcher.stop(key(1), 0)
    await ended(launcher, key(1))
    assert all(alive(int(pid)) for pid in second)
    await launcher.stop(key(2), 0)
    await ended(launcher, key(2))
    assert not any(alive(int(pid)) for pid in (*first, *second))


# --- agents come and go ---


async def test_an_end_while_no_agent_is_there_is_told_to_the_next(launch: LaunchYard) -> None:
    first = await launch.agent()
    os.mkfifo(launch.directory / "go")
    os.chmod(launch.directory / "go", 0o666)
    started = await start(first, launch.shell(1, "echo ready; read line < go; exit 5", cwd=str(launch.directory)))
    await start(first, launch.shell(2, "exec sleep 1000"))
    await launch.abandon(first)

    assert alive(started.pid)
    (launch.directory / "go").write_text("now\n")
    await until(lambda: not alive(started.pid), "the job ended")

    second = await launch.agent()
    states = {state.key: state for state in await second.list()}
    end = await ended(second, key(1))
    assert end.exit_code == 5
    assert states[key(2)].exit is None
    assert states[key(2)].pid

    await second.forget([key(1), key(2)])
    assert [state.key for state in await second.list()] == [key(2)], "what runs is not forgotten"
    third = await launch.agent()
    await third.stop(key(2), 0)
    assert (await ended(third, key(2))).signal == signal.SIGKILL


# --- halted for a while ---


def is_still(pid: int, watched_s: float = 0.1) -> bool:
    """Whether it uses no CPU time over a while in which a busy one would."""
    before = cpu_ticks(pid)
    time.sleep(watched_s)
    return cpu_ticks(pid) == before


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_a_frozen_tree_stands_still_and_goes_on_where_it_was(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    started = await start(
        launcher, launch.shell(1, "sh -c 'echo $$; while :; do :; done' & echo $$; while :; do :; done")
    )
    pids = [int(line) for line in await launch.printed(1, 2)]
    assert started.pid in pids
    await launcher.freeze([key(1), key(77)], frozen=True)
    await launcher.freeze([key(1)], frozen=True)
    await until(lambda: all(is_still(pid) for pid in pids), "it stands still")
    await launcher.freeze([key(1)], frozen=False)
    await until(lambda: not any(is_still(pid) for pid in pids), "it goes on")


@pytest.mark.parametrize("grace_ms", [0, 60_000])
async def test_what_is_frozen_can_be_stopped(launch: LaunchYard, grace_ms: int) -> None:
    launcher = await launch.agent()
    await start(launcher, launch.shell(1, "trap 'exit 3' TERM; echo ready; while :; do :; done"))
    await launch.printed(1, 1)
    await launcher.freeze([key(1)], frozen=True)
    await launcher.stop(key(1), grace_ms)
    await launcher.freeze([key(1)], frozen=True)
    end = await ended(launcher, key(1))
    assert (end.exit_code, end.signal) == ((3, 0) if grace_ms else (0, signal.SIGKILL))


async def test_what_an_agent_left_frozen_goes_on(launch: LaunchYard) -> None:
    first = await launch.agent()
    started = await start(first, launch.shell(1, "echo ready; while :; do :; done"))
    await launch.printed(1, 1)
    await first.freeze([key(1)], frozen=True)
    await until(lambda: is_still(started.pid), "it stands still")
    await launch.abandon(first)
    await launch.agent()
    await until(lambda: not is_still(started.pid), "it goes on")


# --- leases ---


def leased(launch: LaunchYard, job: int, text: str, lease_ms: int, grace_ms: int = 0) -> ProcessSpec:
    return launch.shell(job, text, lease_ms=lease_ms, lease_grace_ms=grace_ms, renewed_ms=boot_clock_ms())


async def test_a_lease_that_runs_out_ends_the_job_with_its_grace(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    text = "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 0.02; done"
    began_ms = boot_clock_ms()
    await start(launcher, leased(launch, 1, text, 1_500, 10_000))
    await start(launcher, launch.shell(2, "sleep 1000"))
    told = await ended(launcher, key(1))
    assert (told.exit_code, told.expired) == (3, True)
    assert boot_clock_ms() - began_ms >= 1_500
    assert launch.output(1).split() == ["up", "told"]
    assert [state.key for state in await launcher.list() if state.exit is None] == [key(2)], "it has no lease"


async def test_a_job_that_ignores_the_end_of_its_lease_is_killed(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await start(launcher, leased(launch, 1, "trap '' TERM; while :; do sleep 0.02; done", 500, 500))
    told = await ended(launcher, key(1))
    assert (told.signal, told.expired) == (signal.SIGKILL, True)


async def test_a_lease_that_is_renewed_does_not_run_out(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await start(launcher, leased(launch, 1, "sleep 1000", 2_000))
    until_ms = boot_clock_ms() + 5_000
    while boot_clock_ms() < until_ms:
        await launcher.renew(boot_clock_ms())
        await launcher.renew(1)  # one that was long under way
        await asyncio.sleep(0.25)
    (state,) = await launcher.list()
    assert state.exit is None
    told = await ended(launcher, key(1))
    assert told.expired
    assert boot_clock_ms() - until_ms >= 1_500


async def test_a_lease_runs_out_though_the_agent_is_gone(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    started = await start(launcher, leased(launch, 1, "sleep 1000", 1_000))
    await launch.abandon(launcher)
    await until(lambda: not alive(started.pid), "its lease runs out")
    again = await launch.agent()
    told = await ended(again, key(1))
    assert told.expired


async def test_a_job_that_ends_by_itself_has_not_run_out(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await start(launcher, leased(launch, 1, "exit 4", 60_000))
    told = await ended(launcher, key(1))
    assert (told.exit_code, told.expired) == (4, False)


async def test_a_limit_of_memory_can_be_changed_and_none_is_made(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    limited = await start(launcher, launch.shell(1, "sleep 1000", limits=Limits(memory_mib=100)))
    free = await start(launcher, launch.shell(2, "sleep 1000"))
    for job in (1, 2):
        await launcher.limit_memory(key(job), 300)
    await launcher.list()  # after what was asked before
    is_kept = KIND == "systemd"
    assert launch.memory_limit_mib(1, limited.pid) in ((300,) if is_kept else (300, None))
    assert launch.memory_limit_mib(2, free.pid) is None


async def test_limits_and_leases_of_nobody_are_no_error(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    await launcher.limit_memory(key(9), 100)
    await launcher.renew(boot_clock_ms())
    assert (await launch.run(launcher, launch.shell(1, "exit 0"))).exit_code == 0
