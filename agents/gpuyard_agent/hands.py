"""Carries out what the core decides: partitions, ports, processes; and tells it what came of that.

Every action runs as a task of its own, but the starts of one turn, which go to the launcher together. Results come back
as events. What fails in a way that a single assignment can bear (its account, its cards, its command) is an event too;
a launcher out of reach is told by the list of what it knows once it is back. Anything else ends the agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from gpuyard_agent import host
from gpuyard_agent.checkpoint_dirs import CheckpointDirectories
from gpuyard_agent.commands import Spawn
from gpuyard_agent.core.actions import (
    Action,
    Answer,
    ForgetProcess,
    HoldPort,
    PreparePartition,
    RenewLeases,
    ResumeProcess,
    StartProcess,
    StopProcess,
    SuspendProcess,
    UndoPartition,
)
from gpuyard_agent.core.events import (
    Event,
    PartitionFailed,
    PartitionReady,
    PartitionUndone,
    PortFree,
    PortTaken,
    ProcessesListed,
    ProcessExited,
    ProcessFound,
    ProcessRefused,
    ProcessStarted,
    UndoFailed,
)
from gpuyard_agent.core.model import Assignment
from gpuyard_agent.devices.base import DeviceTrouble
from gpuyard_agent.environment import environment
from gpuyard_agent.launch.accounts import AccountMissing, AccountPolicy
from gpuyard_agent.launch.allowance import limits_of
from gpuyard_agent.launch.base import (
    Account,
    Launcher,
    LauncherGone,
    ProcessExit,
    ProcessSpec,
    ProcessState,
    Started,
)
from gpuyard_agent.launch.containers import ENGINE_MISSING, Containers, NotContained
from gpuyard_agent.launch.starters import starter
from gpuyard_agent.logs import LogStore
from gpuyard_agent.metrics import Metrics
from gpuyard_agent.partitions.base import PartitionGrant, PartitionMaker, PartitionRefused
from gpuyard_agent.suspending import Suspending
from gpuyard_agent.tenant_secrets import SecretMissing, TenantSecrets
from gpuyard_agent.uploads import UploadMissing, Uploads
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import Launch, OrderAnswer
from gpuyard_protocol.resources import MpsShare, Partition, devices_of, share_domain_of

#: Between tries to reach the launcher again.
REOPEN_PAUSE_S = 0.2
OPEN_TRIES = 3
#: What ending a job's work under MPS may take after its grace, before the launcher kills it all the same.
CALM_MS_MAX = 10_000
REOPEN_PAUSE_S_MAX = 5.0

_log = structlog.get_logger("gpuyard_agent.hands")


class _Place(NamedTuple):
    """What an assignment was given, until it is undone."""

    grant: PartitionGrant
    account: Account
    partition: Partition
    #: It runs in a container.
    is_contained: bool


class Hands:
    """`emit` takes events, `answer` takes answers to orders; `network`: what members of gangs are told of it."""

    def __init__(
        self,
        node: NodeId,
        partitions: PartitionMaker,
        launcher: Launcher,
        accounts: AccountPolicy,
        store: LogStore,
        checkpoints: CheckpointDirectories,
        metrics: Metrics,
        suspending: Suspending,
        containers: Containers,
        secrets: TenantSecrets,
        uploads: Uploads,
        *,
        network: Mapping[str, str],
        emit: Callable[[Event], None],
        answer: Callable[[int, OrderAnswer], None],
        spawn: Spawn,
    ) -> None:
        self._node = node
        self._partitions = partitions
        self._launcher = launcher
        self._accounts = accounts
        self._store = store
        self._checkpoints = checkpoints
        self._network = network
        self._metrics = metrics
        self._suspending = suspending
        self._containers = containers
        self._secrets = secrets
        self._uploads = uploads
        self._emit = emit
        self._answer = answer
        self._spawn = spawn
        self._places: dict[AssignmentKey, _Place] = {}

    def carry_out(self, actions: Sequence[Action]) -> None:
        starts: list[StartProcess] = []
        forgotten: list[AssignmentKey] = []
        for action in actions:
            match action:
                case StartProcess():
                    starts.append(action)
                case PreparePartition(key=key, partition=partition, launch=launch):
                    self._spawn(self._prepare(key, partition, launch))
                case HoldPort(key=key, port=port):
                    self._emit((PortFree if host.can_bind(port) else PortTaken)(key, port))
                case StopProcess(key=key, grace_ms=grace_ms, pid=pid):
                    self._spawn(self._stop(key, grace_ms, pid))
                case SuspendProcess():
                    self._spawn(self._suspending.suspend(action))
                case ResumeProcess():
                    self._spawn(self._suspending.resume(action, self._take_again))
                case UndoPartition(key=key):
                    self._spawn(self._undo(key))
                case ForgetProcess(key=key):
                    forgotten.append(key)
                case RenewLeases(renewed_ms=renewed_ms):
                    self._spawn(self._renew(renewed_ms))
                case Answer(request=request, answer=answer):
                    self._answer(request, answer)
        if starts:
            self._spawn(self._start(starts))
        if forgotten:
            self._spawn(self._forget(forgotten))

    # --- partitions ---

    async def _prepare(self, key: AssignmentKey, partition: Partition, launch: Launch) -> None:
        self._emit(await self._take_place(key, partition, launch, adopting=False))

    async def adopt(self, assignment: Assignment) -> Event:
        """Take over a partition made before the agent's restart."""
        start = assignment.start
        return await self._take_place(start.key, start.partition, start.launch, adopting=True)

    async def _take_place(
        self, key: AssignmentKey, partition: Partition, launch: Launch, *, adopting: bool, resuming: bool = False
    ) -> Event:
        take = self._partitions.adopt if adopting else self._partitions.prepare
        try:
            shares_card = isinstance(partition, MpsShare)
            account = self._accounts.resolve(launch.tenant, launch.user, shares_card=shares_card)
            if launch.image and not adopting:
                self._containers.check(launch, partition)
                await self._containers.wake(account)
            if not adopting:
                await self._checkpoints.make(launch.tenant, key.job, account)
                if not resuming:
                    await self._uploads.unpack(launch.tenant, launch.upload, self._store.files(key).job_dir, account)
                await self._secrets.hand_over(key, launch.tenant, launch.user, launch.secrets, account)
            grant = await take(key, partition, account, share_domain_of(launch.tenant, launch.share_domain))
        except (AccountMissing, SecretMissing, UploadMissing) as error:
            return PartitionFailed(key, error.code, str(error))
        except NotContained as error:
            return PartitionFailed(key, ENGINE_MISSING, str(error))
        except PartitionRefused as error:
            return PartitionFailed(key, error.code, str(error))
        except DeviceTrouble as error:
            # The node's fault and not the job's, as with cards that are taken: it may run elsewhere.
            return PartitionFailed(key, PartitionRefused.code, str(error))
        except OSError as error:
            return PartitionFailed(key, "OutputUnavailable", f"no directory for what it needs: {error}")
        self._places[key] = _Place(grant, account, partition, bool(launch.image))
        return PartitionReady(key)

    async def _take_again(self, action: ResumeProcess) -> Event:
        """The partition of one that was suspended."""
        return await self._take_place(action.key, action.partition, action.launch, adopting=False, resuming=True)

    async def _undo(self, key: AssignmentKey) -> None:
        try:
            await self._partitions.undo(key)
        except DeviceTrouble as error:
            _log.warning("partition not undone", assignment=str(key), why=str(error))
            self._emit(UndoFailed(key, str(error)))
            return
        self._places.pop(key, None)
        self._secrets.take_back(key)
        self._suspending.forget(key)
        self._emit(PartitionUndone(key))

    def on_mig(self, mig_uuid: str) -> frozenset[AssignmentKey]:
        """Who holds this MIG instance."""
        return frozenset(key for key, place in self._places.items() if place.grant.mig_uuid == mig_uuid)

    # --- processes ---

    async def _start(self, starts: Sequence[StartProcess]) -> None:
        specs = []
        for start in starts:
            try:
                specs.append(self._spec(start))
            except NotContained as error:
                self._emit(ProcessRefused(start.key, ENGINE_MISSING, str(error)))
        try:
            results = await self._launcher.start(specs)
        except LauncherGone as error:
            _log.warning("launcher lost during a start", why=str(error))
            return
        for result in results:
            if isinstance(result, Started):
                self._metrics.started(result.key)
                self._partitions.running(result.key, result.pid)
                self._emit(ProcessStarted(result.key, result.pid, result.at_ms))
            else:
                self._emit(ProcessRefused(result.key, result.code, result.detail))

    def _spec(self, start: StartProcess) -> ProcessSpec:
        key, launch = start.key, start.launch
        place, files = self._places[key], self._store.files(key)
        job_dir, checkpoint_dir = str(files.job_dir), str(self._checkpoints.path(launch.tenant, key.job))
        env = environment(
            key=key,
            launch=launch,
            grant=place.grant,
            account=place.account,
            node=self._node,
            job_dir=job_dir,
            go=start.go,
            port=start.port,
            checkpoint_dir=checkpoint_dir,
            network=self._network,
        )
        wrapper: tuple[str, ...] = ()
        if launch.image:
            mounts = (launch.cwd or job_dir, job_dir, checkpoint_dir)
            wrapper = self._containers.wrap(
                key, launch, place.account, (*env, *launch.secrets), mounts, self._cards_of(place)
            )
        return ProcessSpec(
            key=key,
            argv=launch.argv,
            wrapper=(*self._secrets.wrapper(key, launch.secrets), *wrapper, *starter(launch)),
            script=launch.script,
            env=env,
            cwd=launch.cwd,
            account=place.account,
            job_dir=job_dir,
            stdout=str(files.out),
            stderr=str(files.err),
            limits=limits_of(launch, place.grant),
            lease_ms=launch.lease_ms,
            lease_grace_ms=launch.stop_grace_ms if launch.lease_ms else 0,
            renewed_ms=start.renewed_ms,
        )

    def _cards_of(self, place: _Place) -> tuple[tuple[str, int], ...]:
        """As a container engine needs them; modelled cards cannot be given to anybody."""
        if place.grant.devices is None:
            return ()
        if place.grant.mig_uuid:
            return ((place.grant.mig_uuid, -1),)
        return tuple((uuid, self._partitions.index(uuid)) for uuid in devices_of(place.partition))

    async def _stop(self, key: AssignmentKey, grace_ms: int, pid: int) -> None:
        """Under MPS the work on the card is ended before the SIGKILL, so that it does not take the neighbours along;
        the launcher's own SIGKILL is then the backstop, should the agent not be there at the end of the grace."""
        place = self._places.get(key)
        is_shared = place is not None and place.grant.mode == "mps" and pid != 0
        try:
            if not is_shared:
                await self._launcher.stop(key, grace_ms)
                return
            if grace_ms:
                await self._launcher.stop(key, grace_ms + CALM_MS_MAX)
                await asyncio.sleep(grace_ms / 1000)
            if key in self._places:  # else it has ended within its grace
                await self._partitions.before_kill(key, (pid,))
                await self._launcher.stop(key, 0)
        except LauncherGone as error:
            _log.warning("launcher lost during a stop", assignment=str(key), why=str(error))

    async def _renew(self, renewed_ms: int) -> None:
        try:
            await self._launcher.renew(renewed_ms)
        except LauncherGone as error:
            _log.warning("launcher lost while renewing leases", why=str(error))

    async def _forget(self, keys: Sequence[AssignmentKey]) -> None:
        try:
            await self._launcher.forget(keys)
        except LauncherGone as error:
            _log.warning("launcher lost while forgetting", why=str(error))

    async def open_launcher(self) -> tuple[ProcessFound, ...]:
        """Connect for the first time. Raises `LauncherGone` when that fails again and again."""
        for _ in range(OPEN_TRIES - 1):
            try:
                return self._found(await self._launcher.open())
            except LauncherGone as error:
                _log.warning("launcher out of reach", why=str(error))
                await asyncio.sleep(REOPEN_PAUSE_S)
        return self._found(await self._launcher.open())

    async def watch(self) -> None:
        """Tell every exit, for ever; and when the launcher was away, what it knows now."""
        while True:
            try:
                async for ended in self._launcher.exits():
                    self._on_exit(ended)
            except LauncherGone as error:
                _log.warning("launcher lost", why=str(error))
            await self._reopen()

    async def _reopen(self) -> None:
        pause_s = REOPEN_PAUSE_S
        while True:
            try:
                found = self._found(await self._launcher.open())
            except LauncherGone as error:
                _log.warning("launcher out of reach", why=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, REOPEN_PAUSE_S_MAX)
            else:
                # Before anything is started over the new connection: the list knows nothing of that.
                self._emit(ProcessesListed(found))
                return

    def _found(self, states: Sequence[ProcessState]) -> tuple[ProcessFound, ...]:
        for state in states:
            if state.exit is None:
                self._partitions.running(state.key, state.pid)
        return tuple(ProcessFound(state.key, state.pid, state.at_ms, state.exit is not None) for state in states)

    def _on_exit(self, ended: ProcessExit) -> None:
        self._partitions.running(ended.key, 0)
        place = self._places.get(ended.key)
        if place is not None and place.is_contained:
            self._spawn(self._remove_container(ended, place.account))
        else:
            self._tell_exit(ended)

    async def _remove_container(self, ended: ProcessExit, account: Account) -> None:
        """Before the end is told: with it goes the partition."""
        await self._containers.remove(ended.key, account)
        self._tell_exit(ended)

    def _tell_exit(self, ended: ProcessExit) -> None:
        self._emit(
            ProcessExited(
                ended.key,
                exit_code=ended.exit_code,
                signal=ended.signal,
                lost=ended.lost,
                at_ms=ended.at_ms,
                started_ms=ended.started_ms,
                detail=ended.detail,
                expired=ended.expired,
            )
        )
