"""What the agent knows of one assignment, and the states it goes through.

An assignment is one start of one replica on this node. It is recorded before anything is done about it, and it ends
exactly once: in one `Ended` report, made when its process is gone and its partition is free again. Afterwards only its
key stays for a while (`Closed`), so that an order repeated late starts nothing.

    intended ──▶ starting ──▶ running ──▶ stopping ──▶ ending ──▶ (closed)
        └──▶ prepared ──▶┘      ▲ └▶ suspending ─▶ suspended ┐   ▲
                                └──── resuming ◀─────────────┘   │
                                           every state may go ───┘

`TRANSITIONS` is that picture as a table; a move that is not in it is a programmer's error.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Go, Start

#: `intended`: recorded; the partition is being made. `prepared`: a member of a gang that waits for `Go`. `starting`:
#: handed to the launcher. `running`: its process runs. `suspending`: its work is being taken off the card.
#: `suspended`: it lies in the host's memory, halted, and holds no card. `resuming`: it is being put back. `stopping`:
#: told to end. `ending`: no process (any more); the partition is being undone.
State: TypeAlias = Literal[
    "intended", "prepared", "starting", "running", "suspending", "suspended", "resuming", "stopping", "ending"
]

TRANSITIONS: dict[State, frozenset[State]] = {
    "intended": frozenset({"prepared", "starting", "running", "stopping", "ending"}),
    "prepared": frozenset({"starting", "running", "stopping", "ending"}),
    "starting": frozenset({"running", "stopping", "ending"}),
    "running": frozenset({"suspending", "stopping", "ending"}),
    "suspending": frozenset({"running", "suspended", "stopping", "ending"}),
    "suspended": frozenset({"resuming", "stopping", "ending"}),
    "resuming": frozenset({"running", "suspended", "stopping", "ending"}),
    "stopping": frozenset({"ending"}),
    "ending": frozenset(),
}

#: States in which a process is known to be there.
WITH_PROCESS: frozenset[State] = frozenset({"running", "suspending", "suspended", "resuming", "stopping"})

#: States in which nothing is held on the cards, or nobody knows whether.
WITHOUT_PARTITION: frozenset[State] = frozenset({"suspended", "resuming", "ending"})

Outcome: TypeAlias = Literal["exited", "signalled", "stopped", "refused", "lost"]


class InvariantViolated(Exception):
    """The core contradicts itself: the agent stops taking orders and exits, its jobs go on."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the `Ended` report will say, settled by the first cause: a later one changes nothing."""

    outcome: Outcome
    exit_code: int = 0
    signal: int = 0
    code: str = ""
    detail: str = ""
    #: Wall time of the end; 0: that of the report.
    at_ms: int = 0


class Assignment(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One assignment that has not ended. Saved in the ledger as it stands here."""

    key: AssignmentKey
    start: Start
    #: Of the boot in which it was taken: processes do not survive the next.
    boot_id: str
    state: State = "intended"
    #: The gang's rendezvous, once every member is prepared.
    go: Go | None = None
    #: Held for it on this node: a gang's rendezvous or a service's listening port. 0: it needs none.
    port: int = 0
    #: The port was found free. Not saved: after a restart it is looked at again while nothing runs on it.
    has_port: bool = False
    #: The partition exists. Not saved: the partition maker's books are in memory too.
    has_partition: bool = False
    #: 0 until the process runs.
    pid: int = 0
    #: Wall time of the process's start, for reports; 0 before.
    started_ms: int = 0
    #: A `Started` report was made.
    told_started: bool = False
    #: Node clock at which a gang's member gives up waiting for `Go`; 0: not waiting.
    hold_until_ms: int = 0
    #: Node clock at which the time limit strikes; 0: no limit, or not running.
    limit_at_ms: int = 0
    #: How long it was halted in turns with others, as far as `limit_at_ms` has been moved for it.
    halted_ms: int = 0
    #: Set by the first cause of the end, such as a `Stop`; None while it should run.
    verdict: Verdict | None = None
    #: Between SIGTERM and SIGKILL, of the stop that is under way.
    grace_ms: int = 0
    #: Node clock of that SIGKILL; 0: no stop asked of the launcher yet.
    kill_at_ms: int = 0
    #: Node clock of the next try to undo a partition that would not go; 0: none is due.
    undo_at_ms: int = 0
    undo_tries: int = 0
    #: The newest order to suspend or resume it, and which of the two that was.
    step: int = 0
    wants_suspended: bool = False
    #: The step that the way under way, or the last one, was begun for.
    moving_step: int = 0
    #: Node clock since which it is off its card; 0: it is on it.
    off_card_ms: int = 0
    #: While it is suspended: those of its processes that were on the card, and the host memory that their work takes.
    gpu_pids: tuple[int, ...] = ()
    image_mib: int = 0

    @property
    def needs_port(self) -> bool:
        return bool(self.start.launch.service) or self.start.launch.replicas > 1

    @property
    def may_start(self) -> bool:
        """Nothing but its partition and port keep it from starting."""
        return self.verdict is None and (not self.start.hold or self.go is not None)

    @property
    def is_on_cards(self) -> bool:
        """A new agent has its partition to take over: others may have the place of one that left it to be suspended,
        also while that one is ended.
        """
        return self.state not in WITHOUT_PARTITION and not self.off_card_ms

    @property
    def is_ready(self) -> bool:
        return self.has_partition and (self.has_port or not self.needs_port)


class Closed(msgspec.Struct, kw_only=True):
    """The key of an assignment that has ended, or was stopped before it was known (a tombstone). Never starts again."""

    #: Number of its `Ended` report.
    report: int
    #: Node clock when that report was known to be delivered; None: not yet.
    delivered_ms: int | None = None
