"""How fast models of cards are: for work as such, by the operator's word, and for one job, by its owner's.

In thousandths of the fastest. What a job says of a model holds for that job; of models that it does not name, and for
whoever says nothing, the operator's figure holds; a model that nobody names is as fast as the fastest. Where several
names fit a card the slowest counts.

A job's work is counted in GPU time of the fastest card (`Ranking`); a place on a slower one costs what is lost there
(`scoring`). Whoever says how it fares also pays for what others would lose without the fast card, by a quarter: so a
job that gains nothing there leaves it to those who do, and one that gains more than that goes there.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from gpuyard_protocol.resources import model_matches
from gpuyard_protocol.units import MILLI

#: (model, thousandths of the fastest), sorted.
Named: TypeAlias = tuple[tuple[str, int], ...]
#: The part of others' loss that a job with figures of its own is charged. At one, half of the jobs would change places
#: for nothing; at nothing, a job that is indifferent would keep the fastest card. Between, it decides where what the
#: job itself loses is small.
_OTHERS_PART: Final = 4
_KNOWN_MAX: Final = 4096


class Speeds:
    """The operator's figures, with the answers found so far."""

    __slots__ = ("_known", "named")

    def __init__(self, named: Named = ()) -> None:
        self.named = named
        self._known: dict[tuple[str, Named], tuple[int, int]] = {}

    def of(self, model: str, own: Named = ()) -> int:
        """How fast a card is, for a job with figures of its own or for work as such."""
        return self._both(model, own)[0]

    def of_name(self, short: str) -> int:
        """How fast cards of a short name are for work as such: of those that share it, the slowest."""
        fitting = [speed for name, speed in self.named if model_matches(short, name) or model_matches(name, short)]
        return min(fitting, default=MILLI)

    def loss(self, model: str, own: Named = ()) -> int:
        """What a place on such a card costs a job, in thousandths of it; below 0: it leaves a faster one to others."""
        if not self.named and not own:
            return 0
        mine, usual = self._both(model, own)
        return MILLI - mine - ((MILLI - usual) // _OTHERS_PART if own else 0)

    def _both(self, model: str, own: Named) -> tuple[int, int]:
        """(for the job, for work as such)."""
        if not self.named and not own:
            return MILLI, MILLI
        key = (model, own)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            usual = _least(model, self.named) or MILLI
            known = self._known[key] = (_least(model, own) or usual, usual)
        return known


def _least(model: str, named: Named) -> int:
    return min([speed for name, speed in named if model_matches(model, name)], default=0)
