"""Logarithms, powers and decay in whole numbers: the same on every machine, and exact to the last place that is kept.

Floating point would do for one machine. But a standby must reach the same bytes as the leader, and a library's
logarithm may differ in its last bit.
"""

from __future__ import annotations

from math import isqrt
from typing import Final

#: Parts of an octave in which logarithms are kept.
LOG_PARTS: Final = 256
_FRACTION_BITS: Final = 32
_ONE: Final = 1 << _FRACTION_BITS
#: 1 / ln 2, in millionths.
_PER_LN2: Final = 1_442_695


def _roots() -> tuple[int, ...]:
    """2^(1/2), 2^(1/4), 2^(1/8), … with so many fractional bits."""
    found, value = [], 2 << _FRACTION_BITS
    for _ in range(_FRACTION_BITS):
        value = isqrt(value << _FRACTION_BITS)
        found.append(value)
    return tuple(found)


_ROOTS: Final = _roots()


def log2_parts(value: int) -> int:
    """floor(256 * log2(value)) of a number above 0."""
    shift = max(0, value.bit_length() - 24)
    power = value >> shift
    for _ in range(8):
        power *= power
    return shift * LOG_PARTS + power.bit_length() - 1


def exp2_parts(parts: int) -> int:
    """2^(parts / 256), rounded down; 0 for what is below 1."""
    octaves, rest = divmod(parts, LOG_PARTS)
    value = _power(rest << (_FRACTION_BITS - 8))
    places = octaves - _FRACTION_BITS
    return value << places if places >= 0 else value >> -places


def _power(fraction: int) -> int:
    """2^(fraction / 2^32) with 32 fractional bits."""
    value = _ONE
    for place, root in enumerate(_ROOTS, start=1):
        if fraction >> (_FRACTION_BITS - place) & 1:
            value = value * root >> _FRACTION_BITS
    return value


def decayed(value: int, passed_ms: int, half_life_ms: int) -> int:
    """What is left of an amount."""
    if not value or passed_ms <= 0:
        return value
    halves, rest = divmod(passed_ms, half_life_ms)
    if halves >= 63:
        return 0
    # 2^-r = 2^(1-r) / 2 for 0 <= r < 1.
    left = _power(((half_life_ms - rest) << _FRACTION_BITS) // half_life_ms) if rest else 2 * _ONE
    return value * left >> (_FRACTION_BITS + 1 + halves)


def grown(rate: int, passed_ms: int, half_life_ms: int) -> int:
    """What a steady rate (per ms) has added in a time, with what decayed meanwhile taken off."""
    most = rate * half_life_ms * _PER_LN2 // 1_000_000
    return most - decayed(most, passed_ms, half_life_ms)
