"""Partitions: what the books allow, what processes are told, and that failing and undoing leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, MigInstanceFound, PartitionRefused
from gpuyard_agent.devices.simulated import SimulatedBackend, parse_cards
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import NeighbourFault
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_agent.partitions.room import CardLedger
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import (
    Device,
    MigInstance,
    MigProfileFacts,
    MpsShare,
    NoGpu,
    Partition,
    TimeSliceShare,
    WholeCards,
    devices_of,
    mode_of,
)

ALICE = Account(name="alice", uid=1001, gid=1001)
BOB = Account(name="bob", uid=1002, gid=1002)
CARDS = "2xH100-80GB,1xA30"


def key(job: int) -> AssignmentKey:
    return AssignmentKey(job, 1, 0)


def instance(device: Device, profile: str, start: int) -> MigInstance:
    facts = next(facts for facts in device.mig_profiles if facts.name == profile)
    return MigInstance(device.uuid, profile, start, facts.size, facts.memory_mib, facts.compute_slices)


class Yard:
    """Modelled cards and their partitions."""

    def __init__(self, directory: Path, devices: tuple[Device, ...], backend: SimulatedBackend) -> None:
        self.directory = directory
        self.devices = devices
        self.backend = backend
        self.partitions = CardPartitions(backend, directory)

    async def prepare(
        self, job: int, partition: Partition, account: Account = ALICE, domain: str = "acme"
    ) -> dict[str, str]:
        return (await self.partitions.prepare(key(job), partition, account, domain)).env


@pytest.fixture
async def yard(tmp_path: Path) -> Yard:
    backend = SimulatedBackend(parse_cards(CARDS), "node-1")
    made = Yard(tmp_path, await backend.inventory(), backend)
    await made.partitions.refresh()
    return made


# --- what processes are told ---


async def test_a_replica_without_cards_sees_none(yard: Yard) -> None:
    grant = await yard.partitions.prepare(key(1), NoGpu(), ALICE, "acme")
    assert grant.env == {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert (grant.mode, grant.cards) == ("none", 0)


async def test_whole_cards_are_named_by_uuid(yard: Yard) -> None:
    one, two = yard.devices[0].uuid, yard.devices[1].uuid
    grant = await yard.partitions.prepare(key(1), WholeCards((two, one)), ALICE, "acme")
    assert grant.env == {"CUDA_VISIBLE_DEVICES": f"{two},{one}", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert (grant.mode, grant.cards) == ("whole", 2)
    assert yard.partitions.modes() == {one: "whole", two: "whole", yard.devices[2].uuid: "idle"}


async def test_a_share_under_mps_gets_its_limits(yard: Yard) -> None:
    card = yard.devices[0].uuid
    env = await yard.prepare(1, MpsShare(card, 305, 10_000, processes=4))
    assert env["CUDA_VISIBLE_DEVICES"] == card
    assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "31", "rounded up"
    assert env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"{card}=2500M", "the limit is per process"
    assert env["CUDA_MPS_PIPE_DIRECTORY"].startswith(str(yard.directory))
    other = await yard.prepare(2, MpsShare(card, 100, 1000))
    assert other["CUDA_MPS_PIPE_DIRECTORY"] == env["CUDA_MPS_PIPE_DIRECTORY"], "one daemon for a card and an account"


async def test_an_instance_is_named_by_its_own_uuid_and_gone_when_undone(yard: Yard) -> None:
    device = yard.devices[0]
    grant = await yard.partitions.prepare(key(1), instance(device, "1g.10gb", 5), ALICE, "acme")
    (made,) = await yard.backend.mig_instances(device.uuid)
    assert grant.mig_uuid == made.mig_uuid
    assert grant.env["CUDA_VISIBLE_DEVICES"] == made.mig_uuid
    assert (made.profile, made.start) == ("1g.10gb", 5)
    await yard.partitions.undo(key(1))
    assert await yard.backend.mig_instances(device.uuid) == ()


# --- by key ---


async def test_asking_again_gives_the_same_and_another_partition_is_refused(yard: Yard) -> None:
    device = yard.devices[0]
    partition = instance(device, "1g.10gb", 0)
    first = await yard.partitions.prepare(key(1), partition, ALICE, "acme")
    assert await yard.partitions.prepare(key(1), partition, ALICE, "acme") == first
    assert len(await yard.backend.mig_instances(device.uuid)) == 1
    with pytest.raises(PartitionRefused, match=r"1\.1\.0 holds another partition already"):
        await yard.prepare(1, WholeCards((yard.devices[1].uuid,)))
    await yard.partitions.undo(key(1))
    await yard.partitions.undo(key(1))
    assert yard.partitions.held() == ()


async def test_asking_twice_at_once_makes_it_once(yard: Yard) -> None:
    partition = instance(yard.devices[0], "1g.10gb", 0)
    grants = await asyncio.gather(*(yard.prepare(1, partition) for _ in range(5)))
    assert all(grant == grants[0] for grant in grants)


# --- what is refused ---


async def test_mps_is_shared_inside_one_domain_and_by_one_account(yard: Yard) -> None:
    card = yard.devices[0].uuid
    await yard.prepare(1, MpsShare(card, 100, 1000))
    with pytest.raises(PartitionRefused, match="shared inside 'acme', not with 'globex'"):
        await yard.prepare(2, MpsShare(card, 100, 1000), domain="globex")
    with pytest.raises(PartitionRefused, match="serves uid 1001 under MPS and cannot serve uid 1002"):
        await yard.prepare(2, MpsShare(card, 100, 1000), account=BOB)
    await yard.partitions.undo(key(1))
    await yard.prepare(2, MpsShare(card, 100, 1000), account=BOB, domain="globex")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (WholeCards(()), "at least one card, and each once"),
        (WholeCards(("GPU-none",)), "no card GPU-none"),
        (MpsShare("CARD", 0, 1000), "a share of 0 thousandths"),
        (MpsShare("CARD", 1001, 1000), "a share of 1001 thousandths"),
        (MpsShare("CARD", 100, 0), "a share needs memory"),
        (MpsShare("CARD", 100, 90_000), "has 81152 MiB left of 81152, not 90000"),
        (MpsShare("CARD", 100, 1000, processes=49), "serves 48 processes under MPS and has 0"),
        (MpsShare("CARD", 100, 1000, processes=0), "0 processes cannot divide"),
        (TimeSliceShare("CARD", 100, -5), "a share needs memory"),
        (TimeSliceShare("CARD", 0, 5), "a weight of 0 thousandths"),
        (MigInstance("CARD", "1g.5gb", 0, 1, 5000, 1), "has no MIG profile '1g.5gb'"),
        (MigInstance("CARD", "2g.20gb", 1, 2, 20_096, 2), "can have 2g.20gb at 0, 2, 4, not at 1"),
        (MigInstance("CARD", "2g.20gb", 0, 1, 20_096, 2), "has 2g.20gb with 2 slices"),
    ],
)
async def test_what_cannot_be_is_refused(yard: Yard, wanted: Partition, expected: str) -> None:
    card = yard.devices[0].uuid
    if isinstance(wanted, MpsShare):
        wanted = MpsShare(card, wanted.share_milli, wanted.memory_mib, wanted.processes)
    elif isinstance(wanted, TimeSliceShare):
        wanted = TimeSliceShare(card, wanted.share_milli, wanted.memory_mib)
    elif isinstance(wanted, MigInstance):
        wanted = MigInstance(card, wanted.profile, wanted.start, wanted.size, wanted.memory_mib, wanted.compute_slices)
    with pytest.raises(PartitionRefused, match=expected):
        await yard.prepare(1, wanted)
    assert yard.partitions.held() == ()


async def test_a_card_that_is_ill_takes_nothing_new_but_its_jobs_are_adopted(yard: Yard) -> None:
    card = yard.devices[0].uuid
    yard.backend.set_fault(card, "fell off the bus")
    await yard.partitions.refresh()
    with pytest.raises(PartitionRefused, match="is not healthy: fell off the bus"):
        await yard.prepare(1, WholeCards((card,)))
    grant = await yard.partitions.adopt(key(1), WholeCards((card,)), ALICE, "acme")
    assert grant.env["CUDA_VISIBLE_DEVICES"] == card


# --- restarts and failures ---


async def test_a_restarted_agent_adopts_and_sweeps_the_rest(yard: Yard) -> None:
    device = yard.devices[0]
    kept = await yard.partitions.prepare(key(1), instance(device, "2g.20gb", 0), ALICE, "acme")
    await yard.prepare(2, instance(device, "1g.10gb", 6))
    await yard.partitions.close()
    yard.backend.drop(key(2))

    restarted = CardPartitions(yard.backend, yard.directory)
    await restarted.refresh()
    assert await restarted.adopt(key(1), instance(device, "2g.20gb", 0), ALICE, "acme") == kept
    assert await restarted.sweep() == (f"MIG instance 1g.10gb at 6 of card 0 ({device.uuid})",)
    assert [one.profile for one in await yard.backend.mig_instances(device.uuid)] == ["2g.20gb"]
    with pytest.raises(PartitionRefused, match="is in mode mig, not whole"):
        await restarted.prepare(key(3), WholeCards((device.uuid,)), ALICE, "acme")


async def test_cards_that_were_modelled_by_an_earlier_agent_come_back_by_adoption(yard: Yard) -> None:
    """The modelled cards of a new process are empty: adopting makes again what the ledger says."""
    device = yard.devices[0]
    before = await yard.partitions.prepare(key(1), instance(device, "3g.40gb", 4), ALICE, "acme")
    backend = SimulatedBackend(parse_cards(CARDS), "node-1")
    restarted = CardPartitions(backend, yard.directory)
    await restarted.refresh()
    assert await restarted.adopt(key(1), instance(device, "3g.40gb", 4), ALICE, "acme") == before
    assert len(await backend.mig_instances(device.uuid)) == 1


class _Stubborn(SimulatedBackend):
    """Cards that will not make, or not let go of, an instance."""

    trouble = ""

    async def create_mig(self, device: str, profile: str, start: int) -> MigInstanceFound:
        if self.trouble == "create":
            raise DeviceTrouble("the driver is busy")
        return await super().create_mig(device, profile, start)

    async def destroy_mig(self, device: str, mig_uuid: str) -> None:
        if self.trouble == "destroy":
            raise DeviceTrouble("in use by another client")
        await super().destroy_mig(device, mig_uuid)


async def test_a_card_that_does_not_let_go_is_given_to_nobody_else(tmp_path: Path) -> None:
    backend = _Stubborn(parse_cards("1xH100-80GB"), "node-1")
    partitions = CardPartitions(backend, tmp_path)
    (device,) = await partitions.refresh()
    whole = WholeCards((device.uuid,))

    backend.trouble = "create"
    with pytest.raises(DeviceTrouble, match="the driver is busy"):
        await partitions.prepare(key(1), instance(device, "1g.10gb", 0), ALICE, "acme")
    assert partitions.held() == ()

    backend.trouble = "destroy"
    await partitions.prepare(key(1), instance(device, "1g.10gb", 0), ALICE, "acme")
    with pytest.raises(DeviceTrouble, match="in use by another client"):
        await partitions.undo(key(1))
    assert partitions.held() == (key(1),)
    with pytest.raises(PartitionRefused):
        await partitions.prepare(key(2), whole, ALICE, "acme")

    backend.trouble = ""
    await partitions.undo(key(1))
    await partitions.prepare(key(2), whole, ALICE, "acme")


# --- MPS daemons ---

#: Does what the agent needs of NVIDIA's program: a daemon with a pid file and a socket, and a client that asks it.
CONTROL = """#!{python}
import os, socket, sys, time
pipe = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
where = os.path.join(pipe, "control")
pid_file = os.path.join(pipe, "nvidia-cuda-mps-control.pid")
if sys.argv[1:] == ["-f"]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "GPU-broken":
        print("Cannot find a card")
        sys.exit(1)
    if os.path.exists(where):
        os.unlink(where)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(where)
    listener.listen()
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    while True:
        connection, _ = listener.accept()
        question = connection.recv(200).decode().strip()
        if question == "quit":
            os.unlink(pid_file)
            sys.exit(0)
        connection.sendall(b"100.0")
        connection.close()
