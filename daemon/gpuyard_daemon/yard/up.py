"""A whole yard on one machine: keys, NATS server, daemon and agents, started, kept alive and stopped in order.

The conductor holds no state of the yard and makes none of its decisions: it imports neither the daemon nor the agent,
and talks to them as any operator and tenant would. Kill it, and the yard goes on; the next one finds what was left
and begins afresh from the same directory.

Stopping is the reverse of starting, with the work first: the daemon takes every job back into the queue, uncharged, the
agents end what runs with grace, and only then do agents, daemon and NATS server go. Whoever is in a hurry (a second
Ctrl-C) skips the grace, not the order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from gpuyard.client import Client
from gpuyard.context import Context
from gpuyard.errors import GpuyardError, QueryFailed
from gpuyard.operator import Operator
from gpuyard_daemon.yard import home as homes
from gpuyard_daemon.yard import processes
from gpuyard_daemon.yard.home import Home, Running, YardTrouble
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import NatsServer
from gpuyard_daemon.yard.processes import Child, ProcessMark
from gpuyard_daemon.yard.server_config import TlsFiles
from gpuyard_daemon.yard.server_files import ConfigurationError, is_loopback, public_name
from gpuyard_protocol.queries import NodeView, Stats

T = TypeVar("T")

YARD = "main"
HTTP_HOST, HTTP_PORT = "127.0.0.1", 7790
SUPERVISOR_MODULE = "gpuyard_agent.launch.supervisor"
START_TIMEOUT_S = 60.0
POLL_S = 0.05
#: Jobs get their own grace (30 s by default); whoever asks for more than this is cut short.
GRACE_MAX_S = 300.0
#: The streams take this share of the server's store, and the daemon's own default at most.
STREAMS_PERCENT = 95
STREAMS_MAX_MIB = 12 * 1024
#: Enough for the daemon to write down that everything is to start again.
HURRIED_GRACE_S = 0.5
#: A supervisor that has nothing to do ends this soon after its agent.
SUPERVISOR_LEAVES_S = 2.0
#: While the yard stops: an append is tried this often, and so many in a row without an acknowledgement mean that the
#: store is dead. Then each process has this long to end. Together with its jobs, all is over within ten seconds.
PROBE_S = 1.2
MISSED_PROBES_MAX = 3
DEAD_STOP_S = 1.0
#: In the environment of every job; its directory lies below the yard's.
JOB_DIR_VARIABLE = "GPUYARD_JOB_DIR"
ACTIVE_STATES = ("starting", "running", "suspended", "stopping")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What `gpuyard up` was asked for."""

    state: Path
    #: Cards to model on each node, such as `8xH100-80GB`; "": the machine's own.
    simulate: str = ""
    #: Agents; more than one only with modelled cards.
    nodes: int = 1
    #: A NATS server that somebody else runs; "": one of the yard's own.
    nats: str = ""
    #: Of the own NATS server. None: as before, or 4222, or any; 0: any.
    port: int | None = None
    #: Account that jobs run as; "": see `home.job_account`.
    run_as: str = ""
    tenant: str = "main"
    #: "": the login name.
    user: str = ""
    #: HOST:PORT of the daemon; "": 127.0.0.1, with the port of the last time, 7790 in the usual place, or any free one.
    http: str = ""
    #: Room for the streams, in MiB; 0: as much as the disk allows.
    store_mib: int = 0
    #: A second daemon that takes over from the first.
    standby: bool = False
    #: Address of the own NATS server, beyond loopback with TLS: for other machines to join.
    listen: str = HTTP_HOST


