"""One identity's way to a yard: questions and durable requests, with the bus's failures told plainly.

What may be repeated and what may not is decided here. A question changes nothing, so it is asked again until its time
is up. A request is published again only when it certainly had no effect, or when it carries an id that the yard
recognises; otherwise an unanswered one is an `OutcomeUnknown` for the caller to settle.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gpuyard.context import Context
from gpuyard.errors import Forbidden, Full, GpuyardError, NoRoom, OutcomeUnknown, QueryFailed, Unreachable
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import (
    Bus,
    BusError,
    Disconnected,
    NoResponders,
    PermissionDenied,
    PublishRefused,
    StreamUnavailable,
    Unanswered,
)
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.queries import QueryError, Stats, StatsQuery

T = TypeVar("T")
Connector = Callable[[Context], Awaitable[Bus]]

#: How long a question or a request may take altogether, unless the caller says.
DEFAULT_TIMEOUT_S = 15.0
#: One attempt's share of it.
ATTEMPT_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.1
RETRY_PAUSE_MAX_S = 1.0
#: So long, and every so often, the yard is asked whether it was for want of room that no word came back: its daemon
#: looks at the disk every 2 s.
ALARMS_S = 3.0
ALARMS_PAUSE_S = 0.25
ANSWER_BYTES_MAX = 8 * 1024 * 1024
_QUERY_ERROR_START = b'{"code":'
#: JetStream's code for a stream, or a subject in it, at its bound.
STORE_LIMIT = 10077


async def connect_as_tenant(context: Context) -> Bus:
    return await open_bus(context, context.key, f"_INBOX.{context.user}", f"client {context.tenant}/{context.user}")


async def connect_as_operator(context: Context) -> Bus:
    if not context.operator:
        raise Forbidden(
            f"the context of yard {context.yard!r} names no operator (its `operator` and `operator_key` are empty): "
            "this is for operators; whoever runs the yard makes their keys with `gpuyard init --operator NAME`"
        )
    return await open_bus(context, context.operator_key, f"_INBOX_O.{context.operator}", f"operator {context.operator}")


async def open_bus(context: Context, key: str, inbox_prefix: str, name: str) -> Bus:
    # nats-py takes a fifth of a second to import: commands that fail before they connect need not pay it.
    from gpuyard_protocol.bus import nats

    try:
        return await nats.connect(
            context.url, name=name, inbox_prefix=inbox_prefix, seed=key or None, tls_ca=context.tls_ca or None
        )
    except PermissionDenied as error:
        raise Forbidden(
            f"{error}; the context says tenant {context.tenant!r}, user {context.user!r}, and {key} must be their key"
            if inbox_prefix == f"_INBOX.{context.user}"
            else str(error)
        ) from None
    except Disconnected:
        raise Unreachable(
            f"yard {context.yard!r} does not answer at {context.url}: start it with `gpuyard up`, "
            "or point GPUYARD_CONTEXT at the context.toml of a running one"
        ) from None
    except BusError as error:
        raise told(error) from None


def told(error: BusError) -> GpuyardError:
    """A failure of the bus in the words of this package."""
    if isinstance(error, PermissionDenied):
        return Forbidden(str(error))
    if isinstance(error, NoResponders | Disconnected | Unanswered | StreamUnavailable):
        return Unreachable(f"the yard does not answer ({error}): is `gpuyard up` running?")
    return GpuyardError(str(error))


class Link:
    """Questions and requests of one tenant's user."""

    def __init__(self, bus: Bus, context: Context) -> None:
        self.bus = bus
        self._context = context

    async def ask(self, verb: str, query: object, kind: type[T], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> T:
        """The answer to a question; `QueryFailed` if the daemon says no, `Unreachable` if it stays silent."""
        subject = subjects.query(self._context.tenant, self._context.user, verb)
        return await ask(self.bus, subject, query, kind, timeout_s=timeout_s)

    async def send(self, verb: str, payload: bytes, *, may_repeat: bool, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Make a request durable; its sequence in the yard's submissions."""
        subject = subjects.submission(self._context.tenant, self._context.user, verb)
        deadline = asyncio.get_running_loop().time() + timeout_s
        pause_s = RETRY_PAUSE_S
        is_unsettled = False
        while True:
            try:
                return (await self.bus.stream_publish(subject, payload, timeout=ATTEMPT_TIMEOUT_S)).sequence
            except (NoResponders, Disconnected) as error:
                failure: BusError = error
            except Unanswered as error:
                if not may_repeat:
                    raise await self._unknown(error) from None
                failure, is_unsettled = error, True
            except PublishRefused as error:
                refusal = self._full(error)
                if is_unsettled:  # What is refused now may have been taken before.
                    raise NoRoom(f"{refusal.why}, and no word came back whether the request is stored") from None
                raise refusal from None
            except PermissionDenied as error:
                raise Forbidden(str(error)) from None
            if asyncio.get_running_loop().time() + pause_s > deadline:
                raise Unreachable(f"the yard does not take requests ({failure}): is `gpuyard up` running?")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_PAUSE_MAX_S)

    async def _unknown(self, error: Unanswered) -> OutcomeUnknown:
        """What to say of a request that nobody confirmed: why, if the yard knows that it had no room."""
        ask_again = (
            "look with `gpuyard jobs` before sending it again, or give it a submission id, which makes repeating safe"
        )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ALARMS_S
        while (left_s := deadline - loop.time()) > 0:
            with contextlib.suppress(GpuyardError):
                stats = await self.ask("stats", StatsQuery(), Stats, timeout_s=left_s)
                if alarms := [alarm for alarm in stats.alarms if "full" in alarm or "refused" in alarm]:
                    return NoRoom(
                        f"the yard ran out of room ({'; '.join(alarms)}), and no word came back whether the request is "
                        f"stored: {ask_again}"
                    )
            await asyncio.sleep(ALARMS_PAUSE_S)
        return OutcomeUnknown(f"no word came back whether the request is stored ({error}): {ask_again}")

    def _full(self, refusal: PublishRefused) -> Full:
        """The stream of submissions takes no more, of this user or of anybody."""
        if refusal.code == STORE_LIMIT and "per subject" in refusal.description:
            why = f"too many requests of {self._context.tenant}/{self._context.user} wait to be decided"
        elif refusal.code == STORE_LIMIT:
            why = "there is no room left for requests (the yard's operator sees it in `gpuyard stats`)"
        else:
            why = refusal.description
        return Full(f"the yard takes no more requests now: {why}; nothing was stored, try again later", why)


async def ask(
    bus: Bus,
    subject: str,
    query: object,
    kind: type[T],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
) -> T:
    """One question on any subject, asked again while nobody answers and time is left."""
    payload = encode(query)
    deadline = asyncio.get_running_loop().time() + timeout_s
    pause_s = RETRY_PAUSE_S
    while True:
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            reply = await bus.request(subject, payload, timeout=max(0.05, min(left_s, attempt_timeout_s)))
            return _read_answer(kind, reply.data)
        except PermissionDenied as error:
            raise Forbidden(str(error)) from None
        except (NoResponders, Unanswered, Disconnected, StreamUnavailable) as error:
            if asyncio.get_running_loop().time() + pause_s > deadline:
                raise Unreachable(f"the yard's daemon does not answer ({error}): is `gpuyard up` running?") from None
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, RETRY_PAUSE_MAX_S)


def _read_answer(kind: type[T], data: bytes) -> T:
    try:
        if data.startswith(_QUERY_ERROR_START):
            refusal = decode(QueryError, data, max_bytes=ANSWER_BYTES_MAX)
            raise QueryFailed(refusal.code, refusal.text, refusal.nearest)
        return decode(kind, data, max_bytes=ANSWER_BYTES_MAX)
    except Malformed as error:
        raise GpuyardError(f"the daemon's answer cannot be read ({error}): it may be of another version") from None
