"""The environment of a replica's process, complete: nothing of the agent's own is in it.

Three layers, the later ones win: the account's basics, what the job names itself, and what the yard says about the
partition, the gang and the assignment. Variables that name a partition, a gang or another scheduler's job are taken
from the job's own layer as well (`scrub`): a submission that exports the whole environment of a shell inside another
job would otherwise put this one on that job's cards. Variables that only tune a library, such as NCCL_DEBUG, stay.

Pure: it reads no environment, clock or account database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import Go, Launch

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Say which cards a process may use; only the yard may set them.
_PARTITION = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
#: Belong to another launcher's job: a process that believes them joins, or waits for, somebody else's peers.
_FOREIGN_PREFIXES = ("CUDA_MPS_", "GPUYARD_", "SLURM_", "PET_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_")
_FOREIGN = ("NCCL_COMM_ID", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE")
#: Service accounts have a shell that refuses; programs that run `$SHELL -c` need one that does not.
_NO_LOGIN = dict.fromkeys(("/usr/sbin/nologin", "/sbin/nologin", "/bin/false", "/usr/bin/false", ""), "/bin/sh")


def scrub(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What a job names for itself, less what would place it somewhere else."""
    return {
        name: value
        for name, value in named
        if name not in _PARTITION and name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }


def environment(
    *,
    key: AssignmentKey,
    launch: Launch,
    grant: PartitionGrant,
    account: Account,
    node: NodeId,
    job_dir: str,
    go: Go | None,
    port: int,
    checkpoint_dir: str,
    network: Mapping[str, str],
) -> dict[str, str]:
    """Everything the process sees. `port`: held for it on this node, 0 for none. `network`: what the member of a gang
    is told of the node's network, unless the job says otherwise."""
    env = {
        "PATH": PATH,
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": _NO_LOGIN.get(account.shell, account.shell),
        "LANG": "C.UTF-8",
    }
    if go is not None:
        env.update(network)
    env.update(scrub(launch.env))
    env.update(grant.env)
    env.update(_assignment(key, launch, grant, node, job_dir))
    env["GPUYARD_CHECKPOINT_DIR"] = checkpoint_dir
    env.update(_slurm_twins(key, launch, grant))
    env.update(_array(launch))
    if go is not None:
        env.update(_gang(key, launch, grant, go))
    elif launch.launcher:
        # torchrun on its own: it finds a port itself.
        env.update({"PET_STANDALONE": "1", "PET_NPROC_PER_NODE": str(max(1, grant.cards))})
    if launch.service:
        env["GPUYARD_SERVICE"] = launch.service
        env["PORT"] = str(port)
    return env


def _assignment(
    key: AssignmentKey, launch: Launch, grant: PartitionGrant, node: NodeId, job_dir: str
) -> dict[str, str]:
    return {
        "GPUYARD_JOB": str(key.job),
        "GPUYARD_ATTEMPT": str(key.attempt),
        "GPUYARD_REPLICA": str(key.replica),
        "GPUYARD_ASSIGNMENT": str(key),
        "GPUYARD_TENANT": launch.tenant,
        "GPUYARD_USER": launch.user,
        "GPUYARD_NODE": node,
        "GPUYARD_PARTITION": grant.mode,
        "GPUYARD_JOB_DIR": job_dir,
    }


def _gang(key: AssignmentKey, launch: Launch, grant: PartitionGrant, go: Go) -> dict[str, str]:
    """One process a replica: every rank is the only one of its launcher, so the local rank is always 0. A replica that
    is itself a launcher (torchrun) finds its part in PET_*: one node of the gang, one process for each of its cards."""
    return {
        "RANK": str(key.replica),
        "WORLD_SIZE": str(launch.replicas),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": str(key.replica),
        "MASTER_ADDR": go.master_address,
        "MASTER_PORT": str(go.master_port),
        "PET_NNODES": str(launch.replicas),
        "PET_NODE_RANK": str(key.replica),
        "PET_NPROC_PER_NODE": str(max(1, grant.cards)),
        "PET_MASTER_ADDR": go.master_address,
        "PET_MASTER_PORT": str(go.master_port),
        "GPUYARD_PEERS": ",".join(go.peers),
        "GPUYARD_WORLD_SIZE": str(launch.replicas),
        **_elastic(launch),
    }


def _elastic(launch: Launch) -> dict[str, str]:
    """Of a job whose size may change: each attempt has one, so that PET_NNODES is a number and no range."""
    if not launch.replicas_max:
        return {}
    return {
        "GPUYARD_MIN_REPLICAS": str(launch.replicas_min),
        "GPUYARD_MAX_REPLICAS": str(launch.replicas_max),
    }


def _array(launch: Launch) -> dict[str, str]:
    """Which element of which array it is, under our names and Slurm's."""
    if not launch.array_job:
        return {}
    job, index, count = str(launch.array_job), str(launch.array_index), str(launch.array_count)
    return {
        "GPUYARD_ARRAY_JOB": job,
        "GPUYARD_ARRAY_INDEX": index,
        "GPUYARD_ARRAY_COUNT": count,
        "SLURM_ARRAY_JOB_ID": job,
        "SLURM_ARRAY_TASK_ID": index,
        "SLURM_ARRAY_TASK_COUNT": count,
    }


def _slurm_twins(key: AssignmentKey, launch: Launch, grant: PartitionGrant) -> dict[str, str]:
    """The names under which programs written for Slurm look for the same facts."""
    return {
        "SLURM_JOB_ID": str(key.job),
        "SLURM_PROCID": str(key.replica),
        "SLURM_NTASKS": str(launch.replicas),
        "SLURM_NNODES": str(launch.replicas),
        "SLURM_NODEID": str(key.replica),
        "SLURM_LOCALID": "0",
        "SLURM_GPUS_ON_NODE": str(grant.cards),
    }
