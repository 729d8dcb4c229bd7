"""The arithmetic of a job's level: sizes in half octaves of GPU time, lifts by waiting, shifts of tenants.

Small goes first, and many levels matter more than knowing run times. A level is half an octave: on traces with known
run times whole octaves cost 1 to 3 % of the average completion time, quarters no less than halves and more preemptions.
An expected run time is a static size, not a countdown: it never moves while the job runs, so nothing is reordered, and
a wrong one costs little.

Knows no job, no queue and no node. Whole numbers only; nothing is kept.
"""

from __future__ import annotations

from math import isqrt
from typing import Final

from gpuyard_protocol.units import MILLI

#: Levels that a factor of two in size spans.
PER_OCTAVE: Final = 2
#: Size at which level 1 begins, GPU-milliseconds.
LEVEL_UNIT: Final = 600_000
#: Begins beyond a thousand GPU years.
LEVEL_MAX: Final = 27 * PER_OCTAVE
#: Every job may run this long as if it were of size 0, so that short and failing jobs are found at once.
PROBE_MS: Final = 120_000
#: Gangs larger than this probe only if they are at most a twentieth of the pool.
PROBE_GPUS: Final = 8
#: Least wait before a lift by one level.
LIFT_MIN_MS: Final = 150_000
#: Waits for a lift by an octave, in multiples of the time that a job of the level's size takes. Small factors turn a
#: yard with a backlog of days into first come, first served: at 16 the average completion time on an overloaded trace
#: is 25 % above that at 128, and from there on nothing changes.
LIFT_FACTOR: Final = 128
#: Levels by which one step of a user's class lifts: two octaves.
CLASS_LEVELS: Final = 2 * PER_OCTAVE
#: Jobs of this level and above sink or rise by the whole of their tenant's shift, smaller ones by the part of it that
#: their level is of this. Nobody is shifted further, so a tenant's small jobs never fall behind its large ones.
SHIFT_MAX: Final = 12 * PER_OCTAVE
#: Octaves that a tenant sinks by at once for each factor of two above its share, …
_SHIFT_OCTAVES: Final = 2
#: … and octaves more for each hour in which it stays there.
_DRIFT_OCTAVES: Final = 1
#: A tenant that moves is at least so many parts of a level away.
_SHIFT_PARTS: Final = 4
_SHIFT_SLACK: Final = 3
_HOUR_MS: Final = 3_600_000
#: … or in the time of so many restarts, if that is longer: whoever follows the shifts from card to card restarts for
#: them, so what they cost stays the same small part of the yard's time however long a restart takes.
_DRIFT_RESTARTS: Final = 60


