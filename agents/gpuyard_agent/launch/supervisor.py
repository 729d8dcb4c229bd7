"""The process that owns a node's replicas: `python -m gpuyard_agent.launch.supervisor --socket PATH --state DIR`.

One for each node. It outlives the agent, so that an agent can be restarted, upgraded or killed while jobs run, and
knows how each of them ended when the agent comes back. It does little, so that it has little to be restarted for: no
NATS, no cards, no decisions.

One thread, one loop over a selector: requests of the agent, SIGCHLD, pidfds of adopted processes, one deadline. Starts
are taken a few at a time, so that a thousand of them do not keep exits waiting. What a request brings about is answered
in batches, one for each turn of the loop.

It serves its own user and root, as the kernel names them (SO_PEERCRED), at a socket that nobody else may open. It ends
when an agent that leaves on purpose finds nothing running, or when nothing runs and no agent has been there for a
minute; SIGTERM ends it too, and leaves every process running for the next one to adopt.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from gpuyard_agent.launch import kernel
from gpuyard_agent.launch.base import ProcessSpec, StartResult
from gpuyard_agent.launch.cgroups import Cgroups
from gpuyard_agent.launch.messages import (
    Answer,
    BadFrame,
    Exits,
    Forget,
    FrameBuffer,
    FreezeMany,
    Leave,
    LimitMemory,
    ListAll,
    Listing,
    Renew,
    Request,
    Results,
    StartMany,
    StopOne,
    decode_request,
    encode_frame,
)
from gpuyard_agent.launch.records import Records
from gpuyard_agent.launch.replicas import Replicas

#: How long it waits for an agent with nothing to do.
LINGER_S = 60.0
#: Starts in one turn of the loop.
_STARTS_PER_TURN = 16
#: Exits wait this long for an absent agent before they are forced to disk. With an agent there, they are durable in its
#: ledger sooner, and a slow disk must not hold up starts.
_SYNC_S = 1.0
#: An agent that reads nothing while this much waits for it is cut off; it will list everything when it returns.
_UNREAD_BYTES_MAX = 64 * 1024 * 1024
_READ_BYTES = 1024 * 1024
_BACKLOG = 16
#: Hardly anything here makes cycles, so they are looked for seldom.
_GC_THRESHOLD = 50_000
#: The supervisor must be the last to go: with it goes the knowledge of how jobs ended.
_OOM_SCORE = -900
#: Unix socket addresses end at 108 bytes.
_ADDRESS_BYTES_MAX = 100

ALREADY_RUNS = 3


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """The path, or a short way to it if it is longer than an address may be."""
    if len(os.fsencode(path)) <= _ADDRESS_BYTES_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def log(event: str, detail: str = "") -> None:
    """One line on standard output, which is the supervisor's log file."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    sys.stdout.write(f"{at} {event}{' ' if detail else ''}{detail}\n")
    sys.stdout.flush()


class _Agent:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.frames = FrameBuffer()
        #: Not yet taken by the kernel.
        self.unsent = bytearray()


