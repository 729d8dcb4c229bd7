"""From a state directory and a journal to a daemon that leads.

Streams first, then the newest readable snapshot, then the journal from there; then the claim, and the journal up to
the claim: after it nobody else can append, so the state is whole. Facts are applied, never decided again.

A journal that does not belong to what is on disk, or lacks a part that no snapshot covers, is refused
(`StartRefused`): going on would mean losing acknowledged jobs without a word.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import deque
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import structlog

from gpuyard_daemon.config import DaemonConfig
from gpuyard_daemon.core.state.facts import JobRetired
from gpuyard_daemon.core.state.inputs import Cursors
from gpuyard_daemon.core.state.turn import RECORD_VERSION, Notice, Record, Turn
from gpuyard_daemon.history import History
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.snapshots import SnapshotCorrupt, SnapshotStore
from gpuyard_protocol.bus.base import Bus, StoredMessage, StreamUnavailable
from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.subjects import JOURNAL_ENTRY, JOURNAL_PERCENT, Streams, stream_name, streams
from gpuyard_protocol.units import format_mib

log = structlog.get_logger("recovery")

#: Records may be as large as the server takes.
RECORD_BYTES_MAX = 8 * 1024 * 1024
#: Of this many records the events are kept during replay, in case the daemon before did not come to tell them.
RETOLD_RECORDS = 256
_GIB = 1024**3
#: How the server says that its store is smaller than what its streams may use.
ERROR_NO_ROOM = "JetStream error 10047"
#: … that an existing stream cannot take these settings; and that there are fewer servers than replicas.
ERROR_CANNOT_CHANGE = "JetStream error 10052"
ERROR_FEW_SERVERS = "JetStream error 10074"
_KINDS: tuple[Literal["SUB", "REP", "JRN", "EVT"], ...] = ("SUB", "REP", "JRN", "EVT")
BUDGET_DEFAULT_MAX = 12 * _GIB


class StartRefused(Exception):
    """The daemon must not start on what it found; the text says what a person can do."""


class PartMissing(StartRefused):
    """The journal begins after what the newest readable snapshot holds."""


class StartLater(Exception):
    """Something that will pass stands in the way."""


class ReplayedCore(Protocol):
    """What this file asks of the core."""

    turn: int
    now_ms: int

    @property
    def cursors(self) -> Cursors: ...
    def apply(self, record: Record, *, told: bool = False) -> Turn: ...


class Restored(NamedTuple):
    """State of a snapshot: its bytes (None: begin with an empty yard), and the journal sequence it stands for."""

    state: bytes | None
    sequence: int


async def ensure_streams(bus: Bus, config: DaemonConfig) -> Streams:
    """The four streams with today's settings, and durable: a stream that was just made is synced to disk."""
    budget_bytes = await _budget_bytes(bus, config)
    wanted = await planned_streams(bus, config, budget_bytes)
    is_new = not await _are_there(bus, wanted)
    for spec in wanted:
        try:
            await bus.ensure_stream(spec)
        except StreamUnavailable as error:
            if ERROR_CANNOT_CHANGE in str(error):
                raise StartRefused(
                    f"the stream {spec.name} was made with settings that cannot be changed into today's: {error}. "
                    "It is no stream of this yard, or was made by hand"
                ) from None
            if ERROR_FEW_SERVERS in str(error):
                raise StartRefused(f"`replicas` is {spec.replicas}, but there are fewer servers: {error}") from None
            if ERROR_NO_ROOM not in str(error):
                raise
            raise StartRefused(
                f"the NATS server has no room for {spec.name}: the yard's streams are to have "
                f"{format_mib(budget_bytes // 2**20)} together. Set `budget` in [journal] to less, or the server's "
                "`max_file` to more"
            ) from None
    if is_new:
        # The server does not do it; and on a busy disk it takes seconds, which a restart does not have.
        os.sync()
    return wanted


async def _are_there(bus: Bus, wanted: Streams) -> bool:
    try:
        for spec in wanted:
            await bus.stream_state(spec.name)
    except StreamUnavailable:
        return False
    return True


