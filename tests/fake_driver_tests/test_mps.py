"""The fake MPS daemon, driven as agent and jobs drive the real one: by its command line and by CUDA programs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_driver.control import Error, FakeDriver
from fake_driver.mps_wire import Line

OUT_OF_MEMORY, NO_DEVICE, BUSY, REFUSED, TERMINATED, FAULT = 70, 71, 72, 73, 75, 76


class Mps:
    """One control daemon for one card, and its command line."""

    def __init__(self, driver: FakeDriver, folder: Path, device: str) -> None:
        self.driver = driver
        self.pipe = folder / "pipe"
        self.log = folder / "log"
        self.device = device
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log),
            "CUDA_VISIBLE_DEVICES": device,
        }

    def start(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """With -d: returns when it is up, or has said why not."""
        return subprocess.run(
            [self.driver.program("nvidia-cuda-mps-control"), *(options or ("-d",))],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )

    def run(self, *commands: str, timeout_s: float = 10) -> str:
        """What the command line prints."""
        return subprocess.run(
            [self.driver.program("nvidia-cuda-mps-control")],
            env=self.environment,
            input="".join(f"{command}\n" for command in commands),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        ).stdout

    def ask(self, *commands: str) -> str:
        """The same without a process for it."""
        line = Line.connect(str(self.pipe))
        try:
            answers = ""
            for command in commands:
                line.send({"command": command})
                answers += (line.receive() or {})["answer"]
            return answers
        finally:
            line.close()

    def quit(self) -> None:
        """Returns when the daemon has gone."""
        line = Line.connect(str(self.pipe))
        line.send({"command": "quit"})
        assert line.receive() is None
        line.close()

    def server(self) -> str:
        """Pid of the only server."""
        (pid,) = self.ask("get_server_list").split()
        return pid

    def pid(self) -> int:
        return int((self.pipe / "nvidia-cuda-mps-control.pid").read_text())

    def kill(self) -> None:
        """Whatever state it is in."""
        try:
            os.kill(self.pid(), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            return


@pytest.fixture
def mps(driver: FakeDriver, tmp_path: Path) -> Iterator[Mps]:
    """A daemon for the first card, running."""
    control = Mps(driver, tmp_path, driver.gpu(0).uuid)
    started = control.start()
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    yield control
    driver.clear_faults()
    control.kill()


@pytest.fixture
def client(mps: Mps, start_job: Any) -> Callable[..., Any]:
    """Starts clients of `mps` that sleep."""

    def start(*arguments: str, **environment: str) -> Any:
        return start_job("--sleep", *arguments, **{**mps.environment, **environment})

    return start


def test_it_leaves_the_files_that_the_real_one_leaves(mps: Mps) -> None:
    names = {"control", "control_lock", "control_privileged", "log", "nvidia-cuda-mps-control.pid"}
    assert {path.name for path in mps.pipe.iterdir()} == names
    assert mps.start().stderr.strip() == "An instance of this daemon is already running"
    assert mps.run("get_default_active_thread_percentage", "get_server_list") == "100.0\n"
    assert mps.run("quit") == ""
    # The socket stays, so it says nothing about life.
    assert {path.name for path in mps.pipe.iterdir()} == names - {"nvidia-cuda-mps-control.pid"}
    assert mps.run("get_server_list") == "Cannot find MPS control daemon process\n"
    assert mps.start().returncode == 0


def test_a_server_starts_with_the_first_client(mps: Mps, client: Any, driver: FakeDriver, until: Any) -> None:
    assert mps.ask("get_server_list") == ""
    job = client("--memory", "100")
    assert job.until("ready")["mps_server"] == int(mps.server())
    pid = mps.server()
    assert mps.ask(f"get_server_status {pid}", f"get_client_list {pid}") == f"ACTIVE\n{job.pid}\n"
    row = mps.ask("ps").splitlines()[1].split()
    assert (row[0], row[2], mps.device.startswith(row[3])) == (str(job.pid), pid, True)
    assert mps.ask("get_device_client_list").split() == ["Device", mps.device, str(job.pid)]
    assert {process["pid"]: process["mps"] for process in driver.processes()} == {int(pid): "server", job.pid: "client"}
    job.kill()
    until(lambda: mps.ask(f"get_client_list {pid}") == "")
    assert mps.server() == pid


def test_limits_hold_and_clients_only_lower_them(mps: Mps, client: Any) -> None:
    assert mps.ask(f"set_default_device_pinned_mem_limit {mps.device} 2G") == "2G\n"
    assert mps.ask("set_default_active_thread_percentage 60") == "60.0\n"
    facts = client("--steps", "1").until("ready")
    assert (facts["limit_mib"], facts["percentage"]) == (2048, 60)
    lower = {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"{mps.device}=512M", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"}
    facts = client("--memory", "100", "--steps", "1", **lower).until("ready")
    assert (facts["limit_mib"], facts["percentage"]) == (512, 30)
    higher = {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=8G", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "90"}
    facts = client("--steps", "1", **higher).until("ready")
    assert (facts["limit_mib"], facts["percentage"]) == (2048, 60)


def test_a_client_over_its_limit_runs_out_of_memory_alone(mps: Mps, client: Any) -> None:
    neighbour = client()
    neighbour.until("ready")
    limit = {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"{mps.device}=600M"}
    assert client("--memory", "400", "--context", "300", **limit).exit_code() == OUT_OF_MEMORY
    growing = client("--memory", "100", "--grow", "100", "--step-ms", "1", **limit)
    assert growing.until("ready")
    assert growing.exit_code() == OUT_OF_MEMORY
    assert neighbour.process.poll() is None


def test_defaults_reach_later_servers_and_server_settings_later_clients(mps: Mps, client: Any) -> None:
    first = client()
    first.until("ready")
    pid = mps.server()
    mps.ask("set_default_active_thread_percentage 20", f"set_default_device_pinned_mem_limit {mps.device} 1G")
    second = client()
    assert second.until("ready")["percentage"] == 100
    assert mps.ask(f"get_active_thread_percentage {pid}", f"get_device_pinned_mem_limit {pid} 0") == "100.0\n\n"
    mps.ask(f"set_active_thread_percentage {pid} 40", f"set_device_pinned_mem_limit {pid} {mps.device} 4G")
    facts = client().until("ready")
    assert (facts["percentage"], facts["limit_mib"]) == (40, 4096)


def test_a_terminated_client_has_stopped_when_the_command_returns(mps: Mps, client: Any) -> None:
    neighbour, job = client(), client()
    neighbour.until("ready")
    job.until("ready")
    pid = mps.server()
    assert mps.run(f"terminate_client {pid} {job.pid}") == "0\n"
    assert job.exit_code() == TERMINATED
    assert mps.run(f"terminate_client {pid} 1") == "Invalid process 1!\n"
    assert mps.run("terminate_client 1 1") == "Server 1 not found\n"
    assert neighbour.process.poll() is None


def test_one_clients_fault_ends_all_and_the_server_recovers(
    mps: Mps, client: Any, driver: FakeDriver, start_job: Any, until: Any
) -> None:
    neighbour = client()
    neighbour.until("ready")
    # Frozen: it stays connected, so the server cannot recover yet.
    frozen = client()
    frozen.until("ready")
    frozen.freeze()
    other_card = start_job("--sleep", CUDA_VISIBLE_DEVICES=driver.gpu(1).uuid)
    other_card.until("ready")
    culprit = client("--fault-after", "0")
    assert (culprit.exit_code(), neighbour.exit_code()) == (FAULT, FAULT)
    pid = mps.server()
    assert mps.ask(f"get_server_status {pid}") == "FAULT\n"
    late = client()
    assert late.until("error")["cuda"] == 807
    assert late.exit_code() == REFUSED
    frozen.kill()
    until(lambda: mps.ask(f"get_server_status {pid}") == "ACTIVE\n")
    assert client("--steps", "1").exit_code() == 0
    assert other_card.process.poll() is None


def test_a_fault_can_be_ordered(mps: Mps, client: Any) -> None:
    job = client()
    job.until("ready")
    mps.ask(f"fake_fault {mps.server()}")
    assert job.exit_code() == FAULT


def test_another_users_clients_wait_for_the_first_users(mps: Mps, client: Any, until: Any) -> None:
    mine = client("--uid", "1000")
    mine.until("ready")
    theirs = client("--uid", "1001")
    until(lambda: "push client to pending list" in (mps.log / "control.log").read_text())
    assert len(mps.ask("get_server_list").split()) == 1
    mine.kill()
    assert theirs.until("ready")
    assert len(mps.ask("get_server_list").split()) == 1


def test_one_server_can_serve_every_user(mps: Mps, client: Any) -> None:
    mps.quit()
    assert mps.start("-d", "--multiuser-server").returncode == 0
    servers = {client("--uid", str(uid)).until("ready")["mps_server"] for uid in (1000, 1001)}
    assert len(servers) == 1


def test_an_exclusive_card_lets_nobody_past_mps(mps: Mps, client: Any, driver: FakeDriver, start_job: Any) -> None:
    driver.gpu(0).set(compute_mode=3)
    inside = client()
    inside.until("ready")
    assert start_job("--steps", "1", CUDA_VISIBLE_DEVICES=mps.device).exit_code() == BUSY
    assert client("--steps", "1").exit_code() == 0


def test_a_server_does_not_start_on_a_card_that_somebody_has_alone(
    mps: Mps, client: Any, driver: FakeDriver, bystander: Any
) -> None:
    driver.gpu(0).set(compute_mode=3)
    driver.gpu(0).allocate(bystander.pid, 10)
    assert client().exit_code() == REFUSED


def test_a_client_of_a_card_that_the_daemon_does_not_see_has_no_device(
    mps: Mps, client: Any, driver: FakeDriver
) -> None:
    assert client(CUDA_VISIBLE_DEVICES=driver.gpu(1).uuid).exit_code() == NO_DEVICE


def test_without_a_daemon_a_program_runs_without_mps(mps: Mps, client: Any) -> None:
    """Unless the card is exclusive: that is why the agent makes it so."""
    mps.quit()
    assert client("--steps", "1").until("ready")["mps_server"] is None


def test_a_command_that_hangs_is_let_go_by_the_test(mps: Mps, driver: FakeDriver) -> None:
    driver.hang("mps:get_default_active_thread_percentage")
    with pytest.raises(subprocess.TimeoutExpired):
        mps.run("get_default_active_thread_percentage", timeout_s=0.5)
    # The daemon takes one command connection at a time, and the one that hangs is still the one.
    assert mps.run("get_server_list") == "Cannot send command to MPS control daemon process\n"
    driver.clear_faults()
    assert driver.calls("mps:get_default_active_thread_percentage") == 1


def test_a_command_that_fails_prints_its_code(mps: Mps, driver: FakeDriver) -> None:
    driver.inject("mps:get_server_list", error=201, times=1)
    assert mps.run("get_server_list", "get_server_list") == "201\n"


def test_the_daemon_can_fail_to_start(mps: Mps, driver: FakeDriver) -> None:
    mps.quit()
    driver.inject("mps:start", error=1, times=1)
    assert mps.start().returncode == 1
    assert mps.start().returncode == 0


def test_sigkill_of_a_client_can_wedge_its_server(mps: Mps, client: Any, driver: FakeDriver, until: Any) -> None:
    driver.inject("mps:client-killed", error=1)
    job = client()
    job.until("ready")
    pid = mps.server()
    job.kill()
    until(lambda: driver.calls("mps:client-killed") == 1)
    with pytest.raises(subprocess.TimeoutExpired):
        mps.run(f"get_server_status {pid}", timeout_s=0.5)
    # What is left: kill the server. Its clients fail, and the next one gets a new server.
    os.kill(int(pid), signal.SIGKILL)
    assert client("--steps", "1").until("ready")["mps_server"] != int(pid)


def test_clients_fail_with_their_server_and_with_their_daemon(mps: Mps, client: Any) -> None:
    job = client()
    job.until("ready")
    os.kill(int(mps.server()), signal.SIGKILL)
    assert job.until("error")["cuda"] == 806
    job = client()
    job.until("ready")
    mps.kill()
    assert job.until("error")["cuda"] == 806


def test_quit_waits_for_clients(mps: Mps, client: Any) -> None:
    job = client()
    job.until("ready")
    with pytest.raises(subprocess.TimeoutExpired):
        mps.run("quit", timeout_s=0.3)
    job.kill()


def clients_taken(mps: Mps, count: int) -> int:
    """How many of so many connections are accepted; the others hear that there are too many."""
    lines = [Line.connect(str(mps.pipe)) for _ in range(count)]
    try:
        answers = []
        for line in lines:
            line.send({"client": {"device": mps.device, "limits": {}}})
            answers.append(line.receive() or {})
        taken = sum("server" in answer for answer in answers)
        assert [answer.get("error") for answer in answers] == [None] * taken + [809] * (count - taken)
        return taken
    finally:
        for line in lines:
            line.close()


def test_a_server_takes_no_more_than_48_clients(mps: Mps) -> None:
    assert clients_taken(mps, 50) == 48


def test_a_stranger_on_the_socket_does_no_harm(mps: Mps) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(mps.pipe / "control"))
    assert mps.ask("get_default_active_thread_percentage") == "100.0\n"


def test_static_partitioning_is_probed_for_and_refused(mps: Mps) -> None:
    assert mps.start("-d", "-S").returncode == 1
    assert mps.run("lspart") == "Unrecognized command: lspart\n"
    assert mps.start("-v").stdout == "CUDA MPS control daemon, binary version 13000\n"


def test_a_pipe_directory_too_deep_for_a_socket_is_refused(driver: FakeDriver, tmp_path: Path) -> None:
    deep = Mps(driver, tmp_path / ("x" * 100), driver.gpu(0).uuid)
    started = deep.start()
    assert started.returncode == 1
    assert "too long" in started.stderr


def test_mps_inside_a_mig_device(driver: FakeDriver, nvml: Any, card: Any, tmp_path: Path, start_job: Any) -> None:
    nvml.nvmlDeviceSetMigMode(card, 1)
    gi = nvml.nvmlDeviceCreateGpuInstance(card, 14)
    device = nvml.nvmlComputeInstanceGetInfo(nvml.nvmlGpuInstanceCreateComputeInstance(gi, 1)).device
    uuid = nvml.nvmlDeviceGetUUID(device)
    control = Mps(driver, tmp_path, uuid)
    assert control.start().returncode == 0
    try:
        job = start_job("--sleep", **control.environment)
        job.until("ready")
        assert [process.pid for process in nvml.nvmlDeviceGetMPSComputeRunningProcesses(device)] == [job.pid]
        # As many clients as its two slices of seven deserve.
        assert clients_taken(control, 20) == 13 - 1
    finally:
        control.kill()


def test_the_foreground_daemon_stops_cleanly_on_sigterm(driver: FakeDriver, tmp_path: Path, until: Any) -> None:
    control = Mps(driver, tmp_path, driver.gpu(0).uuid)
    with subprocess.Popen([driver.program("nvidia-cuda-mps-control"), "-f"], env=control.environment) as process:
        until(lambda: control.run("get_default_active_thread_percentage") == "100.0\n")
        assert control.pid() == process.pid
        process.terminate()
        assert process.wait(timeout=10) == 0
    assert not (control.pipe / "nvidia-cuda-mps-control.pid").exists()


def test_smi_sets_the_time_slice_where_it_can(driver: FakeDriver) -> None:
    def smi(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [driver.program("nvidia-smi"), *arguments], env={}, capture_output=True, text=True, timeout=10, check=False
        )
        return done.returncode, done.stdout

    gpu = driver.gpu(1)
    assert smi("compute-policy", "-i", gpu.uuid, "--set-timeslice", "3")[0] == 0
    assert gpu.get("timeslice") == 3
    assert smi("compute-policy", "-i", "1", "--set-timeslice=0")[0] == 0
    assert "Timeslice DEFAULT" in smi("compute-policy", "-l")[1]
    assert smi("compute-policy", "-i", "1", "--set-timeslice", "4")[0] == 2
    assert smi("compute-policy", "-i", "7", "--set-timeslice", "1")[0] == 6
    assert smi("-L")[0] == 2
    gpu.set(compute_mode=3)
    assert smi("compute-policy", "-i", "1", "--set-timeslice", "1")[0] == 3
    gpu.set(compute_mode=0, timeslice_supported=0)
    assert smi("compute-policy", "-i", "1", "--set-timeslice", "1")[0] == 3
    driver.set_knob("privileged", 0)
    assert smi("compute-policy", "-i", "1", "--set-timeslice", "1")[0] == 4
    driver.inject("nvidia-smi", error=Error.UNKNOWN % 256, times=1)
    assert smi("compute-policy", "-l")[0] == Error.UNKNOWN % 256
