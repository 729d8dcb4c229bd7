"""The record of a turn while it is being written.

Everything that decides adds facts here; each is applied to the cluster at once, so the next decision sees it. When the
turn is over the facts are the record, and what they led to outside are its orders and notices.
"""

from __future__ import annotations

from gpuyard_daemon.core.placing.impossible import Possibilities
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.facts import Fact
from gpuyard_daemon.core.state.settings import CoreSettings


class Draft:
    """The turn's time, what it rests on, and the facts so far."""

    __slots__ = ("cluster", "effects", "facts", "now_ms", "possibilities", "settings")

    def __init__(self, cluster: Cluster, settings: CoreSettings, possibilities: Possibilities, now_ms: int) -> None:
        self.cluster = cluster
        self.possibilities = possibilities
        self.settings = settings
        self.now_ms = now_ms
        self.facts: list[Fact] = []
        self.effects = Effects()

    def add(self, fact: Fact) -> None:
        self.cluster.apply_fact(fact, self.now_ms, self.effects)
        self.facts.append(fact)

    def backoff_ms(self, times: int) -> int:
        """How long to wait: 1 s, 2 s, 4 s, … for the first, second, third time (counted from 0), up to a minute."""
        settings = self.settings
        return min(settings.retry_backoff_max_ms, settings.retry_backoff_ms << min(times, 20))
