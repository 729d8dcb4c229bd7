"""What files of pictures and stories have in common: cards and jobs as they are written, and the answer below a rule.

The answers are written anew with REWRITE_SCENARIOS=1: read what changed before believing it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpuyard_protocol.codec import from_plain
from gpuyard_protocol.jobs import JobRequest, JobSpec
from gpuyard_protocol.resources import Device
from gpuyard_protocol.units import Memory
from support.builders import gpu

#: Between what is done and what comes of it.
RULE = "----\n"
CARDS = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-40GB", "A30": "NVIDIA A30"}
MEMORY_MIB = {"H100": 81_152, "A100": 40_448, "A30": 24_064}
NUMBERS = {"gpus", "replicas", "min_replicas", "priority", "retries", "gpu_processes", "total_gpus"}


def devices_drawn(node: str, cards: str) -> Iterator[Device]:
    """Of `4×H100`, `4×H100,2×A30:24Gi` or `none`."""
    if cards == "none":
        return
    index = 0
    for part in cards.split(","):
        count, _, kind = part.partition("×")
        model, _, memory = kind.partition(":")
        for _ in range(int(count)):
            mib = int(Memory.parse(memory)) if memory else MEMORY_MIB[model]
            yield gpu(index, node=node, model=CARDS[model], memory_mib=mib)
            index += 1


def spec_written(fields: tuple[str, ...]) -> JobSpec:
    """Of `gpus=2 nodes=n-1,n-2 node_labels=zone:b throughput=A100:0.5 hold=yes` and the like."""
    plain: dict[str, object] = {"command": ["/bin/true"]}
    for field in fields:
        name, _, value = field.partition("=")
        match name:
            case "nodes" | "depends_on":
                plain[name] = value.split(",")
            case "node_labels":
                plain[name] = dict(pair.split(":") for pair in value.split(","))
            case "throughput":
                model, _, speed = value.partition(":")
                plain[name] = {model: float(speed)}
            case "hold" | "allow_pending":
                plain[name] = value == "yes"
            case _:
                plain[name] = int(value) if name in NUMBERS else value
    return from_plain(JobRequest, plain).specify()


def check_picture(path: Path, play: Callable[[str], str]) -> None:
    """What comes of the part above the rule is what stands below it."""
    text, _, expected = path.read_text(encoding="utf-8").partition(RULE)
    told = play(text)
    if os.environ.get("REWRITE_SCENARIOS"):
        path.write_text(text + RULE + told, encoding="utf-8")
    else:
        unlike = difflib.unified_diff(expected.splitlines(), told.splitlines(), "as written", "as it is", lineterm="")
        assert told == expected, "\n".join(unlike)
