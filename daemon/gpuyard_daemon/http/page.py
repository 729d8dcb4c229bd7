"""The page at `/`: the yard on one screen, for a person without any tool at hand. No scripts, no styles of weight.

It shows numbers and nodes, never a job's name or its tenant: whoever can reach this port has shown no key.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from gpuyard_daemon.http.sources import Sources
from gpuyard_protocol.queries import NodeView
from gpuyard_protocol.units import format_mib, format_milli

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta http-equiv="refresh" content="5">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }} th, td {{ text-align: left; padding: .15em 1.2em .15em 0 }}
th {{ border-bottom: 1px solid #999 }} .bad {{ color: #b00 }} code {{ white-space: pre }}
</style></head><body>
"""


def render(sources: Sources) -> str:
    stats = sources.stats()
    trouble = sources.health.unready_because()
    state = f'<span class="bad">{escape(trouble)}</span>' if trouble else "scheduling"
    jobs = [(name, str(count)) for name, count in stats.jobs.items()]
    held = f"{format_milli(stats.held_milli)} of {stats.gpus} cards promised"
    return "".join(
        (
            _HEAD.format(title=f"gpuyard: {escape(stats.yard)}"),
            f"<h1>Yard {escape(stats.yard)}</h1><p>{state} · {held} · turn {stats.turns}</p>",
            _table(("jobs", "now"), jobs),
            _table(("node", "state", "heard", "cards", "memory", "why"), map(_node_row, sources.nodes())),
            '<p><a href="/metrics">metrics</a> · <a href="/stats">stats</a> · <a href="/healthz">health</a></p>',
            "</body></html>\n",
        )
    )


def _node_row(node: NodeView) -> tuple[str, ...]:
    cards = " ".join(f"{card.mode}:{format_milli(card.held_milli)}" for card in node.cards)
    heard = f"{node.heard_ms_ago / 1000:.0f} s ago" if node.heard_ms_ago >= 0 else "never"
    memory = f"{format_mib(node.memory_held_mib)} of {format_mib(node.memory_mib)}"
    return (node.hostname or node.node, node.state, heard, cards, memory, node.reason)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["<table><tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{escape(cell)}</td>" for cell in row), "</tr>"]
    return "".join((*lines, "</table>"))
