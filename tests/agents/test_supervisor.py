"""The supervisor with real processes: how they start, how they end, and that nothing is forgotten or left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpuyard_agent.launch.base import Account, LauncherGone, ProcessExit, Started
from gpuyard_agent.launch.kernel import boot_id, environment_value
from gpuyard_agent.launch.records import Header, Intent, Records, Running
from gpuyard_agent.launch.spawn import MARK
from gpuyard_protocol.names import AssignmentKey
from support.launch import LaunchYard, alive, all_ended, ended, key, launch_yard, refusal, start, until

#: Leaves two sessions of its own behind, one of them without the job's environment, and says their pids.
SCATTER = (
    'setsid sh -c "echo \\$\\$; exec sleep 1000" & env -i /usr/bin/setsid /bin/sh -c "echo \\$\\$; exec sleep 1001" &'
)


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
    assert first._writer is not None
    first._writer.transport.abort()  # as when the agent is killed

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


async def test_the_supervisor_is_in_no_session_of_its_agent(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    assert os.getsid(launcher.supervisor_pid) == os.getpgid(launcher.supervisor_pid)
    assert os.getsid(launcher.supervisor_pid) != os.getsid(0)


async def test_a_lost_connection_is_told_to_everyone_who_waits(launch: LaunchYard) -> None:
    launcher = await launch.agent()
    waiting = asyncio.create_task(ended(launcher, key(1)))
    await asyncio.sleep(0)
    os.kill(launcher.supervisor_pid, signal.SIGKILL)
    with pytest.raises(LauncherGone):
        await waiting
    with pytest.raises(LauncherGone):
        await launcher.start([launch.spec(1, "true")])
    with pytest.raises(LauncherGone):
        await launcher.list()
    assert await launcher.open() == ()
    launch.supervisors.add(launcher.supervisor_pid)
    await launch.run(launcher, launch.spec(1, "true"))


async def test_two_agents_at_once_use_one_supervisor_and_both_are_told(launch: LaunchYard) -> None:
    one, two = await asyncio.gather(launch.agent(), launch.agent())
    assert one.supervisor_pid == two.supervisor_pid
    await start(one, launch.spec(1, "true"))
    assert await ended(one, key(1)) == await ended(two, key(1))


async def test_only_its_own_user_and_root_are_served(launch: LaunchYard) -> None:
    await launch.agent()
    path = launch.directory / "supervisor.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o666)  # as if that protection were gone: the kernel's word on the caller remains
    program = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); print(len(s.recv(1)))"
    user = launch.account.uid if os.getuid() == 0 else None
    serving = subprocess.Popen(["/usr/bin/python3", "-c", program], user=user, cwd="/", stdout=subprocess.PIPE)
    if user is None:
        serving.kill()  # it is served, so it waits for a first word
    output, _ = serving.communicate(timeout=20)
    assert output.strip() == (b"0" if user is not None else b"")


@pytest.mark.parametrize(
    "junk", [struct.pack(">I", 2**31), struct.pack(">I", 4) + b"junk", struct.pack(">I", 17) + b'{"type":"dance"} ']
)
async def test_junk_ends_the_connection_and_nothing_else(launch: LaunchYard, junk: bytes) -> None:
    launcher = await launch.agent()
    stranger = socket.socket(socket.AF_UNIX)
    stranger.settimeout(20)
    stranger.connect(str(launch.directory / "supervisor.sock"))
    stranger.sendall(junk)
    assert stranger.recv(1) == b""
    stranger.close()
    assert (await launch.run(launcher, launch.spec(1, "true"))).exit_code == 0
    assert "bad-frame" in launch.supervisor_log()


# --- the supervisor itself is killed ---


async def kill_supervisor(launch: LaunchYard) -> None:
    pid = launch.launchers[-1].supervisor_pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid), "the supervisor is gone")


async def test_processes_outlive_their_supervisor_and_are_adopted_by_the_next(launch: LaunchYard) -> None:
    first = await launch.agent()
    os.mkfifo(launch.directory / "go")
    os.chmod(launch.directory / "go", 0o666)
    waiting = launch.shell(1, f"{SCATTER} read line < go; exit 5", cwd=str(launch.directory))
    started = await start(first, waiting)
    await start(first, launch.shell(2, f"{SCATTER} exec sleep 1000"))
    strays = [int(pid) for pid in (*await launch.printed(1, 2), *await launch.printed(2, 2))]
    # A process shows no environment in the middle of its exec.
    await until(lambda: sum(environment_value(pid, MARK) is not None for pid in strays) == 2, "two that are marked")
    marked = [pid for pid in strays if environment_value(pid, MARK)]
    await kill_supervisor(launch)

    second = await launch.agent()
    assert second.supervisor_pid != first.supervisor_pid
    assert [(state.key, state.exit) for state in await second.list()] == [(key(1), None), (key(2), None)]
    assert (await start(second, waiting)).pid == started.pid, "known, so not started again"

    (launch.directory / "go").write_text("now\n")
    end = await ended(second, key(1))
    # Linux 6.15 and later tell how the process of a killed parent ended; older kernels do not.
    assert (end.lost, end.exit_code) in ((False, 5), (True, 0))
    await second.stop(key(2), 50)
    stopped = await ended(second, key(2))
    assert stopped.stopped
    assert not any(alive(pid) for pid in marked)
    for pid in set(strays) - set(marked):
        if alive(pid):  # without mark, session and parent it cannot be told from a stranger's: init has it now
            os.kill(pid, signal.SIGKILL)


async def test_who_ends_while_no_supervisor_is_there_is_lost_and_its_tree_is_cleared(launch: LaunchYard) -> None:
    first = await launch.agent()
    started = await start(first, launch.shell(1, "setsid sh -c 'echo $$; exec sleep 1000' & exec sleep 1000"))
    (stray,) = await launch.printed(1, 1)
    await kill_supervisor(launch)
    os.kill(started.pid, signal.SIGKILL)
    await until(lambda: not alive(started.pid), "the process is gone")

    second = await launch.agent()
    end = await ended(second, key(1))
    if not end.lost:  # nobody has reaped it yet, so the kernel could still be asked
        assert end.signal == signal.SIGKILL
    assert not alive(int(stray))


async def test_ends_that_were_not_fetched_survive_the_supervisor(launch: LaunchYard) -> None:
    first = await launch.agent()
    await launch.run(first, launch.shell(1, "exit 4"))
    await launch.run(first, launch.shell(2, "exit 0"))
    await first.forget([key(2)])
    await first.list()  # taken in order, so the supervisor has forgotten
    await kill_supervisor(launch)
    second = await launch.agent()
    assert (await ended(second, key(1))).exit_code == 4
    assert [state.key for state in await second.list()] == [key(1)]


# --- records ---


def record(launch: LaunchYard, boot: str = "") -> Records:
    (launch.directory / "state").mkdir(exist_ok=True)
    return Records(launch.directory / "state" / "supervisor.records", boot or boot_id())


async def test_after_a_restart_of_the_node_everything_that_ran_is_lost(launch: LaunchYard) -> None:
    """Its pids mean other processes now: this test's own among them, which had better survive."""
    records = record(launch, "another-boot")
    records.append(Running(key(1), os.getpid(), 123, 1_700_000_000_000, launch.account.uid))
    records.close()
    launcher = await launch.agent()
    end = await ended(launcher, key(1))
    assert (end.lost, end.detail) == (True, "the node was restarted while it ran")
    assert end.started_ms == 1_700_000_000_000


