"""Jobs with images in real containers: podman as the job's own account, inside transient services of a real systemd.

The image is made here, of one program (busybox) and a file to know it by; no registry is asked. Cards are modelled, so
the container's card is a device file that stands for one, named as NVIDIA's toolkit names cards.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from support.machine_yard import (
    CONTEXT,
    NODE,
    cancel,
    is_forgotten,
    output,
    running,
    state_of,
    submit,
    unit,
    until,
    yard_inside,
)
from support.nspawn import PREFIX, PYTHON, Machine

pytestmark = pytest.mark.machine

WORKER = "worker"
UID = 61500
IMAGE = "localhost/busy:1"
ARCHIVE = "busy.tar"
#: Files of podman that a machine with an empty /etc lacks. Its own driver for layers needs what a tmpfs has not.
SETTINGS = {
    "containers/policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
    "containers/storage.conf": (
        '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n'
    ),
    "subuid": f"{WORKER}:200000:65536\n",
    "subgid": f"{WORKER}:200000:65536\n",
    "sysusers.d/worker.conf": f'u {WORKER} {UID} "runs jobs" /home/{WORKER}\n',
    "tmpfiles.d/worker.conf": f"d /home/{WORKER} 0755 {WORKER} {WORKER}\n",
    "cdi/nvidia.yaml": """
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
- name: GPU-of-the-test
  containerEdits:
    env: [FROM_CDI=1]
    deviceNodes: [{path: /dev/nvidia7}]
""",
}
#: Runs a command line as the agent makes it, with a card that has a name for containers.
WITH_A_CARD = """
import os, sys
from pathlib import Path
from gpuyard_agent.launch.base import Account
from gpuyard_agent.launch.containers import Containers, Engine
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Launch

