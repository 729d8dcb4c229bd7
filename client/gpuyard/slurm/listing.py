"""`squeue`, `scancel` and `sinfo`: the yard in Slurm's columns and words."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpuyard.cli.jobs import reasons_of
from gpuyard.cli.nodes import is_used, state_of
from gpuyard.cli.output import now_ms, print_json, remark
from gpuyard.cli.session import Session
from gpuyard.cli.tables import print_table
from gpuyard.errors import Rejected
from gpuyard_protocol.jobs import JobState, JobView
from gpuyard_protocol.queries import NodeView

if TYPE_CHECKING:
    from gpuyard.client import Client

CODES: dict[JobState, str] = {
    "pending": "PD", "starting": "CF", "running": "R", "suspended": "S", "stopping": "CG", "succeeded": "CD",
    "failed": "F", "cancelled": "CA",
}  # fmt: skip
#: Slurm's first words for reasons; the rest is said as it is.
WORDS = {
    "OverQuota": "QOSMaxGRESPerUser", "Held": "JobHeldUser", "BeginTime": "BeginTime",
    "ArrayLimit": "JobArrayTaskLimit", "Dependency": "Dependency",
}  # fmt: skip
_COLUMNS = ("#JOBID", "PARTITION", "NAME", "USER", "ST", "#TIME", "#NODES", "NODELIST(REASON)")
_ELEMENTS = re.compile(r"(\d+)(?:_\[?[\d,%-]+\]?)?")


def squeue(arguments: Sequence[str]) -> None:
    flags = _parser("squeue")
    flags.add_argument("--me", action="store_true")
    flags.add_argument("-u", "--user", default="")
    flags.add_argument("-j", "--jobs", default="")
    flags.add_argument("-t", "--states", default="")
    flags.add_argument("-h", "--noheader", action="store_true")
    flags.add_argument("--json", action="store_true")
    given = flags.parse_args(arguments)
    wanted = {int(text) for text in given.jobs.split(",") if text.isdigit()}

    async def work(yard: Client) -> tuple[list[JobView], dict[int, str]]:
        user = yard.context.user if given.me else given.user
        rows = yard.jobs(states=_states(given.states), all=bool(given.states), user=user, fold=not given.json)
        found = [view async for view in rows if not wanted or view.job in wanted or view.array in wanted]
        return found, {} if given.json else await reasons_of(yard, found)

    found, reasons = Session(None).run(work)
    if given.json:
        print_json(found)
        return
    lines = [_row(view, reasons.get(view.job, "")) for view in found]
    if given.noheader:
        for line in lines:
            print(" ".join(line))  # noqa: T201  a line of the answer
    else:
        print_table(_COLUMNS, lines)


def _row(view: JobView, reason: str) -> tuple[str, ...]:
    number = f"{view.array}_[{view.elements} left]" if view.elements else str(view.job)
    if view.array and not view.elements:
        number = f"{view.array}_{view.array_index}"
    nodes = list(dict.fromkeys(replica.node for replica in view.placed if replica.node))
    spent_s = ((view.ended_ms or now_ms()) - view.started_ms) // 1000 if view.started_ms else 0
    where = ",".join(nodes) if nodes else f"({_word(view, reason)})"
    queue = view.spec.queue if view.spec is not None and view.spec.queue else "gpuyard"
    return (
        number, queue, view.name[:24] or "-", view.user, CODES[view.state], _clock(spent_s),
        str(len(nodes) or view.replicas), where,
    )  # fmt: skip


def _word(view: JobView, reason: str) -> str:
    if view.reason is not None:
        return f"{WORDS.get(view.reason.code, 'Resources')}: {view.reason.text}"
    return f"Resources: {reason}" if reason else "Priority"


def _clock(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    shown = f"{hours}:{rest // 60:02}:{rest % 60:02}" if days or hours else f"{rest // 60}:{rest % 60:02}"
    return f"{days}-{shown}" if days else shown


def _states(text: str) -> list[str]:
    """By Slurm's codes or names; `all` or nothing: any."""
    if text.lower() in ("", "all"):
        return []
    by_name = {code: state for state, code in CODES.items()} | {"COMPLETED": "succeeded", "CONFIGURING": "starting"}
    found = []
    for word in text.upper().split(","):
        state = by_name.get(word) or (word.lower() if word.lower() in CODES else "")
        if not state:
            raise SystemExit(f"squeue: error: {word!r} is no state: {', '.join(CODES.values())}")
        found.append(state)
    return found


