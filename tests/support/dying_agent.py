"""An agent that dies at a chosen state of its ledger: `python -m support.dying_agent STATE MOMENT agent's arguments…`.

The production code has no such places. Here the ledger's commit is wrapped: when the first assignment comes to STATE
(or is `closed`, or its last report is `delivered`), the process ends by SIGKILL, `before` that is durable or `after`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import get_args

from gpuyard_agent import __main__ as agent
from gpuyard_agent.core.actions import Turn
from gpuyard_agent.core.book import Counters
from gpuyard_agent.core.model import State
from gpuyard_agent.ledger import Ledger

#: `ending` is never written: to die before `closed` is to die in it.
STATES: tuple[str, ...] = (*(state for state in get_args(State) if state != "ending"), "closed", "delivered")


def _has_come(turn: Turn, counters: Counters, state: str) -> bool:
    if state == "closed":
        return bool(turn.closed)
    if state == "delivered":
        # Of what ended, that is: the first reports are those of joining.
        return bool(counters.delivered == counters.reported > 2 and not turn.reports)
    return any(assignment.state == state for assignment in turn.saved.values())


def main() -> None:
    state, moment = sys.argv[1], sys.argv[2]
    commit, postpone = Ledger.commit, Ledger.postpone

    async def wrapped(self: Ledger, turn: Turn, reports: Sequence[tuple[int, bytes]], counters: Counters) -> None:
        is_there = _has_come(turn, counters, state)
        if is_there and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await commit(self, turn, reports, counters)
        if is_there:
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(self: Ledger, turn: Turn, counters: Counters) -> None:
        postpone(self, turn, counters)
        if state == "delivered" and _has_come(turn, counters, state):
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.commit = wrapped  # type: ignore[method-assign]
    Ledger.postpone = noted  # type: ignore[method-assign]
    sys.argv[1:3] = []
    agent.main()


if __name__ == "__main__":
    main()
