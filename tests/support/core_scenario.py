"""A seeded day of a yard, the same for every process that plays it; run as a module it prints a digest of all records.

python -m support.core_scenario SEED
"""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import msgspec

from gpuyard_daemon.core.state.inputs import LoadReported, NodeLost, RequeueAll, ServiceApplied, YardStarted
from gpuyard_daemon.core.state.turn import Record
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, job, need, node
from support.core_world import World

NEEDS: tuple[dict[str, Any], ...] = (
    {"gpus": 1},
    {"gpus": 2, "models": ("H100", "A100")},
    {"gpus": 8},
    {"share_milli": 300},
    {"share_memory_mib": 20_000, "isolation": "none"},
    {"share_milli": 250, "isolation": "hard"},
    {"mig": "1g.10gb"},
    {"mig": "3g.40gb"},
    {"node_labels": (("zone", "b"), ("rack", "r1"))},
    {},
)


def play(seed: int, steps: int = 60) -> list[Record]:
    """Submissions of all kinds, services, lost nodes, failures, a stop and a start."""
    rng = random.Random(seed)
    harness = CoreHarness()
    inventories = [node(f"n-{number}", 8) for number in range(1, 4)]
    inventories.append(node("n-4", 4, labels={"zone": "b", "rack": "r1"}))
    world = World(harness, inventories)
    for target in world.nodes.values():
        world.join(target)
    for name in ("chat", "embed", "rank"):
        spec = ServiceSpec(name=name, argv=("serve",), need=need(share_milli=200), max_replicas=6, target_concurrency=4)
        harness.turn(ServiceApplied(tenant="acme", user="alice", submission_id=f"apply-{name}", spec=spec))
    for _ in range(steps):
        _step(rng, harness, world)
    world.finish(20)
    return harness.records


def _step(rng: random.Random, harness: CoreHarness, world: World) -> None:
    target = world.nodes[rng.choice(sorted(world.nodes))]
    match rng.randrange(9):
        case 0 | 1 | 2:
            specs = [
                job(replicas=rng.choice((1, 1, 3)), retries=1, priority=rng.randint(-2, 2), **rng.choice(NEEDS))
                for _ in range(rng.randint(1, 6))
            ]
            harness.submit_many(specs, tenant=rng.choice(("acme", "umbrella")), user=rng.choice(("alice", "bob")))
        case 3 | 4:
            world.sync(target)
            world.deliver(target)
        case 5 | 6:
            for key in target.live("running")[: rng.randint(0, 5)]:
                world.end(target, key, "exited", exit_code=rng.choice((0, 0, 1)))
            world.deliver(target)
        case 7:
            load = LoadReported(tenant="acme", service=rng.choice(("chat", "rank")), concurrency=rng.randrange(40))
            harness.turn(load, after_ms=rng.randrange(20_000))
        case _:
            if rng.random() < 0.2:
                harness.turn(RequeueAll())
                harness.turn(YardStarted(epoch=rng.randrange(9)))
                for each in world.nodes.values():
                    world.join(each)
            else:
                harness.turn(NodeLost(node=target.name))
                world.join(target)


def digest(records: list[Record]) -> str:
    return hashlib.sha256(b"\n".join(msgspec.json.encode(record) for record in records)).hexdigest()


if __name__ == "__main__":
    print(digest(play(int(sys.argv[1]))))
