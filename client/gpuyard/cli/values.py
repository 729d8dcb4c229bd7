"""What is typed on a command line made into values, with refusals that name what was found and what is expected.

Every number of a command line is read here: the ranges stand beside the options, the words here. A parser is also given
the option's default, which is a value already.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import typer

from gpuyard_protocol.units import Duration


def whole(text: str | int) -> int:
    """Any whole number: the yard says which ones it takes."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"found {text!r}; expected a whole number") from None


def count(least: int, most: int | None = None) -> Callable[[str | int], int]:
    """A parser of whole numbers from `least` to `most`; None: as many as there are."""
    expected = f"expected a whole number {_range(least, most)}"

    def parse(text: str | int) -> int:
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(f"found {text!r}; {expected}") from None
        if value < least or (most is not None and value > most):
            raise typer.BadParameter(f"found {value}; {expected}")
        return value

    return parse


def amount(least: float, unit: str = "") -> Callable[[str | float], float]:
    """A parser of numbers of at least `least`, which may have a fraction."""
    expected = f"expected a number{f' of {unit}' if unit else ''} {_range(least, None)}, such as {max(least, 0.5):g}"

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise typer.BadParameter(f"found {text!r}; {expected}")
        return value

    return parse


def length_s(text: str | float) -> float:
    """A length of time in seconds, which is what a bare number means; 0: none."""
    try:
        value = float(text)
    except ValueError:
        try:
            return int(Duration.parse(text)) / 1000
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"found {text!r}; expected {Duration.EXPECTED}, or a number of seconds")
    return value


def _range(least: float, most: float | None) -> str:
    return f"of at least {least:g}" if most is None else f"from {least:g} to {most:,}"


def job_number(text: str) -> int:
    """From 1 on, in digits."""
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise typer.BadParameter(f"found {text!r}; expected a job's number, such as 17 (see: gpuyard jobs)")
