"""A job's place in line: key (band, level, sequence), smaller first, whole numbers only, every term showable.

The level is the job's size in octaves of GPU-milliseconds: what it is told or predicted to need while it has had less,
else what it has had. Small goes first; many levels matter more than knowing run times. A prediction is a static level,
not a countdown: it never moves while the job runs, so nothing is reordered, and a wrong one costs little.

Terms move the level: tenants above their share sink, waiting and near deadlines lift, a user's class lifts what it pays
for. Within a level the order is first come, first served.

Knows no queue and no node. Time is given in; nothing is kept.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: Size at which level 1 begins, GPU-milliseconds.
LEVEL_UNIT: Final = 600_000
LEVEL_MAX: Final = 27
#: Above all natural levels: the head of those who waited longest, which owns a reservation.
LEVEL_TOP: Final = -1
#: Every job may run this long as if it were of size 0, so that short and failing jobs are found at once.
PROBE_MS: Final = 120_000
#: Gangs larger than this probe only if they are at most a twentieth of the pool.
PROBE_GPUS: Final = 8
#: Least wait before a lift by one level.
LIFT_MIN_MS: Final = 300_000
#: Waits for a lift, in multiples of the time that the job's size would take on its GPUs. Small factors turn a yard with
#: a backlog of days into first come, first served: at 2 the average completion time tripled on overloaded traces.
LIFT_FACTOR: Final = 64
#: Tenants sink or rise by at most this many levels.
SHIFT_MAX: Final = 6


class Terms(NamedTuple):
    """What a level is made of."""

    #: 0 floors of services, 1 within quota, 2 borrowing, 3 scavenging.
    band: int
    #: Octave of the job's size.
    natural: int
    #: Tenant's usage against its share, in octaves.
    tenant_shift: int = 0
    #: Levels lifted by waiting.
    lifted: int = 0
    #: Levels lifted by a near deadline.
    deadline: int = 0
    #: The user's class, -2 to 2; charged to the tenant as usage.
    user_class: int = 0

    @property
    def level(self) -> int:
        raw = self.natural + self.tenant_shift - self.lifted - self.deadline - 2 * self.user_class
        return max(LEVEL_TOP, min(LEVEL_MAX, raw))

    def key(self, sequence: int) -> tuple[int, int, int]:
        return (self.band, self.level, sequence)


def natural_level(size: int) -> int:
    """Octave of a size in GPU-milliseconds."""
    return min(LEVEL_MAX, (size // LEVEL_UNIT).bit_length())


def level_begins(level: int) -> int:
    """Smallest size of a natural level, GPU-milliseconds."""
    return LEVEL_UNIT << (level - 1) if level > 0 else 0


def may_probe(gpus: int, pool_gpus: int) -> bool:
    return gpus <= PROBE_GPUS or gpus * 20 <= pool_gpus


def size_of(gpus: int, attained_ms: int, estimate_ms: int | None, *, probes: bool) -> int:
    """The size that decides the level, GPU-milliseconds.

    `attained_ms`: useful run time so far; `estimate_ms`: told or predicted run time, None if there is none.
    """
    if estimate_ms is not None and attained_ms < estimate_ms:
        return gpus * estimate_ms
    if probes and attained_ms < PROBE_MS:
        return 0
    return gpus * attained_ms


def next_border_ms(gpus: int, attained_ms: int, estimate_ms: int | None, *, probes: bool) -> int:
    """Useful run time at which the size's level changes next."""
    if estimate_ms is not None and attained_ms < estimate_ms:
        return estimate_ms
    if probes and attained_ms < PROBE_MS:
        return PROBE_MS
    border = level_begins(natural_level(gpus * attained_ms) + 1)
    return max(attained_ms + 1, -(-border // gpus))


def lift_wait_ms(level: int, gpus: int) -> int:
    """How long a job waits at a level until it is lifted by one.

    Over all levels the sum is at most 2 * LIFT_FACTOR * size / gpus + LIFT_MIN_MS * (level + 1): a job's wait for the
    top is bounded by its own size.
    """
    if level <= 0:
        return LIFT_MIN_MS
    return max(LIFT_MIN_MS, LIFT_FACTOR * level_begins(level) // gpus)


def tenant_shift(usage: int, share: int, before: int) -> int:
    """Octaves by which a tenant is above its share, rounded; it moves only past three quarters of an octave.

    `usage`, `share`: decayed GPU-milliseconds, and what an equal claim by weight would be; both above 0.
    """
    # Quarter octaves: 4 * log2(usage / share), by comparing fourth powers.
    quarters = _quarter_octaves(usage**4, share**4)
    if abs(quarters - 4 * before) <= 3:
        return before
    rounded = (abs(quarters) + 2) // 4 * (1 if quarters >= 0 else -1)
    return max(-SHIFT_MAX, min(SHIFT_MAX, rounded))


def _quarter_octaves(above: int, below: int) -> int:
    """floor(log2(above / below)) for above >= below, its mirror image else."""
    if above < below:
        return -_quarter_octaves(below, above)
    return (above // below).bit_length() - 1
