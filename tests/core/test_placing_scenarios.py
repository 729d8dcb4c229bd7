"""Pictures of a yard before and after somebody asks for a place in it: one file each in `placing/`.

A file says what there is, what runs and what is asked, line by line; below `----` stand the yard before, each request
with the places it got, and the yard after. A card shows `.` for nobody, `1` for job 1, `1+2` for both, `!` if it is
not healthy; a MIG card its eight slices, as in `<1111..22>`. What is free and kept for somebody who waits is `*`.

    node NAME CARDS [label=value ...]      CARDS: 4×H100, 2×A30:24Gi, none
    links NAME 0-1 2-3 ...                 NVLinks between cards
    switches NAME 0-1 2-3 ...              cards behind one PCIe switch; all others stand at the other socket
    speeds MODEL=SPEED ...                 beside the fastest; of one job: throughput=MODEL:SPEED
    seen TIMES field=value ...             so many such jobs were asked for (and taken back) before
    run TENANT/USER field=value ...        a job as in a job file, there before
    end NUMBER                             it ends
    ask TENANT/USER field=value ...        the request; all of one file's come in one turn after `together`
    serve TENANT/USER COUNT field=value …  a service of so many replicas, after the requests before this
    wait MINUTES                           so much time passes after the requests before this, and the yard is drawn

The pictures are drawn anew with REWRITE_SCENARIOS=1: read what changed before believing it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon.core.placing.partitions import Card, slices_at
from gpuyard_daemon.core.state.inputs import CancelRequested, JobSubmitted, PolicyChanged, ServiceApplied
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import MigInstance, Partition, WholeCards, devices_of
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, node
from support.pictures import check_picture, devices_drawn, spec_written

FOLDER = Path(__file__).parent / "placing"


class Scenario:
    """A yard that does what a file says."""

    def __init__(self) -> None:
        self.harness = CoreHarness()
        self.inventories: dict[str, Inventory] = {}
        self.output: list[str] = []
        self.asked: list[tuple[str, JobSpec, str]] = []
        #: It was drawn as it was before any request.
        self.is_drawn = False

    def play(self, text: str) -> str:
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                getattr(self, "_" + words[0])(*words[1:])
        self._request_all(together="together" in text.split())
        self._draw()
        return "\n".join(self.output) + "\n"

    def _node(self, name: str, cards: str, *labels: str) -> None:
        inventory = node(
            name, devices=list(devices_drawn(name, cards)), labels=dict(label.split("=", 1) for label in labels)
        )
        self._join(name, inventory)

    def _join(self, name: str, inventory: Inventory) -> None:
        self.inventories[name] = inventory
        self.harness.join(inventory)

    def _speeds(self, *named: str) -> None:
        speeds = sorted(
            (model, int(float(speed) * 1000)) for model, _, speed in [each.partition("=") for each in named]
        )
        self.harness.turn(PolicyChanged(policy=Policy(speeds=tuple(speeds))))

    def _links(self, name: str, *pairs: str) -> None:
        inventory = self.inventories[name]
        linked: dict[int, list[tuple[str, int]]] = {}
        for pair in pairs:
            one, other = map(int, pair.split("-"))
            linked.setdefault(one, []).append((inventory.devices[other].uuid, 4))
            linked.setdefault(other, []).append((inventory.devices[one].uuid, 4))
        devices = [
            msgspec.structs.replace(device, nvlinks=tuple(linked.get(position, ())))
            for position, device in enumerate(inventory.devices)
        ]
        self._join(name, msgspec.structs.replace(inventory, devices=tuple(devices)))

    def _switches(self, name: str, *groups: str) -> None:
        inventory = self.inventories[name]
        behind = [set(map(int, group.split("-"))) for group in groups]
        devices = [
            msgspec.structs.replace(
                device,
                pcie_peers=tuple(
                    (other.uuid, "same-switch" if any({one, two} <= group for group in behind) else "system")
                    for two, other in enumerate(inventory.devices)
                    if two != one
                ),
            )
            for one, device in enumerate(inventory.devices)
        ]
        self._join(name, msgspec.structs.replace(inventory, devices=tuple(devices)))

    def _seen(self, times: str, *fields: str) -> None:
        spec = msgspec.structs.replace(spec_written(fields), hold=True, allow_pending=True)
        for number in self.harness.submit_many([spec] * int(times)):
            self.harness.turn(
                CancelRequested(tenant="acme", user="alice", submission_id=f"c{number}", job=number),
            )

    def _run(self, owner: str, *fields: str) -> None:
        tenant, user = owner.split("/")
        number = self.harness.submit(spec_written(fields), tenant=tenant, user=user)
        assert number, self.harness.refused()
        self.harness.run(number)

    def _end(self, number: str) -> None:
        self.harness.ended(self._number(number))

    def _request_all(self, *, together: bool) -> None:
        if not self.is_drawn:
            self.is_drawn = True
            self._draw()
        for batch in [self.asked] if together else [[each] for each in self.asked]:
            self._request(batch)
        self.asked = []

    def _wait(self, minutes: str) -> None:
        self._request_all(together=False)
        self.harness.settle(most_ms=int(minutes) * 60_000)
        self._draw()
        self.output.append(f"{minutes} min later")

    def _serve(self, owner: str, count: str, *fields: str) -> None:
        self._request_all(together=False)
        first = self.harness.core.cluster.last_job + 1
        tenant, user = owner.split("/")
        spec = ServiceSpec(
            name="chat", argv=("/bin/serve",), need=spec_written(fields).need, min_replicas=int(count),
            max_replicas=int(count),
        )  # fmt: skip
        self.harness.turn(ServiceApplied(tenant=tenant, user=user, submission_id=f"s{first}", spec=spec))
        for number in range(first, self.harness.core.cluster.last_job + 1):
            self._tell(number, f"{owner} chat {' '.join(fields)}")

    def _ask(self, owner: str, *fields: str) -> None:
        self.asked.append((owner, spec_written(fields), " ".join(fields)))

    def _together(self) -> None:
        """Read from the text as a whole."""

    def _number(self, text: str) -> int:
        return int(text) + self._first() - 1

    def _first(self) -> int:
        """The number of the first job that was not only seen."""
        jobs = self.harness.core.cluster.jobs
        return min(
            [number for number, job in jobs.items() if job.state != "cancelled"], default=max(jobs, default=0) + 1
        )

    def _request(self, batch: list[tuple[str, JobSpec, str]]) -> None:
        first = self.harness.core.cluster.last_job + 1
        inputs = [
            JobSubmitted(tenant=owner.split("/")[0], user=owner.split("/")[1], submission_id=f"a{at}", spec=spec)
            for at, (owner, spec, _) in enumerate(batch, start=first)
        ]
        self.harness.turn(*inputs)
        for number, (owner, _, said) in enumerate(batch, start=first):
            self._tell(number, f"{owner} {said}")

    def _tell(self, number: int, asked: str) -> None:
        job = self.harness.core.cluster.jobs[number]
        places = ", ".join(self._place(a.node, devices_of(a.partition)) for a in job.assignments) or "waits"
        self.output.append(f"{number - self._first() + 1} {asked} → {places}")

    def _place(self, name: str, uuids: tuple[str, ...]) -> str:
        cards = self.harness.core.cluster.pool.spaces[name].by_uuid
        return name + (f"[{' '.join(str(cards[uuid].position) for uuid in uuids)}]" if uuids else "")

    def _draw(self) -> None:
        if self.output:
            self.output.append("")
        base = self._first() - 1
        for name, space in self.harness.core.cluster.pool.spaces.items():
            held = sorted({key.job - base for key in space.assignments} - _on_cards(space.cards, base))
            beside = f"  + {' '.join(map(str, held))}" if held else ""
            kept = {uuid: claim.partition for claim in space.claims for uuid in devices_of(claim.partition)}
            cards = " ".join(_card(card, base, kept.get(card.device.uuid)) for card in space.cards)
            self.output.append(f"{name}  [{cards}]{beside}")
        self.output.append("")


def _on_cards(cards: list[Card], base: int) -> set[int]:
    return {key.job - base for card in cards for key in card.held}


def _card(card: Card, base: int, kept: Partition | None) -> str:
    if not card.device.healthy:
        return "!"
    if card.mode == "mig":
        slices = ["*" if isinstance(kept, WholeCards) else "."] * card.device.mig_slices
        if isinstance(kept, MigInstance):
            slices[kept.start : kept.start + kept.size] = "*" * kept.size
        for key, partition in card.held.items():
            if isinstance(partition, MigInstance):
                for at in range(card.device.mig_slices):
                    if slices_at(partition.start, partition.size) >> at & 1:
                        slices[at] = str(key.job - base)
        return f"<{''.join(slices)}>"
    return "+".join(str(key.job - base) for key in sorted(card.held)) or ("." if kept is None else "*")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_places_are_as_drawn(path: Path) -> None:
    check_picture(path, Scenario().play)


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 10
