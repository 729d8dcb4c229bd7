"""The bytes of the NATS protocol: parsing what a server sends, building what a client sends.

Pure functions and one parser without I/O. It knows neither connections nor JetStream.

Why a parser of our own although nats-py has one: that one splits control lines at any white space, so a subject with
a vertical tab (which the server allows) reads as a protocol error, and a message stored under such a subject throws
every reader off the server again and again. Here only the separators that the server itself uses count, everything
stays bytes until somebody decodes it, and decoding one message can fail without harming the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from gpuyard_protocol.bus.base import BusError

CRLF = b"\r\n"
PING = b"PING\r\n"
PONG = b"PONG\r\n"
_HEADER_LINE = "NATS/1.0"
#: A control line longer than this is no NATS (the server's own limit is 4 KiB; INFO lines of clusters are longer).
MAX_CONTROL_LINE_BYTES = 1024 * 1024

_SUBJECT_FAULT = re.compile(r"[\s\x00]|\.\.|^\.|\.$|^$")
_HEADER_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE_FAULT = re.compile(r"[\r\n\x00]")


class MalformedMessage(ValueError):
    """One message whose subject, reply or headers cannot be read; the stream of messages is still intact."""


class ProtocolViolation(Exception):
    """What came is not the NATS protocol; nothing after it can be trusted."""


class Sink(Protocol):
    """Who takes what the parser found."""

    def on_message(self, sid: int, subject: bytes, reply: bytes, data: bytes, header_block: bytes | None) -> None: ...
    def on_error_line(self, text: str) -> None: ...
    def on_ping(self) -> None: ...
    def on_pong(self) -> None: ...
    def on_info(self, line: bytes) -> None: ...


class WireParser:
    """Turns chunks of bytes into calls of its sink. A half-received message waits for its rest."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        #: What was received and not understood yet, oldest first; joined only when enough is there.
        self._chunks: list[bytes] = []
        self._waiting_bytes = 0
        #: Bytes that must be there before looking again makes sense.
        self._needed_bytes = 0

    def feed(self, data: bytes) -> None:
        if self._chunks:
            self._chunks.append(data)
            self._waiting_bytes += len(data)
            if self._waiting_bytes < self._needed_bytes:
                return
            data = b"".join(self._chunks)
            self._chunks.clear()
        rest, needed = self._parse(data)
        if rest < len(data):
            self._chunks.append(data[rest:])
            self._waiting_bytes = len(data) - rest
            self._needed_bytes = needed

    def _parse(self, data: bytes) -> tuple[int, int]:
        """Returns where the unread rest begins, and how many bytes it needs to become readable."""
        position, end = 0, len(data)
        on_message = self._sink.on_message
        while position < end:
            line_end = data.find(CRLF, position)
            if line_end < 0:
                if end - position > MAX_CONTROL_LINE_BYTES:
                    raise ProtocolViolation("a control line has no end")
                return position, end - position + 1
            if data.startswith(b"MSG ", position):
                subject, sid, reply, sizes = _message_arguments(data[position + 4 : line_end], 1)
                header_bytes, total_bytes = 0, sizes[0]
            elif data.startswith(b"HMSG ", position):
                subject, sid, reply, sizes = _message_arguments(data[position + 5 : line_end], 2)
                header_bytes, total_bytes = sizes
            else:
                self._control(data[position:line_end])
                position = line_end + 2
                continue
            body = line_end + 2
            after = body + total_bytes + 2
            if after > end:
                return position, after - position
            if header_bytes:
                split = body + header_bytes
                on_message(sid, subject, reply, data[split : after - 2], data[body:split])
            else:
                on_message(sid, subject, reply, data[body : after - 2], None)
            position = after
        return position, 0

    def _control(self, line: bytes) -> None:
        verb = line[:4].upper()
        if verb == b"PING":
            self._sink.on_ping()
        elif verb == b"PONG":
            self._sink.on_pong()
        elif verb == b"-ERR":
            self._sink.on_error_line(line[4:].strip().strip(b"'").decode("utf-8", "backslashreplace"))
        elif verb == b"INFO":
            self._sink.on_info(line[4:])
        elif not line.startswith(b"+OK"):
            raise ProtocolViolation(f"unknown control line {line[:40]!r}")


