"""What an operator may set about scheduling.

Only decisions read these; applying a record never does. So a journal written under one configuration is replayed to
the same state under another.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gpuyard_protocol.jobs import LEASE_MIN_MS


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
    #: … or so many bytes of commands, environments and scripts in them: a few may be as large as very many.
    finished_bytes_max: int = 256 * 2**20
    #: A chosen submission id answers repeats with the first answer for this long.
    chosen_answers_kept_ms: int = 7 * 86_400_000
    #: Answers to requests without a chosen id are only kept for those who ask late.
    given_answers_kept_ms: int = 3_600_000
    #: Most answers of either kind; beyond it the oldest go early.
    chosen_answers_max: int = 1_000_000
    given_answers_max: int = 100_000
    #: Facts one turn adds for housekeeping (jobs retired): some two milliseconds, which nobody who waits for a decision
    #: notices; bounds the record's size, too.
    retired_per_turn: int = 100
    #: Housekeeping waits until this much of it can be done at once, so that it causes few turns.
    housekeeping_ms: int = 10_000
    #: Most compute promised on a time-sliced card, in thousandths of it: four jobs of a whole card's appetite.
    timeslice_milli_max: int = 4000
    #: What becomes of a job on a node that is lost, where the job does not say: it waits for the node, or it starts
    #: elsewhere once its lease has run out; and that lease.
    on_node_lost: Literal["wait", "restart"] = "wait"
    lease_ms: int = 600_000

    #: All blocked jobs are looked at this often for whether somebody should give way to them; those that come in
    #: between, at once.
    preempt_every_ms: int = 10_000
    #: Work of one such round: running jobs looked at, waiting ones, and nodes tried for them.
    preempt_occupants: int = 1024
    preempt_heads: int = 32
    preempt_nodes: int = 256
    #: Most of the yard's GPU compute that is on its way from one job to another, in thousandths, and in any case the
    #: GPUs of one plan.
    preempt_moving_permille: int = 20
    #: What a new start costs a job that does not say, by its kind of preemption.
    restart_requeue_ms: int = 10_000
    restart_checkpoint_ms: int = 60_000
    restart_suspend_ms: int = 20_000
    #: How long a job has run at least before it is ended for one of a better band (the floor of a service: two
    #: minutes).
    reclaim_after_ms: int = 600_000
    #: A job within its quota that has waited so long for places kept for it takes them also from borrowers that may not
    #: be preempted; one that would borrow itself, later.
    force_nominal_ms: int = 6 * 3_600_000
    force_borrowing_ms: int = 24 * 3_600_000

    def validate(self) -> None:
        """`ValueError` with one sentence if a value makes no sense."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and value <= 0:
                raise ValueError(f"scheduler.{name}: found {value}; expected a number above 0")
        if self.lease_ms < LEASE_MIN_MS:
            raise ValueError(f"scheduler.lease_ms: found {self.lease_ms}; expected at least {LEASE_MIN_MS}")
        if self.retry_backoff_max_ms < self.retry_backoff_ms:
            raise ValueError("scheduler.retry_backoff_max_ms: must be at least retry_backoff_ms")
        if self.timeslice_milli_max < 1000:
            raise ValueError("scheduler.timeslice_milli_max: must be at least 1000, one whole card")
