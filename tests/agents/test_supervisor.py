"""The supervisor process: its agents come and go, it is killed itself, and what it keeps on disk.

What it does for a single replica is the launchers' contract, `test_launcher_contract.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuyard_agent.launch.base import LauncherGone, ProcessExit
from gpuyard_agent.launch.kernel import boot_id, environment_value
from gpuyard_agent.launch.records import Header, Intent, Records, Running
from gpuyard_agent.launch.spawn import MARK
from support.launch import SCATTER, LaunchYard, alive, ended, key, launch_yard, start, until


@pytest.fixture
async def launch() -> AsyncIterator[LaunchYard]:
    async with launch_yard() as yard:
        yield yard


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