async def planned_streams(bus: Bus, config: DaemonConfig, budget_bytes: int | None = None) -> Streams:
    """The four streams as this daemon would make them; nothing is changed. Without a budget: as large as they are."""
    if budget_bytes is None:
        journal = await bus.stream_state(stream_name("JRN", config.yard))
        budget_bytes = -(-journal.max_bytes * 100 // JOURNAL_PERCENT)
    return streams(config.yard, budget_bytes, config.replicas)


async def _budget_bytes(bus: Bus, config: DaemonConfig) -> int:
    if config.journal.budget is not None:
        return int(config.journal.budget) * 1024 * 1024
    used = 0
    for kind in _KINDS:
        try:
            used += (await bus.stream_state(stream_name(kind, config.yard))).bytes
        except StreamUnavailable:
            continue  # Not made yet.
    return min(BUDGET_DEFAULT_MAX, (shutil.disk_usage(config.state_directory).free + used) * 80 // 100)


def restore(store: SnapshotStore) -> Restored:
    """The newest snapshot that can be read; broken ones are passed over."""
    for sequence, path in store.paths():
        try:
            header, state = store.read(path)
        except (SnapshotCorrupt, OSError) as error:
            log.error("snapshot.unreadable", file=str(path), error=str(error))
            continue
        log.info("snapshot.restored", file=path.name, sequence=sequence, turn=header.turn, bytes=len(state))
        return Restored(state, header.sequence)
    return Restored(None, 0)


class Replay:
    """Applies journal entries to the core, and feeds the history with what they retire."""

    def __init__(self, core: ReplayedCore, history: History, after: int, told: int = 0) -> None:
        self._core = core
        self._history = history
        #: Entries up to this sequence are in the core already.
        self._after = after
        #: What entries before this one led to is known to the world: nothing is made of it again.
        self._told = told
        self.records = 0
        #: What the newest records had to tell, by their sequence: the daemon before may have died before it told it.
        self.recent: deque[tuple[int, tuple[Notice, ...]]] = deque(maxlen=RETOLD_RECORDS)

    def take(self, message: StoredMessage) -> None:
        if message.subject != JOURNAL_ENTRY:
            return
        try:
            record = decode(Record, message.data, max_bytes=RECORD_BYTES_MAX)
        except Malformed as error:
            raise StartRefused(
                f"journal entry {message.sequence} cannot be read: {error} (did a later version of gpuyard write it?)"
            ) from None
        if record.v > RECORD_VERSION:
            raise StartRefused(
                f"journal entry {message.sequence} has format {record.v}, and this version reads up to "
                f"{RECORD_VERSION}: a later version of gpuyard wrote it"
            )
        if message.sequence > self._after:
            if record.turn != self._core.turn + 1:
                raise PartMissing(
                    f"the journal goes on with turn {record.turn} at {message.sequence}, but the newest readable "
                    f"snapshot ends with turn {self._core.turn}: a part is missing. Put a snapshot file back, or the "
                    "archived segments; `gpuyard` will not guess what was in between"
                )
            turn = self._core.apply(record, told=message.sequence < self._told)
            self.recent.append((message.sequence, turn.notices))
            self.records += 1
        views = [fact.view for fact in record.facts if type(fact) is JobRetired]
        self._history.take(views, message.sequence)


async def replay_and_claim(
    journal: Journal,
    core: ReplayedCore,
    history: History,
    restored: Restored,
    *,
    replacing: int | None = None,
    told: int = 0,
) -> Replay:
    """Bring the core to the journal's end and become its one writer. `replacing`: see `Journal.claim`. `told`: see
    `Replay`."""
    replay = Replay(core, history, restored.sequence, told)
    end = await journal.end()
    if end < restored.sequence:
        raise StartRefused(
            f"the stream {journal.stream} ends at {end}, but the state directory has a snapshot of "
            f"{restored.sequence}: this is not the journal that the snapshot was made from "
            "(was the NATS store replaced?)"
        )
    start = min(restored.sequence, history.through) + 1
    await journal.replay(start, end, replay.take)
    await journal.claim(socket.gethostname(), os.getpid(), replacing=replacing)
    await journal.replay(end + 1, journal.epoch, replay.take)
    log.info("journal.claimed", epoch=journal.epoch, records=replay.records, turn=core.turn)
    return replay


async def check_cursors(bus: Bus, names: Streams, cursors: Cursors) -> None:
    """Whether SUB and REP are the streams that the journal took its cursors from."""
    for spec, cursor in ((names.submissions, cursors.submissions), (names.reports, cursors.reports)):
        end = (await bus.stream_state(spec.name)).last_sequence
        if end < cursor:
            raise StartRefused(
                f"the stream {spec.name} ends at {end}, but the journal has taken it in up to {cursor}: it was made "
                "anew, and what it holds now would be taken for old. Restore the NATS store, or start a new yard"
            )


def prepare_directory(config: DaemonConfig) -> Path:
    """The daemon's directory, its own alone, whoever made it: it holds what all tenants submitted."""
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as error:
        raise StartRefused(f"cannot use the state directory {directory}: {error.strerror or error}") from None
    return directory
