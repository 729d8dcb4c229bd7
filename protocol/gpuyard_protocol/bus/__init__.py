"""The message bus: one interface (`base`), a hardened NATS connection (`nats`), and an in-memory one (`memory`)."""

from gpuyard_protocol.bus.base import (
    Bus,
    BusError,
    Disconnected,
    Message,
    NoResponders,
    PermissionDenied,
    PubAck,
    PublishRefused,
    StoredMessage,
    StreamReader,
    StreamSpec,
    StreamState,
    StreamUnavailable,
    Subscription,
    Unanswered,
)
from gpuyard_protocol.bus.deferred import defer

# Before anything imports nats-py, which stands behind this package alone.
defer("aiohttp")

__all__ = [
    "Bus",
    "BusError",
    "Disconnected",
    "Message",
    "NoResponders",
    "PermissionDenied",
    "PubAck",
    "PublishRefused",
    "StoredMessage",
    "StreamReader",
    "StreamSpec",
    "StreamState",
    "StreamUnavailable",
    "Subscription",
    "Unanswered",
]
