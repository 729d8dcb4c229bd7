"""Quantities as integers, and the words people write for them.

Inside the yard every amount is a plain integer whose name ends in its unit: `share_milli` (thousandths of one GPU's
compute), `memory_mib`, `cpu_milli`, `timeout_ms`. Floats never enter a decision. The classes of this module exist for
requests alone: `Memory.parse("5Gi")` is an `int` of MiB that prints as `5Gi` again.

Each class parses what people already type (Kubernetes' `5Gi`, `500m`; Slurm's `1-12:00:00`) and refuses a bare number
where its unit would be a guess.
"""

from __future__ import annotations

import re
from datetime import datetime
from fractions import Fraction
from math import ceil
from typing import Annotated, ClassVar, Self, TypeAlias

import msgspec

MILLI = 1000
MIB_PER_GIB = 1024

#: A count or a number of something in a request: never negative, and exact in every language that reads JSON.
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
#: A place in a file; negative: that many bytes before its end.
Offset: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**53) + 1, le=2**53 - 1)]


class Quantity(int):
    """An integer amount with a unit; the base of everything a request may write as text."""

    #: What a message says was expected, with an example.
    EXPECTED: ClassVar[str]
    #: No yard needs more: sums of such amounts stay far inside 64 bits.
    MOST: ClassVar[int] = 2**40

    @classmethod
    def parse(cls, text: str | int | float) -> Self:
        """The amount, or `ValueError` that names what was found and what was expected."""
        raise NotImplementedError  # pragma: no cover - abstract

    @classmethod
    def _bounded(cls, amount: int, found: object) -> Self:
        if amount > cls.MOST:
            raise ValueError(f"found {found!r}; expected at most {cls(cls.MOST)}")
        return cls(amount)

    @classmethod
    def _refuse(cls, found: object) -> ValueError:
        return ValueError(f"found {found!r}; expected {cls.EXPECTED}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


_BYTES_PER = {
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_MEMORY = re.compile(r"([0-9]{1,13}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]{1,3})")


class Memory(Quantity):
    """Memory in MiB, rounded up: `5Gi`, `512Mi`, `80GB`, `1.5Ti`."""

    EXPECTED = "an amount of memory with its unit, such as '5Gi', '512Mi' or '80GB'"

    @classmethod
    def parse(cls, text: str | int | float) -> Self:
        match = _MEMORY.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None or (unit := _BYTES_PER.get(match[2].lower())) is None:
            raise cls._refuse(text)
        return cls._bounded(ceil(Fraction(match[1]) * unit / 2**20), text)

    def __str__(self) -> str:
        if self and self % MIB_PER_GIB == 0:
            return f"{int(self) // MIB_PER_GIB}Gi"
        return f"{int(self)}Mi"


_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?")


def _thousandths(text: str | int | float) -> int | None:
    """`0.3`, `"0.3"` → 300; None if it is no plain decimal number or finer than a thousandth."""
    if isinstance(text, bool):
        return None
    shown = str(text).strip()
    if not _DECIMAL.fullmatch(shown):
        return None
    exact = Fraction(shown) * MILLI
    return int(exact) if exact.denominator == 1 else None


class _Thousandths(Quantity):
    """What people write with a fraction, and we count in thousandths."""

    @classmethod
    def parse(cls, text: str | int | float) -> Self:
        milli = _thousandths(text)
        if milli is None:
            raise cls._refuse(text)
        return cls(milli)

    def __str__(self) -> str:
        return format_milli(int(self))


class Share(_Thousandths):
    """A fraction of one GPU in thousandths: `0.3`, `"0.3"`, `"30%"`; more than 0, at most 1."""

    EXPECTED = "a fraction of one GPU between 0.001 and 1, such as 0.3 or '30%'"

    @classmethod
    def parse(cls, text: str | int | float) -> Self:
        if isinstance(text, str) and text.strip().endswith("%"):
            percent = _thousandths(text.strip()[:-1])
            milli = percent // 100 if percent is not None and percent % 100 == 0 else None
        else:
            milli = _thousandths(text)
        if milli is None or not 0 < milli <= MILLI:
            raise cls._refuse(text)
        return cls(milli)


class Cpus(_Thousandths):
    """CPU cores in thousandths: `4`, `0.5`, `"500m"`."""

    EXPECTED = "a number of CPU cores, such as 4, 0.5 or '500m'"

    @classmethod
    def parse(cls, text: str | int | float) -> Self:
        if isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}m", text.strip()):
            return cls(int(text.strip()[:-1]))
        return super().parse(text)


class GpuAmount(_Thousandths):
    """GPU compute in thousandths of a card: `8`, `2.5`, `"0.5"`; 0 where that means no limit."""

    EXPECTED = "a number of GPUs, such as 8 or 2.5, or 0 for no limit"


class Moment(str):
    """A point in time: ISO 8601 with its zone, or `+2h` from the acceptance on. The text is kept as written."""

    __slots__ = ()
    EXPECTED = "a time with its zone, such as '2030-01-01T08:00:00Z', or a wait, such as '+2h'"

    @classmethod
    def parse(cls, text: object) -> Self:
        moment = cls(text.strip()) if isinstance(text, str) else cls()
        try:
            known = bool(moment.after_ms or moment.at_ms)
        except (ValueError, OverflowError):
            known = False
        if not known:
            raise ValueError(f"found {text!r}; expected {cls.EXPECTED}")
        return moment

    @property
    def after_ms(self) -> int:
        """A wait in ms; 0 if it is a time."""
        return int(Duration.parse(self[1:])) if self.startswith("+") else 0

    @property
    def at_ms(self) -> int:
        """Unix milliseconds; 0 if it is a wait."""
        if self.startswith("+"):
            return 0
        found = datetime.fromisoformat(self)
        if found.tzinfo is None:
            raise ValueError("without a zone it would be a guess")
        return max(1, int(found.timestamp() * 1000))


_MS_PER = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION_PART = re.compile(r"([0-9]{1,12})(ms|min|[smhdw])")
_CLOCK = re.compile(r"(?:([0-9]{1,5})-)?([0-9]{1,9})(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?")


class Duration(Quantity):
    """A length of time in ms: `90s`, `1h30m`, `500ms`, and Slurm's `D-HH[:MM[:SS]]`, `HH:MM:SS`, `MM:SS`."""

    EXPECTED = "a length of time, such as '90s', '1h30m', '01:30:00' or '1-12:00:00'"
    #: A hundred years.
    MOST = 36_525 * 86_400_000

    @classmethod
    def parse(cls, text: str | int | float) -> Self:
        if not isinstance(text, str):
            raise cls._refuse(text)
        compact = text.strip().replace(" ", "")
        parts = _DURATION_PART.findall(compact)
        if parts and "".join(number + unit for number, unit in parts) == compact:
            return cls._bounded(sum(int(number) * _MS_PER[unit] for number, unit in parts), text)
        milliseconds = _clock_ms(compact)
        if milliseconds is None:
            raise cls._refuse(text)
        return cls._bounded(milliseconds, text)

    def __str__(self) -> str:
        return format_ms(int(self))


def _clock_ms(text: str) -> int | None:
    """Slurm's clock forms; None if it is none of them (a bare number is none: minutes or seconds would be a guess)."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    days, *fields = match.groups()
    numbers = [int(part) for part in fields if part is not None]
    if days is None and len(numbers) == 1:
        return None
    if days is not None or len(numbers) == 3:  # D-HH[:MM[:SS]] or HH:MM:SS
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:  # MM:SS
        hours, (minutes, seconds) = 0, numbers
    if seconds > 59 or (minutes > 59 and (days is not None or len(numbers) == 3)):
        return None
    return ((int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) * 1000


def format_milli(milli: int) -> str:
    """300 → `0.3`, 2000 → `2`."""
    whole, rest = divmod(milli, MILLI)
    return str(whole) if rest == 0 else f"{whole}.{rest:03d}".rstrip("0")


def format_mib(mib: int) -> str:
    """5120 → `5Gi`."""
    return str(Memory(mib))


def format_ms(milliseconds: int) -> str:
    """5400000 → `1h30m`; 0 → `0s`."""
    if milliseconds < 0:
        return "-" + format_ms(-milliseconds)
    if milliseconds % 1000:
        seconds, rest = divmod(milliseconds, 1000)
        return (format_ms(seconds * 1000) if seconds else "") + f"{rest}ms"
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        count, milliseconds = divmod(milliseconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


_PROFILE = re.compile(r"(?:[0-9]{1,2}c\.)?[0-9]{1,2}g\.[0-9]{1,4}gb(?:[+-][a-z]+(?:\.[a-z]+)*)*")


class MigProfile(str):
    """A MIG profile's name as the driver prints it: `1g.10gb`, `1g.10gb+me`, `1c.3g.40gb`."""

    __slots__ = ()
    EXPECTED = "a MIG profile such as '1g.10gb' or '3g.40gb'"

    @classmethod
    def parse(cls, text: object) -> Self:
        name = text.strip().lower() if isinstance(text, str) else ""
        if not _PROFILE.fullmatch(name):
            raise ValueError(f"found {text!r}; expected {cls.EXPECTED}")
        return cls(name)


_GPU_MODEL = re.compile(r"[A-Za-z][A-Za-z0-9_. -]{0,63}")
_GPU_COUNT = re.compile(r"[0-9]{1,4}")


class GpuWish(str):
    """Which cards, in one word: `A100`, `A100:80GB`, `A100:80GB:4`, `A100|H100:2`: models, least card memory, count.

    The text is kept as written; `models`, `memory_mib` and `cards` read it.
    """

    __slots__ = ()
    EXPECTED = "GPU models with optional card memory and count, such as 'H100', 'A100|H100' or 'A100:80GB:4'"

    @classmethod
    def parse(cls, text: object) -> Self:
        if not isinstance(text, str):
            raise ValueError(f"found {text!r}; expected {cls.EXPECTED}")
        wish = cls(text.strip())
        models, *rest = wish.split(":")
        counts = [part for part in rest if _GPU_COUNT.fullmatch(part)]
        memories = [part for part in rest if not _GPU_COUNT.fullmatch(part)]
        well_formed = all(_GPU_MODEL.fullmatch(model) for model in models.split("|"))
        if not well_formed or len(memories) > 1 or len(counts) > 1 or any(not 0 < int(n) <= 1024 for n in counts):
            raise ValueError(f"found {text!r}; expected {cls.EXPECTED}")
        if memories:
            Memory.parse(memories[0])
        return wish

    @property
    def models(self) -> tuple[str, ...]:
        """Acceptable models, sorted."""
        return tuple(sorted({model.strip() for model in self.split(":")[0].split("|")}))

    @property
    def memory_mib(self) -> int:
        """Least memory of the card, 0 if it does not matter."""
        return next((int(Memory.parse(part)) for part in self.split(":")[1:] if not _GPU_COUNT.fullmatch(part)), 0)

    @property
    def cards(self) -> int | None:
        """How many, where it says so."""
        return next((int(part) for part in self.split(":")[1:] if _GPU_COUNT.fullmatch(part)), None)
