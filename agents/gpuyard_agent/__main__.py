"""`python -m gpuyard_agent`: settings, identity, wiring; no logic of its own.

Exit codes: 0 asked to stop; 70 the core contradicts itself; 75 ledger, launcher or driver fail, try again; 78 the
settings, the key, the name or the state directory are wrong, trying again changes nothing. Whatever the code: jobs go
on.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import structlog
import uvloop

from gpuyard_agent import host, identity, network
from gpuyard_agent.checkpoint import CheckpointBackend
from gpuyard_agent.checkpoint_worker import CheckpointWorker
from gpuyard_agent.config import EXIT_BAD_CONFIG, AgentConfig, parse_arguments
from gpuyard_agent.core.model import InvariantViolated
from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, NoDriver
from gpuyard_agent.devices.nvml import NvmlBackend
from gpuyard_agent.devices.simulated import SimulatedBackend, parse_cards, simulated_host
from gpuyard_agent.drill import FAULTS_FILE, FaultDrill
from gpuyard_agent.http import HttpDoor
from gpuyard_agent.launch.accounts import AccountPolicy
from gpuyard_agent.launch.base import LauncherGone
from gpuyard_agent.launch.choose import choose
from gpuyard_agent.launch.containers import find_engine
from gpuyard_agent.launch.limits import Enforceable, probe_supervisor, probe_systemd
from gpuyard_agent.launch.systemd import SystemdLauncher
from gpuyard_agent.launch.turn_taking import TurnTakingLauncher
from gpuyard_agent.ledger import Ledger, LedgerUnusable
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_agent.partitions.timeslice import DriverSlices, TimeSliceMaker
from gpuyard_agent.partitions.turns import TurnSettings
from gpuyard_agent.runtime import NodeRules, Runtime
from gpuyard_agent.simulated_checkpoint import SimulatedCheckpoint
from gpuyard_agent.telemetry import agent_version
from gpuyard_agent.twin import NameTaken
from gpuyard_protocol.bus.base import Bus
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.nodes import IdleGpu, Inventory
from gpuyard_protocol.resources import ABILITIES
from gpuyard_protocol.service.http_place import Place
from gpuyard_protocol.service.sd_notify import Notifier
from gpuyard_protocol.service.settings_file import BadConfig

EXIT_INVARIANT = 70
EXIT_TEMPORARY = 75

_log = structlog.get_logger("gpuyard_agent")


def main() -> None:
    try:
        config = parse_arguments(sys.argv[1:])
        _configure_logs(config.log_level)
        raise SystemExit(uvloop.run(_run(config)))
    except (BadConfig, identity.IdentityRefused) as error:
        sys.stderr.write(f"gpuyard-agent: {error}\n")
        raise SystemExit(EXIT_BAD_CONFIG) from None


async def _run(config: AgentConfig) -> int:
    """The exit code."""
    state = _prepare_directory(config.state_directory)
    who = identity.take(state, config.node)
    lock = identity.lock(state)
    code = 0
    try:
        await _run_as(config, state, who)
    except* (LedgerUnusable, LauncherGone, DeviceTrouble) as group:
        _log.error("cannot go on; jobs do", why="; ".join(map(str, group.exceptions)))
        code = EXIT_TEMPORARY
    except* NameTaken as group:
        _log.error("name taken; jobs go on", why="; ".join(map(str, group.exceptions)))
        code = EXIT_BAD_CONFIG
    except* InvariantViolated as group:
        _log.error("invariant violated; jobs go on", exc_info=group)
        code = EXIT_INVARIANT
    finally:
        os.close(lock)
    return code


async def _run_as(config: AgentConfig, state: Path, who: identity.Identity) -> None:
    accounts = AccountPolicy(config.run_as, config.run_shares_as)
    backend, inventory = await _open_cards(config, who, accounts)
    checkpoint, inventory = await _open_checkpoint(config, inventory)
    engine = await find_engine(config.containers)
    launcher, limits = await _open_launcher(config, state, who)
    inventory = msgspec.structs.replace(
        inventory,
        launcher=limits.launcher,
        enforces=limits.names(),
        keeps_leases=True,
        container_engine=engine.name,
        container_problem=engine.problem,
        abilities=ABILITIES,
    )
    runtime = Runtime(
        identity=who,
        boot_id=host.boot_id(),
        rules=NodeRules(
            jobs=state / "jobs",
            checkpoints=Path(config.checkpoints) if config.checkpoints else None,
            secrets=Path(config.secrets) if config.secrets else state / "secrets",
            idle=IdleGpu(
                warn_ms=int(config.idle_gpu_warn),
                suspend_ms=int(config.idle_gpu_suspend),
                release_ms=int(config.idle_gpu_release),
            ),
            must_be_forwarded=bool(config.key),
        ),
        inventory=inventory,
        ledger=Ledger(state / "ledger.sqlite", who.node),
        backend=backend,
        partitions=CardPartitions(
            backend,
            state / "run",
            mps_exclusive=config.mps_exclusive,
            time_slice=_time_slicing(config, launcher),
        ),
        launcher=launcher,
        accounts=accounts,
        checkpoint=checkpoint,
        engine=engine,
        connector=functools.partial(_connect, config, who),
        drill=FaultDrill(state / FAULTS_FILE, backend) if isinstance(backend, SimulatedBackend) else None,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.stop)
    door = await _open_http(config, runtime)
    companion = asyncio.create_task(_tell_systemd(runtime))
    try:
        gc.freeze()
        await runtime.run()
    finally:
        companion.cancel()
        if door is not None:
            await door.close()


async def _open_launcher(
    config: AgentConfig, state: Path, who: identity.Identity
) -> tuple[TurnTakingLauncher, Enforceable]:
    """What starts processes, and what it was found to enforce here."""
    chosen = await choose(config.launcher, who.node, state)
    limits = probe_systemd() if isinstance(chosen, SystemdLauncher) else probe_supervisor()
    _log.info("launcher", kind=type(chosen).__name__, enforces=limits.names(), lacking=limits.lacking)
    quantum_ms = int(config.quantum)
    launcher = TurnTakingLauncher(
        chosen,
        TurnSettings(quantum_ms=quantum_ms, shortest_ms=quantum_ms // 5),
        book=state / "turns.json",
        clock_ms=host.node_clock_ms,
        wall_ms=host.wall_clock_ms,
    )
    return launcher, limits


def _time_slicing(config: AgentConfig, launcher: TurnTakingLauncher) -> TimeSliceMaker:
    if config.time_slice == "turns":
        return TimeSliceMaker(launcher)
    return TimeSliceMaker(slices=None if config.simulate else DriverSlices(config.driver_slice))


def _prepare_directory(state: Path) -> Path:
    """Only the way to a job's own directory is open to its account."""
    os.umask(0o077)
    try:
        state.mkdir(parents=True, exist_ok=True)
        (state / "jobs").mkdir(exist_ok=True)
        for directory in (state, state / "jobs"):
            directory.chmod(directory.stat().st_mode | 0o011)
    except OSError as error:
        raise BadConfig(f"state: {error}") from None
    return state.resolve()


