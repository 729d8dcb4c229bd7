"""Is the daemon getting on? Progress, not existence.

Alive means that turns end: the loop runs, no turn has been under way for too long while there is a connection, and
nothing that was read waits for a turn that never begins. A leader tells its standby of the latter two: whoever answers
and decides nothing is replaced.
While NATS is away the daemon waits, and that is no fault of its own: alive, but not ready. Ready means that a
submission would be decided now. A standby is alive while its loop runs, and never ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: A turn that takes longer, with a connection, has stalled. Above the 8 s that an append may wait for its answer.
STALLED_AFTER_S = 20.0
#: The loop's own heartbeat, and how late it may be.
BEAT_S = 0.5
BEAT_LATE_S = 5.0


class Health:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        #: When the loop ran last.
        self.beat_at = monotonic()
        #: When the turn under way began; None between turns.
        self.turn_since: float | None = None
        #: Since when something waits and no turn has taken anything; None: nothing waits.
        self.waiting_since: Callable[[], float | None] = lambda: None
        self.is_connected: Callable[[], bool] = lambda: False
        self._connected_at = monotonic()
        #: Set when start-up is over, and cleared when the end begins.
        self.is_serving = False
        #: While another daemon leads and this one stands by: who leads, and how far behind this one is.
        self.standby_of = ""
        #: Messages of the journal that the standby has not applied yet.
        self.standby_behind = 0
        #: Largest delay of the loop's heartbeat since it was last asked for, seconds.
        self.loop_delay_s = 0.0

    def beat(self) -> None:
        now = self._monotonic()
        self.loop_delay_s = max(self.loop_delay_s, now - self.beat_at - BEAT_S)
        self.beat_at = now

    def reconnected(self) -> None:
        """What waited for the connection has its full time again."""
        self._connected_at = self._monotonic()

    def take_loop_delay_s(self) -> float:
        delay_s, self.loop_delay_s = max(0.0, self.loop_delay_s), 0.0
        return delay_s

    def stalled_because(self) -> str:
        """ "" while the daemon gets on."""
        now = self._monotonic()
        if now - self.beat_at > BEAT_S + BEAT_LATE_S:
            return f"the loop has not run for {now - self.beat_at:.1f} s"
        return self.undecided_because()

    def undecided_because(self) -> str:
        """ "" while turns begin and end, whatever else the process does."""
        if not self.is_connected():
            return ""
        now, since = self._monotonic(), self.turn_since
        if since is not None:
            under_way_s = now - max(since, self._connected_at)
            if under_way_s > STALLED_AFTER_S:
                return f"a turn has been under way for {under_way_s:.1f} s"
        elif (waiting := self.waiting_since()) is not None:
            waits_s = now - max(waiting, self._connected_at)
            if waits_s > STALLED_AFTER_S:
                return f"an input has waited {waits_s:.1f} s for a turn"
        return ""

    def unready_because(self) -> str:
        """ "" when a submission would be decided now."""
        if self.standby_of:
            return f"standby of {self.standby_of}"
        if not self.is_serving:
            return "starting or stopping"
        if not self.is_connected():
            return "no connection to NATS"
        return self.stalled_because()
