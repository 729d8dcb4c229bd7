"""What is typed on a command line made into values, with refusals that name what was found and what is expected."""

from __future__ import annotations

import typer


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"found {text!r}; expected a whole number") from None


def job_number(text: str) -> int:
    """From 1 on, in digits."""
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise typer.BadParameter(f"found {text!r}; expected a job's number, such as 17 (see: gpuyard jobs)")
