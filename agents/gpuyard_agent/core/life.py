"""The life of one assignment: what each event does to it.

Rules of this file:

- The first cause of an end is the one reported (`Verdict`); what comes later only hastens it.
- Nothing is undone while a process may use it: the order is process gone, partition undone, `Ended` told, launcher
  told to forget.
- An event that does not fit the state (late, repeated) changes nothing.
"""

from __future__ import annotations

from gpuyard_agent.core import leases
from gpuyard_agent.core.actions import (
    ForgetProcess,
    HoldPort,
    PreparePartition,
    ResumeProcess,
    StartProcess,
    StopProcess,
    SuspendProcess,
    UndoPartition,
)
from gpuyard_agent.core.book import Book
from gpuyard_agent.core.events import (
    PartitionFailed,
    PortTaken,
    ProcessesListed,
    ProcessExited,
    ProcessFound,
    ProcessRefused,
    UndoFailed,
)
from gpuyard_agent.core.model import Assignment, InvariantViolated, Verdict
from gpuyard_protocol.nodes import NODE_FAULTS, Ended, Go, Prepared, Start, Started, Stop
from gpuyard_protocol.resources import devices_of
from gpuyard_protocol.units import format_ms

#: A member of a gang gives its partition back after this long without `Go`. The daemon gives up after 30 s; this is for
#: one that does not come back.
HOLD_MS_MAX = 600_000
#: First pause before a partition that would not go is undone again; it doubles up to the second.
UNDO_PAUSE_MS = 2_000
UNDO_PAUSE_MS_MAX = 60_000
#: The card under it broke: the job is not to blame and runs again elsewhere.
DEVICE_FAULT = "DeviceFault"


# --- what orders do ---


def begin(book: Book, start: Start, go: Go | None = None) -> Assignment:
    """A key never seen before: recorded, and its partition asked for."""
    assignment = Assignment(key=start.key, start=start, boot_id=book.boot_id, go=go)
    book.add(assignment)
    if faults := _faults_under(book, assignment):
        _end(book, assignment, Verdict(outcome="lost", code=DEVICE_FAULT, detail=faults))
    else:
        _ask_for_place(book, assignment)
    return assignment


def let_go(book: Book, assignment: Assignment, go: Go) -> None:
    if assignment.go is None and assignment.start.hold and assignment.verdict is None:
        assignment.go = go
        assignment.hold_until_ms = 0
        book.save(assignment)
        _advance(book, assignment)


def stop(book: Book, assignment: Assignment, verdict: Verdict, grace_ms: int) -> None:
    """End it, whatever it does now. Asked again: the shorter grace holds."""
    if assignment.state == "ending":
        return
    is_shorter = grace_ms < assignment.grace_ms
    if assignment.verdict is not None and not is_shorter:
        return
    if assignment.verdict is None:
        assignment.verdict = verdict
    assignment.grace_ms = grace_ms
    book.save(assignment)
    match assignment.state:
        case "prepared":
            _end(book, assignment, assignment.verdict)
        case "starting" | "running" | "stopping":
            stop_now(book, assignment)
        case "suspended":
            kill(book, assignment)
        case "suspending" | "resuming":  # a process in the middle of that cannot see a signal
            assignment.kill_at_ms = book.now_ms + grace_ms
            if grace_ms:
                book.expect(assignment, assignment.kill_at_ms)
            else:
                kill(book, assignment)
        case _:  # intended: what is being made is undone once it is there
            _advance(book, assignment)


def stop_now(book: Book, assignment: Assignment) -> None:
    """SIGTERM, and SIGKILL at the end of what is left of its grace."""
    if assignment.kill_at_ms and assignment.state != "stopping":
        assignment.grace_ms = max(0, assignment.kill_at_ms - book.now_ms)
    if assignment.state != "stopping":
        book.move(assignment, "stopping")
    _stop_process(book, assignment)


def kill(book: Book, assignment: Assignment) -> None:
    """At once: what is suspended, or on its way, can use no grace."""
    assignment.grace_ms = 0
    book.move(assignment, "stopping")
    book.save(assignment)
    _stop_process(book, assignment)


def tombstone(book: Book, order: Stop) -> None:
    """A stop for a key never seen: it will never start here."""
    book.close(order.key, Ended(key=order.key, outcome="stopped", at_ms=book.wall_ms, detail=order.reason))


