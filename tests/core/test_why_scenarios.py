"""Pictures of a yard, a question, and the answer as a person reads it: one file each in `why/`.

A file says what there is and what was asked, line by line; below `----` stands what comes of it: who is on which card
(`.` nobody, `1` job 1, `1+2` both, `!` not healthy), and the answer of `gpuyard why` or `gpuyard submit --dry-run`.

    node NAME CARDS [label=value ...]      CARDS: 4×H100, 2×A30:24Gi, none
    limit TENANT GPUS
    queue NAME NOMINAL BORROW [MODEL]      a queue of the tenant of that name
    job TENANT/USER field=value ...        as in a job file; a second after the line before; what is placed runs at once
    end NUMBER | hold NUMBER | wait TIME | lose NODE | break NODE/CARD
    why NUMBER [TENANT]                    as that tenant, else as the operator
    dry TENANT/USER field=value ...

The answers are written anew with REWRITE_SCENARIOS=1: read what changed before believing it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from gpuyard.cli.explaining import dry_run_lines, why_lines
from gpuyard_daemon.core.state.inputs import NodeSuspected, PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.codec import from_plain
from gpuyard_protocol.jobs import JobRequest, JobSpec
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device
from gpuyard_protocol.units import Duration, GpuAmount, Memory
from support.builders import CoreHarness, gpu, node

FOLDER = Path(__file__).parent / "why"
RULE = "----\n"
CARDS = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-40GB", "A30": "NVIDIA A30"}
MEMORY_MIB = {"H100": 81_152, "A100": 40_448, "A30": 24_064}
NUMBERS = {"gpus", "replicas", "priority", "retries", "gpu_processes"}


class Scenario:
    """A yard that does what a file says."""

    def __init__(self) -> None:
        self.harness = CoreHarness()
        self.inventories: dict[str, Inventory] = {}
        self.queues: dict[str, QueuePolicy] = {}
        self.output: list[str] = []
        self._verbs: dict[str, Callable[..., None]] = {
            "node": self._node, "limit": self._limit, "queue": self._queue, "job": self._job, "end": self._end,
            "hold": self._hold, "wait": self._wait, "lose": self._lose, "break": self._break, "why": self._why,
            "dry": self._dry,
        }  # fmt: skip

    def play(self, text: str) -> str:
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                self._verbs[words[0]](*words[1:])
        return "\n".join(self.output) + "\n"

    # --- what there is ---

    def _node(self, name: str, cards: str, *labels: str) -> None:
        inventory = node(
            name, devices=list(_devices(name, cards)), labels=dict(label.split("=", 1) for label in labels)
        )
        self._join(name, inventory)

    def _join(self, name: str, inventory: Inventory) -> None:
        self.inventories[name] = inventory
        self.harness.join(inventory)

    def _break(self, where: str) -> None:
        name, card = where.split("/")
        devices = list(self.inventories[name].devices)
        devices[int(card)] = msgspec.structs.replace(devices[int(card)], healthy=False, fault="Xid 79")
        self._join(name, msgspec.structs.replace(self.inventories[name], devices=tuple(devices)))

    def _lose(self, name: str) -> None:
        self.harness.turn(NodeSuspected(node=name))

    def _limit(self, tenant: str, gpus: str) -> None:
        self.harness.limit(tenant, gpus_milli=int(GpuAmount.parse(gpus)))

    def _queue(self, name: str, nominal: str, borrow: str, model: str = "") -> None:
        grant = Grant(model, nominal_milli=int(GpuAmount.parse(nominal)), borrow_milli=int(GpuAmount.parse(borrow)))
        self.queues[name] = QueuePolicy(name, grants=(grant,))
        queues = tuple(self.queues[known] for known in sorted(self.queues))
        tenants = tuple((known, TenantLimits(queue=known)) for known in sorted(self.queues))
        self.harness.turn(PolicyChanged(policy=Policy(tenants=tenants, queues=queues)))

    def _job(self, owner: str, *fields: str) -> None:
        tenant, user = owner.split("/")
        self.harness.now_ms += 1000
        number = self.harness.submit(_spec(fields), tenant=tenant, user=user)
        assert number, self.harness.refused()
        self._run_placed()

    def _run_placed(self) -> None:
        for number, job in list(self.harness.core.cluster.jobs.items()):
            if job.state == "starting":
                self.harness.run(number)

    def _end(self, number: str) -> None:
        self.harness.ended(int(number))
        self._run_placed()

    def _hold(self, number: str) -> None:
        assert self.harness.hold(int(number)).accepted

    def _wait(self, time: str) -> None:
        self.harness.settle(most_ms=int(Duration.parse(time)))
        self._run_placed()

    # --- what is asked ---

    def _picture(self) -> None:
        if self.output:
            self.output.append("")
        spaces = self.harness.core.cluster.pool.spaces
        for name, space in spaces.items():
            cards = [
                "!" if not card.device.healthy else "+".join(str(key.job) for key in sorted(card.held)) or "."
                for card in space.cards
            ]
            state = "" if space.node.state == "ready" else f"  ({space.node.state})"
            self.output.append(f"{name}  [{' '.join(cards)}]{state}")
        self.output.append("")

    def _why(self, number: str, viewer: str | None = None) -> None:
        self._picture()
        answer = self.harness.core.why(int(number), self.harness.now_ms, viewer=viewer)
        assert answer is not None
        self.output.append(f"$ gpuyard why {number}")
        self.output += why_lines(answer, self.harness.now_ms)

    def _dry(self, owner: str, *fields: str) -> None:
        self._picture()
        tenant, user = owner.split("/")
        before = self.harness.core.digest()
        answer = self.harness.core.plan(tenant, user, _spec(fields), self.harness.now_ms)
        assert self.harness.core.digest() == before, "a dry run changed something"
        self.output.append(f"$ gpuyard submit --dry-run ({' '.join(fields)})")
        self.output += dry_run_lines(answer, self.harness.now_ms)


def _devices(name: str, cards: str) -> Iterator[Device]:
    if cards == "none":
        return
    index = 0
    for part in cards.split(","):
        count, _, kind = part.partition("×")
        model, _, memory = kind.partition(":")
        for _ in range(int(count)):
            mib = int(Memory.parse(memory)) if memory else MEMORY_MIB[model]
            yield gpu(index, node=name, model=CARDS[model], memory_mib=mib)
            index += 1


def _spec(fields: tuple[str, ...]) -> JobSpec:
    plain: dict[str, object] = {"command": ["/bin/true"]}
    for field in fields:
        name, _, value = field.partition("=")
        match name:
            case "nodes" | "depends_on":
                plain[name] = value.split(",")
            case "node_labels":
                plain[name] = dict(pair.split(":") for pair in value.split(","))
            case "hold" | "allow_pending":
                plain[name] = value == "yes"
            case _:
                plain[name] = int(value) if name in NUMBERS else value
    return from_plain(JobRequest, plain).specify()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_answer_reads_as_written(path: Path) -> None:
    text, _, expected = path.read_text(encoding="utf-8").partition(RULE)
    answer = Scenario().play(text)
    if os.environ.get("REWRITE_SCENARIOS"):
        path.write_text(text + RULE + answer, encoding="utf-8")
    else:
        assert answer == expected


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 15