def scancel(arguments: Sequence[str]) -> None:
    flags = _parser("scancel")
    flags.add_argument("--me", action="store_true")
    flags.add_argument("-u", "--user", default="")
    flags.add_argument("-n", "--name", default="")
    flags.add_argument("-t", "--state", default="")
    flags.add_argument("jobs", nargs="*")
    given = flags.parse_args(arguments)
    if not (given.jobs or given.me or given.user or given.name):
        flags.error("jobs to cancel are missing: numbers, --me, --user or --name")

    async def work(yard: Client) -> int:
        numbers = [_number(text) for text in given.jobs]
        if not numbers:
            user = yard.context.user if given.me else given.user
            rows = yard.jobs(states=_states(given.state), user=user)
            numbers = [(view.job, False) async for view in rows if given.name in ("", view.name)]
        refused = 0
        for number, is_array in numbers:
            try:
                await yard.cancel(number, array=is_array)
            except Rejected as refusal:
                remark(f"scancel: error: {number}: {refusal}")
                refused += 1
        return int(bool(refused))

    raise SystemExit(Session(None).run(work))


def _number(text: str) -> tuple[int, bool]:
    """`17`, `17_3` (an element of array 17)."""
    array, _, index = text.partition("_")
    if not array.isdigit() or (index and not index.isdigit()):
        raise SystemExit(f"scancel: error: {text!r} is no job: expected a number, or ARRAY_INDEX")
    if not index:
        return int(array), False
    raise SystemExit(f"scancel: error: {text}: cancel the element by its own number (see: gpuyard jobs)")


def sinfo(arguments: Sequence[str]) -> None:
    flags = _parser("sinfo")
    flags.add_argument("-N", "--Node", action="store_true")
    flags.add_argument("-h", "--noheader", action="store_true")
    flags.add_argument("--json", action="store_true")
    given = flags.parse_args(arguments)

    async def work(yard: Client) -> tuple[NodeView, ...]:
        return await yard.nodes()

    found = Session(None).run(work)
    if given.json:
        print_json(found)
        return
    by_state: dict[str, list[str]] = {}
    for view in found:
        by_state.setdefault(_node_state(view), []).append(view.node)
    if given.Node:
        rows = [(view.node, "1", "gpuyard", _node_state(view), str(len(view.cards))) for view in found]
        print_table(("NODELIST", "#NODES", "PARTITION", "STATE", "#GPUS"), rows)
        return
    lines = [
        ("gpuyard*", "up", "infinite", str(len(names)), state, ",".join(names)) for state, names in by_state.items()
    ]
    print_table(("PARTITION", "AVAIL", "TIMELIMIT", "#NODES", "STATE", "NODELIST"), lines)


def _node_state(view: NodeView) -> str:
    state = state_of(view)
    if state in ("cordoned", "draining"):
        return "drain" if state == "cordoned" else "drng"
    if state != "ready":
        return "down"
    free = any(not card.held_milli for card in view.cards)
    return "idle" if not is_used(view) else "mix" if free or not view.cards else "alloc"


def _parser(name: str) -> argparse.ArgumentParser:
    """`-h` is no help here: it leaves out the headings."""
    flags = argparse.ArgumentParser(prog=name, allow_abbrev=False, add_help=False)
    flags.add_argument("--help", action="help", help="show this")
    return flags
