"""Whether the agent makes progress, not only whether its process exists.

A beat passes through the loop of turns each second. When none has come out at the other end for `STALLED_S`, the loop
or the ledger's disk is stuck: `/healthz` says so and the watchdog is not fed.
"""

from __future__ import annotations

import time

STALLED_S = 10.0


class Health:
    def __init__(self) -> None:
        self._turned_s = time.monotonic()
        #: Connected to the bus. An agent without it keeps its jobs and is healthy.
        self.is_connected = False

    def turned(self) -> None:
        """A turn is done."""
        self._turned_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Since the last turn."""
        return time.monotonic() - self._turned_s

    @property
    def is_alive(self) -> bool:
        return self.age_s < STALLED_S