account = Account(name="worker", uid=os.getuid(), gid=os.getgid(), home=os.environ["HOME"])
made = Containers(Engine(name="podman", path="/usr/bin/podman"), "node").wrap(
    AssignmentKey(99, 1, 0), Launch(tenant="acme", user="alice", image=sys.argv[1]), account, (), (account.home,),
    (("GPU-of-the-test", 0),),
)
os.execv(made[0], (*made, "sh", "-c", "echo cdi $FROM_CDI; ls /dev | grep nvidia"))
"""


def prepare(made: Machine) -> None:
    for name, text in SETTINGS.items():
        (made.etc / name).parent.mkdir(exist_ok=True)
        (made.etc / name).write_text(text)
    made.state.chmod(0o755)
    (made.state / ARCHIVE).write_bytes(image())
    (made.state / ARCHIVE).chmod(0o644)


def image() -> bytes:
    """The root of an image: busybox under the names that the jobs use."""
    program = shutil.which("busybox")
    assert program is not None, "needs busybox, statically linked (Debian package busybox-static)"
    is_dynamic = subprocess.run(["ldd", program], capture_output=True, check=False).returncode == 0
    assert not is_dynamic, f"{program} is not linked statically (Debian package busybox-static)"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(program, "bin/busybox")
        for name in ("sh", "id", "cat", "ls", "grep", "sleep", "env", "touch"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name in ("tmp", "etc"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(folder)
        mark = tarfile.TarInfo("made-for-this-test")
        tar.addfile(mark)
    return packed.getvalue()


def as_worker(yard: Machine, *command: str) -> str:
    """As the engine is run for a job: by its account, with little more than HOME."""
    return yard.run(
        *("systemd-run", "--quiet", "--wait", "--pipe", "--collect", "-p", f"User={WORKER}"),
        *("-p", "WorkingDirectory=~", "--setenv=PATH=/usr/bin:/bin", "--", *command),
    ).stdout


@pytest.fixture(scope="module")
def yard() -> Iterator[Machine]:
    assert shutil.which("podman") is not None, "needs podman, crun and newuidmap (Debian packages podman crun uidmap)"
    settings = f'quantum = "500ms"\ncontainers = "podman"\nrun_as = "{WORKER}"\n'
    with yard_inside(settings, prepare=prepare, nesting=True) as made:
        as_worker(made, "podman", "import", f"/var/lib/gpuyard/{ARCHIVE}", IMAGE)
        yield made


def containers(yard: Machine) -> list[str]:
    return as_worker(yard, "podman", "ps", "--all", "--format={{.Names}}").split()


def test_a_job_runs_in_its_image_as_its_account_and_its_exit_code_arrives(yard: Machine) -> None:
    script = 'ls /; id -u; echo "$CUDA_VISIBLE_DEVICES"; touch "$GPUYARD_JOB_DIR/made"; exit 7'
    job = submit(yard, script, "--image", IMAGE, "--gpus", "1")
    until(lambda: is_forgotten(yard, job) and "failed" in state_of(yard, job), "it has ended")
    lines = output(yard, job).split()
    assert "made-for-this-test" in lines
    assert lines[-2] == str(UID)
    assert lines[-1].startswith("GPU-")
    assert "exit code 7" in state_of(yard, job) or "7" in state_of(yard, job).split()
    assert list((yard.state / "agent" / "jobs" / str(job)).rglob("made"))
    assert containers(yard) == []


def test_a_container_belongs_to_its_unit_and_goes_with_it(yard: Machine) -> None:
    job, _ = running(yard, "trap '' TERM; while :; do sleep 0.1; done", "--image", IMAGE)
    assert containers(yard) == [f"gpuyard-{NODE}-{job}.1.0"]
    group = f"/sys/fs/cgroup{yard.show(unit(job), 'ControlGroup')}/cgroup.procs"
    seen = yard.run("sh", "-c", f"for p in $(cat {group}); do ls /proc/$p/root; done").stdout.split()
    assert "made-for-this-test" in seen, "a process of the image is in the unit's control group"
    cancel(yard, job)
    until(lambda: containers(yard) == [], "the container has gone")


def test_containers_on_one_card_take_turns(yard: Machine) -> None:
    options = ("--image", IMAGE, "--gpu", "0.4", "--isolation", "none", "--gpu-memory", "1Gi", "--cpus", "0.1")
    jobs = [running(yard, "while :; do :; done", *options)[0] for _ in range(2)]
    halted = dict.fromkeys(jobs, 0)

    def both_were() -> bool:
        for job in jobs:
            halted[job] += yard.show(unit(job), "FreezerState") == "frozen"
        return all(halted.values())

    until(both_were, "each has been halted for the other")
    cancel(yard, *jobs)


def test_a_container_survives_its_agent(yard: Machine) -> None:
    job, pid = running(yard, "while :; do sleep 0.1; done", "--image", IMAGE)
    yard.systemctl("kill", "--signal=KILL", "gpuyard-agent")
    until(lambda: yard.show("gpuyard-agent", "ActiveState") == "active", "the agent is back")
    assert int(yard.show(unit(job), "MainPID")) == pid
    assert "running" in yard.run(f"{PREFIX}/bin/gpuyard", "jobs", env=CONTEXT).stdout
    cancel(yard, job)
    until(lambda: containers(yard) == [], "the container has gone")


def test_an_image_that_is_not_there_is_the_jobs_own_failure(yard: Machine) -> None:
    job = submit(yard, "true", "--image", "localhost/nothing:1")
    until(lambda: "failed" in state_of(yard, job), "it has failed")
    path = yard.state / "agent" / "jobs" / str(job) / "1" / "0.err"
    assert "localhost/nothing:1" in path.read_text()


def test_a_card_is_given_by_its_name_for_containers(yard: Machine) -> None:
    yard.run("mknod", "-m", "666", "/dev/nvidia7", "c", "1", "3")
    yard.run("mknod", "-m", "666", "/dev/nvidia8", "c", "1", "3")
    said = as_worker(yard, PYTHON, "-c", WITH_A_CARD, IMAGE)
    assert said.splitlines() == ["cdi 1", "nvidia7"]
