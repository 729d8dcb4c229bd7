"""JetStream's API as data: requests to build, answers to read, settings to send. No connection in here.

Kept apart from the bus so that what a stream is made of (`stream_config`) and how each answer may fail stand in one
place.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from gpuyard_protocol.bus.base import (
    BusError,
    Message,
    NoResponders,
    PubAck,
    PublishRefused,
    StoredMessage,
    StreamSpec,
    StreamState,
    StreamUnavailable,
)
from gpuyard_protocol.bus.wire import decode_headers

API = "$JS.API"
STATUS_CONFLICT = 409
STATUS_NO_RESPONDERS = 503
STATUS_NOT_FOUND = 404
STATUS_TIMEOUT = 408
STATUS_IDLE_HEARTBEAT = 100
ERROR_STREAM_NOT_FOUND = 10059
#: JetStream's code for a message above the stream's limit; used for the server's `max_payload` as well.
ERROR_MESSAGE_TOO_LARGE = 10054
_NS = 1_000_000_000


class ApiFault(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: ApiFault | None = None


class _State(msgspec.Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _Config(msgspec.Struct):
    max_bytes: int = -1
    persist_mode: str = ""


class ApiAnswer(msgspec.Struct):
    """The union of what we read from API answers; everything else is ignored."""

    error: ApiFault | None = None
    state: _State | None = None
    config: _Config | None = None
    name: str = ""


_ack_decoder = msgspec.json.Decoder(_Ack)
_answer_decoder = msgspec.json.Decoder(ApiAnswer)


def decode_ack(subject: str, data: bytes, header_block: bytes | None) -> PubAck:
    """A stream's answer to a publish. Anything that is no such answer is an unreadable reply (`ValueError`)."""
    if header_block is not None and not data and decode_headers(header_block)[0] == STATUS_NO_RESPONDERS:
        raise NoResponders(f"no stream takes {subject} (or JetStream is not ready); nothing was stored")
    try:
        ack = _ack_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    if ack.error is not None:
        raise PublishRefused(ack.error.err_code, f"{subject}: {ack.error.description}")
    if not ack.stream or not ack.seq:
        raise ValueError("no acknowledgement of a stream")
    return PubAck(ack.stream, ack.seq, ack.duplicate)


def decode_reply(subject: str, data: bytes, header_block: bytes | None) -> Message:
    """Anybody's answer to a request, or the server's word that nobody is there to give one."""
    headers: dict[str, str] = {}
    if header_block is not None:
        status, _, headers = decode_headers(header_block)
        if status == STATUS_NO_RESPONDERS and not data:
            raise NoResponders(f"nobody listens on {subject}")
    return Message(subject, data, "", headers)


def unavailable(what: str, fault: ApiFault) -> StreamUnavailable:
    return StreamUnavailable(f"{what}: {fault.description} (JetStream error {fault.err_code})")


def decode_answer(what: str, data: bytes) -> ApiAnswer:
    try:
        return _answer_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise StreamUnavailable(f"{what}: unreadable answer of JetStream: {error}") from None


def stream_config(spec: StreamSpec) -> dict[str, Any]:
    """All settings, so that an update also undoes what somebody changed by hand."""
    return {
        "name": spec.name,
        "subjects": list(spec.subjects),
        "retention": "limits",
        "storage": "file",
        "discard": "old" if spec.discard_old else "new",
        "discard_new_per_subject": spec.discard_new_per_subject,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": spec.max_bytes,
        "max_msg_size": spec.max_message_bytes,
        "max_msgs_per_subject": spec.max_messages_per_subject,
        "max_age": spec.max_age_s * _NS,
        "duplicate_window": round(spec.duplicate_window_s * _NS),
        "allow_direct": spec.allow_direct,
        # Tenants' headers must not be able to wipe, expire, schedule or count anything.
        "allow_rollup_hdrs": False,
        "allow_msg_ttl": False,
        "deny_delete": spec.is_append_only,
        "deny_purge": spec.is_append_only,
        "num_replicas": spec.replicas,
        "persist_mode": "async" if spec.is_lazy and spec.replicas == 1 else "default",
    }


def changed_config(spec: StreamSpec, known: ApiAnswer) -> dict[str, Any]:
    """Settings for a stream that is there. How it writes to the disk was fixed when it was made, and stays."""
    config = stream_config(spec)
    if known.config is not None:
        config["persist_mode"] = known.config.persist_mode or "default"
    return config


def consumer_config(name: str, start: int, filter_subject: str, inactive_threshold_s: float) -> dict[str, Any]:
    """A reader's consumer: nothing to acknowledge, nothing durable, nothing kept when the reader has gone."""
    config: dict[str, Any] = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "ack_policy": "none",
        "replay_policy": "instant",
        "max_deliver": -1,
        "max_waiting": 16,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": round(inactive_threshold_s * _NS),
    }
    if filter_subject:
        config["filter_subject"] = filter_subject
    return config


def stream_state(answer: ApiAnswer) -> StreamState:
    state = answer.state or _State()
    limit = answer.config.max_bytes if answer.config else -1
    # An empty stream that never held anything says "first 0"; one that was purged, "last + 1".
    first = state.first_seq if state.messages else state.last_seq + 1
    return StreamState(first, state.last_seq, state.messages, state.bytes, max(limit, 0))


def decode_direct(stream: str, data: bytes, header_block: bytes | None) -> StoredMessage | None:
    """The answer to a direct read: the message with `Nats-*` headers that say where it was stored, or a status."""
    if header_block is None:
        raise StreamUnavailable(f"{stream}: unreadable answer to a direct read (no headers)")
    status, description, headers = decode_headers(header_block)
    if "Nats-Sequence" not in headers:
        if status == STATUS_NOT_FOUND:
            return None
        if status == STATUS_NO_RESPONDERS:
            raise StreamUnavailable(f"stream {stream} does not exist, is not ready, or allows no direct reads")
        raise BusError(f"{stream}: direct read refused: {status} {description}")
    # The server writes its own headers last, so a stored message cannot pretend to be another one.
    sequence = int(headers.pop("Nats-Sequence"))
    subject = headers.pop("Nats-Subject")
    stored = datetime.fromisoformat(headers.pop("Nats-Time-Stamp"))
    headers.pop("Nats-Stream", None)
    headers.pop("Nats-Last-Sequence", None)
    headers.pop("Nats-Num-Pending", None)
    return StoredMessage(subject, data, sequence, headers, int(stored.astimezone(UTC).timestamp() * 1000))