def lose_card(book: Book, assignment: Assignment, detail: str) -> None:
    """The card under it broke: nothing there can end in an orderly way."""
    stop(book, assignment, Verdict(outcome="lost", code=DEVICE_FAULT, detail=detail), 0)
    if assignment.state == "ending" and assignment.undo_at_ms:
        # It had ended, and its partition would not go: it need not, any more.
        partition_undone(book, assignment)


def _faults_under(book: Book, assignment: Assignment) -> str:
    """What is wrong with the cards it lies on; "" while nothing is."""
    return "; ".join(book.broken[uuid] for uuid in devices_of(assignment.start.partition) if uuid in book.broken)


# --- partition and port ---


def partition_ready(book: Book, assignment: Assignment) -> None:
    assignment.has_partition = True
    _advance(book, assignment)


def partition_failed(book: Book, assignment: Assignment, event: PartitionFailed) -> None:
    verdict = Verdict(outcome="refused", code=event.code, detail=event.detail)
    if assignment.state in ("intended", "prepared"):
        _end(book, assignment, assignment.verdict or verdict)
    elif assignment.state != "ending":
        # A process runs on cards that could not be taken over after a restart of the agent: it must not go on there.
        code, detail = "PartitionLost", f"its partition could not be taken over: {event.detail}"
        stop(book, assignment, Verdict(outcome="lost", code=code, detail=detail), assignment.start.launch.stop_grace_ms)


def port_free(book: Book, assignment: Assignment, port: int) -> None:
    if assignment.port == port:
        assignment.has_port = True
        _advance(book, assignment)


def port_taken(book: Book, assignment: Assignment, event: PortTaken) -> None:
    if assignment.state == "intended" and assignment.port == event.port:
        book.next_port(assignment)
        book.save(assignment)
        _ask_for_port(book, assignment)


def _ask_for_place(book: Book, assignment: Assignment) -> None:
    start = assignment.start
    book.act(PreparePartition(start.key, start.partition, start.launch))
    if assignment.needs_port:
        _ask_for_port(book, assignment)


def _ask_for_port(book: Book, assignment: Assignment) -> None:
    if assignment.port:
        book.act(HoldPort(assignment.key, assignment.port))
    elif assignment.verdict is None:
        detail = "every port from 29500 to 29999 is held on this node"
        assignment.verdict = Verdict(outcome="refused", code="NoFreePort", detail=detail)
        _advance(book, assignment)


def _advance(book: Book, assignment: Assignment) -> None:
    """Go on as far as what is there allows."""
    if assignment.state == "intended" and assignment.has_partition and assignment.verdict is not None:
        _end(book, assignment, assignment.verdict)
    elif assignment.state in ("intended", "prepared") and assignment.is_ready:
        if assignment.may_start and leases.has_run_out(book, assignment):
            detail = "the daemon was not heard for so long that the job may have been started elsewhere"
            _end(book, assignment, Verdict(outcome="refused", code=leases.LEASE_EXPIRED, detail=detail))
        elif assignment.may_start:
            book.move(assignment, "starting")
            _start_process(book, assignment)
        elif assignment.state == "intended":
            book.move(assignment, "prepared")
            assignment.hold_until_ms = book.now_ms + HOLD_MS_MAX
            book.expect(assignment, assignment.hold_until_ms)
            book.save(assignment)
            book.report(Prepared(key=assignment.key, port=assignment.port))


# --- the process ---


def _start_process(book: Book, assignment: Assignment) -> None:
    launch = assignment.start.launch
    renewed_ms = book.renewed_ms if launch.lease_ms else 0
    book.act(StartProcess(assignment.key, launch, assignment.go, assignment.port, renewed_ms))


def _stop_process(book: Book, assignment: Assignment) -> None:
    """Only of a process known to run: a launcher that is asked to start it does not yet know whom to stop."""
    if assignment.pid:
        assignment.kill_at_ms = book.now_ms + assignment.grace_ms
        book.act(StopProcess(assignment.key, assignment.grace_ms, assignment.pid))


def ask_to_suspend(book: Book, assignment: Assignment) -> None:
    """Also to halt one again that is suspended: the shell looks how far it has come."""
    start = assignment.start
    book.act(
        SuspendProcess(
            assignment.key,
            assignment.moving_step,
            start.partition,
            assignment.pid,
            assignment.gpu_pids,
            assignment.image_mib,
            start.launch.memory_limit_mib,
        )
    )


