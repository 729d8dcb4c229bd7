"""Calls into NVML that tolerate what a card, a driver version or a missing privilege does not give.

Three ways to ask: `checked` for what must be answered, `optional` for what may be missing, and `code_of` for those who
decide by the driver's code. A card that is gone is `Lost` in all of them, whatever was asked. Codes are compared by
number: the binding's exceptions neither hash nor compare with anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import pynvml

T = TypeVar("T")

MIB = 2**20

#: Codes that mean, whatever was asked: this card is gone until somebody does something about it.
_LOST: dict[int, str] = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "the driver lost the card",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the card must be reset",
}
#: By the type a numbered figure says it has: where its value is.
_MEMBERS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}


class Lost(Exception):
    """A call found its card gone; the text says why."""


def code_of(error: pynvml.NVMLError) -> int:
    return int(error.value)


def checked(function: Callable[..., T], *arguments: object, **named: object) -> T:
    """Raises `Lost` when the card is gone, `NVMLError` for anything else."""
    try:
        return function(*arguments, **named)
    except pynvml.NVMLError as error:
        if code_of(error) in _LOST:
            raise Lost(f"{_LOST[code_of(error)]} ({error})") from None
        raise


def optional(function: Callable[..., T], *arguments: object, **named: object) -> T | None:
    """None for what is not supported, not permitted, or newer than the driver. Raises `Lost`."""
    try:
        return checked(function, *arguments, **named)
    except pynvml.NVMLError:
        return None


def fields(handle: object, numbers: Sequence[int]) -> tuple[int | None, ...]:
    """Some of the driver's numbered figures, in one call; None for one that the card does not give."""
    values = optional(pynvml.nvmlDeviceGetFieldValues, handle, list(numbers))
    if values is None:
        return (None,) * len(numbers)
    return tuple(
        int(getattr(value.value, _MEMBERS[value.valueType]))
        if value.nvmlReturn == pynvml.NVML_SUCCESS and value.valueType in _MEMBERS
        else None
        for value in values
    )


def field(handle: object, number: int) -> int | None:
    return fields(handle, (number,))[0]
