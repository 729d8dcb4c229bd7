"""When a waiting job may take the place of running ones, and which of them go.

The exchange test: a victim goes only if it is at least one level larger than the claimant would be with four times the
victim's cost added to it. That is the argument for shortest-first with the price of the switch in it: dear victims
protect themselves, and nobody can be evicted by what it itself evicted.

Costs are GPU-milliseconds lost: the victim's GPUs times (restart + progress lost). Knows no nodes: the caller says who
runs on each and how much room is missing there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from gpuyard_daemon.core.priority import natural_level

#: Weight of a victim's cost against the claimant's size.
COST_WEIGHT: Final = 4
#: A job earns the right to be preempted again with this part of its useful run time, …
CREDIT_DIVISOR: Final = 20
#: … and may be preempted once before it has earned anything.
CREDIT_START: Final = 1


class Victim(NamedTuple):
    """Somebody who runs, as seen by a claimant on one node."""

    #: Larger goes first among equals: youngest first.
    number: int
    #: Its effective level.
    level: int
    #: GPUs it would free here.
    gpus: int
    #: What stopping it costs, GPU-milliseconds.
    cost: int


class Plan(NamedTuple):
    """Whom to stop, and what it costs."""

    victims: tuple[int, ...]
    cost: int


def may_take(claimant_size: int, claimant_level: int, victim: Victim) -> bool:
    """The exchange test. `claimant_level` may be lower than its size says (aging, deadline)."""
    with_cost = natural_level(claimant_size + COST_WEIGHT * victim.cost)
    lifted = natural_level(claimant_size) - claimant_level
    return with_cost - lifted + 1 <= victim.level


def has_credit(attained_ms: int, restart_ms: int, preemptions: int) -> bool:
    """Whether a job's useful run time pays for one more preemption: overhead stays below a twentieth of it."""
    return (preemptions + 1 - CREDIT_START) * restart_ms * CREDIT_DIVISOR <= attained_ms


def cheapest(victims: Iterable[Victim], missing: int) -> Plan | None:
    """Victims that free so many GPUs on one node: largest levels first, cheap first, then nobody needlessly."""
    ordered = sorted(victims, key=lambda victim: (-victim.level, victim.cost, -victim.number))
    chosen: list[Victim] = []
    freed = 0
    for victim in ordered:
        if freed >= missing:
            break
        chosen.append(victim)
        freed += victim.gpus
    if freed < missing:
        return None
    return _pruned(chosen, freed - missing)


def _pruned(chosen: Sequence[Victim], spare: int) -> Plan:
    """Without the victims that are not needed, dearest first."""
    kept = list(chosen)
    for victim in sorted(chosen, key=lambda victim: (-victim.cost, victim.number)):
        if victim.gpus <= spare:
            spare -= victim.gpus
            kept.remove(victim)
    return Plan(tuple([victim.number for victim in kept]), sum([victim.cost for victim in kept]))
