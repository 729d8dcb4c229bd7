"""The page at `/`: the yard on one screen, for a person without any tool at hand. No scripts, no styles of weight.

It shows numbers and nodes, never a job's name or its tenant: whoever can reach this port has shown no key. A card is a
box, as full as what is held of it, in the colour of how it is cut. Of a large yard the nodes in trouble come first, and
only so many are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from gpuyard_daemon.http.sources import Sources
from gpuyard_protocol.queries import CardView, NodeView
from gpuyard_protocol.units import MILLI, format_mib, format_milli

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta http-equiv="refresh" content="5">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }} th, td {{ text-align: left; padding: .15em 1.2em .15em 0 }}
th {{ border-bottom: 1px solid #999 }} .bad {{ color: #b00 }}
.card {{ display: inline-block; width: .9em; height: 1.1em; margin-right: .2em; border: 1px solid #888 }}
{modes}
</style></head><body>
"""
#: How a card is cut, and its colour.
_COLOURS = {"whole": "#3b6fd4", "mps": "#2a9d5c", "mig": "#a648b8", "timeslice": "#d9a400"}
NODES_MAX = 200


def render(sources: Sources) -> str:
    stats = sources.stats()
    trouble = sources.health.unready_because()
    state = f'<span class="bad">{escape(trouble)}</span>' if trouble else "scheduling"
    jobs = [(name, str(count)) for name, count in stats.jobs.items()]
    held = f"{format_milli(stats.held_milli)} of {stats.gpus} cards promised"
    return "".join(
        (
            _HEAD.format(
                title=f"gpuyard: {escape(stats.yard)}",
                modes=" ".join(f".{mode} {{ color: {colour} }}" for mode, colour in _COLOURS.items()),
            ),
            f"<h1>Yard {escape(stats.yard)}</h1><p>{state} · {held} · turn {stats.turns}</p>",
            _table(("jobs", "now"), (tuple(map(escape, row)) for row in jobs)),
            _nodes(sources.nodes()),
            '<p><a href="/metrics">metrics</a> · <a href="/stats">stats</a> · <a href="/healthz">health</a></p>',
            "</body></html>\n",
        )
    )


def _nodes(nodes: tuple[NodeView, ...]) -> str:
    shown = sorted(nodes, key=lambda node: node.state == "ready")[:NODES_MAX]
    table = _table(("node", "host", "state", "heard", "cards", "GPUs held", "memory", "why"), map(_node_row, shown))
    legend = " ".join(f'<span class="{mode}">■</span> {mode}' for mode in _COLOURS)
    more = f"<p>and {len(nodes) - NODES_MAX} more nodes</p>" if len(nodes) > NODES_MAX else ""
    return f'{table}{more}<p>cards: □ idle {legend} <span class="bad">✗</span> not healthy</p>'


def _node_row(node: NodeView) -> tuple[str, ...]:
    heard = f"{node.heard_ms_ago / 1000:.0f} s ago" if node.heard_ms_ago >= 0 else "never"
    memory = f"{format_mib(node.memory_held_mib)} of {format_mib(node.memory_mib)}"
    held = f"{format_milli(sum(card.held_milli for card in node.cards))} of {len(node.cards)}"
    first = [escape(cell) for cell in (node.node, node.hostname, node.state, heard)]
    return (*first, "".join(map(_card, node.cards)), escape(held), escape(memory), escape(node.reason))


def _card(card: CardView) -> str:
    """A box, filled from below; what it says is there for whoever points at it, too."""
    if not card.healthy:
        return f'<span class="bad" title="{escape(card.fault)}">✗</span> '
    full = min(100, card.held_milli * 100 // MILLI)
    style = f"background: linear-gradient(to top, currentColor {full}%, transparent {full}%)"
    title = f"{card.index}: {card.model}, {card.mode}, {full} %"
    return f'<span class="card {escape(card.mode)}" style="{style}" title="{escape(title)}"></span>'


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Of cells that are HTML already."""
    lines = ["<table><tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{cell}</td>" for cell in row), "</tr>"]
    return "".join((*lines, "</table>"))
