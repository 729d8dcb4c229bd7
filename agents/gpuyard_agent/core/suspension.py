"""Suspending an assignment to the host's memory and resuming it: what orders and answers do to its life.

Orders carry steps, 1, 2, 3 … of one key. Each is taken once and the newest holds, so a daemon that repeats itself, or
orders a `Resume` while the suspension is still under way, changes nothing or changes its mind. Every step is answered
by one report, those that were overtaken excepted; an assignment that ends meanwhile answers by its `Ended` alone.

A suspended assignment keeps its key, its port and its process, which is halted. Its card is not its own any more: the
shell has undone the partition, and takes it anew to resume. The way back from a failure is the shell's to find; here a
refusal leaves the assignment as it was, and one that can neither go on nor be suspended (`ProcessBroken`) is ended as
lost: the driver failed it, not its program.

Its time limit stands still while it is suspended. A stop that comes while it is suspended kills at once: a halted
process could use no grace. One that comes while it is on its way gives the way as long as the grace is.
"""

from __future__ import annotations

from gpuyard_agent.core import life
from gpuyard_agent.core.book import Book
from gpuyard_agent.core.events import (
    ProcessBroken,
    ProcessResumed,
    ProcessSuspended,
    ResumeRefused,
    SuspendRefused,
)
from gpuyard_agent.core.model import Assignment, Verdict
from gpuyard_protocol.nodes import Resume, Resumed, ResumeFailed, Suspend, Suspended, SuspendFailed
from gpuyard_protocol.resources import TimeSliceShare, WholeCards

#: Codes of `SuspendFailed`.
NOT_SUSPENDABLE = "NotSuspendable"
NOT_RUNNING = "NotRunning"
#: Code of the `Ended` of one that the driver broke.
BROKEN = "SuspendBroken"


def take(book: Book, assignment: Assignment, order: Suspend | Resume) -> None:
    if order.step <= assignment.step or assignment.verdict is not None or assignment.state == "ending":
        return
    assignment.step = order.step
    assignment.wants_suspended = isinstance(order, Suspend)
    book.save(assignment)
    _pursue(book, assignment)


def _pursue(book: Book, assignment: Assignment) -> None:
    """Begin what the newest step asks for, or answer it where it is so already."""
    match assignment.state:
        case "running" if assignment.wants_suspended:
            if problem := _unsuitable(assignment):
                _tell_failed(book, assignment, assignment.step, NOT_SUSPENDABLE, problem)
            else:
                assignment.moving_step = assignment.step
                book.move(assignment, "suspending")
                life.ask_to_suspend(book, assignment)
        case "suspended" if not assignment.wants_suspended:
            assignment.moving_step = assignment.step
            book.move(assignment, "resuming")
            life.ask_to_resume(book, assignment)
        case "running":
            book.report(Resumed(key=assignment.key, step=assignment.step, at_ms=book.wall_ms))
        case "suspended":
            _tell_suspended(book, assignment, assignment.step, 0)
        case "intended" | "prepared" | "starting" if assignment.wants_suspended:
            _tell_failed(book, assignment, assignment.step, NOT_RUNNING, "its process does not run yet")
        case _:  # on its way: answered when it has arrived
            return


def _unsuitable(assignment: Assignment) -> str:
    """Why the driver cannot suspend it, as far as that shows in what was ordered; "" if it may try."""
    launch, partition = assignment.start.launch, assignment.start.partition
    if not launch.suspendable:
        return "the job did not ask to be suspended"
    if launch.replicas > 1:
        return "it is a member of a gang"
    if isinstance(partition, TimeSliceShare) or (isinstance(partition, WholeCards) and len(partition.devices) == 1):
        return ""
    return "only jobs with one whole card, or with turns on one, can be suspended"


# --- what came of it ---


def suspended(book: Book, assignment: Assignment, event: ProcessSuspended) -> None:
    if assignment.state != "suspending":
        return
    book.move(assignment, "suspended")
    assignment.off_card_ms = book.now_ms
    assignment.gpu_pids, assignment.image_mib = event.gpu_pids, event.image_mib
    book.save(assignment)
    if assignment.verdict is not None:
        life.kill(book, assignment)
        return
    has_news = assignment.step > assignment.moving_step
    answered = assignment.step if assignment.wants_suspended else assignment.moving_step
    _tell_suspended(book, assignment, answered, event.took_ms)
    if has_news and not assignment.wants_suspended:
        _pursue(book, assignment)


def suspend_refused(book: Book, assignment: Assignment, event: SuspendRefused) -> None:
    if assignment.state != "suspending":
        return
    _run_on(book, assignment)
    if assignment.verdict is not None:
        life.stop_now(book, assignment)
        return
    _tell_failed(book, assignment, assignment.moving_step, event.code, event.detail)
    if assignment.step > assignment.moving_step:
        _pursue(book, assignment)


def resumed(book: Book, assignment: Assignment, event: ProcessResumed) -> None:
    if assignment.state != "resuming":
        return
    if assignment.limit_at_ms and assignment.off_card_ms:
        assignment.limit_at_ms += book.now_ms - assignment.off_card_ms
    assignment.off_card_ms = assignment.image_mib = 0
    assignment.gpu_pids = ()
    _run_on(book, assignment)
    if assignment.verdict is not None:
        life.stop_now(book, assignment)
        return
    answered = assignment.moving_step if assignment.wants_suspended else assignment.step
    book.report(Resumed(key=assignment.key, step=answered, at_ms=book.wall_ms, took_ms=event.took_ms))
    if assignment.step > assignment.moving_step and assignment.wants_suspended:
        _pursue(book, assignment)


def resume_refused(book: Book, assignment: Assignment, event: ResumeRefused) -> None:
    if assignment.state != "resuming":
        return
    book.move(assignment, "suspended")
    book.save(assignment)
    if assignment.verdict is not None:
        life.kill(book, assignment)
        return
    book.report(
        ResumeFailed(
            key=assignment.key,
            step=assignment.moving_step,
            at_ms=book.wall_ms,
            code=event.code,
            detail=event.detail,
        )
    )
    if assignment.step > assignment.moving_step:
        _pursue(book, assignment)


def broken(book: Book, assignment: Assignment, event: ProcessBroken) -> None:
    life.stop(book, assignment, Verdict(outcome="lost", code=BROKEN, detail=event.detail), 0)


def _run_on(book: Book, assignment: Assignment) -> None:
    book.move(assignment, "running")
    book.save(assignment)
    if assignment.limit_at_ms:
        book.expect(assignment, assignment.limit_at_ms)


def _tell_suspended(book: Book, assignment: Assignment, step: int, took_ms: int) -> None:
    book.report(
        Suspended(key=assignment.key, step=step, at_ms=book.wall_ms, image_mib=assignment.image_mib, took_ms=took_ms)
    )


def _tell_failed(book: Book, assignment: Assignment, step: int, code: str, detail: str) -> None:
    book.report(SuspendFailed(key=assignment.key, step=step, at_ms=book.wall_ms, code=code, detail=detail))
