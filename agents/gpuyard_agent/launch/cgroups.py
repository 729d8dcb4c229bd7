"""A control group for each replica, where the host lets us make them: whole trees frozen, killed, limited.

What there is, is found by trying, once, at the start: version 2 with `cgroup.freeze` and `cgroup.kill` in a group that
we may write to; else the freezer of version 1; else nothing, and trees are halted and killed by signals as far as they
can be found. Limits are set only where the controllers are enabled for us; `limits` says which. Nothing here raises:
what cannot be done is said by the return value, and the caller goes on without.

A process is put into its group right after it was made, and with it the children that it may have made in between. So
a group is complete but for a child of a child made in that instant, which is found by its mark like everything else.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from gpuyard_agent.launch.base import Limits
from gpuyard_protocol.names import AssignmentKey

Kind: TypeAlias = Literal["v2", "v1-freezer", "none"]

_CPU_PERIOD_US = 100_000
_CONTROLLERS = frozenset({"cpu", "memory", "pids"})


class CgroupPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where this process may make groups, as /proc says."""

    kind: Kind
    #: Directory of the group that this process is in; "" with `none`.
    own: str = ""
    #: The hierarchy's root directory.
    root: str = ""


def find_place() -> CgroupPlace:
    """By /proc alone; whether it is writable shows when it is tried."""
    mounts = [line.split() for line in _read("/proc/self/mounts").splitlines()]
    paths = {}
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    for mount in mounts:
        if mount[2] == "cgroup2" and "" in paths:
            own = _join(mount[1], paths[""])
            # Not in the root group of all: there, nothing can be frozen or killed, but groups can be made.
            return CgroupPlace(kind="v2", own=own, root=mount[1])
    for mount in mounts:
        if mount[2] == "cgroup" and "freezer" in mount[3].split(",") and "freezer" in paths:
            return CgroupPlace(kind="v1-freezer", own=_join(mount[1], paths["freezer"]), root=mount[1])
    return CgroupPlace(kind="none")


