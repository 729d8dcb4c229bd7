"""A real yard of two cards for what gives way: who works at night leaves at once for who has cards of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from support.yard import Yard, running_yard

#: Submitting to `night` is working at night: a scavenger's queue, whose jobs are reclaimed after a second.
SETTINGS = """
[scheduler]
reclaim_after_ms = 1000
preempt_every_ms = 1000
[tenants.main]
queue = "lab"
[queues.lab]
grants = [{ nominal = 2 }]
[queues.night]
parent = "lab"
scavenger = true
"""


@contextlib.contextmanager
def night_yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="2xH100-80GB", settings=SETTINGS) as yard:
        yield yard
