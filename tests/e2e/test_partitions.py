"""What a job finds in its slice: real processes in every mode, looked at from inside."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB") as yard:
        yield yard


async def _environment(client: gpuyard.Client, **fields: object) -> dict[str, str]:
    """The environment of a job that prints it."""
    job = await client.submit(command=["env"], **fields)
    assert (await job.wait()).state == "succeeded"
    lines = (await job.logs()).decode().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


async def test_whole_cards_are_named_by_uuid(yard: Yard) -> None:
    async with yard.connect() as client:
        env = await _environment(client, gpus=2)
    cards = env["CUDA_VISIBLE_DEVICES"].split(",")
    assert len(set(cards)) == 2
    assert all(card.startswith("GPU-") for card in cards)
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert env["GPUYARD_PARTITION"] == "whole"


async def test_an_mps_share_has_a_cap_on_compute_and_a_limit_on_memory(yard: Yard) -> None:
    async with yard.connect() as client:
        env = await _environment(client, gpu=0.3, gpu_memory="12Gi")
    card = env["CUDA_VISIBLE_DEVICES"]
    assert env["GPUYARD_PARTITION"] == "mps"
    assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "30"
    assert env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"{card}=12288M"
    assert env["CUDA_MPS_PIPE_DIRECTORY"]


async def test_a_mig_instance_is_named_by_its_own_uuid(yard: Yard) -> None:
    async with yard.connect() as client:
        env = await _environment(client, mig="1g.10gb")
    assert env["CUDA_VISIBLE_DEVICES"].startswith("MIG-")
    assert env["GPUYARD_PARTITION"] == "mig"


async def test_processes_of_a_job_share_its_mig_instance_under_mps(yard: Yard) -> None:
    async with yard.connect() as client:
        env = await _environment(client, mig="2g.20gb", mps=True, gpu_processes=4)
        with pytest.raises(gpuyard.Rejected, match=r"no card can give 2g\.20gb for 20 processes"):
            await client.submit(command=["env"], mig="2g.20gb", mps=True, gpu_processes=20)
    assert env["CUDA_VISIBLE_DEVICES"].startswith("MIG-")
    assert env["GPUYARD_PARTITION"] == "mig"
    assert env["CUDA_MPS_PIPE_DIRECTORY"]
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in env
    number, _, limit = env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"].partition("=")
    assert (number, int(limit.removesuffix("M")) * 4 // 1024) == ("0", 19)


async def test_isolation_none_takes_turns(yard: Yard) -> None:
    async with yard.connect() as client:
        env = await _environment(client, gpu=0.5, isolation="none")
    assert env["GPUYARD_PARTITION"] == "timeslice"


async def test_a_job_without_gpus_sees_none(yard: Yard) -> None:
    async with yard.connect() as client:
        env = await _environment(client)
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["GPUYARD_PARTITION"] == "none"


async def test_a_gang_gets_one_rendezvous_and_its_ranks(yard: Yard) -> None:
    out = yard.scratch / "gang"
    async with yard.connect() as client:
        job = await client.submit(
            command=f'echo "$RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $GPUYARD_NODE" >> {out}', gpus=4, replicas=2
        )
        assert (await job.wait()).state == "succeeded"
    rows = sorted(line.split() for line in out.read_text().splitlines())
    assert [row[0] for row in rows] == ["0", "1"]
    assert {row[1] for row in rows} == {"2"}
    assert len({row[2] for row in rows}) == 1
    assert len({row[3] for row in rows}) == 2, "8 cards of 4 a node: two nodes"


async def test_stop_is_sigterm_then_grace_then_the_whole_group(yard: Yard) -> None:
    """A job that ignores SIGTERM, and whose child left its session, is gone after the grace all the same."""
    script = "trap '' TERM; setsid sleep 600 & echo ready; while :; do sleep 600; done"
    async with yard.connect() as client:
        job = await client.submit(command=["/bin/sh", "-c", script], gpus=1, stop_grace="500ms")

        async def it_runs() -> bool:
            return (await client.job(job.number)).state == "running"

        await eventually(it_runs, "the job runs")
        await client.cancel(job.number)
        assert (await job.wait()).state == "cancelled"


async def test_exit_codes_and_output_come_back(yard: Yard) -> None:
    async with yard.connect() as client:
        job = await client.submit(command="echo out; echo err >&2; exit 7")
        end = await job.wait()
        assert (end.state, end.exit_code) == ("failed", 7)
        assert await job.logs() == b"out\n"
        assert await job.logs(stream="err") == b"err\n"


async def test_a_job_reads_no_keys_ledgers_or_streams_and_commands_no_supervisor(yard: Yard) -> None:
    """By their full names, which it may well know; and what processes above it hold in memory and environment."""
    secret = [path for path in yard.state.rglob("*") if path.is_file() or path.is_socket()]
    secret = [path for path in secret if "jobs" not in path.relative_to(yard.state).parts]
    kinds = (".seed", "ledger.sqlite", ".blk", "nats.conf", "supervisor.sock", "context.toml", "history.sqlite")
    assert all(any(path.name.endswith(kind) for path in secret) for kind in kinds)
    others = [process.pid for process in yard.processes()]
    script = (
        'while read name; do if [ -S "$name" ]; then [ -w "$name" ]; else ( : < "$name" ) 2> /dev/null; fi '
        '&& echo "reached $name"; done; id -u'
    )
    names = yard.scratch / "names"
    names.write_text(
        "\n".join(map(str, [*secret, *(f"/proc/{pid}/{what}" for pid in others for what in ("environ", "mem"))]))
    )
    async with yard.connect() as client:
        job = await client.submit(command=f"( {script} ) < {names}", cwd="/")
        end = await job.wait()
        said, errors = (await job.logs()).decode().splitlines(), await job.logs(stream="err")
    assert end.state == "succeeded", errors
    # A yard of somebody who is not root runs jobs as him: then there is no wall between the two, and the docs say so.
    if int(said[-1]) != os.getuid():
        assert said[:-1] == []
