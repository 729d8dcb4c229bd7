"""What a launcher can enforce on this host, found by asking and trying: data for `doctor` and the inventory.

Nothing is assumed of a version or a name: systemd takes a memory limit on a host without the memory controller, says
nothing, and keeps none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from gpuyard_agent.launch.cgroups import Cgroups, find_place

_CONTROLLERS = ("cpu", "memory", "pids")


class Enforceable(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for replicas that run here."""

    launcher: Literal["systemd", "supervisor"]
    #: How a whole tree is halted. `signal` misses whoever leaves the group, and is seen by the processes.
    freeze: Literal["cgroup-v2", "cgroup-v1", "signal"]
    #: How a whole tree is killed. `search` finds it by marks and sessions.
    kill: Literal["cgroup", "search"]
    #: Whether the limits of this name hold.
    cpu: bool
    memory: bool
    tasks: bool
    #: Only the cards of its own can be opened.
    devices: bool
    #: Replicas may run as other accounts than the agent's.
    accounts: bool
    #: What does not hold and why, for people.
    lacking: tuple[str, ...]

    def names(self) -> tuple[str, ...]:
        """Of what holds, as the inventory tells it."""
        held = {
            "accounts": self.accounts,
            "cpu": self.cpu,
            "devices": self.devices,
            "memory": self.memory,
            "tasks": self.tasks,
        }
        return tuple(name for name, holds in held.items() if holds)


def probe_supervisor() -> Enforceable:
    """Tries it with a group of its own, which is gone afterwards."""
    trial = Cgroups(f"gpuyard-trial-{os.getpid()}", enable=False)
    try:
        kind, limits = trial.kind, trial.available
    finally:
        trial.close()
    lacking = [f"no {name} controller that can be handed down" for name in _CONTROLLERS if name not in limits]
    if kind == "none":
        lacking.append("no control group that may be written to: trees are halted by signals, and found by search")
    lacking.append("device files of other cards stay open to jobs: needs the systemd launcher")
    return Enforceable(
        launcher="supervisor",
        freeze="cgroup-v2" if kind == "v2" else "cgroup-v1" if kind == "v1-freezer" else "signal",
        kill="cgroup" if kind == "v2" else "search",
        cpu="cpu" in limits,
        memory="memory" in limits,
        tasks="pids" in limits,
        devices=False,
        accounts=os.geteuid() == 0,
        lacking=tuple(_with_account(lacking)),
    )


def probe_systemd() -> Enforceable:
    """From the controllers that systemd has, in the hierarchy in which it puts services."""
    place = find_place()
    unified = place.kind == "v2" and (Path(place.root) / "init.scope").is_dir()
    root = Path(place.root) if unified else Path("/sys/fs/cgroup")
    if unified:
        have = set((root / "cgroup.controllers").read_text().split())
    else:
        have = {name for name in _CONTROLLERS if (root / name / "system.slice").is_dir()}
    lacking = [
        f"systemd has no {name} controller, and keeps no such limit" for name in _CONTROLLERS if name not in have
    ]
    if not unified:
        lacking.append("systemd does not use cgroup version 2: trees are halted by signals")
    return Enforceable(
        launcher="systemd",
        freeze="cgroup-v2" if unified else "signal",
        kill="cgroup",
        cpu="cpu" in have,
        memory="memory" in have,
        tasks="pids" in have,
        devices=True,
        accounts=True,
        lacking=tuple(lacking),
    )


def _with_account(lacking: list[str]) -> list[str]:
    if os.geteuid() != 0:
        lacking.append("jobs run as the agent's own account: it is not root")
    return lacking