def ask_to_resume(book: Book, assignment: Assignment) -> None:
    start = assignment.start
    book.act(
        ResumeProcess(
            assignment.key,
            assignment.moving_step,
            start.partition,
            start.launch,
            assignment.pid,
            assignment.gpu_pids,
            assignment.image_mib,
        )
    )


def process_started(book: Book, assignment: Assignment, pid: int, at_ms: int) -> None:
    if assignment.pid or assignment.state not in ("intended", "prepared", "starting", "stopping"):
        return
    assignment.pid, assignment.started_ms = pid, at_ms
    _tell_started(book, assignment)
    if assignment.verdict is not None:
        if assignment.state != "stopping":
            book.move(assignment, "stopping")
        _stop_process(book, assignment)
        return
    book.move(assignment, "running")
    if assignment.start.launch.time_limit_ms:
        ran_ms = max(0, book.wall_ms - at_ms)
        assignment.limit_at_ms = book.now_ms + max(0, assignment.start.launch.time_limit_ms - ran_ms)
        book.expect(assignment, assignment.limit_at_ms)


def time_halted(book: Book, assignment: Assignment, total_ms: int) -> None:
    """Its time limit is about the time that it could use."""
    more_ms = total_ms - assignment.halted_ms
    if assignment.limit_at_ms and more_ms > 0:
        assignment.limit_at_ms += more_ms
        assignment.halted_ms = total_ms
        book.expect(assignment, assignment.limit_at_ms)


def _tell_started(book: Book, assignment: Assignment) -> None:
    """The row rides with the report: after a crash in between, the launcher still says that it runs."""
    if not assignment.told_started:
        assignment.told_started = True
        port = assignment.port if assignment.start.launch.service else 0
        book.report(Started(key=assignment.key, at_ms=assignment.started_ms, pid=assignment.pid, port=port))
    book.save(assignment)


def process_refused(book: Book, assignment: Assignment, event: ProcessRefused) -> None:
    if assignment.pid == 0 and assignment.state in ("starting", "stopping"):
        verdict = Verdict(outcome="refused", code=event.code, detail=event.detail)
        _end(book, assignment, assignment.verdict or verdict)


def process_exited(book: Book, assignment: Assignment, event: ProcessExited) -> None:
    if assignment.state == "ending":
        return
    if not assignment.told_started and event.started_ms:  # its end overtook the answer to its start
        assignment.started_ms = event.started_ms
        _tell_started(book, assignment)
    cause, at_ms = assignment.verdict, event.at_ms or book.wall_ms
    if cause is not None:
        code, detail = cause.code, cause.detail
        outcome = cause.outcome
    elif event.expired:
        outcome, code = "lost", leases.LEASE_EXPIRED
        detail = "the daemon was not heard for as long as its lease is: it may run elsewhere"
    elif event.lost:
        outcome, code, detail = "lost", "SupervisorLost", event.detail or "nobody saw how it ended"
    else:
        outcome, code, detail = ("signalled" if event.signal else "exited"), "", event.detail
    verdict = Verdict(
        outcome=outcome, exit_code=event.exit_code, signal=event.signal, code=code, detail=detail, at_ms=at_ms
    )
    _end(book, assignment, verdict)


# --- the end ---


def _end(book: Book, assignment: Assignment, verdict: Verdict) -> None:
    """No process (any more). Not saved: after a crash the launcher and the ledger lead to the same place."""
    book.move(assignment, "ending")
    assignment.verdict = verdict
    assignment.hold_until_ms = assignment.limit_at_ms = assignment.kill_at_ms = 0
    book.act(UndoPartition(assignment.key))


def partition_undone(book: Book, assignment: Assignment) -> None:
    verdict = assignment.verdict
    if assignment.state != "ending" or verdict is None:
        return
    ended = Ended(
        key=assignment.key,
        outcome=verdict.outcome,
        at_ms=verdict.at_ms or book.wall_ms,
        exit_code=verdict.exit_code,
        signal=verdict.signal,
        code=verdict.code,
        detail=verdict.detail,
        started_ms=assignment.started_ms,
        node_fault=verdict.outcome == "refused" and verdict.code in NODE_FAULTS,
    )
    book.close(assignment.key, ended)
    book.act(ForgetProcess(assignment.key))


