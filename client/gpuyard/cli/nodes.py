"""`gpuyard nodes` and `gpuyard stats`: the machines, their cards, and the yard in numbers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import AsJson, print_fields, print_json, remark, rough
from gpuyard.cli.session import session_of
from gpuyard.cli.tables import print_table
from gpuyard.errors import GpuyardError
from gpuyard_protocol.names import nearest
from gpuyard_protocol.queries import CardView, NodeView, Stats
from gpuyard_protocol.resources import Device
from gpuyard_protocol.units import MILLI, format_milli

if TYPE_CHECKING:
    from gpuyard.client import Client

NODE_COLUMNS = ("NODE", "STATE", "CARDS", "MODES", "#GPU", "#CPU", "#MEMORY", "HEARD", "REASON")
CARD_COLUMNS = ("NODE", "#CARD", "MODEL", "MODE", "#COMPUTE", "#MEMORY", "#USE", "JOBS")


def register(app: typer.Typer) -> None:
    app.command("nodes")(nodes)
    app.command("stats")(stats)


def nodes(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(metavar="[NODE]", help="Only this one, with its cards.")] = "",
    cards: Annotated[bool, typer.Option("--cards", help="One line per card.")] = False,
    as_json: AsJson = False,
) -> None:
    """List nodes, and how full they are."""

    async def work(yard: Client) -> tuple[tuple[NodeView, ...], tuple[str, ...]]:
        return await yard.nodes(), (await yard.stats()).alarms

    found, alarms = session_of(ctx).run(work)
    if node:
        chosen = tuple(view for view in found if node in (view.node, view.hostname))
        if not chosen:
            near = nearest(node, [view.node for view in found])
            hint = f": did you mean {near!r}?" if near else " (see: gpuyard nodes)"
            raise GpuyardError(f"there is no node {node!r}{hint}")
        found = chosen
    if as_json:
        print_json(found)
    elif not found:
        remark("no node has joined yet")
    elif node or cards:
        print_table(CARD_COLUMNS, [_card_row(view, card) for view in found for card in view.cards])
    else:
        print_table(NODE_COLUMNS, [_node_row(view) for view in found])
    if not as_json:
        for alarm in alarms:
            remark(f"alarm: {alarm}")


def short_model(card: CardView) -> str:
    """`H100` out of "NVIDIA H100 80GB HBM3"."""
    return Device(uuid=card.uuid, index=card.index, model=card.model, memory_mib=card.memory_mib, modes=()).short_model


def state_of(view: NodeView) -> str:
    """Its state; of a node that an operator keeps new work away from, whether anything is there still."""
    if not view.cordoned or view.state != "ready":
        return view.state
    return "draining" if is_used(view) else "cordoned"


def is_used(view: NodeView) -> bool:
    """Something holds a part of it."""
    return bool(view.cpu_held_milli or view.memory_held_mib or any(card.held_milli for card in view.cards))


def _node_row(view: NodeView) -> tuple[str, ...]:
    models = Counter(short_model(card) for card in view.cards)
    modes = Counter(card.mode for card in view.cards if card.healthy)
    faulty = sum(not card.healthy for card in view.cards)
    held = sum(card.held_milli for card in view.cards)
    return (
        view.node,
        state_of(view),
        ", ".join(f"{count}×{model}" for model, count in sorted(models.items())) + (" sim" if view.simulated else ""),
        " ".join(f"{mode}:{count}" for mode, count in sorted(modes.items())) + (f" faulty:{faulty}" if faulty else ""),
        f"{format_milli(held)}/{len(view.cards)}",
        f"{format_milli(view.cpu_held_milli)}/{format_milli(view.cpu_milli)}",
        f"{_gib(view.memory_held_mib)}/{_gib(view.memory_mib)}Gi",
        "never" if view.heard_ms_ago < 0 else f"{rough(view.heard_ms_ago)} ago",
        view.reason,
    )


def _gib(mib: int) -> str:
    return f"{mib / 1024:.4g}"


def _card_row(view: NodeView, card: CardView) -> tuple[str, ...]:
    sample = card.sample
    use = "" if sample is None or sample.utilization_pct is None else f"{sample.utilization_pct}%"
    return (
        view.node,
        str(card.index),
        short_model(card),
        (card.mode if card.healthy else f"{card.mode}, faulty{card.fault and ': '}{card.fault}")
        + (f" ({card.note})" if card.note else ""),
        f"{card.held_milli * 100 // MILLI}%",
        f"{_gib(card.held_memory_mib)}/{_gib(card.memory_mib)}Gi",
        use,
        ",".join(str(job) for job in card.jobs),
    )


def stats(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The yard in numbers."""

    async def work(yard: Client) -> Stats:
        return await yard.stats()

    found = session_of(ctx).run(work)
    if as_json:
        print_json(found)
        return
    used = f"{100 * found.held_milli_ms / found.capacity_milli_ms:.1f} % so far" if found.capacity_milli_ms else ""
    print_fields(
        [
            ("yard", found.yard),
            ("nodes", ", ".join(f"{count} {state}" for state, count in sorted(found.nodes.items()) if count)),
            ("GPUs", f"{format_milli(found.held_milli)} of {found.gpus} held now{', ' + used if used else ''}"),
            ("jobs", ", ".join(f"{count} {state}" for state, count in found.jobs.items() if count) or "none"),
            ("finished", str(found.finished)),
            ("started", str(found.started)),
            ("average wait", rough(found.wait_sum_ms // found.started) if found.started else ""),
            *(("alarm", alarm) for alarm in found.alarms),
        ]
    )
