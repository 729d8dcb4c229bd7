"""What a node says of its network, and what a gang is told of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gpuyard_agent import host, network
from gpuyard_agent.checkpoint_dirs import CheckpointDirectories
from gpuyard_agent.launch.base import Account
from gpuyard_agent.logs import KEPT_S, LogStore
from gpuyard_protocol.nodes import NetworkInterface, RdmaPort

ETH = NetworkInterface(name="eth0", addresses=("10.0.0.7", "fd00::7"), speed_mbps=25_000)
DOCKER = NetworkInterface(name="docker0", addresses=("172.17.0.1",))
ME = Account(name="me", uid=os.geteuid(), gid=os.getegid())


def rdma_tree(root: Path) -> Path:
    """As the kernel shows two fast ports, a slow one, and one without a cable."""
    ports = [
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand", "ib0"),
        ("mlx5_1", "4: ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand", "ib1"),
        ("mlx5_2", "4: ACTIVE", "25 Gb/sec (1X EDR)", "Ethernet", "eth0"),
        ("mlx5_3", "1: DOWN", "2.5 Gb/sec (1X SDR)", "InfiniBand", ""),
    ]
    for device, state, rate, layer, interface in ports:
        port = root / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", rate), ("link_layer", layer)):
            (port / name).write_text(text + "\n")
        if interface:
            (root / device / "device" / "net" / interface).mkdir(parents=True)
    return root


def test_rdma_ports_are_read_with_state_rate_and_interface(tmp_path: Path) -> None:
    first, _, roce, down = network.rdma_ports(rdma_tree(tmp_path))
    assert first == RdmaPort(
        device="mlx5_0", port=1, active=True, rate_gbps=400, link_layer="InfiniBand", interface="ib0"
    )
    assert (roce.link_layer, roce.rate_gbps, roce.interface) == ("Ethernet", 25, "eth0")
    assert (down.active, down.rate_gbps, down.interface) == (False, 2, "")
    assert network.rdma_ports(tmp_path / "none") == ()


def test_a_gang_uses_the_fastest_ports_that_are_up_and_the_interface_of_its_address(tmp_path: Path) -> None:
    ports = network.rdma_ports(rdma_tree(tmp_path))
    env = network.training_environment("10.0.0.7", (DOCKER, ETH), ports)
    assert env["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert env["GLOO_SOCKET_IFNAME"] == env["OMPI_MCA_btl_tcp_if_include"] == "eth0"
    assert (env["NCCL_IB_DISABLE"], env["NCCL_IB_HCA"]) == ("0", "=mlx5_0:1,mlx5_1:1")


def test_without_rdma_it_is_switched_off_and_an_unknown_address_names_no_interface() -> None:
    assert network.training_environment("203.0.113.9", (ETH,), ()) == {"NCCL_IB_DISABLE": "1"}
    assert network.training_environment("127.0.0.1", (ETH,), ())["NCCL_SOCKET_IFNAME"] == "=lo"


def test_this_hosts_interfaces_have_addresses_and_loopback_is_none_of_them() -> None:
    for interface in network.interfaces():
        assert interface.addresses
        assert not any(address.startswith("127.") for address in interface.addresses)
        assert interface.speed_mbps >= 0


def test_a_node_beside_its_server_does_not_tell_others_its_loopback_address() -> None:
    assert host.reachable_address("nats://127.0.0.1:4222", one_host=True) == "127.0.0.1"
    out = host.reachable_address("nats://127.0.0.1:4222", one_host=False)
    addresses = [address for interface in network.interfaces() for address in interface.addresses]
    assert out in addresses or not addresses


# --- checkpoints ---


async def test_a_job_has_one_directory_for_all_its_attempts(tmp_path: Path) -> None:
    directories = CheckpointDirectories(tmp_path)
    await directories.make("acme", 17, ME)
    path = directories.path("acme", 17)
    (path / "step-100").touch()
    await directories.make("acme", 17, ME)
    assert path == tmp_path / "17" / "checkpoint"
    assert [entry.name for entry in path.iterdir()] == ["step-100"]
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("made", ["17", "17/checkpoint"])
async def test_a_directory_left_half_made_by_a_kill_is_made_whole(tmp_path: Path, made: str) -> None:
    (tmp_path / made).mkdir(0o700, parents=True)
    (tmp_path / "17").chmod(0o700)
    account = Account(name="one", uid=60_001, gid=60_001) if os.geteuid() == 0 else ME
    directories = CheckpointDirectories(tmp_path)
    await directories.make("acme", 17, account)
    path = directories.path("acme", 17)
    assert path.parent.stat().st_mode & 0o777 == 0o711
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (account.uid, 0o700)


async def test_on_shared_storage_tenants_are_apart(tmp_path: Path) -> None:
    directories = CheckpointDirectories(tmp_path / "jobs", tmp_path / "shared")
    await directories.make("acme", 17, ME)
    assert (tmp_path / "shared" / "acme" / "17").is_dir()
    assert not (tmp_path / "jobs").exists()


async def test_an_attempt_under_another_account_gets_what_is_there(tmp_path: Path) -> None:
    directories = CheckpointDirectories(tmp_path)
    await directories.make("acme", 17, Account(name="one", uid=60_001, gid=60_001))
    path = directories.path("acme", 17)
    (path / "deep").mkdir()
    (path / "deep" / "step-100").touch()
    outside = tmp_path / "outside"
    outside.touch()
    (path / "link").symlink_to(outside)
    os.link(outside, path / "deep" / "second-name")
    await directories.make("acme", 17, Account(name="two", uid=60_002, gid=60_002))
    new_owner = 60_002 if os.geteuid() == 0 else os.geteuid()  # only root gives files away
    assert {(path / name).stat().st_uid for name in (".", "deep", "deep/step-100")} == {new_owner}
    assert outside.stat().st_uid == os.geteuid()


async def test_a_checkpoint_goes_with_the_last_output_of_its_job(tmp_path: Path) -> None:
    await CheckpointDirectories(tmp_path).make("acme", 17, ME)
    (tmp_path / "17" / "1").mkdir()
    (tmp_path / "17" / "1" / "0.out").touch()
    store = LogStore(tmp_path, lambda key: False)
    store.tidy(time.time())
    assert (tmp_path / "17" / "checkpoint").is_dir()
    for _ in range(2):
        store.tidy(time.time() + KEPT_S + 60)
    assert not (tmp_path / "17").exists()
