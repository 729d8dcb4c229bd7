"""`gpuyard top`: the yard as it is now, drawn anew every few seconds, until Ctrl-C.

Each card is one cell: its colour says how it is cut, its height how much of its compute is held. Below stand the
tenant's jobs that run, the largest first, and those that wait. Where there is no terminal, or with --once, it is drawn
once and plainly.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from gpuyard.cli.output import AsJson, is_interactive, now_ms, print_json, rough, say
from gpuyard.cli.session import session_of
from gpuyard.cli.values import amount
from gpuyard_protocol.jobs import JobView
from gpuyard_protocol.queries import PAGE_ROWS_MAX, CardView, JobsQuery, NodeView, Stats, WhyAnswer
from gpuyard_protocol.units import MILLI, format_milli

if TYPE_CHECKING:
    from rich.text import Text

    from gpuyard.client import Client

EVERY_S = 2.0
#: Rows of nodes, of running and of waiting jobs; what is more is counted.
NODE_ROWS, RUNNING_ROWS, WAITING_ROWS = 24, 12, 8
_MODE_STYLES = {"whole": "blue", "mps": "green", "mig": "magenta", "timeslice": "yellow", "idle": "bright_black"}
_FILLS = "▁▂▃▄▅▆▇█"
#: Without colour a letter says how a card is cut.
_LETTERS = {"whole": "W", "mps": "S", "mig": "M", "timeslice": "T", "idle": "·"}

_Every = typer.Option("--every", "-n", metavar="SECONDS", parser=amount(0.2, "seconds"), help="Between two pictures.")


class Scene(NamedTuple):
    """What there is to draw."""

    stats: Stats
    nodes: tuple[NodeView, ...]
    running: tuple[JobView, ...]
    #: The longest waiting, with a reason each.
    waiting: tuple[tuple[JobView, str], ...]


def register(app: typer.Typer) -> None:
    app.command("top")(top)


def top(
    ctx: typer.Context,
    every: Annotated[float, _Every] = EVERY_S,
    once: Annotated[bool, typer.Option("--once", help="Draw once and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch cards, jobs and the queue; Ctrl-C ends it."""
    session = session_of(ctx)
    if as_json or once or not is_interactive():
        scene = session.run(look)
        if as_json:
            waiting = [view for view, _ in scene.waiting]
            plain = {"stats": scene.stats, "nodes": scene.nodes, "running": scene.running, "waiting": waiting}
            print_json(plain)
        else:
            for line in plain_lines(scene, now_ms()):
                say(line)
        return
    try:
        session.run(lambda yard: _watch(yard, every))
    except KeyboardInterrupt:
        raise typer.Exit from None


async def look(yard: Client) -> Scene:
    """One look at the yard: three questions, and one for each waiting job that is shown."""
    stats, nodes, running, waiting = await asyncio.gather(
        yard.stats(),
        yard.nodes(),
        yard.jobs_page(JobsQuery(states=["running", "starting", "suspended", "stopping"], limit=PAGE_ROWS_MAX)),
        _longest_waiting(yard),
    )
    largest = sorted(running.jobs, key=lambda view: (-_cards_of(view), view.started_ms or 2**62, view.job))
    return Scene(stats, nodes, tuple(largest), waiting)


async def _longest_waiting(yard: Client) -> tuple[tuple[JobView, str], ...]:
    """Of the newest page: asking for all of a long queue every few seconds would cost the yard more than it says."""
    page = await yard.jobs_page(JobsQuery(states=["pending"], fold=True, limit=PAGE_ROWS_MAX))
    oldest = page.jobs[-WAITING_ROWS:][::-1]
    unsaid = [view.job for view in oldest if view.reason is None]
    answers = await asyncio.gather(*(yard.why(job, brief=True) for job in unsaid), return_exceptions=True)
    said = {answer.job: answer.summary for answer in answers if isinstance(answer, WhyAnswer)}
    return tuple([(view, view.reason.text if view.reason else said.get(view.job, "")) for view in oldest])


def _cards_of(view: JobView) -> int:
    return sum(len(replica.devices) for replica in view.placed)