class Yard:
    """One yard under way. `say` hears, in a sentence, of everything that is not normal."""

    def __init__(self, settings: Settings, *, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.home = Home(settings.state)
        self._say = say
        self.account = homes.job_account(settings.run_as)
        self.user = homes.user_name(settings.user)
        self.node_names = [f"node-{number}" for number in range(1, settings.nodes + 1)]
        self._nats: NatsServer | None = None
        self._children: list[Child] = []
        self.context: Context | None = None
        #: The context file for the sudo user, where there is one.
        self.guest_context: Path | None = None
        self._announcement = ""
        #: Set by whoever wants the stop without grace.
        self.hurry = asyncio.Event()
        #: Nothing is stored any more: whatever is waited for in a stop would not come.
        self._is_dead = False

    # -- start ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Return when the yard takes jobs; whatever was started is stopped again if it does not come that far."""
        self.home.take()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._start()
        except TimeoutError:
            trouble = YardTrouble(f"the yard is not ready after {START_TIMEOUT_S:g} s: {self._last_words()}")
            await self._abandon()
            raise trouble from None
        except BaseException:
            await self._abandon()
            raise

    async def _start(self) -> None:
        self._check_way_for_jobs()
        await end_leftovers(self.home, self._say)
        keys = YardKeys.load_or_create(self.home.keys_dir)
        operator = self.user
        keys.add_operator(operator)
        keys.add_user(self.settings.tenant, self.user)
        for node in self.node_names:
            keys.add_node(node)
        url = await self._start_nats(keys)
        http = self._choose_http()
        self.context = Context(
            yard=YARD,
            url=url,
            tenant=self.settings.tenant,
            user=self.user,
            key=str(keys.user(self.settings.tenant, self.user)),
            operator=operator,
            operator_key=str(keys.operator(operator)),
            http=f"http://{http}",
            tls_ca=self._tls_ca,
        )
        self._note_running()
        daemon = self._child("daemon", self._daemon_arguments(url, http), self.home.path / "daemon" / "daemon.log")
        agents = [
            self._child(node, self._agent_arguments(node, url, keys), self.home.agent_dir(node) / "agent.log")
            for node in self.node_names
        ]
        for child in (daemon, *agents):
            await child.start()
        self._note_running()
        await self._unless_failed(self._until_ready(http))
        if self.settings.standby:
            await self._start_standby(url)
        self.home.write_context(self.context)
        self._write_guest_context(keys)
        for child in self._children:
            child.is_proven = True

    def _check_way_for_jobs(self) -> None:
        closed = homes.first_closed_parent(self.home.path / "agents", self.account)
        if closed is not None:
            raise YardTrouble(
                f"jobs run as {self.account}, who may not pass through {closed}: choose another place with --state, "
                f"another account with --run-as, or open it (chmod o+x {closed})"
            )

    async def _start_nats(self, keys: YardKeys) -> str:
        directory = self.home.path / "nats"
        if self.settings.nats:
            from gpuyard_daemon.yard.foreign_nats import check_foreign_server

            await check_foreign_server(self.settings.nats, keys, yard=YARD, directory=directory, say=self._say)
            return self.settings.nats
        listen = self.settings.listen
        tls = None if is_loopback(listen) else self._certificates(listen)
        self._nats = NatsServer(
            directory, keys, yard=YARD, host=listen, tls=tls, port=self.settings.port, on_event=self._say
        )
        await self._nats.start()
        return self._nats.url

    def _certificates(self, listen: str) -> TlsFiles:
        from gpuyard_daemon.yard.certificates import ensure_certificates

        try:
            return ensure_certificates(self.home.path, YARD, [public_name(listen).strip("[]")])
        except ConfigurationError as error:
            raise YardTrouble(str(error)) from None

    @property
    def _tls_ca(self) -> str:
        """Whom clients of the own server trust; "": nobody needs to be."""
        return (self._nats.tls_ca or "") if self._nats is not None else ""

    def _choose_http(self) -> str:
        if self.settings.http:
            host, _, port = self.settings.http.rpartition(":")
            # Any free one, chosen here: the context and whoever waits for the daemon must know it.
            return f"{host}:{homes.free_port(host.strip('[]'))}" if port == "0" else self.settings.http
        before = self.home.read_context()
        kept = before.http.rpartition(":")[2] if before else ""
        candidates = [int(kept)] if kept.isdigit() else []
        return f"{HTTP_HOST}:{homes.free_port(HTTP_HOST, *candidates, *self._usual_port(0))}"

    def _usual_port(self, offset: int) -> list[int]:
        """The well-known port is for the yard in the usual place: others on one machine stay out of its way."""
        return [HTTP_PORT + offset] if self.home.is_usual() else []

    def _child(self, name: str, arguments: list[str], log_file: Path) -> Child:
        child = Child(
            name,
            arguments,
            log_file,
            environment=_child_environment(),
            on_event=self._say,
            on_restart=self._note_running,
        )
        self._children.append(child)
        return child

    def _daemon_arguments(self, url: str, http: str) -> list[str]:
        arguments = ["--state", str(self.home.path), "--nats", url, "--yard", YARD, "--http", http]
        if self.settings.nats:
            from gpuyard_daemon.yard.foreign_nats import replicas_for

            arguments += ["--replicas", str(replicas_for(url))]
        arguments += ["--tls-ca", self._tls_ca] if self._tls_ca else []
        return [sys.executable, "-m", "gpuyard_daemon", *arguments, *self._daemon_config()]

    async def _start_standby(self, url: str) -> None:
        """Last, so that the first one leads. Its page is on a port of its own, in `http.url` beside its log."""
        directory = self.home.path / "standby"
        arguments = [*self._daemon_arguments(url, f"{HTTP_HOST}:0"), "--daemon-dir", str(directory)]
        await self._child("standby", arguments, directory / "daemon.log").start()
        self._note_running()

    def _daemon_config(self) -> list[str]:
        """A file for what has no flag; what its owner adds to it stays."""
        path = self.home.path / "daemon" / "daemon.toml"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            budget_mib = self.settings.store_mib
            if self._nats is not None and not budget_mib:
                budget_mib = min(self._nats.store_bytes // 2**20 * STREAMS_PERCENT // 100, STREAMS_MAX_MIB)
            lines = ["# Settings of this yard's daemon; `gpuyard up` wrote it once and leaves it alone."]
            if budget_mib:
                lines += ["[journal]", f'budget = "{budget_mib}Mi"']
            path.write_text("\n".join(lines) + "\n")
        return ["--config", str(path)]

    def _agent_arguments(self, node: str, url: str, keys: YardKeys) -> list[str]:
        arguments = ["--state", str(self.home.agent_dir(node)), "--node", node, "--nats", url]
        arguments += ["--key", str(keys.node(node)), "--run-as", self.account]
        port = homes.free_port(HTTP_HOST, *self._usual_port(1 + self.node_names.index(node)))
        arguments += ["--http", f"{HTTP_HOST}:{port}"]
        arguments += ["--tls-ca", self._tls_ca] if self._tls_ca else []
        if self.settings.simulate:
            arguments += ["--simulate", self.settings.simulate]
        return [sys.executable, "-m", "gpuyard_agent", *arguments]

    async def _until_ready(self, http: str) -> None:
        host, _, port = http.rpartition(":")
        while True:
            if await answers_ready(host.strip("[]"), int(port)):
                break
            await asyncio.sleep(POLL_S)
        assert self.context is not None
        async with Client(self.context) as yard:
            while True:
                with contextlib.suppress(QueryFailed):
                    ready = {view.node for view in await yard.nodes() if view.state == "ready"}
                    if ready.issuperset(self.node_names):
                        return
                await asyncio.sleep(POLL_S)

    async def _unless_failed(self, work: Awaitable[T]) -> T:
        """The work's result, or `YardTrouble` as soon as a child cannot be kept running."""
        task = asyncio.ensure_future(work)
        failures = [child.failed for child in self._children]
        try:
            waited: list[asyncio.Future[Any]] = [task, *failures]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for failure in failures:
                if failure.done():
                    raise YardTrouble(failure.result())
            return await task
        finally:
            task.cancel()

    def _last_words(self) -> str:
        for child in self._children:
            if child.restarts:
                return f"{child.name} was started {child.restarts + 1} times; {child.last_words()}"
        return "its processes run, but do not answer; their logs are in " + str(self.home.path)

    def _write_guest_context(self, keys: YardKeys) -> None:
        """The sudo user is who will use the yard: he needs a key that he can read."""
        name = os.environ.get("SUDO_USER", "")
        if os.geteuid() == 0 and name and self.context is not None:
            with contextlib.suppress(KeyError):
                self.guest_context = self.home.write_context_for(pwd.getpwnam(name), self.context, keys)

    def _note_running(self) -> None:
        """Keep `up.json` true: it is how a later conductor finds what this one started."""
        conductor = ProcessMark.of(os.getpid())
        if conductor is None or self.context is None:
            return
        pids = {child.name: child.pid for child in self._children}
        if self._nats is not None:
            pids["nats-server"] = self._nats.pid
        marks = {name: ProcessMark.of(pid) for name, pid in pids.items() if pid is not None}
        self.home.write_running(
            Running(
                conductor=conductor,
                url=self.context.url,
                http=self.context.http,
                children={name: mark for name, mark in marks.items() if mark is not None},
                announcement=self._announcement,
            )
        )

    # -- while it runs -------------------------------------------------------------------------------------------------

    async def nodes(self) -> tuple[NodeView, ...]:
        assert self.context is not None
        async with Client(self.context) as yard:
            return await yard.nodes()

    def announce(self, text: str) -> None:
        """Keep what was said about how to reach the yard, for whoever started it in the background."""
        self._announcement = text
        self._note_running()

    async def failure(self) -> str:
        """Wait for a child that cannot be kept running; what it said."""
        done, _ = await asyncio.wait([child.failed for child in self._children], return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()

    # -- stop ----------------------------------------------------------------------------------------------------------

    async def stop(self, *, keep_jobs: bool = True) -> None:
        """End everything. No process of the yard is left when this returns.

        `keep_jobs`: put them back into the queue first, for the next start from the same directory.
        """
        if keep_jobs and self.hurry.is_set():
            # Also in a hurry the journal must know that what is killed now is to start again.
            await self._while_it_stores(self._requeue_all(HURRIED_GRACE_S))
        elif keep_jobs:
            await self._while_it_stores(self._requeue_all(GRACE_MAX_S), self.hurry.wait())
        await self._stop_processes()
        await end_jobs(self.home)
        self.home.forget_running()
        self.home.release()

    async def _while_it_stores(self, work: Coroutine[Any, Any, None], *ends: Coroutine[Any, Any, object]) -> None:
        """Do it, until one of the ends comes or nothing is stored any more, when nobody can be told of a grace."""
        task, dead = asyncio.ensure_future(work), asyncio.ensure_future(self._until_nothing_is_stored())
        waited: list[asyncio.Future[Any]] = [task, dead, *(asyncio.ensure_future(end) for end in ends)]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            elif dead.done() or not await self._is_stored():
                self._give_up_store()
        finally:
            for waiting in waited:
                waiting.cancel()
            await asyncio.gather(*waited, return_exceptions=True)

    async def _until_nothing_is_stored(self) -> None:
        """Long enough for a server that died to be there again."""
        missed = 0
        while missed < MISSED_PROBES_MAX:
            began = time.monotonic()
            missed = 0 if await self._is_stored() else missed + 1
            await asyncio.sleep(max(0.0, PROBE_S - (time.monotonic() - began)))

    async def _is_stored(self) -> bool:
        if self._nats is not None:
            return await self._nats.stores(PROBE_S)
        assert self.context is not None
        host, _, port = self.context.http.rpartition(":")
        return await answers_ready(host.rpartition("/")[2].strip("[]"), int(port))

    async def _requeue_all(self, grace_s: float) -> None:
        """Every job back into the queue, uncharged; return when nothing runs any more."""
        assert self.context is not None
        try:
            async with Operator(self.context) as operator:
                if (active := _active(await operator.stats())) and not self.hurry.is_set():
                    jobs = "1 job" if active == 1 else f"{active} jobs"
                    self._say(f"{jobs} to end with grace, and to wait for the next start (Ctrl-C again: at once)")
                ended = await operator.shutdown(deadline_s=grace_s)
                if active:
                    self._say(ended.text)
        except GpuyardError as error:
            if not await self._is_stored():
                self._give_up_store()
            elif not self.hurry.is_set():
                self._say(f"stopping without grace: {error}")

    def _give_up_store(self) -> None:
        self._is_dead = True
        self.hurry.set()
        self._say("nothing is stored any more: stopping without grace; what ran is told as lost at the next start")

    async def _stop_processes(self) -> None:
        by_name = {child.name: child for child in self._children}
        # The standby before the daemon, which would let it lead otherwise.
        daemons = [child for name in ("standby", "daemon") if (child := by_name.pop(name, None)) is not None]
        agents = list(by_name.values())
        if self._is_dead:
            # None of them can put anything in order any more.
            await asyncio.gather(*(child.stop(DEAD_STOP_S) for child in (*agents, *daemons)))
            if self._nats is not None:
                await self._nats.stop(DEAD_STOP_S)
            return
        await asyncio.gather(
            *(agent.stop(3.0 if self.hurry.is_set() else processes.STOP_TIMEOUT_S) for agent in agents)
        )
        for child in daemons:
            await child.stop()
        if self._nats is not None:
            await self._nats.stop()

    async def _abandon(self) -> None:
        """Undo a start that failed half-way. Jobs of an earlier run, if there are any, stay for the next try."""
        self.hurry.set()
        await asyncio.shield(self._stop_processes())
        self.home.forget_running()
        self.home.release()


def _active(stats: Stats) -> int:
    return sum(stats.jobs.get(state, 0) for state in ACTIVE_STATES)


def _child_environment() -> dict[str, str]:
    """Ours, without what would point a child at another yard or another GPU."""
    dropped = ("GPUYARD_CONTEXT", "CUDA_VISIBLE_DEVICES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: value for name, value in os.environ.items() if name not in dropped}


async def answers_ready(host: str, port: int) -> bool:
    """Whether the daemon's `/readyz` says yes."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /readyz HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return b" 200 " in status


# --- what an earlier conductor left -----------------------------------------------------------------------------------


async def end_leftovers(home: Home, say: Callable[[str], None]) -> None:
    """End daemon and agents of a conductor that was killed. Their jobs stay: the new agents adopt them.

    The NATS server is left to `NatsServer`, which ends the one on its own store.
    """
    running = home.read_running()
    if running is None:
        return
    left = [
        process
        for name, mark in running.children.items()
        if name != "nats-server" and (process := mark.find()) is not None
    ]
    if left:
        say(f"ending {len(left)} processes that an earlier, killed `gpuyard up` left behind; jobs go on")
        await processes.end_processes(left, grace_s=processes.STOP_TIMEOUT_S)


async def end_jobs(home: Home) -> None:
    """End what still runs below this directory, and the supervisors that hold it.

    A supervisor without jobs ends by itself when its agent leaves; this is for a stop in a hurry.
    """
    supervisors = processes.processes_naming(f"{home.path}/", module=SUPERVISOR_MODULE)
    deadline = time.monotonic() + SUPERVISOR_LEAVES_S
    while any(processes.is_running(process) for process in supervisors) and time.monotonic() < deadline:
        if any(processes.descendants(process) for process in supervisors):
            break
        await asyncio.sleep(POLL_S)
    left = [process for process in supervisors if processes.is_running(process)]
    await processes.end_processes(_jobs_below(home, left), grace_s=HURRIED_GRACE_S)
    # A shell that ignores SIGTERM starts its next command when the last one is ended: look until there is nothing.
    while jobs := _jobs_below(home, left):
        await processes.end_processes(jobs, grace_s=0.0)
    await processes.end_processes(left, grace_s=processes.STOP_TIMEOUT_S)


def _jobs_below(home: Home, supervisors: list[psutil.Process]) -> list[psutil.Process]:
    found = [child for process in supervisors for child in processes.descendants(process)]
    found += processes.processes_with(JOB_DIR_VARIABLE, f"{home.path}/")
    return list({process.pid: process for process in found if processes.is_running(process)}.values())


__all__ = ["Settings", "Yard", "YardTrouble", "answers_ready", "end_jobs", "end_leftovers"]
