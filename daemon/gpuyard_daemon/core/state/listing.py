"""Which jobs there are, for lists: ids in order and counts by state, per tenant and for all.

Derived state. Job ids grow, so appending keeps the lists sorted and a page is a slice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from gpuyard_protocol.jobs import JobState
from gpuyard_protocol.names import JobId

JOB_STATES: tuple[JobState, ...] = (
    "pending", "starting", "running", "suspended", "stopping", "succeeded", "failed", "cancelled"
)  # fmt: skip


class JobList:
    """Ids of the jobs of one tenant (or of all), and how many are in each state."""

    __slots__ = ("_gone", "_ids", "counts")

    def __init__(self) -> None:
        self._ids: list[JobId] = []
        #: Retired ids that still stand in `_ids`.
        self._gone: set[JobId] = set()
        self.counts: dict[JobState, int] = dict.fromkeys(JOB_STATES, 0)

    def __len__(self) -> int:
        return len(self._ids) - len(self._gone)

    @property
    def unfinished(self) -> int:
        """How many have not ended."""
        counts = self.counts
        live = counts["starting"] + counts["running"] + counts["suspended"] + counts["stopping"]
        return counts["pending"] + live

    def add(self, job: JobId, state: JobState) -> None:
        self._ids.append(job)
        self.counts[state] += 1

    def remove(self, job: JobId) -> None:
        self._gone.add(job)
        if len(self._gone) > 1024 and len(self._gone) * 2 > len(self._ids):
            self._ids = [known for known in self._ids if known not in self._gone]
            self._gone.clear()

    def newest_first(self, below: JobId = 0) -> Iterator[JobId]:
        """Ids smaller than `below` (0: all), newest first."""
        end = bisect_left(self._ids, below) if below else len(self._ids)
        for position in range(end - 1, -1, -1):
            if self._ids[position] not in self._gone:
                yield self._ids[position]

    def near(self, job: JobId) -> JobId:
        """The id next to one that is not there; 0 if there are none."""
        position = bisect_left(self._ids, job)
        around = [known for known in self._ids[max(0, position - 2) : position + 2] if known not in self._gone]
        return min(around, key=lambda known: (abs(known - job), known), default=0)
