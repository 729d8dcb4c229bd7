"""Calls waiting for an answer on one connection's inbox: who waits, for what, until when, and what became of it.

It decides nothing about the wire: the connection's owner sends the message and hands in replies, refusals and the end
of the connection. Every call ends exactly once: with its answer, an error, or its deadline. One timer serves all of
them, set to the earliest deadline when it last looked, because a timer per call costs as much as the call itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from gpuyard_protocol.bus.base import BusError, PermissionDenied, Unanswered

T = TypeVar("T")
#: Subject asked, the reply's data and header block -> the call's result; raises BusError where the reply is an error.
Decode = Callable[[str, bytes, bytes | None], T]


class Call(Generic[T]):
    """One call under way."""

    __slots__ = ("deadline", "decode", "future", "subject", "timeout")

    def __init__(
        self, subject: str, decode: Decode[T], future: asyncio.Future[T], timeout: float, deadline: float
    ) -> None:
        self.subject = subject
        self.decode = decode
        self.future = future
        #: As asked, seconds.
        self.timeout = timeout
        #: On the loop's clock.
        self.deadline = deadline


class PendingCalls:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: dict[bytes, Call[Any]] = {}
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def begin(self, subject: str, decode: Decode[T], timeout: float) -> tuple[str, asyncio.Future[T]]:
        """A token for the reply subject, never used twice, and the future of the answer."""
        self._count += 1
        token = f"{self._count:x}"
        future: asyncio.Future[T] = self._loop.create_future()
        deadline = self._loop.time() + timeout
        # One table for calls of every result type; `begin` alone ties the type to the future it returns.
        call: Call[Any] = Call(subject, decode, future, timeout, deadline)
        self._calls[token.encode()] = call
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._sweep)
        elif deadline < self._timer.when():
            self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._sweep)
        return token, future

    def forget(self, token: str) -> None:
        """Whoever waited has gone; a late reply is nobody's."""
        self._calls.pop(token.encode(), None)

    def answer(self, token: bytes, data: bytes, header_block: bytes | None) -> None:
        call = self._calls.pop(token, None)
        if call is None or call.future.done():
            return
        try:
            result = call.decode(call.subject, data, header_block)
        except BusError as error:
            call.future.set_exception(error)
        except ValueError as error:
            call.future.set_exception(Unanswered(f"the reply to {call.subject} is unreadable: {error}"))
        else:
            call.future.set_result(result)

    def refuse(self, subject: str) -> bool:
        """The server refused a publish on `subject` (any letter case); False if no call waits on it."""
        for token, call in self._calls.items():
            if call.subject.lower() == subject.lower():
                del self._calls[token]
                if not call.future.done():
                    call.future.set_exception(
                        PermissionDenied(f"this key may not publish on {call.subject}; nothing was sent")
                    )
                return True
        return False

    def connection_ended(self, reason: str) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.future.done():
                call.future.set_exception(
                    Unanswered(f"the connection ended before {call.subject} was answered ({reason})")
                )

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = None
        now = self._loop.time()
        expired = [token for token, call in self._calls.items() if call.deadline <= now or call.future.done()]
        for token in expired:
            call = self._calls.pop(token)
            if not call.future.done():
                call.future.set_exception(
                    Unanswered(f"no answer to {call.subject} within {call.timeout:.2g} s; the outcome is unknown")
                )
        if self._calls:
            earliest = min(call.deadline for call in self._calls.values())
            self._timer = self._loop.call_at(earliest, self._sweep)


def begun(begin: Callable[[], asyncio.Future[T]]) -> asyncio.Future[T]:
    """The call that this begins, or where that fails at once a failed one: for whoever looks at the outcome later."""
    try:
        return begin()
    except BusError as error:
        failed: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        failed.set_exception(error)
        return failed