def undo_failed(book: Book, assignment: Assignment, event: UndoFailed) -> None:
    """Held until it goes: `Ended` would tell the daemon that the card is free. A fenced card is given to nobody."""
    if _faults_under(book, assignment):
        partition_undone(book, assignment)
    elif assignment.state == "ending":
        pause_ms = min(UNDO_PAUSE_MS << min(assignment.undo_tries, 10), UNDO_PAUSE_MS_MAX)
        assignment.undo_tries += 1
        assignment.undo_at_ms = book.now_ms + pause_ms
        book.expect(assignment, assignment.undo_at_ms)


# --- time ---


def deadline_of(assignment: Assignment) -> int:
    """Node clock of the next thing that time does to it; 0: nothing."""
    match assignment.state:
        case "prepared":
            return assignment.hold_until_ms
        case "running":
            return assignment.limit_at_ms
        case "suspending" | "resuming" if assignment.verdict is not None:
            return assignment.kill_at_ms
        case "ending":
            return assignment.undo_at_ms
        case _:
            return 0


def time_passed(book: Book, assignment: Assignment) -> None:
    """Its deadline has come."""
    launch = assignment.start.launch
    match assignment.state:
        case "prepared":
            detail = f"no word to go within {format_ms(HOLD_MS_MAX)}"
            stop(book, assignment, Verdict(outcome="stopped", code="HoldExpired", detail=detail), 0)
        case "running":
            detail = f"reached its time limit of {format_ms(launch.time_limit_ms)}"
            stop(book, assignment, Verdict(outcome="stopped", code="TimeLimit", detail=detail), launch.stop_grace_ms)
        case "suspending" | "resuming":
            kill(book, assignment)
        case "ending":
            assignment.undo_at_ms = 0
            book.act(UndoPartition(assignment.key))
        case _:
            raise InvariantViolated(f"{assignment.key}: nothing is due in state {assignment.state}")


# --- what the launcher knows ---


def compare(book: Book, event: ProcessesListed) -> None:
    """The ledger's word against the launcher's. The launcher never forgets a start that it was not told to forget."""
    found = {entry.key: entry for entry in event.found}
    for assignment in list(book.live.values()):
        _compare_one(book, assignment, found.get(assignment.key), event.at_start)
    for key in sorted(found.keys() - book.live.keys()):
        _drop_stray(book, found[key])


def _compare_one(book: Book, assignment: Assignment, found: ProcessFound | None, at_start: bool) -> None:
    if assignment.boot_id != book.boot_id:
        if assignment.state != "ending":
            verdict = Verdict(outcome="lost", code="NodeRestarted", detail="the node restarted under it")
            _end(book, assignment, verdict)
        elif at_start:
            book.act(UndoPartition(assignment.key))
        return
    if found is not None and assignment.state != "ending":
        if not assignment.pid:
            process_started(book, assignment, found.pid, found.at_ms)
        elif assignment.state == "stopping" and not found.has_ended:
            grace_ms = max(0, assignment.kill_at_ms - book.now_ms)
            book.act(StopProcess(assignment.key, grace_ms, assignment.pid))
        elif assignment.state in ("suspending", "suspended") and not found.has_ended:
            ask_to_suspend(book, assignment)
        elif assignment.state == "resuming" and not found.has_ended:
            ask_to_resume(book, assignment)
        return
    match assignment.state:
        case "running" | "stopping" | "suspending" | "suspended" | "resuming" if assignment.pid:
            verdict = Verdict(outcome="lost", code="SupervisorLost", detail="its supervisor knows nothing of it")
            _end(book, assignment, assignment.verdict or verdict)
        case "stopping":
            if assignment.verdict is not None:  # always: it is what made it stop
                _end(book, assignment, assignment.verdict)
        case "starting":
            _start_process(book, assignment)
        case "intended" if at_start and assignment.needs_port:
            _ask_for_port(book, assignment)
        case "ending" if at_start:
            book.act(UndoPartition(assignment.key))
        case _:
            pass


def _drop_stray(book: Book, found: ProcessFound) -> None:
    """A process that the ledger has ended, or never heard of (the ledger was lost): it must not run."""
    book.act(ForgetProcess(found.key) if found.has_ended else StopProcess(found.key, 0))


def resumed(assignment: Assignment) -> Assignment:
    """As it stands after a restart of the agent: what was only in memory is to be found out again."""
    if assignment.state == "starting":
        assignment.state = "prepared" if assignment.start.hold else "intended"
    assignment.has_partition = False
    assignment.has_port = assignment.state != "intended"
    assignment.undo_at_ms = 0
    return assignment
