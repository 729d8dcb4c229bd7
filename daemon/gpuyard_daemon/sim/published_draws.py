"""The very pods and hosts of the published fills, drawn again: which pods came in which order, which host goes first.

The published runs took seeds 42 to 51 of the generator behind Go's `math/rand` and drew from it, in this order: one
number that is not used; the order of all pods; pods to remove or to add until 130 % of the GPUs are asked for; ten
numbers while the parts of their scheduler start; the rank of each host, by which equal hosts are preferred. A policy
without chance of its own then places each pod as it did there, so its allocation must come out equal, not just near.

The generator is additive and lagged: x[n] = x[n-607] + x[n-273] modulo 2^64. Its table begins 7.8e12 steps into the
sequence of a simple first one; `_beginning` leaps there by multiplying polynomials, so that no table is copied here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np

from gpuyard_daemon.sim.openb import Ask, HostShape

#: Seeds of the ten published runs.
FIRST_SEED: Final = 42
#: Arrived demand at the end of a run, in tenths of capacity.
_ASKED_TENTHS: Final = 13
#: Numbers drawn while the scheduler starts (each of its watches draws how long it may last).
_DRAWN_BY_STARTING: Final = 10

_LENGTH: Final = 607
_TAP: Final = 273
_STEPS: Final = 7_800_000_000_000
_WORD: Final = (1 << 64) - 1
_PRIME: Final = (1 << 31) - 1
Words = np.ndarray[tuple[int], np.dtype[np.uint64]]


def _seeded(seed: int, high: int, low: int) -> list[int]:
    """Words of three numbers each of the multiplicative generator that seeds both sequences."""
    number = seed % _PRIME or 89_482_311
    drawn = []
    for _ in range(20 + 3 * _LENGTH):
        number = number * 48_271 % _PRIME
        drawn.append(number)
    return [
        (drawn[at] << high ^ drawn[at + 1] << low ^ drawn[at + 2]) & _WORD for at in range(20, 20 + 3 * _LENGTH, 3)
    ]  # fmt: skip


def _product(left: Words, right: Words) -> Words:
    """Of two polynomials below x^607, modulo x^607 = x^334 + 1."""
    product = np.convolve(left, right)
    for power in range(len(product) - 1, _LENGTH - 1, -1):
        product[power - _LENGTH : power - _LENGTH + 1] += product[power : power + 1]
        product[power - _TAP : power - _TAP + 1] += product[power : power + 1]
    return product[:_LENGTH]


@cache
def _beginning() -> tuple[int, ...]:
    """The table that a seed's words are mixed with, by slot."""
    slots = _seeded(1, 20, 10)
    sequence = [slots[(_LENGTH - _TAP - 1 - at) % _LENGTH] for at in range(_LENGTH)]
    for at in range(_LENGTH):
        sequence.append((sequence[at] + sequence[at + _LENGTH - _TAP]) & _WORD)
    known = np.array(sequence, dtype=np.uint64)
    leap, factor = np.zeros(_LENGTH, dtype=np.uint64), np.zeros(_LENGTH, dtype=np.uint64)
    leap[0], factor[1] = 1, 1
    for bit in range(_STEPS.bit_length()):
        if _STEPS >> bit & 1:
            leap = _product(leap, factor)
        factor = _product(factor, factor)
    table = [0] * _LENGTH
    for at in range(_LENGTH):
        word = (leap * known[at : at + _LENGTH]).sum(dtype=np.uint64)
        table[(2 * _LENGTH - _TAP - 1 - _STEPS - at) % _LENGTH] = int(word)
    return tuple(table)


class Draws:
    """The generator's numbers for one seed."""

    def __init__(self, seed: int) -> None:
        self._slots = [own ^ common for own, common in zip(_seeded(seed, 40, 20), _beginning(), strict=True)]
        self._tap, self._feed = 0, _LENGTH - _TAP

    def bits(self) -> int:
        """The next 63 bits."""
        self._tap = (self._tap - 1) % _LENGTH
        self._feed = (self._feed - 1) % _LENGTH
        word = self._slots[self._feed] = (self._slots[self._feed] + self._slots[self._tap]) & _WORD
        return word & (_WORD >> 1)

    def below(self, limit: int) -> int:
        """Less than `limit`: the remainder of 31 bits, drawn again where that would favour small numbers."""
        if limit & (limit - 1) == 0:
            return (self.bits() >> 32) & (limit - 1)
        while (drawn := self.bits() >> 32) >= (1 << 31) - (1 << 31) % limit:
            pass
        return drawn % limit

    def shuffled(self, items: Sequence[Ask]) -> list[Ask]:
        """From the last place on, each exchanged with one before it, found by the high half of a product."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            limit = last + 1
            while (product := (self.bits() >> 31) * limit) & 0xFFFF_FFFF < (1 << 32) % limit:
                pass
            other = product >> 32
            order[last], order[other] = order[other], order[last]
        return order

    def ranks(self, count: int) -> list[int]:
        """A permutation."""
        ranks = [0] * count
        for at in range(count):
            other = self.below(at + 1)
            ranks[at], ranks[other] = ranks[other], at
        return ranks


def published_run(
    asks: Sequence[Ask], hosts: Sequence[HostShape], seed: int
) -> tuple[list[Ask], tuple[HostShape, ...]]:
    """The pods in order of arrival, and the hosts, preferred first, of the published run of a seed."""
    draws = Draws(seed)
    draws.bits()
    order = draws.shuffled(asks)
    demand, limit = sum(ask.total_milli for ask in order), 100 * _ASKED_TENTHS * sum(host.gpus for host in hosts)
    if demand > limit:
        while demand > limit:
            demand -= order.pop(draws.below(len(order))).total_milli
    elif demand < limit:
        while demand + (ask := asks[draws.below(len(asks))]).milli <= limit:
            demand += ask.total_milli
            order.append(ask)
    for _ in range(_DRAWN_BY_STARTING):
        draws.bits()
    by_rank = sorted(zip(draws.ranks(len(hosts)), range(len(hosts)), strict=True))
    return order, tuple([hosts[number] for _, number in by_rank])
