"""What a replica may use, and what a host can enforce: read from the driver's files, and tried."""

from __future__ import annotations

import os
from pathlib import Path

from gpuyard_agent.launch.allowance import limits_of
from gpuyard_agent.launch.base import Limits
from gpuyard_agent.launch.cgroups import CgroupPlace, Cgroups, find_place
from gpuyard_agent.launch.choose import choose, systemd_is_there
from gpuyard_agent.launch.client import SupervisorLauncher
from gpuyard_agent.launch.limits import probe_supervisor
from gpuyard_agent.launch.systemd import SystemdLauncher
from gpuyard_agent.launch.systemd_bus import unit_of, unit_path
from gpuyard_agent.launch.systemd_units import key_of, properties, unit_name
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_protocol.nodes import Launch
from support.launch import key, launch_yard, start

LAUNCH = Launch(tenant="acme", user="alice", time_limit_ms=60_000, stop_grace_ms=1_000)


def grant(mode: str, *, devices: tuple[str, ...] | None = None) -> PartitionGrant:
    return PartitionGrant(env={}, mode=mode, devices=devices)


def test_a_replica_may_open_its_own_card_and_no_other() -> None:
    devices = limits_of(LAUNCH, grant("whole", devices=("/dev/nvidia1", "/dev/nvidiactl"))).devices
    assert devices is not None
    assert devices[:2] == ("/dev/nvidia1", "/dev/nvidiactl")
    assert "/dev/nvidia0" not in devices


def test_a_replica_without_cards_may_open_none_of_them() -> None:
    devices = limits_of(LAUNCH, grant("none", devices=())).devices
    assert devices is not None
    assert not any("/dev/nvidia" in path and path[-1].isdigit() for path in devices)


def test_modelled_cards_close_nothing() -> None:
    assert limits_of(LAUNCH, grant("whole")).devices is None


def test_only_what_was_asked_for_is_enforced() -> None:
    assert (limits_of(LAUNCH, grant("none")).memory_mib, limits_of(LAUNCH, grant("none")).cpu_milli) == (0, 0)
    asked = Launch(tenant="acme", user="alice", cpu_limit_milli=500, memory_limit_mib=64)
    assert (limits_of(asked, grant("none")).memory_mib, limits_of(asked, grant("none")).cpu_milli) == (64, 500)


def test_the_backstop_lies_well_behind_the_time_limit_and_counts_no_turns() -> None:
    assert limits_of(LAUNCH, grant("whole")).run_max_ms > 61_000
    assert limits_of(LAUNCH, grant("timeslice")).run_max_ms == 0


def test_a_hierarchy_of_control_groups_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    """No control group at all; one that is no control group; and the host's own, whatever that is."""
    assert Cgroups("x", CgroupPlace(kind="none")).kind == "none"
    fake = Cgroups("x", CgroupPlace(kind="v2", own=str(tmp_path), root=str(tmp_path)))
    assert (fake.kind, fake.limits) == ("none", frozenset())
    assert list(tmp_path.iterdir()) == [], "what was tried is undone"
    assert not fake.admit(key(1), os.getpid(), Limits(memory_mib=1))
    assert not fake.freeze(key(1), True)
    assert fake.pids(key(1)) == ()
    fake.kill(key(1))
    fake.remove(key(1))


def test_what_is_said_to_be_enforceable_was_tried() -> None:
    found = probe_supervisor()
    place = find_place()
    assert (found.kill == "cgroup") == (found.freeze == "cgroup-v2")
    assert found.freeze == "signal" or place.kind != "none"
    assert found.memory == (not any("memory" in line for line in found.lacking))
    assert not found.devices


async def test_a_replica_has_a_control_group_where_there_can_be_one() -> None:
    async with launch_yard() as yard:
        started = await start(await yard.agent(), yard.shell(1, "exec sleep 1000"))
        in_its_own = any(
            line.endswith(f"/{key(1)}") for line in Path(f"/proc/{started.pid}/cgroup").read_text().split()
        )
        assert in_its_own == (probe_supervisor().freeze != "signal")


async def test_systemd_is_chosen_where_it_is_and_a_supervisor_with_jobs_where_that_is(tmp_path: Path) -> None:
    async with launch_yard() as yard:
        await yard.agent()
        (yard.directory / "supervisor.sock").chmod(0o600)
        assert isinstance(await choose("auto", "n", yard.directory), SupervisorLauncher)
    assert isinstance(await choose("systemd", "n", tmp_path), SystemdLauncher)
    expected = SystemdLauncher if systemd_is_there() else SupervisorLauncher
    assert isinstance(await choose("auto", "n", tmp_path), expected)


def test_names_of_units_are_those_of_keys() -> None:
    name = unit_name("gpu-1", key(17))
    assert name == "gpuyard-gpu-1-17.1.0.service"
    assert key_of("gpu-1", name) == key(17)
    assert key_of("gpu", name) is None, "another node of the same host"
    assert unit_of(unit_path(name)) == name


async def test_a_unit_gets_what_the_replica_was_given_and_nothing_else() -> None:
    async with launch_yard() as yard:
        limits = Limits(memory_mib=64, cpu_milli=500, tasks=10, run_max_ms=5_000, devices=("/dev/nvidia1",))
        spec = yard.spec(1, "echo", "$HOME", limits=limits)
        rows = properties(spec, "/bin/echo", ["echo", "$HOME"], ["LANG"], one_output=False)
    found = {name: value for name, _, value in rows}
    assert found["ExecStartEx"] == [["/bin/echo", ["echo", "$HOME"], ["no-env-expand"]]]
    assert found["MemoryMax"] == 64 * 2**20
    assert found["CPUQuotaPerSecUSec"] == 500_000
    assert found["RuntimeMaxUSec"] == 5_000_000
    assert found["TasksMax"] == 10
    assert found["DevicePolicy"] == "closed"
    assert ["/dev/nvidia1", "rw"] in found["DeviceAllow"]
    assert "PATH" not in found["UnsetEnvironment"]
    assert {"LANG", "INVOCATION_ID", "HOME"} <= set(found["UnsetEnvironment"])
    assert found["User"] == str(spec.account.uid)
