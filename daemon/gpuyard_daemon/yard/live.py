"""The demo's picture in the terminal: nodes and their cards, the queue, the services, what just happened.

Each card is one cell: its colour says how it is cut, its height how much of its compute is held. It draws what the
yard answers and knows nothing beyond that. Where there is no terminal, a line every few seconds says the same in
numbers.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gpuyard_protocol.jobs import JobEvent, JobView
from gpuyard_protocol.queries import CardView, NodeView
from gpuyard_protocol.services import ServiceView
from gpuyard_protocol.units import MILLI

MODE_STYLES = {"whole": "blue", "mps": "green", "mig": "magenta", "timeslice": "yellow", "idle": "bright_black"}
_FILLS = "▁▂▃▄▅▆▇█"
QUEUE_ROWS = 8
_EVENT_ROWS = 8
_EVENT_STYLES = {"running": "green", "succeeded": "dim", "failed": "red", "cancelled": "dim"}


class Scene(NamedTuple):
    """What there is to draw."""

    #: Since the demo began, and how long it should take altogether.
    elapsed_s: float
    expected_s: float
    nodes: tuple[NodeView, ...]
    services: tuple[ServiceView, ...]
    #: The first of those waiting, next first, and in a word why.
    queue: tuple[tuple[JobView, str], ...]
    submitted: int
    waiting: int
    running: int
    done: int
    failed: int
    #: GPU compute held now and over the whole time, in hundredths.
    held_pct: float
    allocation_pct: float


class Picture:
    """A live picture on a terminal, or lines where there is none."""

    def __init__(self, console: Console, title: str, *, line_every_s: float = 5.0) -> None:
        self._console = console
        self._title = title
        self._events: deque[tuple[str, str]] = deque(maxlen=_EVENT_ROWS)
        self._live: Live | None = None
        #: Whether somebody looks: only then is it worth asking for what only the picture shows.
        self.is_live = console.is_terminal
        self._line_every_s = line_every_s
        self._next_line_s = 0.0

    def __enter__(self) -> Picture:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stderr=False)
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def on_event(self, event: JobEvent, name: str) -> None:
        where = f" on {', '.join(dict.fromkeys(event.nodes))}" if event.nodes else ""
        reason = f": {event.reason.text}" if event.reason else ""
        self._events.append((event.state, f"{event.job} {name} {event.state}{where}{reason}"))

    def say(self, text: str) -> None:
        self._events.append(("", text))
        if self._live is None:
            self._console.print(text, highlight=False)

    def draw(self, scene: Scene) -> None:
        if self._live is not None:
            self._live.update(self._render(scene), refresh=True)
        elif scene.elapsed_s >= self._next_line_s:
            self._next_line_s = scene.elapsed_s + self._line_every_s
            self._console.print(_line(scene), highlight=False, soft_wrap=True)

    def _render(self, scene: Scene) -> RenderableType:
        left = Panel(Group(_cards(scene.nodes), Text(), _legend()), title="nodes × cards", border_style="bright_black")
        queue = Panel(_queue(scene), title=f"queue ({scene.waiting} waiting)", border_style="bright_black")
        services = Panel(_services(scene.services), title="services", border_style="bright_black")
        events = Panel(self._event_lines(), title="events", border_style="bright_black")
        top = Table.grid(expand=True)
        top.add_column(ratio=5)
        top.add_column(ratio=6)
        top.add_row(Group(left, services), Group(queue, events))
        return Group(self._headline(scene), top)

    def _headline(self, scene: Scene) -> Text:
        text = Text.assemble((self._title, "bold"), f"   {scene.elapsed_s:.0f} s of about {scene.expected_s:.0f} s   ")
        text.append(f"{scene.running} running", "green")
        text.append(f"  {scene.waiting} waiting", "yellow")
        text.append(f"  {scene.done} done of {scene.submitted}")
        if scene.failed:
            text.append(f"  {scene.failed} failed", "red")
        text.append(f"   GPUs {scene.held_pct:.0f} % held now, {scene.allocation_pct:.0f} % so far", "bold")
        return text

    def _event_lines(self) -> Text:
        lines = [
            Text(text, _EVENT_STYLES.get(state, ""), no_wrap=True, overflow="ellipsis") for state, text in self._events
        ]
        lines += [Text()] * (_EVENT_ROWS - len(lines))
        return Text("\n").join(lines)


def _cards(nodes: tuple[NodeView, ...]) -> Table:
    table = Table.grid(padding=(0, 1))
    for node in nodes:
        cells = [_cell(card) for card in node.cards]
        held = sum(card.held_milli for card in node.cards)
        style = "" if node.state == "ready" else "red"
        table.add_row(Text(node.node, style), *cells, Text(f"{held / MILLI:4.1f}/{len(node.cards)}", "dim"))
    return table


def _cell(card: CardView) -> Text:
    if not card.healthy:
        return Text("✗✗", "bold red")
    if card.held_milli == 0:
        return Text("··" if card.mode == "idle" else "▁▁", MODE_STYLES.get(card.mode, ""))
    fill = _FILLS[min(len(_FILLS) - 1, card.held_milli * len(_FILLS) // MILLI)]
    return Text(fill * 2, MODE_STYLES.get(card.mode, ""))


def _legend() -> Text:
    words = [("██ ", "whole"), ("██ ", "mps"), ("██ ", "mig"), ("██ ", "timeslice"), ("·· ", "idle")]
    return Text("  ").join(Text(mark + mode, MODE_STYLES[mode]) for mark, mode in words)


def _queue(scene: Scene) -> Table:
    table = Table.grid(padding=(0, 1))
    for view, reason in scene.queue[:QUEUE_ROWS]:
        wants = view.wants if view.replicas == 1 else f"{view.replicas} × {view.wants}"
        table.add_row(
            Text(str(view.job), "yellow"), Text(view.name), Text(wants, "cyan"), Text(reason, "dim", no_wrap=True)
        )
    for _ in range(QUEUE_ROWS - len(scene.queue)):
        table.add_row("")
    return table


def _services(services: tuple[ServiceView, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(head, "dim") for head in ("name", "load", "wanted", "running", "replicas")))
    for view in services:
        bar = "█" * view.running + "▒" * view.starting + "░" * view.pending
        table.add_row(
            view.service, str(view.concurrency), str(view.wanted), str(view.running), Text(bar or "-", "magenta")
        )
    return table


def _line(scene: Scene) -> str:
    services = "".join(f", {view.service} {view.running}/{view.wanted}" for view in scene.services)
    failed = f", {scene.failed} failed" if scene.failed else ""
    return (
        f"{scene.elapsed_s:5.0f} s of about {scene.expected_s:.0f}: {scene.running} running, {scene.waiting} waiting, "
        f"{scene.done} of {scene.submitted} done{failed}; GPUs {scene.held_pct:.0f} % held{services}"
    )
