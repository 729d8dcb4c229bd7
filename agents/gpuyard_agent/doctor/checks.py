"""Looks at this host as an agent would find it, and changes nothing.

Every finding is the answer of the code that does the work: the same probes by which the agent chooses its launcher and
offers its cards, so that `doctor` never promises what the agent would not do. It knows no yard: what jobs ask for is
the daemon's affair. A trial of control groups makes one and removes it again; all else only reads.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec

from gpuyard_agent import host, network
from gpuyard_agent.checkpoint_worker import CheckpointWorker
from gpuyard_agent.config import AgentConfig
from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, NoDriver
from gpuyard_agent.devices.capabilities import Capability, State, probe
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.devices.simulated import SimulatedBackend, parse_cards
from gpuyard_agent.launch.accounts import AccountPolicy
from gpuyard_agent.launch.base import Account
from gpuyard_agent.launch.choose import systemd_is_there
from gpuyard_agent.launch.containers import Containers, Engine, NotContained, find_engine
from gpuyard_agent.launch.limits import Enforceable, probe_supervisor, probe_systemd

Area: TypeAlias = Literal["cards", "processes", "accounts", "network", "disk"]

REACH_S = 2.0
#: Less free space than this and jobs' output, and then the ledger, soon meet a full disk.
FREE_BYTES_MIN = 10 * 2**30
#: A ledger on a disk slower than this delays every start by as much.
FSYNC_MS_MAX = 20.0
_FSYNC_TRIES = 5


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One capability, with where it belongs."""

    area: Area
    name: str
    state: State
    detail: str
    #: How to get what is missing, "" where nothing is or nothing helps.
    remedy: str = ""


async def examine(config: AgentConfig) -> tuple[Finding, ...]:
    """Everything, in the order in which people read it."""
    return (
        *await cards(_backend(config)),
        *processes(probe_systemd() if _uses_systemd(config) else probe_supervisor()),
        await containers(
            await find_engine(config.containers), AccountPolicy(config.run_as, config.run_shares_as).accounts()
        ),
        *accounts(config),
        *await reach(config),
        *disk(config.state_directory),
    )


def _backend(config: AgentConfig) -> DeviceBackend:
    return SimulatedBackend(parse_cards(config.simulate), config.node or "node") if config.simulate else NvmlBackend()


def _uses_systemd(config: AgentConfig) -> bool:
    return config.launcher == "systemd" or (config.launcher == "auto" and systemd_is_there())


async def cards(backend: DeviceBackend) -> list[Finding]:
    try:
        await backend.open()
    except NoDriver as error:
        remedy = "install NVIDIA's driver; without one this node offers its CPUs alone"
        return [Finding(area="cards", name="driver", state="no", detail=str(error), remedy=remedy)]
    try:
        found: tuple[Capability, ...] = await probe(backend, "" if backend.simulated else await _suspend_problem())
    except DeviceTrouble as error:
        return [Finding(area="cards", name="driver", state="no", detail=str(error))]
    finally:
        await backend.close()
    return [
        Finding(area="cards", name=one.name, state=one.state, detail=one.detail, remedy=one.remedy) for one in found
    ]


async def _suspend_problem() -> str:
    worker = CheckpointWorker()
    try:
        return await worker.problem()
    finally:
        await worker.close()


def processes(found: Enforceable) -> Iterator[Finding]:
    """What holds for the processes of jobs."""
    by_systemd = found.launcher == "systemd"
    detail = "transient services of systemd" if by_systemd else "a supervisor process that outlives the agent"
    yield Finding(area="processes", name="launcher", state="yes", detail=detail)
    freeze: State = "partly" if found.freeze == "signal" else "yes"
    hierarchy = "" if freeze == "yes" else "run on a host with cgroup version 2 in which the agent may make groups"
    detail = f"whole trees are halted by {found.freeze}"
    yield Finding(area="processes", name="freeze", state=freeze, detail=detail, remedy=hierarchy)
    kill: State = "yes" if found.kill == "cgroup" else "partly"
    detail = f"whole trees are killed by {found.kill}"
    yield Finding(area="processes", name="kill", state=kill, detail=detail, remedy="" if kill == "yes" else hierarchy)
    controllers = "let systemd start the agent (Delegate=yes), or use the systemd launcher"
    for name, holds, what in (
        ("cpu-limit", found.cpu, "CPU time"),
        ("memory-limit", found.memory, "memory"),
        ("process-limit", found.tasks, "the number of processes"),
    ):
        detail = f"{what} of jobs is {'limited' if holds else 'counted when placing, and not limited'}"
        yield _yes_or_no("processes", name, holds, detail, controllers)
    detail = "jobs open the cards they were given alone" if found.devices else "jobs could open cards of others"
    yield _yes_or_no("processes", "device-isolation", found.devices, detail, "systemd as PID 1, the agent run as root")