async def _watch(yard: Client, every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(render(await look(yard), now_ms()), refresh=True)
            await asyncio.sleep(every_s)


# --- drawing ----------------------------------------------------------------------------------------------------------


def render(scene: Scene, now: int) -> Text:
    """The whole picture as one text, for a terminal with colours."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    for line in _headline(scene):
        text.append(line + "\n", "bold")
    width = max((len(node.node) for node in scene.nodes), default=0)
    for node in scene.nodes[:NODE_ROWS]:
        text.append(f"{node.node:<{width}}  ", "" if node.state == "ready" else "red")
        for card in node.cards:
            text.append_text(_cell(card))
            text.append(" ")
        text.append(_node_note(node) + "\n", "dim" if node.state == "ready" else "red")
    text.append("\n")
    for line in _job_lines(scene, now):
        text.append(line + "\n")
    return text


def _cell(card: CardView) -> Text:
    from rich.text import Text

    if not card.healthy:
        return Text("✗", "bold red")
    if not card.held_milli:
        return Text("·" if card.mode == "idle" else "▁", _MODE_STYLES.get(card.mode, ""))
    fill = _FILLS[min(len(_FILLS) - 1, card.held_milli * len(_FILLS) // MILLI)]
    return Text(fill, _MODE_STYLES.get(card.mode, ""))


def plain_lines(scene: Scene, now: int) -> list[str]:
    """The same without colours."""
    lines = list(_headline(scene))
    width = max((len(node.node) for node in scene.nodes), default=0)
    for node in scene.nodes[:NODE_ROWS]:
        cells = " ".join(_LETTERS.get(card.mode, "?") if card.healthy else "!" for card in node.cards)
        lines.append(f"{node.node:<{width}}  {cells}  {_node_note(node)}".rstrip())
    return [*lines, "", *_job_lines(scene, now)]


def _headline(scene: Scene) -> list[str]:
    stats = scene.stats
    nodes = ", ".join(f"{count} {state}" for state, count in sorted(stats.nodes.items()) if count)
    jobs = ", ".join(f"{count} {state}" for state, count in stats.jobs.items() if count) or "none"
    lines = [f"{stats.yard}: {format_milli(stats.held_milli)} of {stats.gpus} GPUs held; nodes: {nodes}; jobs: {jobs}"]
    more = len(scene.nodes) - NODE_ROWS
    return [*lines, f"(the first {NODE_ROWS} nodes; {more} more)"] if more > 0 else lines


def _node_note(node: NodeView) -> str:
    held = sum(card.held_milli for card in node.cards)
    used = [
        card.sample.utilization_pct for card in node.cards if card.sample and card.sample.utilization_pct is not None
    ]
    busy = f", {sum(used) // len(used)} % busy" if used else ""
    state = "" if node.state == "ready" else f", {node.state}{': ' + node.reason if node.reason else ''}"
    return f"{format_milli(held)}/{len(node.cards)}{busy}{state}"


def _job_lines(scene: Scene, now: int) -> list[str]:
    lines = []
    if scene.running:
        lines.append(f"{len(scene.running)} running")
        lines += [f"  {_running(view, now)}" for view in scene.running[:RUNNING_ROWS]]
        if len(scene.running) > RUNNING_ROWS:
            lines.append(f"  … and {len(scene.running) - RUNNING_ROWS} more")
    if scene.waiting:
        lines.append(f"{scene.stats.jobs.get('pending', 0)} waiting in the yard; of yours, the longest")
        lines += [f"  {_waiting(view, reason, now)}" for view, reason in scene.waiting]
    return lines


def _name(view: JobView) -> str:
    owner = f" {view.user}"
    return f"{view.job}{' ' + view.name if view.name else ''}{owner}"


def _wants(view: JobView) -> str:
    return view.wants if view.replicas == 1 else f"{view.replicas} × ({view.wants})"


def _running(view: JobView, now: int) -> str:
    nodes = ",".join(dict.fromkeys(replica.node for replica in view.placed if replica.node))
    lasted = rough(max(0, now - view.started_ms)) if view.started_ms else view.state
    return f"{_name(view)}  {_wants(view)} on {nodes}, {lasted}"


def _waiting(view: JobView, reason: str, now: int) -> str:
    elements = f" and {view.elements - 1} more of its array" if view.elements > 1 else ""
    return f"{_name(view)}{elements}  {_wants(view)}, {rough(max(0, now - view.submitted_ms))}: {reason}"