client = socket.socket(socket.AF_UNIX)
client.connect(where)
client.sendall(sys.stdin.read().encode())
print(client.recv(200).decode())
"""


class _RealCards:
    """Cards that are not modelled, as far as MPS needs to know."""

    simulated = False

    def __init__(self, devices: tuple[Device, ...]) -> None:
        self._devices = devices

    async def inventory(self) -> tuple[Device, ...]:
        return self._devices

    async def set_exclusive(self, device: str, on: bool) -> str:
        return "denied"

    async def device_files(self, device: str, mig_uuid: str = "") -> tuple[str, ...]:
        return ()

    def hold(self, key: AssignmentKey, partition: Partition) -> None: ...

    def running(self, key: AssignmentKey, pid: int) -> None: ...

    def drop(self, key: AssignmentKey) -> None: ...


class MpsYard:
    """A real card as MPS sees it, and the program that stands in for NVIDIA's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.control = directory / "nvidia-cuda-mps-control"
        self.control.write_text(CONTROL.format(python=sys.executable))
        self.control.chmod(0o755)
        self.device = Device(uuid="GPU-real", index=0, model="NVIDIA A30", memory_mib=24_000, modes=("whole", "mps"))
        self.broken = Device(uuid="GPU-broken", index=1, model="NVIDIA A30", memory_mib=24_000, modes=("mps",))
        self.account = Account(name="me", uid=os.getuid(), gid=os.getgid())

    async def partitions(self) -> CardPartitions:
        backend = cast("DeviceBackend", _RealCards((self.device, self.broken)))
        made = CardPartitions(backend, self.directory, mps_control=str(self.control))
        await made.refresh()
        return made

    def pids(self) -> list[int]:
        """Daemons that live, by their pid files."""
        files = self.directory.glob("mps/*/pipe/nvidia-cuda-mps-control.pid")
        return [pid for pid in (int(file.read_text()) for file in files) if Path(f"/proc/{pid}").exists()]


