"""Shares of a card under MPS: a cap on compute, and a memory limit that the driver enforces per process.

The limits travel in the environment of the client, which can only lower what the daemon allows: a job that throws them
away is not held by them. That guards against accidents, not against malice; whoever needs more asks for isolation
`hard`. The memory limit is per process, so it is the share divided by the number of processes the job declared.

On modelled cards the environment and the books are all there is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant, PartitionRefused
from gpuyard_agent.partitions.mps_daemon import MpsDaemon
from gpuyard_agent.partitions.whole import visible
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import MpsShare, Partition

CONTROL_PROGRAM = "nvidia-cuda-mps-control"


def percentage(share_milli: int) -> int:
    """The active thread percentage for a share, rounded up: 1 … 100."""
    return -(-share_milli // 10)


class MpsMaker:
    """Shares of cards, and the control daemons they need."""

    def __init__(self, backend: DeviceBackend, run_dir: Path, control: str) -> None:
        """`run_dir`: for pipe directories; keep it short. `control`: path of the daemon's program, unused when the
        cards are modelled."""
        self._backend = backend
        self._run_dir = run_dir
        self._control = control
        #: A daemon for each (card, uid) that has a share.
        self._daemons: dict[tuple[DeviceUuid, int], MpsDaemon] = {}
        #: The shares that each daemon serves. Empty sets are not kept: the last release ends the daemon.
        self._users: dict[tuple[DeviceUuid, int], set[AssignmentKey]] = {}

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        if not isinstance(partition, MpsShare):
            raise PartitionRefused(f"assignment {key} asks for no share under MPS")
        place = (partition.device, account.uid)
        directory = self._directory(partition.device, account.uid)
        if not self._backend.simulated:
            if not self._control:
                raise DeviceTrouble(f"there is no {CONTROL_PROGRAM} on this node")
            daemon = self._daemons.get(place) or MpsDaemon(self._control, directory, partition.device, account)
            await daemon.ensure()
            self._daemons[place] = daemon
        self._users.setdefault(place, set()).add(key)
        return PartitionGrant(env=_environment(partition, directory), mode="mps", cards=1)

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        if not isinstance(partition, MpsShare):
            return
        place = (partition.device, uid)
        users = self._users.get(place, set())
        if users <= {key}:
            daemon = self._daemons.get(place)
            if daemon is not None:
                await daemon.quit()
                del self._daemons[place]
            self._users.pop(place, None)
        else:
            users.discard(key)

    async def sweep(self) -> tuple[str, ...]:
        """Daemons of an earlier agent whose shares are all gone: their directories tell of them."""
        if self._backend.simulated or not self._control or not self._run_dir.is_dir():
            return ()
        removed = []
        ours = {daemon.pipe_dir.parent for daemon in self._daemons.values()}
        for directory in sorted(self._run_dir.iterdir()):
            uid = directory.name.rpartition("-")[2]
            if directory in ours or not uid.isdigit():
                continue
            account = Account(name=uid, uid=int(uid), gid=directory.stat().st_gid)
            daemon = MpsDaemon(self._control, directory, "", account)
            if daemon.pid() is not None:
                await daemon.quit()
                removed.append(f"MPS control daemon of {directory.name}")
        return tuple(removed)

    def abandon(self) -> None:
        """The agent ends: daemons go on, as the jobs do."""
        for daemon in self._daemons.values():
            daemon.abandon()

    def _directory(self, device: DeviceUuid, uid: int) -> Path:
        # Short, for the sockets in it; the uid is read back by `sweep`.
        return self._run_dir / f"{hashlib.sha256(device.encode()).hexdigest()[:8]}-{uid}"


def _environment(share: MpsShare, directory: Path) -> dict[str, str]:
    limit_mib = share.memory_mib // share.processes
    return {
        **visible((share.device,)),
        "CUDA_MPS_PIPE_DIRECTORY": str(directory / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(directory / "log"),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percentage(share.share_milli)),
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"{share.device}={limit_mib}M",
    }
