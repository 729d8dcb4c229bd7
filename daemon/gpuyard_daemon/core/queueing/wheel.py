"""Waiting jobs by the moment at which time moves them, so that those whose moment has come are found without looking.

A note stands until its moment has come, whatever became of its job meanwhile: whoever asks compares. When most notes
are of jobs that no longer stand there, the wheel is wound up anew.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from gpuyard_protocol.names import JobId


class Wheel:
    """Notes of (moment, job)."""

    __slots__ = ("_moments", "_notes", "_numbers")

    def __init__(self, notes: Iterable[tuple[int, JobId]] = ()) -> None:
        self._numbers: dict[int, list[JobId]] = {}
        #: Those moments, a heap.
        self._moments: list[int] = []
        self._notes = 0
        for moment, number in notes:
            self.note(moment, number)

    def __len__(self) -> int:
        """How many notes there are."""
        return self._notes

    def note(self, moment: int, number: JobId) -> None:
        """Time will move a job."""
        numbers = self._numbers.get(moment)
        if numbers is None:
            numbers = self._numbers[moment] = []
            heapq.heappush(self._moments, moment)
        numbers.append(number)
        self._notes += 1

    def due(self, now_ms: int, most: int) -> Iterator[tuple[int, JobId]]:
        """Notes whose moment has come, at most so many; they are gone then."""
        moments = self._moments
        while moments and moments[0] <= now_ms and most:
            moment = moments[0]
            numbers = self._numbers[moment]
            while numbers and most:
                most -= 1
                self._notes -= 1
                yield moment, numbers.pop()
            if not numbers:
                heapq.heappop(moments)
                del self._numbers[moment]
