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

import shlex
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from gpuyard.cli.explaining import dry_run_lines, why_lines
from gpuyard_daemon.core.state.inputs import NodeSuspected, PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.units import Duration, GpuAmount
from support.builders import CoreHarness, node
from support.pictures import check_picture, devices_drawn, spec_written

FOLDER = Path(__file__).parent / "why"


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
            name, devices=list(devices_drawn(name, cards)), labels=dict(label.split("=", 1) for label in labels)
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
        number = self.harness.submit(spec_written(fields), tenant=tenant, user=user)
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
        answer = self.harness.core.plan(tenant, user, spec_written(fields), self.harness.now_ms)
        assert self.harness.core.digest() == before, "a dry run changed something"
        self.output.append(f"$ gpuyard submit --dry-run ({' '.join(fields)})")
        self.output += dry_run_lines(answer, self.harness.now_ms)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_answer_reads_as_written(path: Path) -> None:
    check_picture(path, Scenario().play)


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 15