async def _open_cards(
    config: AgentConfig, who: identity.Identity, accounts: AccountPolicy
) -> tuple[DeviceBackend, Inventory]:
    """The cards, and what else the node has."""
    cpu_milli, memory_mib = host.cpu_milli(), host.memory_mib()
    backend: DeviceBackend
    if config.simulate:
        cards = parse_cards(config.simulate)
        backend = SimulatedBackend(cards, who.node)
        claimed = simulated_host(cards)
        cpu_milli, memory_mib = claimed.cpu_milli, claimed.memory_mib
    else:
        backend = NvmlBackend(may_switch_mig=config.mig_switching)
    try:
        await backend.open()
        driver = await backend.driver()
    except NoDriver as error:
        _log.warning("no cards: this node offers its CPUs alone", why=str(error))
        backend, driver = SimulatedBackend((), who.node), ""
    inventory = Inventory(
        hostname=host.hostname(),
        address=config.address or host.reachable_address(config.nats, one_host=bool(config.simulate)),
        cpu_milli=cpu_milli,
        memory_mib=memory_mib,
        labels=tuple(sorted(config.labels.items())),
        accounts=accounts.patterns(),
        simulated=bool(config.simulate),
        driver=driver,
        agent_version=agent_version(),
        interfaces=network.interfaces(),
        rdma=network.rdma_ports(),
    )
    return backend, inventory


async def _open_checkpoint(config: AgentConfig, inventory: Inventory) -> tuple[CheckpointBackend, Inventory]:
    """What suspends jobs, and what the node can say of that: found out by asking the driver."""
    checkpoint: CheckpointBackend = SimulatedCheckpoint() if config.simulate else CheckpointWorker()
    budget_mib = inventory.memory_mib // 2 if config.suspend_memory is None else int(config.suspend_memory)
    if not budget_mib:
        problem = "this node gives no memory for it (suspend_memory)"
    elif not inventory.driver:
        problem = "there are no cards here"
    else:
        problem = await checkpoint.problem()
    offered = msgspec.structs.replace(inventory, suspend_mib=0 if problem else budget_mib, suspend_problem=problem)
    return checkpoint, offered


async def _connect(config: AgentConfig, who: identity.Identity) -> Bus:
    return await connect(
        config.nats,
        name=f"agent {who.node} {who.instance}",
        inbox_prefix=f"_INBOX_A.{who.node}",
        seed=config.key or None,
        reconnect_jitter_s=(0.05, 0.5),
        tls_ca=config.tls_ca or None,
        tls_cert=config.tls_cert or None,
        tls_key=config.tls_key or None,
    )


async def _open_http(config: AgentConfig, runtime: Runtime) -> HttpDoor | None:
    address = config.http_address()
    if address is None:
        return None
    place = Place(config.http_guard())
    door = HttpDoor(runtime.metrics, runtime.health, place)
    try:
        await place.take(*address)
        _log.info("http", url=await door.open())
    except OSError as error:
        raise BadConfig(f"http: found {config.http!r}; expected an address that is free ({error})") from None
    return door


async def _tell_systemd(runtime: Runtime) -> None:
    notifier = Notifier()
    await runtime.resumed.wait()
    notifier.ready("looking after this node's jobs")
    interval_s = notifier.watchdog_interval_s
    while interval_s is not None:
        if runtime.health.is_alive:
            notifier.alive()
        await asyncio.sleep(interval_s)


def _configure_logs(level: str) -> None:
    """JSON lines for machines, colour for a terminal."""
    is_terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    main()
