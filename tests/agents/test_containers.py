"""Replicas in containers: the command line, what cannot be, and a real agent with a stand-in for the engine.

The stand-in runs the command on the host, with the variables that it was told to hand in and no others.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from gpuyard_agent.launch.base import Account
from gpuyard_agent.launch.containers import Containers, Engine, NotContained, find_engine
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Stop
from gpuyard_protocol.resources import MpsShare, NoGpu, TimeSliceShare, WholeCards
from support.agents import AgentRoom, Commander, agent_room, start_order, until_file

KEY = AssignmentKey(17, 2, 0)
ALICE = Account(name="alice", uid=1001, gid=1002, home="/home/alice")
PODMAN, DOCKER = Engine(name="podman", path="/usr/bin/podman"), Engine(name="docker", path="/usr/bin/docker")
LAUNCH = start_order(17, "train", image="registry/train:1", env=(("HOME", "/data"),)).launch
STAND_IN = """#!/usr/bin/python3
import os, sys
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls"), "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] != "run":
    sys.exit(0)
options, command = [], sys.argv[2:]
while command[0].startswith("-"):
    options.append(command.pop(0))
    if options[-1] == "--name":
        command.pop(0)
if command.pop(0) != "registry/train:1":
    sys.exit(125)
names = [one.partition("=")[2] for one in options if one.startswith("--env=")]
os.chdir(next(one.partition("=")[2] for one in options if one.startswith("--workdir=")))
environment = {name: os.environ[name] for name in names if name in os.environ}
os.execvpe(command[0], command, {"PATH": "/usr/bin:/bin", "FROM_IMAGE": "1", **environment})
"""


def wrap(engine: Engine, *, cards: tuple[tuple[str, int], ...] = (), cdi: tuple[Path, ...] = ()) -> list[str]:
    names = ("PATH", "HOME", "CUDA_VISIBLE_DEVICES", "RANK")
    made = Containers(engine, "node-1", cdi).wrap(KEY, LAUNCH, ALICE, names, ("/jobs/17", "/jobs/17", "/ckpt"), cards)
    return list(made)


def test_podman_keeps_the_container_in_the_jobs_own_tree_as_the_jobs_account() -> None:
    command = wrap(PODMAN)
    assert command[:5] == ["/usr/bin/podman", "run", "--rm", "--name", "gpuyard-node-1-17.2.0"]
    assert command[-3:] == ["--workdir=/jobs/17", "--entrypoint=", "registry/train:1"]
    assert {"--cgroups=disabled", "--userns=keep-id", "--user=1001:1002"} <= set(command)
    assert [one for one in command if one.startswith("--volume=")] == [
        "--volume=/jobs/17:/jobs/17",
        "--volume=/ckpt:/ckpt",
    ]


def test_variables_are_handed_in_by_name_and_the_hosts_own_stay_outside() -> None:
    """Values on a command line could be read by everybody. HOME is the job's own wish here, PATH the image's affair."""
    handed = [one for one in wrap(PODMAN) if one.startswith("--env=")]
    assert handed == ["--env=CUDA_VISIBLE_DEVICES", "--env=GPUYARD_LAUNCH", "--env=HOME", "--env=RANK"]


def test_docker_is_not_asked_for_what_it_does_not_know() -> None:
    assert not {"--cgroups=disabled", "--userns=keep-id", "--ulimit=host"} & set(wrap(DOCKER))


def test_cards_are_given_by_the_names_that_the_host_has_for_them(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: GPU-1\n- name: '3'\n- name: MIG-7\n- name: all\n"
    )
    (tmp_path / "other.json").write_text(json.dumps({"kind": "vendor.com/nic", "devices": [{"name": "4"}]}))
    (tmp_path / "broken.yaml").write_text("kind: [")
    given = [
        one for one in wrap(PODMAN, cards=(("GPU-1", 0), ("GPU-9", 3), ("MIG-7", -1)), cdi=(tmp_path,)) if "gpu=" in one
    ]
    assert given == [f"--device=nvidia.com/gpu={name}" for name in ("GPU-1", "3", "MIG-7")]
    with pytest.raises(NotContained, match=r"GPU-4 has no CDI name in .*: nvidia-ctk cdi generate"):
        wrap(PODMAN, cards=(("GPU-4", 4),), cdi=(tmp_path, tmp_path / "none"))


def test_what_cannot_be_is_refused_before_anything_is_made() -> None:
    with pytest.raises(NotContained, match=r"runs no container images: podman is not installed"):
        Containers(Engine(problem="podman is not installed"), "n").check(LAUNCH, NoGpu())
    with pytest.raises(NotContained, match="MPS"):
        Containers(PODMAN, "n").check(LAUNCH, MpsShare("GPU-1", 500, 1_000))
    with pytest.raises(NotContained, match="halted"):
        Containers(DOCKER, "n").check(LAUNCH, TimeSliceShare("GPU-1", 500, 1_000))
    for changes in ({"image": "--privileged"}, {"image": "a b"}, {"cwd": "/a:/etc"}):
        with pytest.raises(NotContained):
            Containers(PODMAN, "n").check(msgspec.structs.replace(LAUNCH, **changes), NoGpu())
    for partition in (NoGpu(), WholeCards(("GPU-1",)), TimeSliceShare("GPU-1", 500, 1_000)):
        Containers(PODMAN, "n").check(LAUNCH, partition)


async def test_the_engine_is_found_by_asking_it(tmp_path: Path) -> None:
    nothing = await find_engine("auto", str(tmp_path))
    assert (nothing.name, nothing.problem) == ("", "podman is not installed; docker is not installed")
    for name, script in (("podman", "#!/bin/sh\necho broken; exit 1\n"), ("docker", "#!/bin/sh\nexit 0\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    assert await find_engine("auto", str(tmp_path)) == Engine(name="docker", path=str(tmp_path / "docker"))
    assert (await find_engine("podman", str(tmp_path))).problem == f"{tmp_path}/podman --version failed: broken"
    assert "settings" in (await find_engine("none", str(tmp_path))).problem


# --- a real agent ---


@pytest.fixture
async def room() -> AsyncIterator[AgentRoom]:
    async with agent_room() as made:
        (made.root / "bin").mkdir(mode=0o755)
        yield made


async def start_agent(room: AgentRoom, *, with_engine: bool) -> Commander:
    commander = await room.commander()
    folder = room.root / "bin"
    if with_engine:
        (folder / "podman").write_text(STAND_IN)
        (folder / "podman").chmod(0o755)
        calls(room).touch()
        calls(room).chmod(0o666)
    path = f"{folder}:{os.environ['PATH']}" if with_engine else str(folder)
    await room.start_agent(environment={**os.environ, "PATH": path})
    await commander.joined()
    await commander.sync()
    return commander


def calls(room: AgentRoom) -> Path:
    return room.root / "bin" / "calls"


async def test_an_image_runs_with_its_own_path_and_the_jobs_variables(room: AgentRoom) -> None:
    commander = await start_agent(room, with_engine=True)
    inventory = (await commander.joined()).inventory
    assert (inventory.container_engine, inventory.container_problem) == ("podman", "")
    card = inventory.devices[0].uuid
    script = f"#!/bin/sh\nenv > {room.scratch}/env; pwd > {room.scratch}/pwd; exit 7\n"
    start = start_order(1, "ignored", partition=WholeCards((card,)), image="registry/train:1", script=script)
    await commander.order(start)
    ended = await commander.ended(start.key)
    assert (ended.outcome, ended.exit_code) == ("exited", 7)
    seen = dict(line.split("=", 1) for line in (room.scratch / "env").read_text().splitlines())
    assert seen["CUDA_VISIBLE_DEVICES"] == card
    assert (seen["PATH"], seen["FROM_IMAGE"], seen["GPUYARD_JOB"]) == ("/usr/bin:/bin", "1", "1")
    assert (room.scratch / "pwd").read_text().strip() == seen["GPUYARD_JOB_DIR"]
    assert calls(room).read_text().splitlines()[-1] == "rm --force gpuyard-node-1-1.1.0"


async def test_a_killed_container_is_removed_before_its_end_is_told(room: AgentRoom) -> None:
    commander = await start_agent(room, with_engine=True)
    start = start_order(1, f"echo up > {room.scratch}/up; sleep 1000", image="registry/train:1")
    await commander.order(start)
    await until_file(room.scratch / "up")
    await commander.order(Stop(key=start.key, grace_ms=0))
    assert (await commander.ended(start.key)).outcome == "stopped"
    assert calls(room).read_text().splitlines()[-1] == "rm --force gpuyard-node-1-1.1.0"


async def test_a_node_without_an_engine_refuses_by_name_and_takes_the_blame(room: AgentRoom) -> None:
    commander = await start_agent(room, with_engine=False)
    inventory = (await commander.joined()).inventory
    assert inventory.container_engine == ""
    start = start_order(1, "true", image="registry/train:1")
    await commander.order(start)
    ended = await commander.ended(start.key)
    assert (ended.outcome, ended.code, ended.node_fault) == ("refused", "ContainerEngineMissing", True)
    assert "podman is not installed; docker is not installed" in ended.detail


# --- an engine that has lost track ---

#: Refuses everything but to begin anew, until it has been told to.
LOST = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/calls"
if [ "$1 $2" = "system migrate" ]; then touch "$here/anew"; exit 0; fi
[ -e "$here/anew" ] && exit 0
echo "invalid internal status, try resetting the pause process with \\"$0 system migrate\\": no such process"
exit 125
"""


