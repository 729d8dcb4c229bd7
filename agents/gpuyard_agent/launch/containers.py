"""Replicas in containers: which engine this host has, and the command line that goes before a replica's own.

The engine is podman, or docker where that alone is there, and it runs as the job's account and not as root: what the
account may not do by itself, an image does not let it do either. Cards are given by their names in the Container Device
Interface (CDI), which NVIDIA's toolkit writes down for the host; a card without such a name cannot be given.

With podman the container stays in the replica's own process tree and control group (`--cgroups=disabled`), so limits,
halting and killing reach it like any other replica. Under docker it is a child of docker's daemon: it cannot be halted,
and has to be removed after a kill; so shares that take turns need podman.

Podman keeps one process of its own for each account, which holds the account's user namespace; whichever command does
not find it starts it. So the agent gives a command before each container (`wake`): otherwise that process would lie in
the control group of some replica, and end with it. Where it has ended, and the containers that podman believes to run
were killed past podman, podman refuses every command until it is told to begin anew (`system migrate`); nothing of the
account runs then, so the agent tells it so.

MPS cannot be used from a container: its server has to know its clients by the host's process ids, and podman gives a
container without a control group of its own always process ids of its own.

The host's network and IPC are the replica's: gangs find each other, and data loaders their shared memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import structlog
import yaml

from gpuyard_agent.launch.base import Account
from gpuyard_agent.launch.spawn import MARK
from gpuyard_protocol.jobs import IMAGE, IMAGE_EXPECTED
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Launch
from gpuyard_protocol.resources import MpsShare, Partition, TimeSliceShare

EngineName: TypeAlias = Literal["podman", "docker"]
EngineChoice: TypeAlias = Literal["auto", "podman", "docker", "none"]

ENGINE_MISSING = "ContainerEngineMissing"
#: Where the toolkit of NVIDIA writes the names of cards.
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
_CDI_KIND = "nvidia.com/gpu"
#: Of the host, and not of the image: never handed in unless the job names them itself.
_HOSTS_OWN = frozenset({"PATH", "HOME", "SHELL", "LD_LIBRARY_PATH"})
#: What podman asks for when it cannot find the processes of what it believes to run; it finds none then.
_LOST_TRACK = "system migrate"
_ASK_S = 10.0
_REMOVE_S = 30.0

_log = structlog.get_logger("gpuyard_agent.containers")


class NotContained(Exception):
    """This replica cannot run in a container here; the text says why."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What runs images here. Without a `path` nothing does, and `problem` says why."""

    name: EngineName | Literal[""] = ""
    path: str = ""
    problem: str = ""


async def find_engine(choice: EngineChoice, search_path: str | None = None) -> Engine:
    """The first of podman and docker that is installed and answers. `search_path`: in the form of PATH."""
    if choice == "none":
        return Engine(problem='the node\'s settings say `containers = "none"`')
    wanted: tuple[EngineName, ...] = ("podman", "docker") if choice == "auto" else (choice,)
    problems = []
    for name in wanted:
        path = shutil.which(name, path=search_path)
        if path is None:
            problems.append(f"{name} is not installed")
            continue
        code, said = await _run((path, "--version"), None, _ASK_S)
        if code == 0:
            return Engine(name=name, path=path)
        problems.append(f"{path} --version failed: {said}")
    return Engine(problem="; ".join(problems))


