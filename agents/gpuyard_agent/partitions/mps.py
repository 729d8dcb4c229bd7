"""Shares of a card under MPS: a cap on compute, and a memory limit that the driver enforces per process.

The limits travel in the environment of the client, which can only lower what the daemon allows: a job that throws them
away is not held by them. Where the agent may say so, a card under MPS admits the server's process alone (compute mode
`exclusive process`), so such a job fails instead; that guards against accidents, not against malice, and whoever needs
more asks for isolation `hard`. The memory limit is per process, so it is the share divided by the number of processes
the job declared.

Clients of one server share its fate. A fatal fault of one ends them all, and the server takes nobody until the last of
them is gone; a client killed amid its work can wedge the server for the others. So `watch` asks every daemon regularly,
and where one has failed, everybody on it is told `NeighbourFault`, the place takes nothing new, and the daemon ends
with its last share. `before_kill` ends a client's work in an orderly way first.

Inside a MIG instance MPS serves the processes of one job, which asked for it: a daemon that sees the instance alone, no
cap on compute, and for each process its part of the instance's memory. No neighbours are there to be told of a fault:
the job's own processes see it.

On modelled cards the environment and the books are all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import NeighbourFault, PartitionGrant, PartitionRefused
from gpuyard_agent.partitions.mps_daemon import MpsDaemon
from gpuyard_agent.partitions.process_tree import descendants
from gpuyard_agent.partitions.whole import visible
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import MigInstance, MpsShare, Partition

CONTROL_PROGRAM = "nvidia-cuda-mps-control"
#: Between two questions to each daemon.
WATCH_S = 5.0
#: Questions in a row without an answer: then it counts as wedged.
SILENT_MAX = 2
#: For all clients of one replica to end their work.
TERMINATE_S = 5.0
#: Files beside the pipe directory: the card, and that this agent made it admit one process alone.
_CARD_FILE = "card"
_EXCLUSIVE_FILE = "exclusive"

#: A card or a MIG instance, and the account that is served there.
_Place = tuple[DeviceUuid, int]


def percentage(share_milli: int) -> int:
    """The active thread percentage for a share, rounded up: 1 … 100."""
    return -(-share_milli // 10)


class MpsMaker:
    """Shares of cards, and the control daemons they need."""

    def __init__(self, backend: DeviceBackend, run_dir: Path, control: str, *, is_exclusive: bool = True) -> None:
        """`run_dir`: for pipe directories; keep it short. `control`: path of the daemon's program, unused when the
        cards are modelled. `is_exclusive`: a card under MPS admits nobody else, where the agent may say so."""
        self._backend = backend
        self._run_dir = run_dir
        self._control = control
        self._is_exclusive = is_exclusive
        #: A daemon for each (card, uid) that has a share.
        self._daemons: dict[_Place, MpsDaemon] = {}
        #: The shares that each daemon serves. Empty sets are not kept: the last release ends the daemon.
        self._users: dict[_Place, set[AssignmentKey]] = {}
        #: Of the places, the MIG instances: each serves one job.
        self._instances: set[_Place] = set()
        #: Places that failed, and how: nobody comes in until the last one is out.
        self._failed: dict[_Place, str] = {}
        #: Questions in a row that a daemon left without an answer.
        self._silent: dict[_Place, int] = {}
        #: Cards whose compute mode this agent may not set.
        self.not_exclusive: set[DeviceUuid] = set()
        self._tell: Callable[[NeighbourFault], None] = lambda news: None
        self._look = asyncio.Event()

    # --- making ---

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        if not isinstance(partition, MpsShare):
            raise PartitionRefused(f"assignment {key} asks for no share under MPS")
        place = (partition.device, account.uid)
        directory = self._directory(partition.device, account.uid)
        if not self._backend.simulated:
            await self._serve(place, directory, account)
        self._users.setdefault(place, set()).add(key)
        return PartitionGrant(env=_share_environment(partition, directory), mode="mps", cards=1)

    async def serve_instance(
        self, key: AssignmentKey, instance: MigInstance, mig_uuid: str, account: Account
    ) -> dict[str, str]:
        """What the processes of a job need in their environment to share its instance."""
        place = (mig_uuid, account.uid)
        directory = self._directory(mig_uuid, account.uid)
        self._instances.add(place)
        if not self._backend.simulated:
            try:
                await self._serve(place, directory, account)
            except BaseException:
                self._instances.discard(place)
                raise
        self._users[place] = {key}
        return _instance_environment(instance, mig_uuid, directory)

    async def leave_instance(self, key: AssignmentKey) -> None:
        place = self._place_of(key)
        if place is not None:
            await self._leave(key, place)
            self._instances.discard(place)

    async def _serve(self, place: _Place, directory: Path, account: Account) -> None:
        """A daemon that answers. Raises `DeviceTrouble`; then what nobody uses is not left behind."""
        if not self._control:
            raise DeviceTrouble(f"there is no {CONTROL_PROGRAM} on this node")
        if place in self._failed:
            raise DeviceTrouble(f"MPS on card {place[0]} is about to be restarted: {self._failed[place]}")
        daemon = self._daemons.get(place) or MpsDaemon(self._control, directory, place[0], account)
        users = self._users.get(place)
        if users and not await daemon.answers():
            # Others depend on it: a new one beside what is left of their server would serve nobody.
            self._fail(place, "its control daemon has died" if daemon.pid() is None else "its control daemon is stuck")
            raise DeviceTrouble(f"MPS on card {place[0]} is about to be restarted: {self._failed[place]}")
        try:
            if place not in self._instances:
                await self._close_card(place[0], directory)
            await daemon.ensure()
        except (DeviceTrouble, asyncio.CancelledError):
            if not users:
                await self._open_card(place[0], directory)
            raise
        self._daemons[place] = daemon

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        if not isinstance(partition, MpsShare):
            return
        await self._leave(key, (partition.device, uid))

    async def _leave(self, key: AssignmentKey, place: _Place) -> None:
        users = self._users.get(place, set())
        if users <= {key}:
            daemon = self._daemons.get(place)
            if daemon is not None:
                await daemon.quit()
                await self._open_card(place[0], daemon.directory)
                del self._daemons[place]
            self._users.pop(place, None)
            self._failed.pop(place, None)
            self._silent.pop(place, None)
        else:
            users.discard(key)

    # --- the card's compute mode ---

    async def _close_card(self, device: DeviceUuid, directory: Path) -> None:
        """Written down before it is done, so that an agent that comes after this one opens the card again."""
        if not self._is_exclusive or (directory / _EXCLUSIVE_FILE).exists():
            return
        _note_exclusive(directory, device)
        answer = await self._backend.set_exclusive(device, True)
        if answer == "denied":
            self.not_exclusive.add(device)
        if answer != "done":
            (directory / _EXCLUSIVE_FILE).unlink()

    async def _open_card(self, device: DeviceUuid, directory: Path) -> None:
        if (directory / _EXCLUSIVE_FILE).exists():
            await self._backend.set_exclusive(device, False)
            (directory / _EXCLUSIVE_FILE).unlink()

    # --- looking after daemons ---

    def listen(self, tell: Callable[[NeighbourFault], None]) -> None:
        self._tell = tell

    def look_now(self) -> None:
        self._look.set()

    async def watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._look.wait()
            self._look.clear()
            await asyncio.gather(*(self.examine(place) for place in list(self._daemons)))

    async def examine(self, place: _Place) -> None:
        """Ask one daemon how it is, and tell those that it failed."""
        daemon = self._daemons.get(place)
        if daemon is None or place in self._failed:
            return
        state = await daemon.state()
        if self._daemons.get(place) is not daemon:
            return  # it was ended meanwhile
        self._silent[place] = self._silent.get(place, 0) + 1 if state == "silent" else 0
        if state == "fault" and place not in self._instances:
            self._fail(place, "a process that shares it had a fatal fault")
        elif state == "gone":
            self._fail(place, "its control daemon has died")
        elif self._silent[place] >= SILENT_MAX:
            self._fail(place, "its control daemon does not answer")

    def _fail(self, place: _Place, why: str) -> None:
        self._failed[place] = why
        for key in sorted(self._users.get(place, ())):
            self._tell(NeighbourFault(key=key, detail=f"MPS on card {place[0]}: {why}"))

    async def before_kill(self, key: AssignmentKey, pids: Collection[int]) -> None:
        place = self._place_of(key)
        daemon = self._daemons.get(place) if place is not None else None
        if place is None or daemon is None or place in self._failed:
            return
        wanted = await asyncio.to_thread(descendants, pids)
        try:
            async with asyncio.timeout(TERMINATE_S):
                await daemon.terminate(wanted)
        except TimeoutError:
            # Whether the server is wedged shows when it is asked.
            self.look_now()

    def _place_of(self, key: AssignmentKey) -> _Place | None:
        return next((place for place, users in self._users.items() if key in users), None)

    # --- after a restart ---

    async def sweep(self) -> tuple[str, ...]:
        """Daemons of an earlier agent whose shares are all gone: their directories tell of them."""
        if self._backend.simulated or not self._control or not self._run_dir.is_dir():
            return ()
        removed = []
        ours = {daemon.directory for daemon in self._daemons.values()}
        for directory in sorted(self._run_dir.iterdir()):
            uid = directory.name.rpartition("-")[2]
            if directory in ours or not uid.isdigit():
                continue
            account = Account(name=uid, uid=int(uid), gid=directory.stat().st_gid)
            daemon = MpsDaemon(self._control, directory, "", account)
            if daemon.pid() is not None:
                await daemon.quit()
                removed.append(f"MPS control daemon of {directory.name}")
            if (directory / _EXCLUSIVE_FILE).exists():
                device = (directory / _CARD_FILE).read_text()
                await self._open_card(device, directory)
                removed.append(f"exclusive compute mode of card {device}")
        return tuple(removed)

    def abandon(self) -> None:
        """The agent ends: daemons go on, as the jobs do."""
        for daemon in self._daemons.values():
            daemon.abandon()

    def _directory(self, device: DeviceUuid, uid: int) -> Path:
        # Short, for the sockets in it; the uid is read back by `sweep`.
        return self._run_dir / f"{hashlib.sha256(device.encode()).hexdigest()[:8]}-{uid}"


def _note_exclusive(directory: Path, device: DeviceUuid) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CARD_FILE).write_text(device)
    (directory / _EXCLUSIVE_FILE).touch()


def _instance_environment(instance: MigInstance, mig_uuid: str, directory: Path) -> dict[str, str]:
    return {
        **visible((mig_uuid,)),
        **_pipes(directory),
        # By number: daemon and clients see one device each, the instance.
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={instance.memory_mib // instance.processes}M",
    }


def _pipes(directory: Path) -> dict[str, str]:
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(directory / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(directory / "log"),
    }


def _share_environment(share: MpsShare, directory: Path) -> dict[str, str]:
    limit_mib = share.memory_mib // share.processes
    return {
        **visible((share.device,)),
        **_pipes(directory),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percentage(share.share_milli)),
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"{share.device}={limit_mib}M",
    }
