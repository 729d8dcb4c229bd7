"""What a replica's process sees: all of it, and nothing that was inherited."""

from __future__ import annotations

import pytest

from gpuyard_agent.environment import PATH, environment, scrub
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Go, Launch

KEY = AssignmentKey(17, 2, 1)
ACCOUNT = Account(name="alice", uid=1000, gid=1000, home="/home/alice", shell="/bin/bash")
GRANT = PartitionGrant(
    env={"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, mode="whole", cards=2
)


def env_of(launch: Launch, *, grant: PartitionGrant = GRANT, go: Go | None = None, port: int = 0) -> dict[str, str]:
    return environment(
        key=KEY,
        launch=launch,
        grant=grant,
        account=ACCOUNT,
        node="node-1",
        job_dir="/jobs/17",
        go=go,
        port=port,
        checkpoint_dir="/jobs/17/checkpoint",
        network={"NCCL_SOCKET_IFNAME": "=eth0", "NCCL_IB_DISABLE": "1"},
    )


def test_a_plain_replica_sees_its_account_its_cards_and_its_assignment() -> None:
    assert env_of(Launch(tenant="acme", user="alice")) == {
        "PATH": PATH,
        "HOME": "/home/alice",
        "USER": "alice",
        "LOGNAME": "alice",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GPUYARD_JOB": "17",
        "GPUYARD_ATTEMPT": "2",
        "GPUYARD_REPLICA": "1",
        "GPUYARD_ASSIGNMENT": "17.2.1",
        "GPUYARD_TENANT": "acme",
        "GPUYARD_USER": "alice",
        "GPUYARD_NODE": "node-1",
        "GPUYARD_PARTITION": "whole",
        "GPUYARD_JOB_DIR": "/jobs/17",
        "GPUYARD_CHECKPOINT_DIR": "/jobs/17/checkpoint",
        "SLURM_JOB_ID": "17",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_GPUS_ON_NODE": "2",
    }


def test_an_element_of_an_array_knows_which_one_it_is() -> None:
    env = env_of(Launch(tenant="acme", user="alice", array_job=16, array_index=5, array_count=9))
    assert {name: value for name, value in env.items() if "ARRAY" in name} == {
        "GPUYARD_ARRAY_JOB": "16",
        "GPUYARD_ARRAY_INDEX": "5",
        "GPUYARD_ARRAY_COUNT": "9",
        "SLURM_ARRAY_JOB_ID": "16",
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_ARRAY_TASK_COUNT": "9",
    }


def test_a_member_of_a_gang_knows_its_rank_and_its_rendezvous() -> None:
    launch = Launch(tenant="acme", user="alice", replicas=4)
    env = env_of(launch, go=Go(key=KEY, master_address="10.0.0.7", master_port=29_512))
    assert {name: env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")} == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": "1",
    }
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["SLURM_NTASKS"]) == ("10.0.0.7", "29512", "4")


def test_a_member_that_is_a_launcher_finds_its_part_of_the_gang() -> None:
    launch = Launch(tenant="acme", user="alice", replicas=2)
    env = env_of(launch, go=Go(key=KEY, master_address="10.0.0.7", master_port=29_512, peers=("10.0.0.7", "10.0.0.8")))
    assert {name: value for name, value in env.items() if name.startswith("PET_")} == {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "2",
        "PET_MASTER_ADDR": "10.0.0.7",
        "PET_MASTER_PORT": "29512",
    }
    assert env["GPUYARD_PEERS"] == "10.0.0.7,10.0.0.8"


def test_a_gang_is_told_of_the_network_and_the_job_may_know_better() -> None:
    launch = Launch(tenant="acme", user="alice", replicas=2, env=(("NCCL_IB_DISABLE", "0"),))
    env = env_of(launch, go=Go(key=KEY, master_address="10.0.0.7", master_port=29_512))
    assert (env["NCCL_SOCKET_IFNAME"], env["NCCL_IB_DISABLE"]) == ("=eth0", "0")
    assert "NCCL_SOCKET_IFNAME" not in env_of(Launch(tenant="acme", user="alice"))


def test_a_single_replica_gets_no_rank() -> None:
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "PORT"} & env_of(Launch(tenant="acme", user="alice")).keys()


def test_a_service_gets_its_port_and_its_name() -> None:
    env = env_of(Launch(tenant="acme", user="alice", service="chat"), port=29_600)
    assert (env["GPUYARD_SERVICE"], env["PORT"]) == ("chat", "29600")


def test_the_variables_of_an_mps_share_come_from_its_grant() -> None:
    mps = {"CUDA_MPS_PIPE_DIRECTORY": "/run/mps", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"}
    launch = Launch(tenant="acme", user="alice", env=(("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100"),))
    env = env_of(launch, grant=PartitionGrant(env=mps, mode="mps", cards=1))
    assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "30"
    assert env["GPUYARD_PARTITION"] == "mps"


@pytest.mark.parametrize(
    "name",
    [
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "CUDA_MPS_PIPE_DIRECTORY",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
        "GPUYARD_ASSIGNMENT",
        "SLURM_PROCID",
        "PET_RDZV_ENDPOINT",
        "NCCL_COMM_ID",
        "OMPI_COMM_WORLD_RANK",
    ],
)
def test_what_would_place_a_job_elsewhere_is_scrubbed(name: str) -> None:
    assert scrub([(name, "stale")]) == {}
    grant = PartitionGrant(env={}, mode="none")
    assert env_of(Launch(tenant="acme", user="alice", env=((name, "stale"),)), grant=grant).get(name) != "stale"


def test_what_only_tunes_a_library_stays() -> None:
    named = (("NCCL_DEBUG", "INFO"), ("OMP_NUM_THREADS", "4"), ("PATH", "/opt/bin"), ("CUDA_LAUNCH_BLOCKING", "1"))
    assert dict(named).items() <= env_of(Launch(tenant="acme", user="alice", env=named)).items()


def test_the_agents_own_environment_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "PET_NNODES", "SLURM_JOB_ID", "SECRET"):
        monkeypatch.setenv(name, "inherited")
    assert "inherited" not in env_of(Launch(tenant="acme", user="alice")).values()


def test_an_account_that_may_not_log_in_still_gets_a_shell() -> None:
    account = Account(name="svc", uid=990, gid=990, shell="/usr/sbin/nologin")
    env = environment(
        key=KEY,
        launch=Launch(tenant="acme", user="alice"),
        grant=GRANT,
        account=account,
        node="n",
        job_dir="/j",
        go=None,
        port=0,
        checkpoint_dir="/j/checkpoint",
        network={},
    )
    assert env["SHELL"] == "/bin/sh"