class Cgroups:
    """The groups of one supervisor, below one group of its own."""

    def __init__(self, name: str, place: CgroupPlace | None = None, *, enable: bool = True) -> None:
        """`name`: of the group above all others, the same for every supervisor of one state directory. `enable`:
        also change what is above it, so that limits hold."""
        self._name = name
        place = place or find_place()
        self.kind: Kind = "none"
        #: Enabled for our groups, out of `cpu`, `memory`, `pids`.
        self.limits: frozenset[str] = frozenset()
        #: Controllers that exist where we are, enabled or not.
        self.available: frozenset[str] = frozenset()
        self._base = os.path.join(place.own, name) if place.own else ""
        #: Groups that exist, by replica: an adopted one may lie below another base.
        self._groups: dict[AssignmentKey, str] = {}
        if place.kind == "none" or not _make(self._base):
            return
        wanted = ("cgroup.freeze", "cgroup.kill") if place.kind == "v2" else ("freezer.state",)
        if not all(os.access(os.path.join(self._base, file), os.W_OK) for file in wanted):
            _remove(self._base)
            return
        self.kind = place.kind
        if self.kind == "v2":
            self.available = frozenset(_read(os.path.join(place.own, "cgroup.controllers")).split()) & _CONTROLLERS
            if enable:
                self.limits = _enable_controllers(place, self._base)

    def admit(self, key: AssignmentKey, pid: int, limits: Limits) -> bool:
        """Make its group, set its limits, put the process in."""
        if self.kind == "none":
            return False
        group = os.path.join(self._base, str(key))
        if not _make(group):
            return False
        self._set_limits(group, limits)
        if not _write(group, "cgroup.procs", str(pid)):
            _remove(group)
            return False
        self._groups[key] = group
        for child in _read(f"/proc/{pid}/task/{pid}/children").split():
            _write(group, "cgroup.procs", child)
        return True

    def _set_limits(self, group: str, limits: Limits) -> None:
        if limits.memory_mib and "memory" in self.limits:
            _write(group, "memory.max", str(limits.memory_mib * 2**20))
            _write(group, "memory.oom.group", "1")
        if limits.cpu_milli and "cpu" in self.limits:
            _write(group, "cpu.max", f"{limits.cpu_milli * _CPU_PERIOD_US // 1000} {_CPU_PERIOD_US}")
        if limits.tasks and "pids" in self.limits:
            _write(group, "pids.max", str(limits.tasks))

    def limit_memory(self, key: AssignmentKey, memory_mib: int) -> None:
        """A new limit, where one was set; a group without one gets none."""
        group = self._groups.get(key)
        if group is not None and _read(os.path.join(group, "memory.max")).strip() not in ("", "max"):
            _write(group, "memory.max", str(memory_mib * 2**20))

    def adopt(self, key: AssignmentKey, pid: int) -> None:
        """Find the group that an earlier supervisor put this process in; it may have lived elsewhere itself."""
        place = find_place()
        if self.kind == "none":
            return
        candidates = [os.path.join(self._base, str(key))]
        for line in _read(f"/proc/{pid}/cgroup").splitlines() if pid else ():
            _, controllers, path = line.split(":", 2)
            if controllers == ("" if self.kind == "v2" else "freezer"):
                candidates.insert(0, _join(place.root, path))
        for group in candidates:
            folder, _, name = group.rpartition("/")
            if name == str(key) and folder.endswith(f"/{self._name}") and os.path.isdir(group):
                self._groups[key] = group
                return

    def pids(self, key: AssignmentKey) -> tuple[int, ...]:
        """Processes in the group and below it, zombies excepted."""
        group = self._groups.get(key)
        if group is None:
            return ()
        found: list[int] = []
        for folder, _, _ in os.walk(group):
            found += map(int, _read(os.path.join(folder, "cgroup.procs")).split())
        return tuple(found)

    def freeze(self, key: AssignmentKey, frozen: bool) -> bool:
        """False: there is no group, so somebody else must halt it."""
        group = self._groups.get(key)
        if group is None:
            return False
        if self.kind == "v2":
            return _write(group, "cgroup.freeze", "1" if frozen else "0")
        return _write(group, "freezer.state", "FROZEN" if frozen else "THAWED")

    def kill(self, key: AssignmentKey) -> None:
        """Everything in it, frozen or not. Under version 1 only thawed: signals are the caller's."""
        group = self._groups.get(key)
        if group is None:
            return
        if self.kind == "v2":
            _write(group, "cgroup.kill", "1")
        else:
            self.freeze(key, False)

    def remove(self, key: AssignmentKey) -> None:
        group = self._groups.pop(key, None)
        if group is not None:
            _remove(group)
            if os.path.dirname(group) != self._base:
                _remove(os.path.dirname(group))

    def close(self) -> None:
        """Leave no empty group behind."""
        if self.kind != "none":
            _remove(self._base)


def _enable_controllers(place: CgroupPlace, base: str) -> frozenset[str]:
    """Those that our groups can have. A group with processes cannot hand controllers down, the root excepted, so where
    we are alone in ours we move into a group beside the replicas'."""
    available = _read(os.path.join(place.own, "cgroup.controllers")).split()
    wanted = sorted(_CONTROLLERS & set(available))
    if not wanted:
        return frozenset()
    handed_down = _read(os.path.join(place.own, "cgroup.subtree_control")).split()
    if not set(wanted) <= set(handed_down) and place.own != place.root:
        me = str(os.getpid())
        if _read(os.path.join(place.own, "cgroup.procs")).split() != [me]:
            return frozenset()
        leaf = os.path.join(place.own, "gpuyard-supervisor")
        if not (_make(leaf) and _write(leaf, "cgroup.procs", me)):
            return frozenset()
    for name in wanted:
        _write(place.own, "cgroup.subtree_control", f"+{name}")
        _write(base, "cgroup.subtree_control", f"+{name}")
    return frozenset(_read(os.path.join(base, "cgroup.subtree_control")).split()) & _CONTROLLERS


def _join(mount: str, path: str) -> str:
    return mount + path if path != "/" else mount


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _write(group: str, file: str, text: str) -> bool:
    try:
        descriptor = os.open(os.path.join(group, file), os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _make(group: str) -> bool:
    try:
        os.mkdir(group)
    except FileExistsError:
        return os.path.isdir(group)
    except OSError:
        return False
    return True


def _remove(group: str) -> None:
    """With the groups that the job itself has made below, if it was allowed to."""
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