async def containers(engine: Engine, accounts: Iterable[Account]) -> Finding:
    """`accounts`: those that jobs run as, as far as they are named."""
    if not engine.path:
        remedy = "install podman, and for cards NVIDIA's container toolkit with its CDI names"
        return _yes_or_no("processes", "containers", False, f"no container images: {engine.problem}", remedy)
    made = Containers(engine, "doctor")
    problems = []
    for account in accounts:
        try:
            await made.wake(account)
        except NotContained as problem:
            problems.append(str(problem))
    detail = "; ".join(problems) or f"container images run by {engine.path}"
    remedy = "give the account a home and a range in /etc/subuid and /etc/subgid; install newuidmap (Debian: uidmap)"
    return _yes_or_no("processes", "containers", not problems, detail, remedy)


def accounts(config: AgentConfig) -> Iterator[Finding]:
    """Who may run here, and as whom."""
    policy = AccountPolicy(config.run_as, config.run_shares_as)
    for_whom = policy.patterns()
    detail = f"for {', '.join(for_whom)}" if for_whom else "no rule of this node leads to an account that exists"
    remedy = "make the accounts that `run_as` names, or change it; nothing runs as root"
    yield _yes_or_no("accounts", "jobs", bool(for_whom), detail, remedy)
    is_root = os.geteuid() == 0
    detail = "jobs run as accounts of their own" if is_root else "jobs run as the agent's own account"
    yield _yes_or_no("accounts", "switching", is_root, detail, "run the agent as root (its unit does)")


async def reach(config: AgentConfig) -> list[Finding]:
    address = config.address or host.reachable_address(config.nats, one_host=bool(config.simulate))
    known, ports = network.interfaces(), network.rdma_ports()
    name = network.interface_of(address, known)
    is_local = name == "lo"
    state: State = "yes" if name and not is_local else "partly"
    detail = f"gangs reach this node at {address}" + (f" on {name}" if name else ", which no interface here has")
    remedy = "" if state == "yes" else "set `address` to where other nodes reach this one"
    findings = [Finding(area="network", name="address", state=state, detail=detail, remedy=remedy)]
    active = [port for port in ports if port.active]
    detail = ", ".join(f"{port.device}:{port.port} {port.rate_gbps} Gb/s {port.link_layer}" for port in active)
    findings.append(
        _yes_or_no(
            "network",
            "rdma",
            bool(active),
            detail or f"{f'none of {len(ports)} ports is up' if ports else 'no RDMA device'}: NCCL uses sockets",
            "" if not ports else "look at the cables and the subnet manager",
        )
    )
    findings.append(await _nats(config.nats))
    return findings


async def _nats(addresses: str) -> Finding:
    failures = []
    for address in addresses.split(","):
        server = urlsplit(address.strip())
        try:
            async with asyncio.timeout(REACH_S):
                _, writer = await asyncio.open_connection(server.hostname, server.port or 4222)
        except (OSError, TimeoutError) as error:
            failures.append(f"{address.strip()}: {str(error) or f'no answer within {REACH_S:g} s'}")
        else:
            writer.close()
            return Finding(area="network", name="nats", state="yes", detail=f"{address.strip()} answers")
    remedy = "start the yard (`gpuyard up`), or set `nats` to its server"
    return Finding(area="network", name="nats", state="no", detail="; ".join(failures), remedy=remedy)


def disk(state: Path) -> Iterator[Finding]:
    """Where the ledger and the output of jobs lie, or will."""
    place = next(parent for parent in (state, *state.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    detail = f"{free / 2**30:.0f} GiB free for {state}"
    yield _yes_or_no("disk", "space", free >= FREE_BYTES_MIN, detail, "make room, or set `state` to a larger disk")
    if not os.access(place, os.W_OK):
        remedy = "set `state` to a directory of this account, or run the agent as root"
        yield Finding(area="disk", name="ledger", state="no", detail=f"{place} is not writable", remedy=remedy)
        return
    took_ms = _fsync_ms(place)
    detail = f"a commit of the ledger takes {took_ms:.1f} ms"
    remedy = "put `state` on a faster disk: each start waits for one commit"
    yield Finding(
        area="disk",
        name="ledger",
        state="yes" if took_ms <= FSYNC_MS_MAX else "partly",
        detail=detail,
        remedy="" if took_ms <= FSYNC_MS_MAX else remedy,
    )


def _fsync_ms(place: Path) -> float:
    """Of a small write, the median."""
    trial = place / f".gpuyard-doctor-{os.getpid()}"
    descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        took = []
        for _ in range(_FSYNC_TRIES):
            os.write(descriptor, b"\0" * 4096)
            began = time.perf_counter()
            os.fsync(descriptor)
            took.append((time.perf_counter() - began) * 1000)
        return sorted(took)[len(took) // 2]
    finally:
        os.close(descriptor)
        trial.unlink()


def _yes_or_no(area: Area, name: str, holds: bool, detail: str, remedy: str) -> Finding:
    return Finding(area=area, name=name, state="yes" if holds else "no", detail=detail, remedy="" if holds else remedy)
