"""A real agent for a test or a benchmark: nats-server with accounts, agent process, supervisor; the test is the daemon.

`AgentRoom` is a machine room with one node: a directory, a NATS server with real keys, and agent processes that can be
started, stopped and killed. `Commander` speaks as the daemon does: orders with their numbers on `cmd.<node>`, reports
read from the REP stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import psutil

import gpuyard_agent
import gpuyard_protocol
from gpuyard_agent.launch import supervisor
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.nats_server import NatsServer
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, BusError, Message, StoredMessage
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    Heartbeat,
    Joined,
    Launch,
    LogChunk,
    Order,
    OrderAnswer,
    OrderBatch,
    Prepared,
    ReadLog,
    Report,
    ReportBatch,
    Resumed,
    ResumeFailed,
    Start,
    Started,
    Suspended,
    SuspendFailed,
    Sync,
)
from gpuyard_protocol.resources import NoGpu, Partition

YARD = "test"
NODE = "node-1"
DEADLINE_S = 15.0
R = TypeVar("R", bound=Report)
Standing: TypeAlias = Suspended | Resumed | SuspendFailed | ResumeFailed


def start_order(
    job: int,
    *argv: str,
    partition: Partition | None = None,
    attempt: int = 1,
    replica: int = 0,
    hold: bool = False,
    **launch: object,
) -> Start:
    """An order to run `argv` (a lone argument is text for /bin/sh)."""
    command = ("/bin/sh", "-c", argv[0]) if len(argv) == 1 else argv
    return Start(
        key=AssignmentKey(job, attempt, replica),
        partition=partition or NoGpu(),
        launch=Launch(tenant="acme", user="alice", argv=command, **launch),  # type: ignore[arg-type]
        hold=hold,
    )


class Commander:
    """The daemon's side of one node. Orders go out with the next numbers; every stored report is in `reports`."""

    def __init__(self, bus: Bus, node: NodeId = NODE) -> None:
        self.bus = bus
        self.node = node
        self.epoch = 7
        self.ordered = 0
        self.instance = ""
        #: By number, as first received.
        self.reports: dict[int, Report] = {}
        #: Reports that came again under a number already seen.
        self.repeated = 0
        self.heartbeat: Heartbeat | None = None
        self._counts: dict[type[Report], int] = {}
        self._by_key: dict[tuple[type[Report], AssignmentKey], Report] = {}
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        for spec in subjects.streams(YARD, 1024**3):
            await self.bus.ensure_stream(spec)
        await self.bus.subscribe(subjects.heartbeat(self.node), self._on_heartbeat)
        await self.bus.read_stream(subjects.stream_name("REP", YARD), self._on_reports)

    # --- what the node says ---

    def _on_heartbeat(self, message: Message) -> None:
        self.heartbeat = decode(Heartbeat, message.data)
        self._notify()

    def _on_reports(self, stored: list[StoredMessage]) -> None:
        for message in stored:
            batch = decode(ReportBatch, message.data)
            for number, report in enumerate(batch.reports, batch.first):
                if number in self.reports:
                    assert self.reports[number] == report
                    self.repeated += 1
                    continue
                assert number == len(self.reports) + 1, f"report {number} after {len(self.reports)}"
                self.reports[number] = report
                self._counts[type(report)] = self.count(type(report)) + 1
                if isinstance(report, Prepared | Started | Ended):
                    assert (type(report), report.key) not in self._by_key, f"told twice: {report}"
                    self._by_key[type(report), report.key] = report
                if isinstance(report, Joined):
                    self.instance = batch.instance
        self._notify()

    def _notify(self) -> None:
        task = asyncio.create_task(self._wake())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def until(self, is_true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(deadline_s), self._news:
            await self._news.wait_for(is_true)

    def of(self, kind: type[R], key: AssignmentKey | None = None) -> list[R]:
        return [
            report
            for report in self.reports.values()
            if isinstance(report, kind) and (key is None or getattr(report, "key", None) == key)
        ]

    def count(self, kind: type[Report]) -> int:
        """How many of this kind came; cheap, unlike `of`."""
        return self._counts.get(kind, 0)

    async def _one(self, kind: type[R], key: AssignmentKey, deadline_s: float) -> R:
        await self.until(lambda: (kind, key) in self._by_key, deadline_s)
        return cast("R", self._by_key[kind, key])

    async def ended(self, key: AssignmentKey, deadline_s: float = DEADLINE_S) -> Ended:
        return await self._one(Ended, key, deadline_s)

    async def started(self, key: AssignmentKey, deadline_s: float = DEADLINE_S) -> Started:
        return await self._one(Started, key, deadline_s)

    async def prepared(self, key: AssignmentKey, deadline_s: float = DEADLINE_S) -> Prepared:
        return await self._one(Prepared, key, deadline_s)

    async def answer(self, key: AssignmentKey, step: int, deadline_s: float = DEADLINE_S) -> Standing:
        """What came of an order to suspend or resume."""
        found: list[Standing] = []

        def has_come() -> bool:
            found[:] = [
                report
                for report in self.reports.values()
                if isinstance(report, Suspended | Resumed | SuspendFailed | ResumeFailed)
                and (report.key, report.step) == (key, step)
            ]
            return bool(found)

        await self.until(has_come, deadline_s)
        (one,) = found
        return one

    async def joined(self, count: int = 1) -> Joined:
        """The `count`-th time that a node joined."""
        await self.until(lambda: len(self.of(Joined)) >= count)
        return self.of(Joined)[count - 1]

    # --- what it is told ---

    async def send(self, command: object) -> OrderAnswer:
        message = await self.bus.request(subjects.commands(self.node), encode(command), timeout=5.0)
        return decode(OrderAnswer, message.data)

    async def order(self, *orders: Order) -> OrderAnswer:
        """The next orders; repeated until answered, as the daemon would by its `Sync`."""
        batch = OrderBatch(
            node=self.node, instance=self.instance, epoch=self.epoch, first=self.ordered + 1, orders=orders
        )
        answer = await self.send(batch)
        if answer.status == "ok":
            self.ordered += len(orders)
        return answer

    async def sync(self, *desired: Desired) -> OrderAnswer:
        """The whole desired set, as of the last order."""
        return await self.send(
            Sync(node=self.node, instance=self.instance, epoch=self.epoch, n=self.ordered, desired=desired)
        )

    async def read_log(self, request: ReadLog) -> LogChunk:
        message = await self.bus.request(subjects.commands(self.node), encode(request), timeout=5.0)
        return decode(LogChunk, message.data, max_bytes=1024 * 1024)


class AgentProcess:
    """One agent process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    async def kill(self) -> None:
        """SIGKILL: nothing of it gets another instruction."""
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        self.process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


class AgentRoom:
    """A directory with a NATS server and one node's agent."""

    def __init__(self, root: Path, server: NatsServer, keys: YardKeys) -> None:
        self.root = root
        self.server = server
        self.keys = keys
        self.state = root / "agents" / NODE
        #: Every job may write here.
        self.scratch = root / "scratch"
        self.agents: list[AgentProcess] = []
        self._buses: list[Bus] = []

    async def start_agent(
        self,
        *arguments: str,
        node: str = NODE,
        simulate: str = "2xH100-80GB",
        environment: Mapping[str, str] = os.environ,
        entry: tuple[str, ...] = ("gpuyard_agent",),
    ) -> AgentProcess:
        """`simulate`: "" for the cards that the driver in `environment` has. `entry`: module and first arguments."""
        log = self.root / f"{node}.log"
        roots = {str(Path(next(iter(package.__path__))).parent) for package in (gpuyard_agent, gpuyard_protocol)}
        roots.add(str(Path(__file__).parents[1]))  # for entries that are tests' own
        command = [
            *(sys.executable, "-m", *entry, "--state", str(self.root / "agents" / node), "--node", node),
            *("--nats", self.server.url, "--key", str(self.keys.node(node))),
            *(("--simulate", simulate) if simulate else ()),
        ]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # What an agent started from somebody's shell inside a job would inherit.
                env={**environment, "PYTHONPATH": ":".join(sorted(roots)), "CUDA_VISIBLE_DEVICES": "9", "RANK": "9"},
                start_new_session=True,
            )
        agent = AgentProcess(process, log)
        self.agents.append(agent)
        return agent

    async def commander(self) -> Commander:
        bus = await connect(
            self.server.url, name="commander", inbox_prefix="_INBOX_D", seed=str(self.keys.daemon), connect_timeout_s=10
        )
        self._buses.append(bus)
        commander = Commander(bus)
        await commander.open()
        return commander

    async def tenant_bus(self) -> Bus:
        bus = await connect(
            self.server.url, name="tenant", inbox_prefix="_INBOX.alice", seed=str(self.keys.user("acme", "alice"))
        )
        self._buses.append(bus)
        return bus

    def supervisors(self) -> list[psutil.Process]:
        """Not the agent, whose flags may name the supervisor too."""
        return [one for one in _processes_naming(str(self.root)) if supervisor.__name__ in one.cmdline()]

    async def close(self) -> None:
        for agent in self.agents:
            if agent.process.returncode is None:
                await agent.kill()
        for bus in self._buses:
            await bus.close()
        await self.server.stop()
        for process in [*_processes_of_jobs(self.root), *_processes_naming(str(self.root))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def _processes_naming(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and text in " ".join(process.cmdline()):
                found.append(process)
    return found


def _processes_of_jobs(root: Path) -> list[psutil.Process]:
    """Jobs of this room and what was started for them: a directory of it is in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            settings = process.environ() if process.pid != os.getpid() else {}
            if any(value.startswith(f"{root}/") for value in settings.values()):
                found.append(process)
    return found


@contextlib.asynccontextmanager
async def agent_room(prefix: str = "gpuyard-room-") -> AsyncIterator[AgentRoom]:
    """A room whose NATS server runs, in a directory that jobs of other accounts can reach; removed at the end."""
    root = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        root.chmod(0o755)
        keys = YardKeys.load_or_create(root / "keys")
        keys.add_node(NODE)
        keys.add_user("acme", "alice")
        server = NatsServer(root / "nats", keys, yard=YARD, port=0)
        room = AgentRoom(root, server, keys)
        room.scratch.mkdir()
        room.scratch.chmod(0o777)
        (root / "agents").mkdir()
        (root / "agents").chmod(0o711)
        await server.start()
        try:
            yield room
        finally:
            await room.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def until_file(path: Path, is_enough: Callable[[str], bool] = bool, deadline_s: float = DEADLINE_S) -> str:
    """The file's text once it is what was waited for: jobs are outside the loop and send no event."""
    end = time.monotonic() + deadline_s
    while True:
        text = path.read_text() if path.exists() else ""
        if is_enough(text):
            return text
        if time.monotonic() > end:
            raise AssertionError(f"{path} holds {text!r}")
        await asyncio.sleep(0.01)


def lines_of(scratch: Path, names: Sequence[str]) -> dict[str, int]:
    """How many lines each of these files has."""
    return {name: len((scratch / name).read_text().splitlines()) if (scratch / name).exists() else 0 for name in names}


async def order_surely(commander: Commander, *orders: Order) -> None:
    """As the daemon does when an agent dies under an order: again and again, until some instance has taken it."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(BusError):
                if (await commander.order(*orders)).status == "ok":
                    return
            await asyncio.sleep(0.02)
