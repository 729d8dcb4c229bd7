"""How large a simulated yard is, and how often its parts do what costs the bench time and the yard nothing.

A day of two hundred nodes is played with fewer heartbeats (and as much more patience with their absence) and fewer
comparisons of whole states; everything else is as in the small yards.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    #: Hosts: at least and at most.
    hosts: tuple[int, int] = (2, 5)
    #: Between two heartbeats of an agent, and between two looks of its core at the time, seconds.
    beat_s: float = 1.0
    suspected_after_s: float = 5.0
    lost_after_s: float = 30.0
    #: Journal records from one snapshot to the next.
    snapshot_records: tuple[int, int] = (5, 60)
    #: An invariant check counts the whole state: only every so many turns.
    check_every: int = 16
    #: The leader's state is compared with its journal's every so many turns.
    digest_every: int = 8
    #: Jobs that have not ended: nothing is submitted above it. 0: `jobs_max` is for all that were ever submitted.
    open_jobs_max: int = 0
    jobs_max: int = 80
    #: What a program runs, seconds.
    program_s: tuple[float, float] = (0.0, 20.0)
    #: After the faults, everything must come to its end within this much simulated time.
    healed_max_s: float = 3600.0
    #: Leases that jobs ask for: several heartbeats long, as any that is to be renewed.
    leases: tuple[str, ...] = ("10s", "45s", "60s")
    #: Submissions under an id of the tenant's own, of a hundred: their answers are kept for a week.
    own_ids: int = 100
    #: Names that jobs share: those that are to be alone of theirs wait for each other.
    names: int = 2
    #: Jobs may be handed in held; in a yard of its size nobody comes by to release them.
    holds: bool = True
    #: Finished jobs that leave the core are counted, not kept, and so is what the bench itself knows of them.
    forgets: bool = False


SMALL = Scale()


def large(nodes: int) -> Scale:
    """For hours of many nodes."""
    return Scale(
        hosts=(nodes, nodes),
        beat_s=10.0,
        suspected_after_s=35.0,
        lost_after_s=90.0,
        snapshot_records=(200, 1000),
        check_every=2000,
        digest_every=1000,
        open_jobs_max=5 * nodes,
        program_s=(10.0, 1800.0),
        healed_max_s=4 * 3600.0,
        leases=("100s", "450s", "600s"),
        own_ids=0,
        names=20 * nodes,
        holds=False,
        forgets=True,
    )