class Containers:
    """Command lines for one node's engine."""

    def __init__(self, engine: Engine, node: str, cdi_folders: Iterable[Path] = CDI_FOLDERS) -> None:
        self.engine = engine
        self._node = node
        self._cdi_folders = tuple(cdi_folders)

    def check(self, launch: Launch, partition: Partition) -> None:
        """Before anything is made for it. Raises `NotContained`."""
        if not self.engine.path:
            raise NotContained(f"this node runs no container images: {self.engine.problem}")
        if isinstance(partition, MpsShare):
            raise NotContained("a share under MPS cannot be used from a container: MPS has to know its process ids")
        if self.engine.name == "docker" and isinstance(partition, TimeSliceShare):
            raise NotContained("docker's containers cannot be halted by the node; podman's can")
        if not IMAGE.fullmatch(launch.image):
            raise NotContained(f"{launch.image!r} is not {IMAGE_EXPECTED}")
        if ":" in launch.cwd:
            raise NotContained(f"the directory {launch.cwd} cannot be shown to a container: it has a colon")

    async def wake(self, account: Account) -> None:
        """Before each container. Raises `NotContained` where the account can run none here."""
        if self.engine.name == "podman":
            code, said = await self._tell(("unshare", "true"), account, _ASK_S)
            if code:
                raise NotContained(f"podman does not work for the account {account.name}: {said}")

    async def _tell(self, command: Sequence[str], account: Account, deadline_s: float) -> tuple[int, str]:
        """As the account, and once more where the engine had lost track of what runs."""
        code, said = await _run((self.engine.path, *command), account, deadline_s)
        if code and self.engine.name == "podman" and _LOST_TRACK in said:
            _log.warning("podman begins anew", account=account.name, why=said)
            await _run((self.engine.path, *_LOST_TRACK.split()), account, _REMOVE_S)
            code, said = await _run((self.engine.path, *command), account, deadline_s)
        return code, said

    def wrap(
        self,
        key: AssignmentKey,
        launch: Launch,
        account: Account,
        names: Iterable[str],
        mounts: Sequence[str],
        cards: Sequence[tuple[str, int]],
    ) -> tuple[str, ...]:
        """What goes before the replica's own command. `names`: of its variables; `mounts`: directories that it has
        under the same path, the first one to start in; `cards`: (UUID of a card or MIG instance, the card's index or
        -1). Raises `NotContained`."""
        asked = {name for name, _ in launch.env}
        command = [self.engine.path, "run", "--rm", "--name", self.name_of(key), "--network=host"]
        if self.engine.name == "podman":
            command += ["--cgroups=disabled", "--userns=keep-id", "--ulimit=host"]
        command += [f"--user={account.uid}:{account.gid}", "--ipc=host", "--security-opt=no-new-privileges"]
        command += [f"--env={name}" for name in sorted({*names, MARK}) if name not in _HOSTS_OWN or name in asked]
        command += [f"--volume={path}:{path}" for path in dict.fromkeys(mounts)]
        command += [f"--device={_CDI_KIND}={name}" for name in self._cdi_names(cards)]
        return (*command, f"--workdir={mounts[0]}", "--entrypoint=", launch.image)

    def name_of(self, key: AssignmentKey) -> str:
        return f"gpuyard-{self._node}-{key}"

    async def remove(self, key: AssignmentKey, account: Account) -> None:
        """Whatever is left of it after its command line has ended, or was killed. Never raises."""
        code, said = await self._tell(("rm", "--force", self.name_of(key)), account, _REMOVE_S)
        if code and "no such container" not in said.lower():
            _log.warning("container not removed", assignment=str(key), why=said)

    def _cdi_names(self, cards: Sequence[tuple[str, int]]) -> list[str]:
        if not cards:
            return []
        known = _known_names(self._cdi_folders)
        found = []
        for uuid, index in cards:
            name = uuid if uuid in known else str(index)
            if name not in known:
                where = " and ".join(map(str, self._cdi_folders))
                raise NotContained(
                    f"the card {uuid} has no CDI name in {where}: nvidia-ctk cdi generate --device-name-strategy=uuid"
                )
            found.append(name)
        return found


def _known_names(folders: Iterable[Path]) -> frozenset[str]:
    names: set[str] = set()
    for folder in folders:
        for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.json"))):
            try:
                text = path.read_text()
                spec: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            except (OSError, ValueError, yaml.YAMLError) as error:
                _log.warning("CDI file not read", path=str(path), why=str(error))
                continue
            if isinstance(spec, dict) and spec.get("kind") == _CDI_KIND:
                devices = spec.get("devices") or ()
                names.update(str(one["name"]) for one in devices if isinstance(one, dict) and "name" in one)
    return frozenset(names)


async def _run(command: Sequence[str], account: Account | None, deadline_s: float) -> tuple[int, str]:
    """(exit code, the last line that it said); as the account, where this process may become it."""
    return await asyncio.to_thread(_run_in_thread, command, account, deadline_s)


def _run_in_thread(command: Sequence[str], account: Account | None, deadline_s: float) -> tuple[int, str]:
    switches = account is not None and os.geteuid() == 0 and account.uid != 0
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": account.home if account else "/"},
            cwd="/",
            user=account.uid if switches and account else None,
            group=account.gid if switches and account else None,
            extra_groups=account.groups if switches and account else None,
            timeout=deadline_s,
            check=False,
        )
    except OSError as error:
        return -1, str(error)
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {deadline_s:.0f} s"
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode, lines[-1] if lines else ""