async def test_a_pid_that_is_another_process_by_now_is_left_alone(launch: LaunchYard) -> None:
    records = record(launch)
    records.append(Running(key(1), os.getpid(), 1, 1_700_000_000_000, launch.account.uid))
    records.close()
    launcher = await launch.agent()
    end = await ended(launcher, key(1))
    assert (end.lost, end.detail) == (True, "it ended while no supervisor was there: nobody saw how")


async def test_a_process_made_but_not_written_down_is_found_by_its_mark(launch: LaunchYard) -> None:
    """The supervisor was killed between making a process and writing down its pid; and once more before making one."""
    records = record(launch)
    for job in (1, 2):
        records.append(Intent(key(job), launch.account.uid))
    mark = f"{records.state_id}/{key(1)}"
    records.close()
    made = subprocess.Popen(["/bin/sleep", "1000"], env={MARK: mark}, start_new_session=True)
    launcher = await launch.agent()
    states = {state.key: state for state in await launcher.list()}
    assert states[key(1)].pid == made.pid
    assert states[key(1)].exit is None
    never_made = await ended(launcher, key(2))
    assert (never_made.lost, never_made.detail) == (True, "the supervisor was killed while it was being started")
    await launcher.stop(key(1), 0)
    made.wait(timeout=20)
    await ended(launcher, key(1))


def test_a_line_cut_off_in_the_middle_is_as_if_never_written(tmp_path: Path) -> None:
    path = tmp_path / "records"
    records = Records(path, "boot")
    records.append(Running(key(1), 10, 20, 30, 40))
    records.append(Running(key(2), 10, 20, 30, 40))
    records.close()
    path.write_bytes(path.read_bytes()[:-10])
    again = Records(path, "boot")
    assert list(again.remembered.running) == [key(1)]
    assert again.state_id == records.state_id
    again.close()


def test_records_do_not_grow_without_end(tmp_path: Path) -> None:
    records = Records(tmp_path / "records", "boot")
    wanted = 0
    for job in range(30_000):
        records.append(Intent(key(job), 1))
        if records.wants_rewrite(live=1):
            wanted += 1
            records.rewrite(records.remembered)
    records.close()
    assert wanted >= 1
    assert (tmp_path / "records").stat().st_size < 1_200_000


async def test_a_bare_start_says_who_runs_already(launch: LaunchYard) -> None:
    await launch.agent()
    arguments = ["--socket", str(launch.directory / "other.sock"), "--state", str(launch.directory / "state")]
    second = subprocess.run(
        [sys.executable, "-m", "gpuyard_agent.launch.supervisor", *arguments],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 3
    assert "already-runs" in second.stdout


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    records = Records(tmp_path / "records", "boot")
    end = ProcessExit(key=key(1), exit_code=3, stopped=True, started_ms=30, at_ms=50)
    running = Running(key(2), 10, 20, 30, 40)
    kept = records.remembered
    kept.running[key(2)] = running
    kept.ended[key(1)] = (None, end)
    records.rewrite(kept)
    records.close()
    again = Records(tmp_path / "records", "other boot")
    assert again.remembered == kept
    assert not again.same_boot
    assert Header(again.state_id, "other boot") != Header(again.state_id, "boot")
    again.close()
