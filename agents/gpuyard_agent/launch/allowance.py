"""What a replica may use of its node: the CPUs and memory it asked for, and the device files of its own cards.

What nobody asked for is counted by the planner and not enforced: a job that says nothing of its memory is not killed at
the default. Which device files belong to a partition is the partition's to say (`PartitionGrant.devices`); here only
those are added that lead to no card.
"""

from __future__ import annotations

from pathlib import Path

from gpuyard_agent.launch.base import Limits
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_protocol.nodes import Launch

#: What programs on several nodes, or with file systems of their own, open; no card is reached through them.
_HARMLESS = ("fuse", "gdrdrv", "infiniband/rdma_cm", "infiniband/uverbs*", "nvidia-caps-imex-channels/*")
#: systemd's backstop comes so much later than the agent's own time limit and grace.
BACKSTOP_MS = 600_000


def limits_of(launch: Launch, grant: PartitionGrant) -> Limits:
    """For one replica, by what was asked and what was granted."""
    # Time in which it is halted or suspended does not count, and systemd would count it.
    has_backstop = launch.time_limit_ms > 0 and grant.mode != "timeslice" and not launch.suspendable
    return Limits(
        memory_mib=launch.memory_limit_mib,
        cpu_milli=launch.cpu_limit_milli,
        run_max_ms=launch.time_limit_ms + launch.stop_grace_ms + BACKSTOP_MS if has_backstop else 0,
        devices=None if grant.devices is None else (*grant.devices, *_present(_HARMLESS)),
    )


def _present(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(path) for pattern in patterns for path in sorted(Path("/dev").glob(pattern)))
