"""Arrays: many jobs of one request, that share its specification and may have a limit of how many go at once.

Which of the elements that could start may look for a place follows from the state alone: the first of them by number,
as many as the limit leaves beside those that hold a place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from gpuyard_daemon.core.state.model import Array, Job
from gpuyard_protocol.names import JobId

LIVE_STATES = frozenset({"starting", "running", "suspended", "stopping"})


class Throttle:
    """The elements of one array that could start, by number; the first of them may."""

    __slots__ = ("_admitted", "_could", "_live", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        #: Sorted.
        self._could: list[JobId] = []
        #: So many from the beginning of that may look for a place.
        self._admitted = 0
        self._live = 0

    @property
    def keeps_back(self) -> bool:
        """Whether more elements could start than may look for a place."""
        return len(self._could) > self._admitted

    def could(self, job: JobId) -> bool:
        """Enter an element that could start; whether it may at once, unless `settle` says otherwise."""
        place = bisect_left(self._could, job)
        if place < len(self._could) and self._could[place] == job:
            return False
        self._could.insert(place, job)
        if place >= self._admitted:
            return False
        self._admitted += 1
        return True

    def cannot(self, job: JobId) -> None:
        place = bisect_left(self._could, job)
        if place < len(self._could) and self._could[place] == job:
            del self._could[place]
            self._admitted -= place < self._admitted

    def lives(self, change: int) -> None:
        """So many more hold a place."""
        self._live += change

    def settle(self) -> tuple[list[JobId], list[JobId]]:
        """(who may look for a place from now on, who may no longer)."""
        before = self._admitted
        self._admitted = now = min(len(self._could), max(0, self._most - self._live))
        return self._could[before:now], self._could[now:before]


class Arrays:
    """All arrays of which a job is left; the records are durable, the rest derived."""

    __slots__ = ("_throttles", "records")

    def __init__(self) -> None:
        self.records: dict[JobId, Array] = {}
        self._throttles: dict[JobId, Throttle] = {}

    def add(self, array: Array) -> None:
        self.records[array.id] = array
        spec = array.spec.array
        if spec is not None and 0 < spec.at_once < array.count:
            self._throttles[array.id] = Throttle(spec.at_once)

    def throttle(self, job: Job) -> Throttle | None:
        """The limit that a job is under."""
        return self._throttles.get(job.array) if job.array else None

    def ended(self, job: Job) -> None:
        if job.array:
            array = self.records[job.array]
            array.unfinished -= 1
            array.unsuccessful += job.state != "succeeded"

    def retired(self, job: Job) -> None:
        """An element leaves the core; the last one takes the array with it."""
        if job.array:
            array = self.records[job.array]
            array.left -= 1
            if not array.left:
                del self.records[job.array]
                self._throttles.pop(job.array, None)


def elements(array: Array) -> Iterator[tuple[JobId, int]]:
    """(job, index) of every element."""
    assert array.spec.array is not None
    for place, index in enumerate(array.spec.array.indices()):
        yield array.id + place, index
