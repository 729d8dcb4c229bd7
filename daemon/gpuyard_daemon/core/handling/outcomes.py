"""What nodes report, and what becomes of a job when its replicas end.

Reports are numbered densely by each node; what was seen is skipped, and what concerns an assignment that the core does
not hold alive on that node is dropped. So a report that comes twice, late or from the wrong place changes nothing.

Who pays for an end:

====================================  ===============================================================
the job                               exit code ≠ 0, a signal, a command or directory that is missing
nobody (it waits again, uncharged)    the node: lost processes, a partition that could not be made;
                                      the yard: shutdown, a gang that did not get prepared
====================================  ===============================================================

Uncharged starts that keep going wrong wait longer each time, so a broken node cannot keep the yard busy.
"""

from __future__ import annotations

from gpuyard_daemon.core.applying.lost_facts import is_given_up
from gpuyard_daemon.core.handling.idleness import take_idle
from gpuyard_daemon.core.handling.services import replica_ended
from gpuyard_daemon.core.preempting.suspension import take_report
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.inputs import NodeReported
from gpuyard_daemon.core.state.model import CONTAINERS, Assignment, Job, Node, account_of
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import (
    NODE_FAULTS,
    Ended,
    Idle,
    Joined,
    Prepared,
    Report,
    Resumed,
    ResumeFailed,
    Started,
    Suspended,
    SuspendFailed,
)
from gpuyard_protocol.resources import mode_of

TIME_LIMIT = "TimeLimit"
#: What is kept of a node's own words: they are repeated in reasons, stories and views.
_CODE_CHARS_MAX = 64
_DETAIL_CHARS_MAX = 500


def take_reports(draft: Draft, batch: NodeReported) -> None:
    """Take in what is new of a batch."""
    node = draft.cluster.nodes.get(batch.node)
    if node is not None and batch.instance in node.former_instances and batch.instance != node.instance:
        return
    seen = node.reports_seen if node else 0
    if node is not None and _is_new_ledger(node, batch):
        draft.add(f.LedgerReplaced(batch.node))
        seen = 0
    last = batch.first + len(batch.reports) - 1
    if last <= seen:
        return
    missing = max(0, batch.first - seen - 1)
    draft.add(f.ReportsTaken(batch.node, last, missing))
    for report in batch.reports[max(0, seen + 1 - batch.first) :]:
        _take_report(draft, batch, report)


def _is_new_ledger(node: Node, batch: NodeReported) -> bool:
    """A node that lost its ledger numbers from 1 again, under another identity of the ledger.

    An agent that does not tell the identity is guessed at: from 1, beginning with `Joined`, from a process not seen
    before. A repetition of everything since the beginning would reach at least as far as what was seen.
    """
    if batch.ledger and node.ledger:
        return batch.ledger != node.ledger
    return (
        batch.first == 1
        and bool(batch.reports)
        and isinstance(batch.reports[0], Joined)
        and batch.instance != node.instance
        and len(batch.reports) < node.reports_seen
    )


def _take_report(draft: Draft, batch: NodeReported, report: Report) -> None:
    if isinstance(report, Joined):
        _take_joined(draft, batch, report)
        return
    node = draft.cluster.nodes[batch.node]
    if node.given_up and isinstance(report, Ended) and is_given_up(node, report.key):
        # All that is believed of it: it is gone there.
        draft.add(f.GivenUpGone(node.id, report.key))
        if not node.given_up and node.state == "joining":
            draft.add(f.NodeChanged(node.id, "ready"))
        return
    assignment = draft.cluster.assignment(report.key)
    if assignment is None or not assignment.is_live or assignment.node != batch.node:
        return
    is_gang = draft.cluster.jobs[report.key.job].is_gang
    match report:
        case Prepared(key=key, port=port):
            if assignment.state == "ordered" and is_gang:
                draft.add(f.ReplicaPrepared(key, port))
                _release_if_prepared(draft, draft.cluster.jobs[key.job])
        case Started(key=key, port=port):
            # A gang's member starts once it was told to go, and not before.
            told = "released" if is_gang else "ordered"
            if not assignment.started_ms and assignment.state in (told, "stopping"):
                draft.add(f.ReplicaStarted(key, port))
        case Suspended() | Resumed() | SuspendFailed() | ResumeFailed():
            take_report(draft, report, assignment)
        case Idle():
            take_idle(draft, report, assignment)
        case Ended():
            end_replica(draft, report)


