"""The SDK against a real yard: jobs from submission to output, many at once, services, and without `await`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import gpuyard
from gpuyard import Client, Rejected
from gpuyard.job import Job
from support.yard import Yard, eventually

SMALL = {"cpus": "0.1", "memory": "64Mi"}


@pytest.fixture
async def client(yard: Yard) -> AsyncIterator[Client]:
    async with yard.connect() as client:
        yield client


async def test_a_job_from_submission_to_output(client: Client) -> None:
    job = await client.submit(
        command=["/bin/sh", "-c", "echo out of $GPUYARD_JOB; echo to err >&2; exit 3"], gpus=1, name="first", **SMALL
    )
    end = await job.wait(timeout=20)
    assert (end.state, end.exit_code, end.name) == ("failed", 3, "first")
    assert await job.logs() == f"out of {job.number}\n".encode()
    assert await job.logs(stream="err") == b"to err\n"
    assert await job.logs(tail_bytes=3) == f"out of {job.number}\n".encode()[-3:]
    assert (await job.why()).state == "failed"


async def test_following_a_job_gives_every_byte_of_both_streams_once(client: Client) -> None:
    script = 'i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo "line $i"; echo "err $i" >&2; sleep 0.02; done'
    job = await client.submit(command=script, **SMALL)
    got = {"out": b"", "err": b""}
    async with asyncio.timeout(20):
        async for chunk in job.follow():
            got[chunk.stream] += chunk.data
    assert got["out"] == b"".join(b"line %d\n" % i for i in range(1, 41))
    assert got["err"] == b"".join(b"err %d\n" % i for i in range(1, 41))


async def test_large_output_is_read_in_pieces(client: Client) -> None:
    job = await client.submit(command="head -c 700000 /dev/zero | tr '\\0' x", **SMALL)
    await job.wait(timeout=20)
    assert await job.logs() == b"x" * 700_000


async def test_a_submission_id_is_one_job(client: Client) -> None:
    first = await client.submit(command="true", submission_id="only-once", **SMALL)
    second = await client.submit(command="false", submission_id="only-once", **SMALL)
    assert first.number == second.number


@pytest.mark.parametrize("wrong", ["two words", "s17", ""])
async def test_an_id_that_the_yard_would_not_take_is_refused_before_anything_is_sent(
    client: Client, wrong: str
) -> None:
    """The yard would answer under an id of its own, and whoever asked would wait for a minute in vain."""
    with pytest.raises(Rejected, match=r"\$\.submission_id: found .* expected lower-case letters"):
        await client.submit(command="true", submission_id=wrong, **SMALL)
    with pytest.raises(Rejected, match="submission_id"):
        await client.submit_many([{"command": "true", "submission_id": wrong}])
    with pytest.raises(Rejected, match="submission_id"):
        await client.cancel(1, submission_id=wrong)


@pytest.mark.parametrize("batched", [True, False])
async def test_many_jobs_are_decided_one_by_one(client: Client, batched: bool) -> None:
    wishes = [{"command": "true", **SMALL} for _ in range(12)]
    wishes[5] = {"command": "true", "gpus": 1, "gpu": 0.5}
    outcomes = await client.submit_many(wishes, batched=batched)
    assert isinstance(refused := outcomes[5], Rejected)
    assert refused.path.endswith("gpu")
    jobs = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    assert [job.number for job in jobs] == sorted({job.number for job in jobs})
    ends = await asyncio.gather(*(job.wait(timeout=20) for job in jobs))
    assert {end.state for end in ends} == {"succeeded"}


async def test_lists_are_read_page_by_page(client: Client) -> None:
    jobs = [job.number for job in await client.submit_many([{"command": "true", **SMALL}] * 7) if isinstance(job, Job)]
    seen = [view.job async for view in client.jobs(all=True)]
    assert seen == sorted(seen, reverse=True)
    assert set(jobs) <= set(seen)
    assert [view.job async for view in client.jobs(all=True, limit=3)] == seen[:3]


async def test_an_impossible_job_is_refused_with_the_nearest(client: Client) -> None:
    with pytest.raises(Rejected, match="H100"):
        await client.submit(command="true", gpus=1, gpu_model="H1000")


async def test_cancelling_ends_a_job_and_refuses_an_unknown_one(client: Client) -> None:
    job = await client.submit(command="sleep 60", **SMALL)
    await job.cancel()
    assert (await job.wait(timeout=20)).state == "cancelled"
    with pytest.raises(Rejected) as caught:
        await client.cancel(999_999)
    assert caught.value.reason == "UnknownJob"


async def test_waiting_for_an_array_waits_for_all_of_it(client: Client) -> None:
    job = await client.submit(
        command='sleep "0.$SLURM_ARRAY_TASK_ID"; test "$SLURM_ARRAY_TASK_ID" != 2', array="1-4", **SMALL
    )
    assert job.elements == 4
    failed = await job.wait(timeout=20)
    assert (failed.job, failed.array_index, failed.state) == (job.number + 1, 2, "failed")
    assert [view.state for view in await job.views()] == ["succeeded", "failed", "succeeded", "succeeded"]
    fine = await client.submit(command="true", array="0-2", **SMALL)
    assert (await fine.wait(timeout=20)).job == fine.number + 2


async def test_cancelling_an_array_just_submitted_ends_all_of_it(client: Client) -> None:
    job = await client.submit(command="sleep 60", array="0-2%1", **SMALL)
    await job.cancel()
    assert (await job.wait(timeout=20)).state == "cancelled"
    assert {view.state for view in await job.views()} == {"cancelled"}


async def test_an_array_is_requeued_as_a_whole(client: Client) -> None:
    job = await client.submit(command="sleep 60", array="0-2%2", gpus=1, **SMALL)

    async def runs() -> bool:
        return [view.state for view in await job.views()].count("running") == 2

    async def waits() -> bool:
        return {view.state for view in await job.views()} == {"pending"}

    await eventually(runs, "two elements run")
    await client.requeue(job.number, array=True, hold=True)
    await eventually(waits, "every element waits")
    await job.cancel()


async def test_a_dry_run_says_where_and_submits_nothing(client: Client) -> None:
    newest = [view.job async for view in client.jobs(all=True, limit=1)]
    plan = await client.plan(command="true", gpus=2)
    assert (plan.verdict, [(each.node, len(each.devices)) for each in plan.placed]) == ("starts", [("node-1", 2)])
    refused = await client.plan(command="true", gpus=20)
    assert refused.refusal is not None
    assert (refused.verdict, refused.refusal.path, refused.refusal.nearest) == ("rejected", "$.gpus", "8")
    malformed = await client.plan(command="true", gpus=-1)
    assert malformed.refusal is not None
    assert (malformed.verdict, malformed.refusal.path) == ("rejected", "$.gpus")
    assert [view.job async for view in client.jobs(all=True, limit=1)] == newest


async def test_why_says_what_would_start_it(client: Client) -> None:
    holder = await client.submit(command="sleep 60", gpus=8, time_limit="5m", **SMALL)

    async def runs() -> bool:
        return (await holder.view()).state == "running"

    await eventually(runs, "the holder runs")
    waiting = await client.submit(command="true", gpus=8, **SMALL)
    answer = await waiting.why()
    assert [held.job for held in answer.holders] == [holder.number]
    assert [(remedy.kind, remedy.jobs) for remedy in answer.remedies] == [("EndOf", (holder.number,))]
    assert answer.estimate is not None
    assert answer.estimate.basis == "limit"
    assert answer.terms
    brief = await client.why(waiting.number, brief=True)
    assert (brief.summary, brief.holders, brief.estimate) == (answer.summary, (), None)
    await waiting.cancel()
    await holder.cancel()


async def test_a_service_follows_its_load_and_goes(client: Client) -> None:
    await client.apply(
        name="echo",
        command="while :; do sleep 0.2; done",
        replica={"gpu": 0.25, "isolation": "soft", **SMALL},
        min_replicas=0,
        max_replicas=3,
        target_concurrency=2,
        scale_down_after="1s",
        stop_grace="1s",
    )

    async def has(running: int) -> bool:
        await client.report_load("echo", running * 2)
        [view] = await client.services("echo")
        return view.running == running

    await eventually(lambda: has(0), "a service with min 0 has no replica without load")
    await eventually(lambda: has(3), "three replicas for a load of six")
    await eventually(lambda: has(0), "no replica once the load is gone")
    await client.delete("echo")
    with pytest.raises(Rejected):
        await client.delete("echo")


async def test_the_yard_tells_its_nodes_and_numbers(client: Client) -> None:
    [node] = await client.nodes()
    assert (node.node, node.state, len(node.cards)) == ("node-1", "ready", 8)
    stats = await client.stats()
    assert stats.gpus == 8


def test_the_client_without_await(yard: Yard) -> None:
    with gpuyard.connect_sync(yard.context) as client:
        job = client.submit(command="echo plain; sleep 0.2; echo words", **SMALL)
        assert b"".join(chunk.data for chunk in job.follow(streams=("out",))) == b"plain\nwords\n"
        assert job.wait(timeout=20).state == "succeeded"
        assert next(client.jobs(all=True)).job >= job.number
        [refused] = client.submit_many([{"command": "true", "gpus": 99}])
        assert isinstance(refused, Rejected)


def test_a_client_that_is_not_open_says_so(yard: Yard) -> None:
    client = gpuyard.connect(yard.context)
    with pytest.raises(gpuyard.GpuyardError, match="not connected"):
        _ = client.link
    with pytest.raises(RuntimeError, match="not open"):
        gpuyard.connect_sync(yard.context).stats()
