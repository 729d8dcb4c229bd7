"""What fills and churn ask of whoever places pods: a baseline's board, or the production core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gpuyard_daemon.sim.openb import Ask
from gpuyard_daemon.sim.typical import TypicalTasks


class PodChange(NamedTuple):
    """A pod began to run, or was taken off its host before its end."""

    pod: int
    runs: bool


class Pods(Protocol):
    """Pods on hosts. `place_round` is for fills, the rest for churn; a run uses one or the other."""

    capacity_milli: int

    @property
    def held_milli(self) -> int:
        """GPU thousandths held now."""
        ...

    def unusable_milli(self, typical: TypicalTasks) -> float:
        """Idle thousandths that typical tasks could not use, over all hosts."""
        ...

    def place_round(self, asks: Sequence[Ask]) -> Sequence[int]:
        """Place pods that arrive together, one try each; nanoseconds of each decision."""
        ...

    def arrive(self, pod: int, ask: Ask) -> None: ...

    def depart(self, pod: int) -> None: ...

    def settle(self, now_s: float) -> Sequence[PodChange]:
        """Decide about what arrived and departed."""
        ...

    def wake_s(self, now_s: float) -> float | None:
        """When to settle again though nothing arrives or departs."""
        ...
