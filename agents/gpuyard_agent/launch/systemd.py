"""`SystemdLauncher`: replicas as transient services of systemd, where it is PID 1 and we are root.

They are systemd's children, so they need nobody of ours: the agent may be restarted or killed, and reads afterwards
how each of them ended, since the units stay until they are forgotten. A restart of the node loses them, processes and
units alike.

A unit's name is its key, so a key cannot start twice. When a main process has ended, what is left of its control group
is killed, and only then is the end told. Stops are our own signals to the group and not systemd's `stop`, which would
drop the unit together with its exit status. That a stop was asked stands in the unit's description.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from gpuyard_agent.launch import kernel, lease_keeper
from gpuyard_agent.launch.base import (
    LauncherGone,
    ProcessExit,
    ProcessSpec,
    ProcessState,
    Refused,
    Started,
    StartResult,
)
from gpuyard_agent.launch.job_files import StartRefused
from gpuyard_agent.launch.leases import Lease, Leases
from gpuyard_agent.launch.prepared import Prepared, prepare
from gpuyard_agent.launch.systemd_bus import (
    SERVICE,
    UNIT,
    UNIT_EXISTS,
    SystemdManager,
    SystemdRefused,
)
from gpuyard_agent.launch.systemd_control import UnitControl
from gpuyard_agent.launch.systemd_units import (
    FACTS,
    OVER,
    STOPPING,
    UnitFacts,
    exit_of,
    explain,
    key_of,
    properties,
    unit_name,
    unit_prefix,
)
from gpuyard_protocol.names import AssignmentKey

#: A tree that has not died this long after SIGKILL sits in the kernel: its end is told nevertheless, with the pids.
CLEAR_S = 10.0
_LOOK_S = 0.02

_log = structlog.get_logger("gpuyard_agent.launch")


class _Replica(msgspec.Struct, kw_only=True):
    """One unit that exists."""

    key: AssignmentKey
    unit: str
    pid: int
    start_time: int
    at_ms: int
    stopping: bool = False
    #: The kill at the end of a stop's grace, and its time on the loop's clock.
    kill: asyncio.TimerHandle | None = None
    #: Something is looking at it now; and something happened meanwhile.
    is_looked_at: bool = False
    is_dirty: bool = False
    exit: ProcessExit | None = None


class SystemdLauncher:
    """Launches through the systemd that this host runs."""

    def __init__(self, node: str, bus_address: str | None = None, *, leases: Path | None = None) -> None:
        """`node`: goes into the units' names. `bus_address`: of another bus than the system's. `leases`: the file that
        the lease keeper reads; without one nobody keeps leases."""
        self._node = node
        self._bus_address = bus_address
        self._lease_file = leases
        self._leases = Leases()
        self._manager: SystemdManager | None = None
        self._replicas: dict[AssignmentKey, _Replica] = {}
        #: Starts under way: asked again, they have one answer.
        self._starting: dict[AssignmentKey, asyncio.Task[StartResult]] = {}
        #: Variables of the manager, which every service would inherit.
        self._foreign: tuple[str, ...] = ()
        self._control = UnitControl()
        self._frozen: set[AssignmentKey] = set()
        #: Units that are being read for the first time, and whether they changed meanwhile.
        self._first_reads: dict[str, bool] = {}
        self._exits: deque[ProcessExit] = deque()
        self._told: set[AssignmentKey] = set()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- connection ---

    async def open(self) -> tuple[ProcessState, ...]:
        await self._disconnect()
        manager = SystemdManager(self._bus_address, self._on_changed, self._on_lost)
        try:
            await manager.open(unit_prefix(self._node))
            environment = await manager.manager_property("Environment")
            self._foreign = tuple(entry.partition("=")[0] for entry in environment)
        except SystemdRefused as error:
            await manager.close()
            raise LauncherGone(f"systemd refuses to serve us: {error}") from None
        except LauncherGone:
            await manager.close()
            raise
        self._manager = manager
        if self._lease_file is not None:
            self._leases = lease_keeper.read(self._lease_file)
        states = await self.list()
        known = {state.key for state in states if state.exit is None}
        await self._change_leases(dropped=[key for key, _ in self._leases.items() if key not in known])
        return states

    async def close(self) -> None:
        await self._disconnect()

    async def _disconnect(self) -> None:
        manager, self._manager = self._manager, None
        for replica in self._replicas.values():
            if replica.kill is not None:
                replica.kill.cancel()
        for task in (*self._tasks, *self._starting.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        if manager is not None:
            await manager.close()
        self._replicas.clear()
        self._first_reads.clear()
        self._starting.clear()

    def _on_lost(self) -> None:
        self._manager = None
        self._news.set()

    def _require(self) -> SystemdManager:
        if self._manager is None:
            raise LauncherGone("not connected to systemd")
        return self._manager

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LauncherGone:
            pass  # whoever iterates over `exits` is told
        except SystemdRefused as error:
            _log.warning("systemd refused", why=str(error))

    # --- reading ---

    async def renew(self, renewed_ms: int) -> None:
        if self._leases.renew(renewed_ms):
            await self._change_leases()

    async def _change_leases(self, dropped: Sequence[AssignmentKey] = ()) -> None:
        """Written down, and with somebody there to keep them."""
        path = self._lease_file
        for key in dropped:
            self._leases.drop(key)
        if path is None or not (len(self._leases) or path.exists()):
            return
        try:
            await asyncio.to_thread(lease_keeper.write, path, self._leases)
        except OSError as error:
            _log.error("leases not written down", why=str(error))
        if len(self._leases):
            unit = lease_keeper.keeper_unit(self._node)
            wanted = lease_keeper.keeper_properties(self._node, path, self._bus_address)
            try:
                await self._require().start_transient(unit, wanted, ())
            except SystemdRefused as error:
                if error.name != UNIT_EXISTS:
                    _log.error("no lease keeper", why=str(error))

    async def list(self) -> tuple[ProcessState, ...]:
        manager = self._require()
        try:
            units = await manager.units(f"{unit_prefix(self._node)}*")
        except SystemdRefused as error:
            raise LauncherGone(f"systemd does not list units: {error}") from None
        keys = [(key, unit) for unit in units if (key := key_of(self._node, unit)) is not None]
        await asyncio.gather(
            *(self._take_up(key, unit) for key, unit in keys if key not in self._replicas and key not in self._starting)
        )
        return tuple(self._state(replica) for _, replica in sorted(self._replicas.items()))

    def _state(self, replica: _Replica) -> ProcessState:
        return ProcessState(
            key=replica.key,
            pid=replica.pid,
            start_time=replica.start_time,
            at_ms=replica.at_ms,
            stopping=replica.stopping,
            exit=replica.exit,
        )

    async def _take_up(self, key: AssignmentKey, unit: str) -> _Replica | None:
        """A unit that we did not start: an earlier agent did. None if it has gone meanwhile."""
        self._first_reads[unit] = False
        facts, stopping = await asyncio.gather(self._read(unit), self._is_stopping(unit))
        has_changed = self._first_reads.pop(unit, False)
        if facts is None or facts.pid == 0:
            return None
        replica = self._replicas.get(key)
        if replica is None:
            replica = self._add(key, unit, facts)
            replica.stopping = stopping
            if facts.main_has_ended or has_changed:
                await self._look(replica)
            if replica.exit is None:
                await self._thaw(replica)
        return replica

    def _add(self, key: AssignmentKey, unit: str, facts: UnitFacts) -> _Replica:
        process = kernel.facts_of(facts.pid)
        replica = _Replica(
            key=key,
            unit=unit,
            pid=facts.pid,
            start_time=process.start_time if process is not None else 0,
            at_ms=facts.started_us // 1000,
        )
        self._replicas[key] = replica
        return replica

    async def _read(self, unit: str) -> UnitFacts | None:
        """None if there is no such unit."""
        manager = self._require()
        try:
            (active,), service = await asyncio.gather(
                manager.get(unit, UNIT, ("ActiveState",)), manager.get(unit, SERVICE, FACTS)
            )
        except SystemdRefused as error:
            if error.is_about_unknown:
                return None
            raise LauncherGone(f"systemd cannot be read: {error}") from None
        pid, code, status, started, exited, result = service
        if active == "inactive":
            return None  # none of ours comes to that: it is just going, or was never there
        return UnitFacts(
            active=active,
            pid=pid,
            code=code,
            status=status,
            started_us=started,
            exited_us=exited,
            result=result,
        )

    async def _is_stopping(self, unit: str) -> bool:
        return await self._is_marked(unit, STOPPING)

    async def _is_marked(self, unit: str, mark: str) -> bool:
        try:
            (description,) = await self._require().get(unit, UNIT, ("Description",))
        except SystemdRefused:
            return False
        return str(description).endswith(mark)

    # --- starting ---

    async def start(self, specs: Sequence[ProcessSpec]) -> tuple[StartResult, ...]:
        self._require()
        waiting = [self._start_task(spec) for spec in specs]
        # Not gather: a caller that gives up must not cancel what another waits for too.
        try:
            return tuple([await asyncio.shield(task) for task in waiting])
        except asyncio.CancelledError:
            if self._manager is None:
                raise LauncherGone("the connection to systemd was closed during a start") from None
            raise

    def _start_task(self, spec: ProcessSpec) -> asyncio.Task[StartResult]:
        task = self._starting.get(spec.key)
        if task is None:
            task = self._starting[spec.key] = asyncio.create_task(self._start(spec))
            task.add_done_callback(lambda done: self._after_start(spec.key, done))
        return task

    def _after_start(self, key: AssignmentKey, done: asyncio.Task[StartResult]) -> None:
        if self._starting.get(key) is done:
            del self._starting[key]
        if not done.cancelled():
            done.exception()  # fetched: nobody may be waiting any more

    async def _start(self, spec: ProcessSpec) -> StartResult:
        known = self._replicas.get(spec.key)
        if known is not None:
            return _started(known)
        try:
            prepared = await asyncio.to_thread(prepare, spec)
        except StartRefused as refused:
            return Refused(key=spec.key, code=refused.code, detail=refused.detail)
        try:
            if spec.lease_ms:
                self._leases.hold(spec.key, Lease(spec.lease_ms, spec.lease_grace_ms))
                self._leases.renew(spec.renewed_ms)
                await self._change_leases()
            return await self._start_unit(spec, prepared)
        except StartRefused as refused:
            return Refused(key=spec.key, code=refused.code, detail=refused.detail)
        finally:
            for descriptor in {prepared.out, prepared.err}:
                os.close(descriptor)

    async def _start_unit(self, spec: ProcessSpec, prepared: Prepared) -> StartResult:
        manager, unit = self._require(), unit_name(self._node, spec.key)
        one_output = prepared.out == prepared.err
        wanted = properties(spec, prepared.program, prepared.argv, self._foreign, one_output=one_output)
        descriptors = [prepared.out] if one_output else [prepared.out, prepared.err]
        try:
            outcome = await manager.start_transient(unit, wanted, descriptors)
        except SystemdRefused as error:
            if error.name != UNIT_EXISTS:
                raise StartRefused("LauncherFailed", f"systemd refuses it: {error}") from None
            # Started by an agent that did not live to see the answer.
            replica = await self._take_up(spec.key, unit)
            if replica is None:
                raise LauncherGone(f"{unit} is just going away") from None
            return _started(replica)
        self._first_reads[unit] = False
        facts = await self._read(unit)
        has_changed = self._first_reads.pop(unit, False)
        if facts is None:
            raise StartRefused("LauncherFailed", f"systemd forgot {unit} at once")
        # A process that ends at once is a failed start to systemd as well; its status tells the two apart.
        if outcome != "done" and facts.was_never_executed:
            with contextlib.suppress(SystemdRefused):
                await manager.call("ResetFailedUnit", "s", [unit])
            raise explain(spec, prepared.program, facts.status)
        replica = self._add(spec.key, unit, facts)
        if facts.main_has_ended or has_changed:
            self._on_changed(unit)
        return _started(replica)

    # --- ends ---

    def _on_changed(self, unit: str) -> None:
        key = key_of(self._node, unit)
        replica = self._replicas.get(key) if key is not None else None
        if unit in self._first_reads:
            self._first_reads[unit] = True
        if replica is None or replica.exit is not None:
            return
        replica.is_dirty = True
        if not replica.is_looked_at:
            self._spawn(self._look(replica))

    async def _look(self, replica: _Replica) -> None:
        """Tell its end, if it has ended and nothing of it is left."""
        replica.is_looked_at = True
        try:
            replica.is_dirty = True
            while replica.is_dirty and replica.exit is None:
                replica.is_dirty = False
                facts = await self._read(replica.unit)
                if facts is None:
                    self._end(replica, _vanished(replica))
                elif facts.main_has_ended:
                    left = await self._clear(replica)
                    if replica.is_dirty:
                        continue
                    if facts.is_at_rest:
                        words = ", ".join(map(str, left))
                        detail = f"processes that do not die were left behind: {words}" if left else ""
                        expired = self._leases.has(replica.key) and await self._is_marked(replica.unit, OVER)
                        ending = exit_of(replica.key, facts, stopped=replica.stopping, expired=expired, detail=detail)
                        self._end(replica, ending)
        finally:
            replica.is_looked_at = False

    async def _clear(self, replica: _Replica) -> tuple[int, ...]:
        """Kill what the main process has left behind; returns what does not die."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CLEAR_S
        while (left := await self._left(replica)) and loop.time() < until:
            await self._kill(replica, signal.SIGKILL)
            await asyncio.sleep(_LOOK_S)
        return left

    async def _left(self, replica: _Replica) -> tuple[int, ...]:
        try:
            (rows,) = await self._require().call("GetUnitProcesses", "s", [replica.unit])
        except SystemdRefused:
            return ()
        return tuple(row[1] for row in rows)

    def _end(self, replica: _Replica, ending: ProcessExit) -> None:
        replica.exit = ending
        self._frozen.discard(replica.key)
        if replica.kill is not None:
            replica.kill.cancel()
        if self._leases.has(replica.key):
            self._spawn(self._change_leases(dropped=(replica.key,)))
        if replica.key not in self._told:
            self._told.add(replica.key)
            self._exits.append(ending)
            self._news.set()

    async def exits(self) -> AsyncIterator[ProcessExit]:
        while True:
            while self._exits:
                yield self._exits.popleft()
            if self._manager is None:
                raise LauncherGone("the connection to systemd is lost")
            self._news.clear()
            await self._news.wait()

    async def forget(self, keys: Sequence[AssignmentKey]) -> None:
        manager = self._require()
        for key in keys:
            replica = self._replicas.get(key)
            if replica is None or replica.exit is None:
                continue
            for method, body in (("StopUnit", [replica.unit, "replace"]), ("ResetFailedUnit", [replica.unit])):
                with contextlib.suppress(SystemdRefused):  # it is one of the two, or gone
                    await manager.call(method, "s" * len(body), body)
            self._replicas.pop(key, None)
            self._told.discard(key)

    # --- stopping, freezing ---

    async def stop(self, key: AssignmentKey, grace_ms: int) -> None:
        self._require()
        replica = self._replicas.get(key)
        if replica is None or replica.exit is not None:
            return
        if not replica.stopping:
            replica.stopping = True
            await self._say_stopping(replica)
            if grace_ms > 0:
                await self._thaw(replica)
                await self._kill(replica, signal.SIGTERM)
                await self._kill(replica, signal.SIGCONT)  # a halted process would not see it
        loop = asyncio.get_running_loop()
        at = loop.time() + max(grace_ms, 0) / 1000
        if replica.kill is not None:
            if not replica.kill.cancelled() and replica.kill.when() <= at:
                return
            replica.kill.cancel()
        replica.kill = loop.call_at(at, lambda: self._spawn(self._kill(replica, signal.SIGKILL)))

    async def _say_stopping(self, replica: _Replica) -> None:
        with contextlib.suppress(SystemdRefused):
            await self._require().describe(replica.unit, f"gpuyard replica {replica.key}{STOPPING}")

    async def limit_memory(self, key: AssignmentKey, memory_mib: int) -> None:
        manager = self._require()
        replica = self._replicas.get(key)
        if replica is not None and replica.exit is None:
            await self._control.limit_memory(manager, replica.unit, memory_mib)

    async def freeze(self, keys: Sequence[AssignmentKey], *, frozen: bool) -> None:
        manager = self._require()
        present = [replica for key in keys if (replica := self._replicas.get(key)) and replica.exit is None]
        if frozen:
            present = [replica for replica in present if not replica.stopping]
            self._frozen.update(replica.key for replica in present)
        else:
            self._frozen.difference_update(replica.key for replica in present)
        turn = self._control.freeze if frozen else self._control.thaw
        await asyncio.gather(*(turn(manager, replica.unit) for replica in present))

    async def _kill(self, replica: _Replica, number: signal.Signals) -> None:
        await self._control.signal(self._require(), replica.unit, number)

    async def _thaw(self, replica: _Replica) -> None:
        self._frozen.discard(replica.key)
        await self._control.thaw(self._require(), replica.unit)


def _started(replica: _Replica) -> Started:
    return Started(key=replica.key, pid=replica.pid, start_time=replica.start_time, at_ms=replica.at_ms)


def _vanished(replica: _Replica) -> ProcessExit:
    return ProcessExit(
        key=replica.key,
        lost=True,
        stopped=replica.stopping,
        started_ms=replica.at_ms,
        detail="systemd does not know its unit any more: somebody removed it",
    )