@pytest.mark.parametrize("ask", ["wake", "remove"])
async def test_podman_that_has_lost_track_is_told_to_begin_anew(tmp_path: Path, ask: str) -> None:
    (tmp_path / "podman").write_text(LOST)
    (tmp_path / "podman").chmod(0o755)
    containers = Containers(Engine(name="podman", path=str(tmp_path / "podman")), "n")
    us = Account(name="us", uid=os.geteuid(), gid=os.getegid(), home=str(tmp_path))
    await (containers.wake(us) if ask == "wake" else containers.remove(KEY, us))
    first, anew, again = (tmp_path / "calls").read_text().splitlines()
    assert (anew, again) == ("system migrate", first)


async def test_an_account_that_the_engine_does_not_serve_is_the_nodes_fault(tmp_path: Path) -> None:
    (tmp_path / "podman").write_text('#!/bin/sh\necho "cannot find UID/GID for user us: no subuid ranges"; exit 125\n')
    (tmp_path / "podman").chmod(0o755)
    containers = Containers(Engine(name="podman", path=str(tmp_path / "podman")), "n")
    us = Account(name="us", uid=os.geteuid(), gid=os.getegid(), home=str(tmp_path))
    with pytest.raises(NotContained, match=r"podman does not work for the account us: .* no subuid ranges"):
        await containers.wake(us)