def natural_level(size: int) -> int:
    """Half octave of a size in GPU-milliseconds."""
    if size < LEVEL_UNIT:
        return 0
    octave = (size // LEVEL_UNIT).bit_length() - 1
    # Beyond the middle, in the sense of factors: size / (LEVEL_UNIT * 2^octave) >= sqrt(2).
    upper = size * size >= LEVEL_UNIT * LEVEL_UNIT << (2 * octave + 1)
    return min(LEVEL_MAX, 1 + PER_OCTAVE * octave + upper)


def level_begins(level: int) -> int:
    """Smallest size of a natural level, GPU-milliseconds."""
    if level <= 0:
        return 0
    octave, upper = divmod(level - 1, PER_OCTAVE)
    begins = LEVEL_UNIT << octave
    return isqrt(2 * begins * begins - 1) + 1 if upper else begins


def may_probe(gpus: int, pool_gpus: int) -> bool:
    return gpus <= PROBE_GPUS or gpus * 20 <= pool_gpus


# --- waiting ---------------------------------------------------------------------------------------------------------


def lift_after_ms(level: int, width_milli: int, lifts: int) -> int:
    """How long a job that began to wait at a natural level waits until it has been lifted so often.

    After `level + 1` lifts it is at the top. The bound: a job of size x on w cards stands at a level l that begins at
    or below x, and waits for each lift from level i at most max(LIFT_MIN_MS, LIFT_FACTOR * begins(i) / (2 * w)). The
    larger of two is at most their sum. The first parts sum to (l + 1) * LIFT_MIN_MS. In the second, begins(i) grows by
    sqrt(2) with each level (but for one GPU-millisecond of rounding), so the sum over i = 1 .. l is below
    begins(l) / (1 - 1 / sqrt(2)) < 3.5 * begins(l) <= 3.5 * x, times LIFT_FACTOR / (2 * w). So

        time to the top  <=  1.75 * LIFT_FACTOR * x / w  +  LIFT_MIN_MS * (l + 1),

    in proportion to the job's own run time x / w, whatever the tenant's shift, the job's class, and whoever else comes.
    At the top nothing counts but the number, so only older jobs are ahead, and they are finitely many.
    """
    return sum([_lift_wait_ms(at, width_milli) for at in range(level, level - lifts, -1)])


def lifts(level: int, width_milli: int, waited_ms: int) -> tuple[int, bool]:
    """(lifts in so much waiting time, whether they lead to the top)."""
    for at in range(level, -1, -1):
        waited_ms -= _lift_wait_ms(at, width_milli)
        if waited_ms < 0:
            return level - at, False
    return level + 1, True


def top_after_ms(level: int, width_milli: int) -> int:
    """After which wait a job is at the top."""
    return lift_after_ms(level, width_milli, level + 1)


def _lift_wait_ms(level: int, width_milli: int) -> int:
    """Wait for the lift from one level to the next."""
    if level <= 0 or not width_milli:
        return LIFT_MIN_MS
    return max(LIFT_MIN_MS, LIFT_FACTOR * level_begins(level) * MILLI // (PER_OCTAVE * width_milli))


# --- tenants ---------------------------------------------------------------------------------------------------------


def tenant_shift(usage: int, share: int, owed: int, before: int) -> int:
    """Levels by which a tenant is above its share, rounded; it moves only past three quarters of a level.

    `usage`, `share`: decayed GPU time, and what an equal claim by weight would be; both above 0. `owed`: what `drift`
    came to over time, thousandths of a level.
    """
    parts = _SHIFT_OCTAVES * _parts_above(usage, share) + owed * _SHIFT_PARTS // MILLI
    if abs(parts - _SHIFT_PARTS * before) <= _SHIFT_SLACK:
        return before
    rounded = (abs(parts) + _SHIFT_PARTS // 2) // _SHIFT_PARTS * (1 if parts >= 0 else -1)
    return max(-SHIFT_MAX, min(SHIFT_MAX, rounded))


def drift(usage: int, share: int, passed_ms: int, restart_ms: int) -> int:
    """What is added to a tenant's shift for having been above its share so long, thousandths of a level.

    `restart_ms` is what a restart takes in this yard.
    """
    parts = _DRIFT_OCTAVES * _parts_above(usage, share)
    moved = abs(parts) * MILLI * passed_ms // (_SHIFT_PARTS * max(_HOUR_MS, _DRIFT_RESTARTS * restart_ms))
    return moved if parts >= 0 else -moved


def shifted(level: int, shift: int) -> int:
    """A level with its tenant's shift in it: larger for a larger level, whatever the shift."""
    if level <= 0 or not shift:
        return level
    return level + (shift * (level if level < SHIFT_MAX else SHIFT_MAX) + SHIFT_MAX // 2) // SHIFT_MAX


def _parts_above(usage: int, share: int) -> int:
    """Parts of a level between the two: 8 * log2(usage / share), by comparing eighth powers."""
    power = _SHIFT_PARTS * PER_OCTAVE
    return _floor_log2(usage**power, share**power)


def _floor_log2(above: int, below: int) -> int:
    """floor(log2(above / below)) for above >= below, its mirror image else."""
    if above < below:
        return -_floor_log2(below, above)
    return (above // below).bit_length() - 1