def _take_joined(draft: Draft, batch: NodeReported, report: Joined) -> None:
    draft.add(f.NodeJoined(batch.node, batch.instance, batch.boot_id, report.inventory, batch.ledger))
    # What the node had confirmed and no longer holds will never report: its ledger lost it.
    held = frozenset(report.held)
    space = draft.cluster.pool.spaces[batch.node]
    vanished = [
        key
        for key, assignment in sorted(space.assignments.items())
        if key not in held and (assignment.started_ms or assignment.state in ("prepared", "released", "running"))
    ]
    for key in vanished:
        end_lost(draft, key, "LedgerLost", "the node no longer holds it")
    node = draft.cluster.nodes[batch.node]
    if node.given_up:
        draft.add(f.NodeChanged(node.id, "joining", still_to_end(node)))


def still_to_end(node: Node) -> str:
    """Why a node that is back takes no work yet."""
    names = ", ".join(str(entry.key) for entry in node.given_up[:4])
    return f"it must first end what was given up while it was lost: {names}" + (" …" if node.given_up[4:] else "")


def _release_if_prepared(draft: Draft, job: Job) -> None:
    if job.verdict is None and all(assignment.state == "prepared" for assignment in job.assignments):
        draft.add(f.GangReleased(job.id))


def end_replica(draft: Draft, report: Ended) -> None:
    code, detail = report.code[:_CODE_CHARS_MAX], report.detail[:_DETAIL_CHARS_MAX]
    node_fault = report.outcome == "refused" and (report.node_fault or code in NODE_FAULTS)
    _end(draft, f.ReplicaEnded(report.key, report.outcome, report.exit_code, report.signal, code, detail, node_fault))


def end_lost(draft: Draft, key: AssignmentKey, code: str, detail: str) -> None:
    """A replica is gone, and its node did not say how."""
    _end(draft, f.ReplicaEnded(key, "lost", code=code, detail=detail))


def _end(draft: Draft, fact: f.ReplicaEnded) -> None:
    job = draft.cluster.jobs[fact.key.job]
    assignment = job.assignments[fact.key.replica]
    draft.add(fact)
    if fact.node_fault:
        _avoid(draft, assignment.node, assignment)
    if job.live == 0:
        settle(draft, job)
    elif job.verdict is None and not assignment.went_well:
        kind, why, exit_code = judge_end(assignment)
        draft.add(f.JobStopping(job.id, kind, why, "peer-failed", exit_code))


def _avoid(draft: Draft, node_id: NodeId, assignment: Assignment) -> None:
    """Leave the node alone for what it could not set up, for a while, longer each time in a row.

    That is the mode, unless it is known to be something that others do not ask for: containers, or an account.
    """
    job = draft.cluster.jobs[assignment.key.job]
    match assignment.code:
        case "AccountMissing":
            mode = account_of(job.spec.need, job.tenant, job.user)
        case "ContainerEngineMissing":
            mode = CONTAINERS
        case _:
            mode = mode_of(assignment.partition)
    known = draft.cluster.nodes[node_id].avoided.get(mode)
    if known is not None and known.until_ms:
        return
    times = known.times + 1 if known else 1
    settings = draft.settings
    wait = min(settings.refusal_avoid_max_ms, settings.refusal_avoid_ms << min(times - 1, 20))
    draft.add(f.NodeAvoided(node_id, mode, draft.now_ms + wait, times))