def _message_arguments(arguments: bytes, sizes: int) -> tuple[bytes, int, bytes, tuple[int, ...]]:
    """`subject sid [reply] size…`, single spaces between: what the server writes, and no more than that."""
    parts = arguments.split(b" ")
    try:
        if len(parts) == 2 + sizes:
            return parts[0], int(parts[1]), b"", tuple(map(int, parts[2:]))
        if len(parts) == 3 + sizes:
            return parts[0], int(parts[1]), parts[2], tuple(map(int, parts[3:]))
    except ValueError:
        pass
    raise ProtocolViolation(f"unreadable message line {arguments[:80]!r}")


def decode_text(raw: bytes, what: str) -> str:
    """Subject or reply as text; `MalformedMessage` if it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise MalformedMessage(f"{what} {raw[:80]!r} is not UTF-8") from None


def decode_headers(block: bytes) -> tuple[int, str, dict[str, str]]:
    """Inline status (0 = none), its description, and the headers; of a repeated header the last counts.

    Raises `MalformedMessage` for anything else than a well-formed block: clients can send any bytes here.
    """
    try:
        text = block.decode()
    except UnicodeDecodeError:
        raise MalformedMessage(f"header block {block[:80]!r} is not UTF-8") from None
    if not text.startswith(_HEADER_LINE) or not text.endswith("\r\n"):
        raise MalformedMessage(f"header block {block[:80]!r} does not begin or end as one")
    first, _, rest = text.partition("\r\n")
    status, _, description = first[len(_HEADER_LINE) :].strip().partition(" ")
    if status and not (status.isascii() and status.isdigit() and len(status) == 3):
        raise MalformedMessage(f"header status {status[:40]!r} is not a number of three digits")
    headers: dict[str, str] = {}
    for line in rest.split("\r\n"):
        if not line:
            continue
        key, colon, value = line.partition(":")
        if not colon or not _HEADER_KEY.fullmatch(key):
            raise MalformedMessage(f"header line {line[:80]!r} is not 'Name: value'")
        headers[key] = value.strip()
    return int(status or 0), description.strip(), headers


def encode_headers(headers: Mapping[str, str]) -> bytes:
    lines = [_HEADER_LINE]
    for key, value in headers.items():
        if not _HEADER_KEY.fullmatch(key):
            raise BusError(f"header name {key!r} is not printable ASCII without separators")
        if _HEADER_VALUE_FAULT.search(value):
            raise BusError(f"the value of header {key} contains a line break")
        lines.append(f"{key}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def check_subject(subject: str) -> None:
    """Refuse what would break the protocol line (and could smuggle commands into it), and empty tokens."""
    if _SUBJECT_FAULT.search(subject):
        raise BusError(f"{subject!r} is not a subject: tokens separated by single dots, without white space")


def encode_publish(subject: str, reply: str, data: bytes, headers: Mapping[str, str] | None) -> bytes:
    check_subject(subject)
    if headers:
        block = encode_headers(headers)
        line = f"HPUB {subject} {reply} {len(block)} {len(block) + len(data)}\r\n"
        return b"".join((line.encode(), block, data, CRLF))
    return b"".join((f"PUB {subject} {reply} {len(data)}\r\n".encode(), data, CRLF))


def encode_subscribe(subject: str, queue: str, sid: int) -> bytes:
    return f"SUB {subject} {queue} {sid}\r\n".encode()


def encode_unsubscribe(sid: int) -> bytes:
    return f"UNSUB {sid}\r\n".encode()


def subject_matches(pattern: str, subject: str) -> bool:
    """Whether `subject` falls under `pattern` (`*` one token, `>` one or more at the end)."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or token not in ("*", given[index]):
            return False
    return len(wanted) == len(given)