class Supervisor:
    """The loop around the table of processes."""

    def __init__(self, listener: socket.socket, replicas: Replicas, records: Records) -> None:
        self._listener = listener
        self._replicas = replicas
        self._records = records
        self._selector = selectors.DefaultSelector()
        self._agents: dict[int, _Agent] = {}
        #: Starts not yet made, with who asked.
        self._starts: deque[tuple[_Agent, ProcessSpec]] = deque()
        #: When nothing ran and no agent was there for the first time; None while there is something to do.
        self._idle_since: float | None = None
        #: Since when something has waited to be forced to disk without an agent there; None while nothing does.
        self._unsynced_since: float | None = None
        #: Who asked for freezes last: when it goes, nobody would thaw them.
        self._halting: _Agent | None = None
        self._ends = False

    def run(self) -> None:
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        # Handlers, not SIG_IGN: what is ignored would stay ignored in every job.
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_ends", True))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(wake, selectors.EVENT_READ)
        for pidfd in self._replicas.pidfds:
            self._selector.register(pidfd, selectors.EVENT_READ)
        while not self._ends:
            self._turn(wake)
        if self._replicas.ended:
            self._records.sync()

    def _turn(self, wake: int) -> None:
        for found, events in self._selector.select(self._timeout()):
            if found.fileobj is self._listener:
                self._accept()
            elif found.fd == wake:
                os.read(wake, 4096)
            elif found.fd in self._agents:
                self._serve(self._agents[found.fd], events)
            elif found.fd in self._replicas.pidfds:
                self._selector.unregister(found.fd)
                self._replicas.main_ended(found.fd)
        self._make_starts()
        # Not only after a SIGCHLD: a start may have ended already, and asking costs a microsecond.
        self._replicas.reap()
        self._replicas.tick()
        exits = self._replicas.take_exits()
        if exits:
            for agent in list(self._agents.values()):
                self._send(agent, Exits(exits))
        if self._agents:
            self._unsynced_since = None
        elif self._unsynced_since is None and self._records.is_dirty:
            self._unsynced_since = time.monotonic()
        self._rest()

    def _timeout(self) -> float | None:
        if self._starts:
            return 0.0
        deadlines = [
            deadline
            for deadline in (
                self._replicas.next_deadline(),
                None if self._idle_since is None else self._idle_since + LINGER_S,
                None if self._unsynced_since is None else self._unsynced_since + _SYNC_S,
            )
            if deadline is not None
        ]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _rest(self) -> None:
        """What is done when there is nothing else: force waiting exits to disk, end after long idleness."""
        now = time.monotonic()
        if self._unsynced_since is not None and now >= self._unsynced_since + _SYNC_S:
            self._unsynced_since = None
            if self._replicas.ended and not self._agents:
                self._records.sync()
        if self._agents or self._replicas.running:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now >= self._idle_since + LINGER_S:
            log("ends", "nothing runs and no agent is there")
            self._ends = True

    def _make_starts(self) -> None:
        results: dict[int, tuple[_Agent, list[StartResult]]] = {}
        for _ in range(min(_STARTS_PER_TURN, len(self._starts))):
            agent, spec = self._starts.popleft()
            results.setdefault(id(agent), (agent, []))[1].append(self._replicas.start(spec))
        for agent, made in results.values():
            self._send(agent, Results(tuple(made)))

    # --- agents ---

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (0, os.geteuid()):
            log("refused", f"a connection of uid {uid}")
            connection.close()
            return
        connection.setblocking(False)
        self._agents[connection.fileno()] = _Agent(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, agent: _Agent, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(agent)
        if events & selectors.EVENT_READ:
            try:
                data = agent.connection.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._cut_off(agent)
                return
            try:
                for body in agent.frames.feed(data):
                    self._handle(agent, decode_request(body))
            except BadFrame as error:
                log("bad-frame", str(error))
                self._cut_off(agent)

    def _handle(self, agent: _Agent, request: Request) -> None:
        match request:
            case StartMany(specs=specs):
                self._starts.extend((agent, spec) for spec in specs)
            case StopOne(key=key, grace_ms=grace_ms):
                self._withdraw_start_of(key)
                self._replicas.stop(key, grace_ms)
            case FreezeMany(keys=keys, frozen=frozen):
                self._halting = agent
                for key in keys:
                    self._replicas.freeze(key, frozen)
            case LimitMemory(key=key, memory_mib=memory_mib):
                self._replicas.limit_memory(key, memory_mib)
            case Renew(renewed_ms=renewed_ms):
                self._replicas.renew(renewed_ms)
            case ListAll():
                self._send(agent, Listing(os.getpid(), self._replicas.states()))
            case Forget(keys=keys):
                for key in keys:
                    self._replicas.forget(key)
            case Leave():
                self._ends = not self._starts and self._replicas.running == 0

    def _withdraw_start_of(self, key: object) -> None:
        """Make a start that was asked before its stop now, so that the stop finds it."""
        for pair in [pair for pair in self._starts if pair[1].key == key]:
            self._starts.remove(pair)
            self._send(pair[0], Results((self._replicas.start(pair[1]),)))

    def _send(self, agent: _Agent, answer: Answer) -> None:
        if agent.connection.fileno() < 0:
            return  # cut off meanwhile
        agent.unsent += encode_frame(answer)
        self._flush(agent)
        if len(agent.unsent) > _UNREAD_BYTES_MAX:
            log("cut-off", "an agent that reads nothing")
            self._cut_off(agent)

    def _flush(self, agent: _Agent) -> None:
        try:
            while agent.unsent:
                sent = agent.connection.send(agent.unsent)
                del agent.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._cut_off(agent)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if agent.unsent else 0)
        if self._selector.get_key(agent.connection).events != events:
            self._selector.modify(agent.connection, events)

    def _cut_off(self, agent: _Agent) -> None:
        """The agent is gone. What it asked for is done nevertheless: it will look with `list`."""
        if agent.connection.fileno() >= 0:
            self._selector.unregister(agent.connection)
            del self._agents[agent.connection.fileno()]
            agent.connection.close()
            if agent is self._halting:
                self._halting = None
                self._replicas.thaw_all()


# --- the process -----------------------------------------------------------------------------------------------------


def _absolute(text: str) -> Path:
    return Path(text).absolute()


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    previous = os.umask(0o177)  # 0600 from the first moment
    try:
        with socket_address(path) as address:
            listener.bind(address)
    finally:
        os.umask(previous)
    listener.listen(_BACKLOG)
    return listener


def _detach() -> None:
    """The caller's process ends here with success; what goes on is init's child, in a session of its own."""
    if os.fork() != 0:
        os._exit(0)
    os.setsid()


def _protect_from_oom() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpuyard_agent.launch.supervisor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--socket", type=_absolute, required=True, help="where agents connect")
    parser.add_argument("--state", type=_absolute, required=True, help="directory for the records of starts and ends")
    parser.add_argument("--detach", action="store_true", help="return once it listens, and go on in the background")
    options = parser.parse_args(arguments)
    options.state.mkdir(parents=True, exist_ok=True, mode=0o711)
    lock = os.open(options.state / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log("already-runs", f"another supervisor serves {options.state}")
        return ALREADY_RUNS
    records = Records(options.state / "supervisor.records", kernel.boot_id())
    listener = _listen(options.socket)
    if options.detach:
        _detach()
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    os.chdir("/")
    kernel.become_subreaper()
    if os.geteuid() == 0:
        _protect_from_oom()
    cgroups = Cgroups(f"gpuyard-{records.state_id}")
    replicas = Replicas(records, log, cgroups)
    replicas.recover()
    means = f"control groups: {cgroups.kind}, limits: {' '.join(sorted(cgroups.limits)) or 'none'}"
    log("ready", f"pid {os.getpid()}, {len(replicas)} known, {replicas.running} running, {means}")
    gc.freeze()  # forks copy what a collection touches
    gc.set_threshold(_GC_THRESHOLD)
    try:
        Supervisor(listener, replicas, records).run()
    finally:
        with contextlib.suppress(FileNotFoundError):
            options.socket.unlink()
        records.close()
        cgroups.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
