"""`gpuyard submit`: hand in jobs and come back at once with their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuyard.cli.explaining import dry_run_lines
from gpuyard.cli.options import Command, JobOptions, takes_job_options
from gpuyard.cli.output import AsJson, now_ms, print_json, remark, say
from gpuyard.cli.session import session_of
from gpuyard.errors import GpuyardError, Rejected
from gpuyard.job import Job
from gpuyard_protocol.queries import DryRun
from gpuyard_protocol.uploads import is_upload

if TYPE_CHECKING:
    from gpuyard.client import Client


def register(app: typer.Typer) -> None:
    app.command("submit", context_settings={"allow_interspersed_args": False})(takes_job_options(submit))


def submit(
    ctx: typer.Context,
    options: JobOptions,
    command: Command = None,
    parsable: Annotated[
        bool, typer.Option("--parsable", "--quiet", "-q", help="Print the job's number and nothing else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say where and when it would start, or why not; submit nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job: gpuyard submit --gpus 2 -- python train.py"""
    requests = options.requests(command)
    options.check(requests)
    requests = hand_in(ctx, requests)
    if dry_run:
        _plan(ctx, options, requests, as_json=as_json)
        return

    async def work(yard: Client) -> list[Job | Rejected]:
        if len(requests) == 1:
            return [await yard.submit(requests[0])]
        return await yard.submit_many(requests)

    try:
        outcomes = session_of(ctx).run(work)
    except Rejected as refusal:
        raise options.told(refusal) from None
    accepted = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    refused = [(place, outcome) for place, outcome in enumerate(outcomes) if isinstance(outcome, Rejected)]
    if as_json:
        shown = [_plain(job) for job in accepted]
        print_json(shown[0] if len(requests) == 1 else shown)
    else:
        for job in accepted:
            say(str(job.number) if parsable else f"Submitted {_described(job)}")
    for job in accepted:
        if job.note:
            remark(f"job {job.number}: {job.note}")
    for place, outcome in refused:
        remark(f"gpuyard: {options.told(outcome, place, len(outcomes))}")
    if refused:
        raise GpuyardError(f"{len(refused)} of {len(outcomes)} jobs were rejected; the others are submitted")


def hand_in(ctx: typer.Context, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same jobs, with directories that they bring along handed in and named by their content."""
    directories = dict.fromkeys([str(each["upload"]) for each in requests if each.get("upload")])
    directories = {path: path for path in directories if not is_upload(path)}
    if not directories:
        return requests

    async def work(yard: Client) -> dict[str, str]:
        return {path: await yard.upload(path) for path in directories}

    names = session_of(ctx).run(work)
    return [
        each | {"upload": names.get(str(each["upload"]), each["upload"])} if each.get("upload") else each
        for each in requests
    ]


def _plan(ctx: typer.Context, options: JobOptions, requests: list[dict[str, Any]], *, as_json: bool) -> None:
    """What would become of each job, asked alone; exit code 1 if any would be rejected."""

    async def work(yard: Client) -> list[DryRun]:
        return [await yard.plan(request) for request in requests]

    plans = session_of(ctx).run(work)
    if as_json:
        print_json(plans[0] if len(plans) == 1 else plans)
    else:
        now = now_ms()
        for place, plan in enumerate(plans):
            if len(plans) > 1:
                say(f"job {place + 1}:")
            for line in dry_run_lines(plan, now, options.named):
                say(line)
    if any(plan.verdict == "rejected" for plan in plans):
        raise typer.Exit(1)


def _plain(job: Job) -> dict[str, int | str]:
    plain: dict[str, int | str] = {"job": job.number, "submission_id": job.submission_id}
    return plain | ({"elements": job.elements} if job.elements else {}) | ({"note": job.note} if job.note else {})


def _described(job: Job) -> str:
    if not job.elements:
        return f"job {job.number}"
    return f"array {job.number} of {job.elements} jobs, {job.number} to {job.number + job.elements - 1}"
