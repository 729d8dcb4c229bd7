"""What is left behind by a run of kills, and how it is counted: so that others can count again.

Three witnesses that know nothing of each other: the submitter's log of acknowledgements, the lines that the jobs'
processes wrote themselves (start and end, with boot-time nanoseconds and the cards they were given), and what the
yard says in the end: its answers, the journal's final states, the agents' ledgers, the processes still there.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

ACKNOWLEDGEMENTS = "acknowledgements.jsonl"
PROCESSES = "processes.log"
VERDICTS = "verdicts.jsonl"

#: Run by each replica, whatever account it runs as: one line at its start, one at its end, each a single append, so
#: that none is torn. The kernel says how long it is up in hundredths of a second; they are written as nanoseconds.
_PROGRAM = """
note() {
  read up rest < /proc/uptime
  echo "$1 ${up%.*}${up#*.}0000000 $GPUYARD_ASSIGNMENT ${CUDA_VISIBLE_DEVICES:--}" >> "$log"
}
log=$1; note start; sleep "$2"; note end
"""


def job_command(directory: Path, seconds: float) -> list[str]:
    return ["/bin/sh", "-c", _PROGRAM, "job", str(directory / PROCESSES), f"{seconds:.3f}"]


class Process(NamedTuple):
    """One line of `processes.log`, or two."""

    job: int
    attempt: int
    replica: int
    cards: tuple[str, ...]
    start_ns: int
    #: 0: it wrote no end.
    end_ns: int


class Acknowledged(NamedTuple):
    """The SUB stream said that it has this submission."""

    submission_id: str
    sequence: int
    at_ns: int
    replicas: int


class Verdict(NamedTuple):
    """What the yard says of a submission in the end."""

    submission_id: str
    #: 0: the yard knows no job of it.
    job: int
    state: str
    attempt: int
    #: Final states that the journal holds for the job; -1: the journal was pruned, they are not all there.
    finals: int


@dataclass
class Count:
    """The figures."""

    kills: int = 0
    submitted: int = 0
    acknowledged: int = 0
    #: Acknowledged, one final state, every replica ran to its end exactly once.
    finished_once: int = 0
    #: Acknowledged and without a final state.
    lost: int = 0
    #: Replicas that started twice in one attempt, or that ran to their end in two.
    ran_twice: int = 0
    #: Pairs of processes on one card at one time.
    double_held: int = 0
    #: Processes and ledger entries that are left although every job has ended.
    orphans: int = 0
    #: In words, the first of whatever is wrong.
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.ran_twice or self.double_held or self.orphans) and (
            self.finished_once == self.acknowledged
        )


def read_processes(directory: Path) -> tuple[list[Process], list[str]]:
    """Every process that ever ran, and which of them started again under the same key."""
    starts: dict[str, tuple[int, str]] = {}
    ends: dict[str, int] = {}
    again: list[str] = []
    for line in (directory / PROCESSES).read_text().splitlines():
        what, at, key, cards = line.split(" ")
        if what == "end":
            ends[key] = int(at)
        elif key in starts:
            again.append(key)
        else:
            starts[key] = (int(at), cards)
    processes = []
    for key, (start_ns, cards) in starts.items():
        job, attempt, replica = (int(part) for part in key.split("."))
        held = tuple(card for card in cards.split(",") if card != "-")
        processes.append(Process(job, attempt, replica, held, start_ns, ends.get(key, 0)))
    return processes, again


def held_twice(processes: Iterable[Process]) -> list[tuple[Process, Process]]:
    """Pairs that were on one card at one time. What wrote no end was ended by the yard: it is not judged."""
    by_card: dict[str, list[Process]] = {}
    for process in processes:
        if process.end_ns:
            for card in process.cards:
                by_card.setdefault(card, []).append(process)
    pairs = []
    for on_card in by_card.values():
        on_card.sort(key=lambda process: process.start_ns)
        pairs += [(one, other) for one, other in itertools.pairwise(on_card) if other.start_ns < one.end_ns]
    return pairs


def left_in_ledgers(state: Path) -> list[str]:
    """Assignments that an agent's ledger still holds."""
    left = []
    for path in sorted((state / "agents").glob("*/ledger.sqlite")):
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            left += [f"{path.parent.name}: {key}" for (key,) in database.execute("SELECT key FROM assignments")]
        finally:
            database.close()
    return left


def count(
    directory: Path, acknowledged: Iterable[Acknowledged], verdicts: Iterable[Verdict], orphans: Iterable[str]
) -> Count:
    """The figures from the three witnesses."""
    figures = Count()
    processes, again = read_processes(directory)
    by_job: dict[int, list[Process]] = {}
    for process in processes:
        by_job.setdefault(process.job, []).append(process)
    finished = Counter((p.job, p.replica) for p in processes if p.end_ns)
    twice = again + [f"{job}.*.{replica}" for (job, replica), times in finished.items() if times > 1]
    figures.ran_twice = len(twice)
    pairs = held_twice(processes)
    figures.double_held = len(pairs)
    left = list(orphans)
    figures.orphans = len(left)
    figures.problems += [f"ran twice: {key}" for key in twice] + [f"held twice: {pair}" for pair in pairs]
    figures.problems += [f"left behind: {what}" for what in left]
    by_submission = {verdict.submission_id: verdict for verdict in verdicts}
    for entry in acknowledged:
        figures.acknowledged += 1
        verdict = by_submission.get(entry.submission_id)
        if verdict is None or verdict.state not in ("succeeded", "failed", "cancelled"):
            figures.lost += 1
            figures.problems.append(f"lost: {entry} is {verdict}")
            continue
        ran = [p for p in by_job.get(verdict.job, []) if p.attempt == verdict.attempt and p.end_ns]
        is_once = verdict.state == "succeeded" and verdict.finals in (1, -1) and len(ran) == entry.replicas
        figures.finished_once += is_once
        if not is_once:
            figures.problems.append(f"not finished once: {verdict}, its processes {by_job.get(verdict.job)}")
    del figures.problems[20:]
    return figures


def write_lines(path: Path, entries: Iterable[Acknowledged | Verdict]) -> None:
    path.write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in entries))


def as_figures(figures: Count) -> dict[str, object]:
    """For the report: the problems only if there are any."""
    result: dict[str, object] = asdict(figures)
    if not figures.problems:
        del result["problems"]
    return result
