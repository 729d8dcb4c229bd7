"""One stream of the in-memory broker: what is stored, what is refused, with JetStream's codes.

The order of the checks and the size of a message are the server's, so that a test that fills a stream or fences a
writer sees here what it will see there.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuyard_protocol.bus.base import StoredMessage, StreamSpec, StreamState
from gpuyard_protocol.bus.wire import encode_headers, subject_matches

WRONG_LAST_SEQUENCE = 10071
STORE_LIMIT = 10077
MESSAGE_TOO_LARGE = 10054
STREAM_NOT_MATCH = 10060


class Refusal(Exception):
    def __init__(self, code: int, description: str) -> None:
        super().__init__(description)
        self.code = code
        self.description = description


class MemoryStream:
    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        #: By sequence, ascending: messages only ever join at the end.
        self._messages: dict[int, StoredMessage] = {}
        #: Sequences still stored, by subject, ascending.
        self._by_subject: dict[str, dict[int, None]] = {}
        self._last_sequence = 0
        self._bytes = 0
        #: Nats-Msg-Id -> (sequence, stored at, ms), oldest first.
        self._ids: dict[str, tuple[int, int]] = {}

    def takes(self, subject: str) -> bool:
        return any(subject_matches(pattern, subject) for pattern in self.spec.subjects)

    def overlaps(self, spec: StreamSpec) -> bool:
        return any(
            subject_matches(mine, theirs) or subject_matches(theirs, mine)
            for mine in self.spec.subjects
            for theirs in spec.subjects
        )

    def store(self, subject: str, data: bytes, headers: Mapping[str, str], now_ms: int) -> tuple[int, bool]:
        """The sequence, and whether the message was there already; `Refusal` leaves everything as it was."""
        self._expire(now_ms)
        expected_stream = headers.get("Nats-Expected-Stream")
        if expected_stream is not None and expected_stream != self.spec.name:
            raise Refusal(STREAM_NOT_MATCH, "expected stream does not match")
        identity = headers.get("Nats-Msg-Id", "")
        if identity and identity in self._ids:
            return self._ids[identity][0], True
        self._check_expectations(subject, headers)
        size = stored_size(subject, data, headers)
        self._make_room(subject, size, len(data))
        self._last_sequence += 1
        sequence = self._last_sequence
        self._messages[sequence] = StoredMessage(subject, data, sequence, dict(headers), now_ms)
        self._by_subject.setdefault(subject, {})[sequence] = None
        self._bytes += size
        if identity:
            self._ids[identity] = (sequence, now_ms)
        return sequence, False

    def _check_expectations(self, subject: str, headers: Mapping[str, str]) -> None:
        per_subject = headers.get("Nats-Expected-Last-Subject-Sequence")
        if per_subject is not None:
            last = self.last_on(headers.get("Nats-Expected-Last-Subject-Sequence-Subject", subject))
            found = 0 if last is None else last.sequence
            if found != int(per_subject):
                raise Refusal(WRONG_LAST_SEQUENCE, f"wrong last sequence: {found}")
        expected = headers.get("Nats-Expected-Last-Sequence")
        if expected is not None and int(expected) != self._last_sequence:
            raise Refusal(WRONG_LAST_SEQUENCE, f"wrong last sequence: {self._last_sequence}")

    def _make_room(self, subject: str, size: int, data_bytes: int) -> None:
        spec = self.spec
        if 0 <= spec.max_message_bytes < data_bytes:
            raise Refusal(MESSAGE_TOO_LARGE, "message size exceeds maximum allowed")
        mine = self._by_subject.get(subject, {})
        if 0 < spec.max_messages_per_subject <= len(mine):
            if spec.discard_new_per_subject:
                raise Refusal(STORE_LIMIT, "maximum messages per subject exceeded")
            self._remove(next(iter(mine)))
        while 0 < spec.max_bytes < self._bytes + size:
            if not spec.discard_old or not self._messages:
                raise Refusal(STORE_LIMIT, "maximum bytes exceeded")
            self._remove(next(iter(self._messages)))

    def _expire(self, now_ms: int) -> None:
        window_ms = self.spec.duplicate_window_s * 1000
        while self._ids:
            identity = next(iter(self._ids))
            if self._ids[identity][1] + window_ms > now_ms:
                break
            del self._ids[identity]
        while self.spec.max_age_s and self._messages:
            oldest = next(iter(self._messages.values()))
            if oldest.stored_ms + self.spec.max_age_s * 1000 > now_ms:
                break
            self._remove(oldest.sequence)

    def _remove(self, sequence: int) -> None:
        message = self._messages.pop(sequence)
        self._bytes -= stored_size(message.subject, message.data, message.headers)
        on_subject = self._by_subject[message.subject]
        del on_subject[sequence]
        if not on_subject:
            del self._by_subject[message.subject]

    def purge(self, up_to: int, subject: str) -> None:
        for sequence in list(self._messages):
            if sequence > up_to:
                break
            if not subject or subject_matches(subject, self._messages[sequence].subject):
                self._remove(sequence)
        if not self._messages and not subject:
            self._last_sequence = max(self._last_sequence, up_to)

    def state(self, now_ms: int) -> StreamState:
        self._expire(now_ms)
        first = next(iter(self._messages), self._last_sequence + 1)
        return StreamState(first, self._last_sequence, len(self._messages), self._bytes, max(self.spec.max_bytes, 0))

    def get(self, sequence: int) -> StoredMessage | None:
        return self._messages.get(sequence)

    def last_on(self, pattern: str) -> StoredMessage | None:
        found = max(
            (
                next(reversed(sequences))
                for subject, sequences in self._by_subject.items()
                if subject == pattern or subject_matches(pattern, subject)
            ),
            default=0,
        )
        return self._messages.get(found)

    def after(self, position: int, pattern: str, limit: int) -> tuple[list[StoredMessage], int]:
        """Up to `limit` messages beyond `position` under `pattern` ("" = all), and up to where that looked."""
        found: list[StoredMessage] = []
        first = next(iter(self._messages), self._last_sequence + 1)
        sequence = max(position + 1, first)
        while sequence <= self._last_sequence and len(found) < limit:
            message = self._messages.get(sequence)
            if message is not None and (not pattern or subject_matches(pattern, message.subject)):
                found.append(message)
            sequence += 1
        return found, sequence - 1


def stored_size(subject: str, data: bytes, headers: Mapping[str, str]) -> int:
    """Bytes that the server's file store counts for one message."""
    header_bytes = 4 + len(encode_headers(headers)) if headers else 0
    return 22 + len(subject) + header_bytes + len(data) + 8
