"""What an operator may set about scheduling.

Only decisions read these; applying a record never does. So a journal written under one configuration is replayed to
the same state under another.
"""

from __future__ import annotations

import msgspec


class CoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and delays of the scheduler. Times in milliseconds."""

    #: Replicas started in one turn; more wait for the next turn, which follows at once. A single larger gang still
    #: starts whole, since a gang starts in one record or not at all.
    starts_per_turn: int = 1000
    #: How long a gang may take until all its members are prepared. Then it gives its places back, uncharged.
    prepare_timeout_ms: int = 30_000
    #: Wait before the first retry after a failure of the job's own; doubled with each further one.
    retry_backoff_ms: int = 1000
    #: Longest wait before a retry, also of uncharged ones and of a service's crashing replica.
    retry_backoff_max_ms: int = 60_000
    #: An attempt that ran this long was a good start: counts of starts gone wrong begin anew.
    steady_run_ms: int = 60_000
    #: How long a node is left alone for a mode it could not set up; doubled each time in a row.
    refusal_avoid_ms: int = 10_000
    refusal_avoid_max_ms: int = 600_000
    #: Finished jobs leave for the history after this time …
    finished_kept_ms: int = 3_600_000
    #: … or earlier, oldest first, when there are more than this. Bounds memory under a flood of short jobs.
    finished_kept_max: int = 20_000
    #: A chosen submission id answers repeats with the first answer for this long.
    chosen_answers_kept_ms: int = 7 * 86_400_000
    #: Answers to requests without a chosen id are only kept for those who ask late.
    given_answers_kept_ms: int = 3_600_000
    #: Most answers of either kind; beyond it the oldest go early.
    chosen_answers_max: int = 1_000_000
    given_answers_max: int = 100_000
    #: Facts one turn adds for housekeeping (jobs retired); bounds the record's size.
    retired_per_turn: int = 1000
    #: Housekeeping waits until this much of it can be done at once, so that it causes few turns.
    housekeeping_ms: int = 10_000
    #: Most compute promised on a time-sliced card, in thousandths of it: four jobs of a whole card's appetite.
    timeslice_milli_max: int = 4000

    def validate(self) -> None:
        """`ValueError` with one sentence if a value makes no sense."""
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0:
                raise ValueError(f"scheduler.{name}: found {getattr(self, name)}; expected a number above 0")
        if self.retry_backoff_max_ms < self.retry_backoff_ms:
            raise ValueError("scheduler.retry_backoff_max_ms: must be at least retry_backoff_ms")
        if self.timeslice_milli_max < 1000:
            raise ValueError("scheduler.timeslice_milli_max: must be at least 1000, one whole card")
