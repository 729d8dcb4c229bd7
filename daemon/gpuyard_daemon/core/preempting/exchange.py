"""When a waiting job may take the place of running ones of its own band: the arithmetic, without nodes and jobs.

The exchange test: a victim goes only if it is at least one level larger than the claimant would be with four times the
victim's cost added to it. That is the argument for shortest-first with the price of the switch in it: dear victims
protect themselves, and nobody can be evicted by what it itself evicted. The argument is about what remains: a victim of
known length counts for no more than twice that, so nobody is sent away shortly before its end. Its rank stays.

Costs are GPU-milliseconds: the victim's GPUs times the run time that it will have to spend again. Who is still at its
start has only that to lose, so it is the cheapest to send back, and at once: cards that nobody better wants are not
idle, and whoever comes does not wait for a start that has just begun.

A fixed time of rest after each preemption would protect the large, who pay least for it, and leave the small as the
only victims when many come at once; so what a job has lost may only be a part of what it has done since.
"""

from __future__ import annotations

from typing import Final

from gpuyard_daemon.core.queueing.priority import PROBE_MS, natural_level

#: Weight of a victim's cost against the claimant's size.
COST_WEIGHT: Final = 4
#: A victim is larger than the claimant with its cost by so many levels at least.
MARGIN: Final = 1
#: Level at which a job counts that has waited to the top: it is lifted a little further than its own size.
TOP: Final = -1
#: Preemptions may cost a job this part of its useful run time, beside the first, which is free: the same weight, now
#: from the victim's side. At a twentieth the yard's long jobs are out of reach most of the time where starts are dear.
CREDIT_DIVISOR: Final = COST_WEIGHT
#: An attempt runs at least so long before it is ended for somebody of the same band: who ends at once ends.
LEAST_RUN_MS: Final = PROBE_MS
#: One whose start takes longer than that runs so long at least: nothing can end yet, and what it has spent is all that
#: it loses, so the sooner the cheaper. Two rounds, for what was begun on a node to settle.
LEAST_START_MS: Final = 20_000
#: A job whose size was changed keeps it for so many times its restart.
GAP_RESTARTS: Final = 10


def may_take(claimant_size: int, claimant_level: int, victim_level: int, cost: int, *, at_top: bool = False) -> bool:
    """The exchange test. `claimant_level` may be lower than its size says (aging, deadline, class)."""
    with_cost = natural_level(claimant_size + COST_WEIGHT * cost)
    lifted = natural_level(claimant_size) - (TOP if at_top else claimant_level)
    return with_cost - lifted + MARGIN <= victim_level


def least_attempt_ms(start_ms: int) -> int:
    """How long an attempt runs at least before it is ended for somebody of the same band. `start_ms`: how long its
    start takes, where it loses no more than that by leaving; else 0."""
    return LEAST_START_MS if start_ms > LEAST_RUN_MS else LEAST_RUN_MS


def least_run_ms(restart_ms: int, resizes: int) -> int:
    """How long an attempt of an elastic job keeps its size."""
    return max(PROBE_MS, GAP_RESTARTS * restart_ms) if resizes else PROBE_MS