def judge_end(assignment: Assignment) -> tuple[f.VerdictKind, Why, int | None]:
    """What the unwished end of a replica means for its job."""
    where = f"replica {assignment.key.replica} on {assignment.node}"
    said = f": {assignment.detail}" if assignment.detail else ""
    if assignment.code == TIME_LIMIT:
        return "abort", Why("TimeLimit", f"{where} reached its time limit{said}"), _exit_code(assignment)
    match assignment.outcome:
        case "exited":
            return (
                "fail",
                Why("ExitCode", f"{where} exited with code {assignment.exit_code}{said}"),
                assignment.exit_code,
            )
        case "signalled":
            code = assignment.code or "Signalled"
            return "fail", Why(code, f"{where} was killed by signal {assignment.signal}{said}"), _exit_code(assignment)
        # The code alone in journals of before.
        case "refused" if not assignment.node_fault and assignment.code not in NODE_FAULTS:
            return "fail", Why(assignment.code or "Refused", f"{where} could not start{said}"), None
        case "refused":
            return "requeue", Why(assignment.code, f"{where} could not start{said}"), None
        case "lost":
            return "requeue", Why(assignment.code or "Lost", f"{where} was lost{said}"), None
        case _:
            return "requeue", Why(assignment.code or "Stopped", f"{where} was stopped by its node{said}"), None


def _exit_code(assignment: Assignment) -> int | None:
    """As a shell would say it: 128 + signal for a replica that a signal ended."""
    if assignment.outcome == "signalled":
        return 128 + assignment.signal
    return assignment.exit_code if assignment.outcome == "exited" else None


def settle(draft: Draft, job: Job) -> None:
    """Every replica of the attempt has ended: requeue the job or end it."""
    _settle(draft, job)
    if job.service:
        replica_ended(draft, job)


def _settle(draft: Draft, job: Job) -> None:
    if all(assignment.went_well for assignment in job.assignments):
        # Whatever was decided meanwhile came too late: the work is done.
        draft.add(f.JobEnded(job.id, "succeeded", None, 0))
        return
    if job.verdict is not None:
        kind, why, exit_code = job.verdict.kind, job.verdict.why, job.verdict.exit_code
    else:
        kind, why, exit_code = judge_end(next(a for a in job.assignments if not a.went_well))
    match kind:
        case "cancel":
            draft.add(f.JobEnded(job.id, "cancelled", why, exit_code))
        case "abort":
            draft.add(f.JobEnded(job.id, "failed", why, exit_code))
        case "fail" if job.retries_left:
            used = job.spec.retries - job.retries_left
            wake_ms = draft.now_ms + draft.backoff_ms(used)
            draft.add(f.JobRequeued(job.id, True, why, wake_ms, 0, exit_code))
        case "fail":
            draft.add(f.JobEnded(job.id, "failed", why, exit_code))
        case "requeue":
            _requeue(draft, job, why)


def _requeue(draft: Draft, job: Job, why: Why) -> None:
    if why.code in ("Shutdown", "Requeued", "Preempted", "Resized"):
        # Asked for, and nobody's fault.
        draft.add(f.JobRequeued(job.id, False, why, 0, job.uncharged))
        return
    ran_well = job.started_ms and draft.now_ms - job.started_ms >= draft.settings.steady_run_ms
    in_a_row = 1 if ran_well else job.uncharged + 1
    # The first time may well be chance: no wait.
    wake_ms = draft.now_ms + draft.backoff_ms(in_a_row - 2) if in_a_row > 1 else 0
    draft.add(f.JobRequeued(job.id, False, why, wake_ms, in_a_row))


def give_up_preparing(draft: Draft, job: Job) -> None:
    """A gang did not get prepared in time: it gives its places back and waits again, uncharged."""
    late = [str(a.key.replica) for a in job.assignments if a.state == "ordered"]
    why = Why("PrepareTimeout", f"replicas {', '.join(late[:8])} were not prepared in time")
    draft.add(f.JobStopping(job.id, "requeue", why, "prepare-timeout"))
