"""What jobs turn out to need, learnt from those that ended: for jobs like one another, and for all of unknown length.

*Jobs like one another.* The run times of jobs of one owner, name (or program) and shape, as mean and spread of their
logarithms; the same for all jobs of one owner and shape; and how far an owner's estimates are from the truth. An
estimate is believed, corrected by that, until its owner's turn out to be anything; then, and where there is none, the
first of the others with enough samples and little enough spread speaks. Where none does, nothing is predicted, because
a prediction that is off by a factor of ten is worse than none.

*All of unknown length.* For each level of GPU time: how many jobs reached it, and how many ended there. From the counts
comes the Gittins rank: the expected further use per expected end, at the best moment to look again. Where sizes have
heavy tails it grows with what a job has had, and the order is least attained first; where they have not, it stays
level, and whoever runs goes on. Jobs that still run count where they are, so that a yard full of long jobs does not
look like one of short jobs.

Whole numbers only, and nothing is sampled. What is learnt stands in the records below and is changed by facts alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from gpuyard_daemon.core.queueing.fixedpoint import LOG_PARTS, exp2_parts, log2_parts
from gpuyard_daemon.core.queueing.priority import LEVEL_MAX, PER_OCTAVE, level_begins, natural_level
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import Tenant, User

#: Kinds of jobs that are remembered, those heard of longest ago forgotten first.
KINDS_MAX: Final = 8192
#: Newer samples count for at least one part in so many.
_MEMORY: Final = 16
#: Spread above which nothing is predicted: e^1.5 to either side, in 256ths of an octave.
_SPREAD_MAX: Final = int(1.5 / 0.6931 * LOG_PARTS)
#: Owners whose estimates are off by less than a factor of two on average are taken at their word: what preparation and
#: new starts add to a run is no fault of theirs.
_BIAS_MIN: Final = LOG_PARTS
_ONE: Final = 1_000_000
#: One job more than was seen is taken to enter each level and go on: a level that nobody has left yet keeps no one from
#: staying. Assuming a heavy tail instead cost a third on traces without one.
_ASSUMED_ENTERED: Final = 1
#: Ranks are worked out anew when as many jobs ended as one part in so many of all that ever did.
_REREAD_PART: Final = 64
#: From the beginning of a level to that of the next.
_WIDTHS: Final = tuple([level_begins(level + 1) - level_begins(level) for level in range(LEVEL_MAX + 1)])
_DIGITS = re.compile(r"[0-9]+")


class RunLore(msgspec.Struct, array_like=True, gc=False):
    """Run times of jobs of one kind, as logarithms in 256ths of an octave."""

    samples: int = 0
    mean: int = 0
    #: Mean square of the distance from the mean.
    variance: int = 0

    def learn(self, value: int) -> None:
        self.samples += 1
        weight = min(self.samples, _MEMORY)
        away = value - self.mean
        self.mean += away // weight
        if self.samples > 1:
            self.variance += (away * away - self.variance) // weight

    def says(self, samples: int) -> bool:
        """There are enough samples, and they agree well enough."""
        return self.samples >= samples and self.variance <= _SPREAD_MAX * _SPREAD_MAX


class SizeLore(msgspec.Struct, array_like=True, gc=False):
    """By level of GPU time: jobs that reached it, jobs that ended at it; and the ranks last worked out from that."""

    entered: list[int]
    ended: list[int]
    ends: int = 0
    #: GPU-milliseconds; [] before the first.
    ranks: list[int] = []
    ends_read: int = 0


class _Ladder(NamedTuple):
    """A kind of likeness, and the samples it takes to speak."""

    name: str
    samples: int


_SAME_NAME = _Ladder("name", 3)
_SAME_SHAPE = _Ladder("shape", 10)
_ESTIMATES = _Ladder("estimates", 10)


class Lore:
    """Everything learnt."""

    __slots__ = ("kinds", "sizes")

    def __init__(self) -> None:
        self.kinds: OrderedDict[str, RunLore] = OrderedDict()
        self.sizes = SizeLore([0] * (LEVEL_MAX + 1), [0] * (LEVEL_MAX + 1))

    # --- run times ---------------------------------------------------------------------------------------------------

    def expected(self, tenant: Tenant, user: User, spec: JobSpec) -> tuple[int, str]:
        """How long a job will run, ms, and how that is known (`estimate`, `history`); 0: it is not."""
        if not self.kinds:
            return spec.estimate_ms, "estimate" if spec.estimate_ms else ""
        if spec.estimate_ms:
            bias = self.kinds.get(_kind(_ESTIMATES, tenant, user, spec))
            if bias is None or bias.samples < _ESTIMATES.samples:
                return spec.estimate_ms, "estimate"
            if bias.says(_ESTIMATES.samples):
                away = bias.mean if abs(bias.mean) >= _BIAS_MIN else 0
                return max(1, exp2_parts(log2_parts(spec.estimate_ms) + away) if away else spec.estimate_ms), "estimate"
        for ladder in (_SAME_NAME, _SAME_SHAPE):
            known = self.kinds.get(_kind(ladder, tenant, user, spec))
            if known is not None and known.says(ladder.samples):
                return max(1, exp2_parts(known.mean)), "history"
        return spec.estimate_ms, "estimate" if spec.estimate_ms else ""

    def note_run(self, tenant: Tenant, user: User, spec: JobSpec, ran_ms: int) -> None:
        """A job ended by itself after so much run time."""
        value = log2_parts(max(1, ran_ms))
        for ladder in (_SAME_NAME, _SAME_SHAPE):
            self._learn(_kind(ladder, tenant, user, spec), value)
        if spec.estimate_ms:
            self._learn(_kind(_ESTIMATES, tenant, user, spec), value - log2_parts(spec.estimate_ms))

    def _learn(self, kind: str, value: int) -> None:
        lore = self.kinds.get(kind)
        if lore is None:
            lore = self.kinds[kind] = RunLore()
            if len(self.kinds) > KINDS_MAX:
                self.kinds.popitem(last=False)
        lore.learn(value)
        self.kinds.move_to_end(kind)

    # --- sizes -------------------------------------------------------------------------------------------------------

    def note_use(self, before: int, after: int) -> None:
        """A job's GPU time, in GPU-milliseconds, grew."""
        first = natural_level(before) + 1 if before else 0
        for level in range(first, natural_level(after) + 1):
            self.sizes.entered[level] += 1

    def note_end(self, size: int) -> None:
        self.sizes.ended[natural_level(size)] += 1
        self.sizes.ends += 1

    def rank(self, size: int) -> int:
        """What a job that had so much is to be taken for, GPU-milliseconds."""
        ranks = self.sizes.ranks
        return ranks[natural_level(size)] if ranks else size

    @property
    def wants_reading(self) -> bool:
        """Enough has ended since ranks were worked out."""
        sizes = self.sizes
        return sizes.ends - sizes.ends_read > sizes.ends_read // _REREAD_PART

    def set_ranks(self, ranks: Sequence[int]) -> None:
        self.sizes.ranks = list(ranks)
        self.sizes.ends_read = self.sizes.ends

    def read_ranks(self, reached: Sequence[int]) -> tuple[int, ...]:
        """Gittins ranks by level. `reached`: how many of those that run have reached each in their present run."""
        entered = [counted + now for counted, now in zip(self.sizes.entered, reached, strict=True)]
        return gittins_ranks(entered, self.sizes.ended)


