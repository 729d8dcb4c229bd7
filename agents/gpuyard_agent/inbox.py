"""Events on their way to the core, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque

from gpuyard_agent.core.events import Event

#: Events of one turn at most, so that a turn stays short; the rest is the next turn's.
TURN_EVENTS_MAX = 500


class Inbox:
    """One reader. What arrives while the reader is busy is one turn for it: load makes batches by itself."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._has_some = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._has_some.set()

    async def take(self) -> list[Event]:
        if not self._events:
            self._has_some.clear()
            await self._has_some.wait()
        return [self._events.popleft() for _ in range(min(len(self._events), TURN_EVENTS_MAX))]
