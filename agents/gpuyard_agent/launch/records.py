"""What must survive the supervisor: which starts it made, and how they ended.

One append-only file of JSON lines. A start is written twice: before the process is made (`intent`) and with its pid
after (`started`), so that no process can exist which the next supervisor does not know to look for. An exit stays until
it is forgotten.

Lines reach the kernel before anything is answered, so they outlive the supervisor's own death. They are forced to disk
only while exits wait for an absent agent: after a power failure every process is gone anyway, and an exit that the
agent has taken over is durable in its ledger. The file is rewritten without what was forgotten when that is most of it.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import TypeAlias

import msgspec

from gpuyard_agent.launch.base import ProcessExit
from gpuyard_protocol.names import AssignmentKey

#: Rewritten when larger than this and mostly forgotten.
_REWRITE_BYTES = 1024 * 1024


class Header(msgspec.Struct, frozen=True, tag="header"):
    """First line: whose processes these are."""

    #: Marks every process started from this file, for ever.
    state_id: str
    #: The boot in which pids of this file mean anything.
    boot_id: str


class Intent(msgspec.Struct, frozen=True, tag="intent", omit_defaults=True):
    key: AssignmentKey
    uid: int
    lease_ms: int = 0
    lease_grace_ms: int = 0


class Running(msgspec.Struct, frozen=True, tag="started", omit_defaults=True):
    key: AssignmentKey
    pid: int
    start_time: int
    at_ms: int
    uid: int
    lease_ms: int = 0
    lease_grace_ms: int = 0


class Renewed(msgspec.Struct, frozen=True, tag="renewed"):
    """Leases count from here."""

    renewed_ms: int


class Refusal(msgspec.Struct, frozen=True, tag="refused"):
    """An intent that came to nothing: the key is unknown again."""

    key: AssignmentKey


class Ending(msgspec.Struct, frozen=True, tag="exit"):
    exit: ProcessExit


class Forgotten(msgspec.Struct, frozen=True, tag="forgotten"):
    key: AssignmentKey


Line: TypeAlias = Header | Intent | Running | Renewed | Refusal | Ending | Forgotten


class Remembered(msgspec.Struct, kw_only=True):
    """What an earlier supervisor left, by key."""

    #: Written down but without a pid: whether there is a process is not known.
    intents: dict[AssignmentKey, Intent] = msgspec.field(default_factory=dict)
    #: Ran when last seen.
    running: dict[AssignmentKey, Running] = msgspec.field(default_factory=dict)
    #: Ended and not forgotten, with the start where it is known.
    ended: dict[AssignmentKey, tuple[Running | None, ProcessExit]] = msgspec.field(default_factory=dict)
    renewed_ms: int = 0


_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class Records:
    """The file, open for appending."""

    def __init__(self, path: Path, boot_id: str) -> None:
        """`boot_id`: of the running kernel. Reads what is there; `remembered` has it."""
        self._path = path
        self._boot_id = boot_id
        #: Of an earlier file, or new.
        self.state_id = uuid.uuid4().hex
        #: Whether what is remembered was written in this boot: otherwise none of its pids means anything.
        self.same_boot = True
        self.remembered = self._read()
        #: What is in the file, forgotten keys included.
        self._bytes = 0
        self._lines = 0
        #: Written since the last `sync`.
        self._dirty = False
        self._descriptor = -1
        self.rewrite(self.remembered)

    def append(self, line: Line) -> None:
        """Raises `OSError` (a full disk) and then has written nothing."""
        data = _ENCODER.encode(line) + b"\n"
        written = os.write(self._descriptor, data)
        if written != len(data):
            os.ftruncate(self._descriptor, self._bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._bytes += len(data)
        self._lines += 1
        self._dirty = True

    @property
    def is_dirty(self) -> bool:
        """Whether something is not forced to disk."""
        return self._dirty

    def sync(self) -> None:
        """Force to disk what is not there yet. Takes milliseconds: only for times when nobody waits."""
        if self._dirty:
            os.fdatasync(self._descriptor)
            self._dirty = False

    def wants_rewrite(self, live: int) -> bool:
        """`live`: keys that are known. A key takes up to four lines."""
        return self._bytes > _REWRITE_BYTES and self._lines > 8 * live

    def rewrite(self, kept: Remembered) -> None:
        """Replace the file by one with these alone."""
        lines: list[Line] = [Header(self.state_id, self._boot_id)]
        lines += [Renewed(kept.renewed_ms)] if kept.renewed_ms else []
        lines += kept.intents.values()
        lines += kept.running.values()
        for start, ending in kept.ended.values():
            lines += [start] if start is not None else []
            lines.append(Ending(ending))
        data = b"".join(_ENCODER.encode(line) + b"\n" for line in lines)
        fresh = self._path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(descriptor, data)
        if kept.ended:
            os.fdatasync(descriptor)
        os.rename(fresh, self._path)
        self.close()
        self._descriptor, self._bytes, self._lines, self._dirty = descriptor, len(data), len(lines), False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self) -> Remembered:
        found = Remembered()
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return found
        for number, text in enumerate(lines):
            if not text:
                continue
            try:
                line = _DECODER.decode(text)
            except msgspec.DecodeError:
                if number == len(lines) - 1:
                    break  # the last line, cut off in the middle of being written
                raise
            self._replay(line, found)
        return found

    def _replay(self, line: Line, found: Remembered) -> None:
        match line:
            case Header(state_id=state_id, boot_id=boot):
                self.state_id = state_id
                self.same_boot = boot == self._boot_id
            case Intent(key=key):
                found.intents[key] = line
            case Running(key=key):
                found.intents.pop(key, None)
                found.running[key] = line
            case Renewed(renewed_ms=renewed_ms):
                found.renewed_ms = renewed_ms
            case Refusal(key=key):
                found.intents.pop(key, None)
            case Ending(exit=ending):
                found.intents.pop(ending.key, None)
                found.ended[ending.key] = (found.running.pop(ending.key, None), ending)
            case Forgotten(key=key):
                found.ended.pop(key, None)