def gittins_ranks(entered: Sequence[int], ended: Sequence[int]) -> tuple[int, ...]:
    """By level, GPU-milliseconds, for a job whose use is at its beginning.

    None is taken for more than an octave larger than the largest job seen: where nobody has ended yet the ranks would
    be without bound, and with them the wait after which a job rises in line.
    """
    seen = max([level for level in range(LEVEL_MAX + 1) if entered[level] or ended[level]], default=0)
    most = level_begins(min(LEVEL_MAX, seen + 1 + PER_OCTAVE))
    known = [min(most, _rank_at(entered, ended, level, seen)) for level in range(seen + 1)]
    return (*known, *[most] * (LEVEL_MAX - seen))


def _rank_at(entered: Sequence[int], ended: Sequence[int], level: int, last: int) -> int:
    alive, served, best = _ONE, 0, 0
    for at in range(level, last + 1):
        ending = alive * ended[at] // (max(entered[at], ended[at]) + _ASSUMED_ENTERED)
        width = _WIDTHS[at]
        # Who ends in the level ends in its middle on average.
        served += (alive - ending) * width + ending * width // 2
        alive -= ending
        rank = served // max(1, _ONE - alive)
        best = rank if not best else min(best, rank)
    return best


def _kind(ladder: _Ladder, tenant: Tenant, user: User, spec: JobSpec) -> str:
    what: tuple[object, ...] = ()
    if ladder is _SAME_NAME:
        # Numbers in a name tell runs of one thing apart, not things.
        what = (_DIGITS.sub("#", spec.name),) if spec.name else (spec.argv, spec.script)
    if ladder is _ESTIMATES:
        return _name_of((ladder.name, tenant, user))
    return _name_of((ladder.name, tenant, user, spec.need, spec.replicas, *what))


@lru_cache(maxsize=2048)
def _name_of(what: tuple[object, ...]) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(what), digest_size=9).hexdigest()
