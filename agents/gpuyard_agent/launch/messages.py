"""What passes over the supervisor's socket: frames of JSON, a length before each.

A frame is four bytes of length, big-endian, and one JSON object with its type in `type`. Requests need no numbers:
results of starts carry their key, the listing is asked for by one client at a time, and stops and forgets are taken in
the order in which they came. Both ends skip unknown fields, since an agent may be newer than the supervisor that it
finds; what one does not understand at all ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from gpuyard_agent.launch.base import ProcessExit, ProcessSpec, ProcessState, StartResult
from gpuyard_protocol.names import AssignmentKey

#: A thousand starts with scripts of 64 KiB fit.
MAX_FRAME_BYTES = 96 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class StartMany(msgspec.Struct, frozen=True, tag="start"):
    """Start all of these. Answered by `Results`, possibly in several pieces, in order."""

    specs: tuple[ProcessSpec, ...]


class StopOne(msgspec.Struct, frozen=True, tag="stop"):
    """No answer but the exit."""

    key: AssignmentKey
    grace_ms: int


class FreezeMany(msgspec.Struct, frozen=True, tag="freeze"):
    """Halt the trees of these, or let them go on. No answer; taken in order with stops and other freezes."""

    keys: tuple[AssignmentKey, ...]
    frozen: bool


class LimitMemory(msgspec.Struct, frozen=True, tag="limit-memory"):
    """A new limit for one that was started with one. No answer; taken in order with stops and freezes."""

    key: AssignmentKey
    memory_mib: int


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """Leases count from this time on. No answer."""

    renewed_ms: int


class ListAll(msgspec.Struct, frozen=True, tag="list"):
    """Answered by `Listing`."""


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """These exits are durable elsewhere. No answer."""

    keys: tuple[AssignmentKey, ...]


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """This agent ends on purpose: without anything running, the supervisor ends too."""


Request: TypeAlias = StartMany | StopOne | FreezeMany | LimitMemory | Renew | ListAll | Forget | Leave


class Results(msgspec.Struct, frozen=True, tag="results"):
    results: tuple[StartResult, ...]


class Listing(msgspec.Struct, frozen=True, tag="listing"):
    """Everything known, exits included. `pid`: the supervisor's own."""

    pid: int
    states: tuple[ProcessState, ...]


class Exits(msgspec.Struct, frozen=True, tag="exits"):
    """Sent to whoever is connected, as they happen."""

    exits: tuple[ProcessExit, ...]


Answer: TypeAlias = Results | Listing | Exits

_ENCODER = msgspec.json.Encoder()
_REQUEST: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_ANSWER: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class BadFrame(Exception):
    """The other end speaks something else."""


def encode_frame(message: Request | Answer) -> bytes:
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode_request(body: bytes) -> Request:
    try:
        return _REQUEST.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(str(error)) from None


def decode_answer(body: bytes) -> Answer:
    try:
        return _ANSWER.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(str(error)) from None


class FrameBuffer:
    """Bytes as they come, frames as they are whole."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are whole now. Raises `BadFrame` on a length beyond all reason."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > MAX_FRAME_BYTES:
                raise BadFrame(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are taken")
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield body