@pytest.fixture
async def mps() -> AsyncIterator[MpsYard]:
    # A short path that any account may enter: sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="gy-") as directory:
        Path(directory).chmod(0o755)
        yard = MpsYard(Path(directory))
        yield yard
        for pid in yard.pids():
            os.kill(pid, signal.SIGKILL)


async def test_a_daemon_serves_its_card_until_the_last_share_is_gone(mps: MpsYard) -> None:
    partitions = await mps.partitions()
    await partitions.prepare(key(1), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    (pid,) = mps.pids()
    await partitions.prepare(key(2), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    assert mps.pids() == [pid]
    await partitions.undo(key(1))
    assert mps.pids() == [pid]
    await partitions.undo(key(2))
    assert mps.pids() == []


async def test_a_daemon_outlives_the_agent_and_is_adopted_or_swept(mps: MpsYard) -> None:
    first = await mps.partitions()
    await first.prepare(key(1), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    (pid,) = mps.pids()
    await first.close()

    second = await mps.partitions()
    await second.adopt(key(1), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    assert await second.sweep() == ()
    assert mps.pids() == [pid]
    await second.close()

    third = await mps.partitions()
    (swept,) = await third.sweep()
    assert swept.startswith("MPS control daemon of")
    os.waitpid(pid, 0)  # in a test the daemon is this process's child
    assert mps.pids() == []


async def test_a_daemon_that_died_is_started_again_when_all_that_it_served_are_gone(mps: MpsYard) -> None:
    partitions = await mps.partitions()
    hit: list[NeighbourFault] = []
    partitions.listen(hit.append)
    await partitions.prepare(key(1), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    (pid,) = mps.pids()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceTrouble, match="about to be restarted: its control daemon has died"):
        await partitions.prepare(key(2), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    assert [news.key for news in hit] == [key(1)]
    await partitions.undo(key(1))
    await partitions.prepare(key(2), MpsShare("GPU-real", 300, 1000), mps.account, "acme")
    assert len(mps.pids()) == 1
    assert mps.pids() != [pid]
    await partitions.undo(key(2))


async def test_a_daemon_that_does_not_come_up_is_told_with_its_last_words(mps: MpsYard) -> None:
    partitions = await mps.partitions()
    with pytest.raises(DeviceTrouble, match="ended at once: Cannot find a card"):
        await partitions.prepare(key(1), MpsShare("GPU-broken", 300, 1000), mps.account, "acme")
    assert partitions.held() == ()


async def test_a_daemon_runs_as_the_account_it_serves(mps: MpsYard) -> None:
    account = mps.account
    if os.getuid() == 0:  # only root can become somebody else
        nobody = pwd.getpwnam("nobody")
        account = Account(name="nobody", uid=nobody.pw_uid, gid=nobody.pw_gid)
    mps.control.write_text(CONTROL.format(python="/usr/bin/python3"))  # an interpreter that anybody may execute
    partitions = await mps.partitions()
    await partitions.prepare(key(1), MpsShare("GPU-real", 300, 1000), account, "acme")
    (pid,) = mps.pids()
    assert os.stat(f"/proc/{pid}").st_uid == account.uid
    await partitions.undo(key(1))
    assert mps.pids() == []


# --- the books, with anything ---

DEVICES: tuple[Device, ...] = asyncio.run(SimulatedBackend(parse_cards(CARDS), "node-1").inventory())


def shares(devices: tuple[Device, ...]) -> st.SearchStrategy[Partition]:
    uuid = st.sampled_from([device.uuid for device in devices])
    memory = st.integers(1, 50_000)
    return st.one_of(
        st.builds(WholeCards, st.lists(uuid, min_size=1, max_size=2, unique=True).map(tuple)),
        st.builds(MpsShare, uuid, st.integers(1, 1000), memory, st.integers(1, 30)),
        st.builds(TimeSliceShare, uuid, st.integers(1, 1000), memory),
        st.sampled_from([(device, facts) for device in devices for facts in device.mig_profiles]).flatmap(
            lambda pair: st.sampled_from(pair[1].starts).map(lambda start: instance(pair[0], pair[1].name, start))
        ),
    )


STEPS = st.lists(
    st.tuples(st.integers(1, 8), st.one_of(st.none(), shares(DEVICES)), st.sampled_from([ALICE, BOB])), max_size=40
)


def check_card(device: Device, held: list[tuple[Partition, int]]) -> None:
    """The rules, written down a second time."""
    modes = {mode_of(partition) for partition, _ in held}
    assert len(modes) <= 1
    if modes == {"whole"}:
        assert len(held) == 1
    soft = [partition for partition, _ in held if isinstance(partition, MpsShare | TimeSliceShare)]
    assert sum(share.memory_mib for share in soft) <= device.memory_mib
    mps = [partition for partition, _ in held if isinstance(partition, MpsShare)]
    assert sum(share.share_milli for share in mps) <= 1000
    assert sum(share.processes for share in mps) <= device.mps_clients_max
    assert not mps or len({uid for _, uid in held}) == 1
    slices: list[int] = []
    facts_by_name: dict[str, MigProfileFacts] = {facts.name: facts for facts in device.mig_profiles}
    instances = [partition for partition, _ in held if isinstance(partition, MigInstance)]
    for one in instances:
        slices += range(one.start, one.start + one.size)
        alike = sum(other.profile == one.profile for other in instances)
        assert alike <= facts_by_name[one.profile].count_max
    assert len(slices) == len(set(slices))
    assert all(0 <= place < device.mig_slices for place in slices)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_whatever_is_taken_and_released_no_card_is_over_committed(
    steps: list[tuple[int, Partition | None, Account]],
) -> None:
    ledger = CardLedger(DEVICES)
    held: dict[AssignmentKey, tuple[Partition, int]] = {}
    for job, partition, account in steps:
        if partition is None:
            ledger.release(key(job))
            held.pop(key(job), None)
        else:
            try:
                ledger.take(key(job), partition, uid=account.uid, share_domain="acme")
            except PartitionRefused:
                pass
            else:
                held[key(job)] = (partition, account.uid)
        assert ledger.keys() == tuple(sorted(held))
        for device in DEVICES:
            on_card = [entry for entry in held.values() if device.uuid in devices_of(entry[0])]
            check_card(device, on_card)
            assert ledger.mode(device.uuid) == (mode_of(on_card[0][0]) if on_card else "idle")


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_the_books_and_the_modelled_cards_agree_on_everything(
    steps: list[tuple[int, Partition | None, Account]],
) -> None:
    """What the books allow, cards that keep books of their own can do: no order is refused twice for two reasons."""

    async def run() -> None:
        backend = SimulatedBackend(parse_cards(CARDS), "node-1")
        partitions = CardPartitions(backend, Path(directory))
        await partitions.refresh()
        ledger = CardLedger(DEVICES)
        for job, partition, account in steps:
            if partition is None:
                await partitions.undo(key(job))
                ledger.release(key(job))
                continue
            try:
                ledger.take(key(job), partition, uid=account.uid, share_domain="acme")
            except PartitionRefused:
                with pytest.raises(PartitionRefused):
                    await partitions.prepare(key(job), partition, account, "acme")
            else:
                await partitions.prepare(key(job), partition, account, "acme")
        assert partitions.held() == ledger.keys()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run())
