"""What `gpuyard top` draws, from made-up answers of a yard."""

from __future__ import annotations

from gpuyard.cli.top import NODE_ROWS, Scene, plain_lines, render
from gpuyard_protocol.jobs import JobView, ReplicaView
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.queries import CardView, NodeView, Stats

NOW = 1_700_000_600_000


def card(index: int, mode: str = "idle", held: int = 0, *, healthy: bool = True, busy: int | None = None) -> CardView:
    sample = None if busy is None else DeviceSample(uuid=f"GPU-{index}", utilization_pct=busy)
    return CardView(
        uuid=f"GPU-{index}",
        index=index,
        model="NVIDIA H100",
        memory_mib=80_000,
        mode=mode,
        held_milli=held,
        healthy=healthy,
        sample=sample,
    )


def view(number: int, *, elements: int = 0, started: bool = False, name: str = "") -> JobView:
    placed = (ReplicaView(replica=0, state="running", node="n-1", devices=("GPU-0",)),) if started else ()
    return JobView(
        job=number,
        tenant="acme",
        user="alice",
        name=name,
        state="running" if started else "pending",
        submission_id=f"s{number}",
        priority=0,
        replicas=1,
        wants="1×GPU",
        submitted_ms=NOW - 600_000,
        started_ms=NOW - 60_000 if started else 0,
        placed=placed,
        elements=elements,
    )


def scene(nodes: int = 1) -> Scene:
    cards = (card(0, "whole", 1000, busy=80), card(1, "mps", 300), card(2), card(3, healthy=False))
    views = tuple(NodeView(node=f"n-{n}", hostname=f"h-{n}", state="ready", cards=cards) for n in range(1, nodes + 1))
    stats = Stats(
        yard="lab", now_ms=NOW, jobs={"running": 1, "pending": 3}, nodes={"ready": nodes}, gpus=4 * nodes,
        held_milli=1300 * nodes, held_milli_ms=0, capacity_milli_ms=0,
    )  # fmt: skip
    waiting = ((view(4, elements=3, name="sweep"), "no such card free"),)
    return Scene(stats, views, (view(1, started=True, name="train"),), waiting)


def test_a_picture_without_a_terminal() -> None:
    assert plain_lines(scene(), NOW) == [
        "lab: 1.3 of 4 GPUs held; nodes: 1 ready; jobs: 1 running, 3 pending",
        "n-1  W S · !  1.3/4, 80 % busy",
        "",
        "1 running",
        "  1 train alice  1×GPU on n-1, 1m",
        "3 waiting in the yard; of yours, the longest",
        "  4 sweep alice and 2 more of its array  1×GPU, 10m: no such card free",
    ]


def test_a_picture_with_colours_says_the_same() -> None:
    drawn = render(scene(), NOW).plain
    assert "n-1  █ ▃ · ✗ 1.3/4, 80 % busy" in drawn
    assert "  1 train alice  1×GPU on n-1, 1m" in drawn


def test_what_does_not_fit_is_counted() -> None:
    lines = plain_lines(scene(NODE_ROWS + 6), NOW)
    assert f"(the first {NODE_ROWS} nodes; 6 more)" in lines
    assert sum(line.startswith("n-") for line in lines) == NODE_ROWS
