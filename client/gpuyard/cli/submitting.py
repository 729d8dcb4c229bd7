"""`gpuyard submit`: hand in jobs and come back at once with their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.options import Command, JobOptions, takes_job_options
from gpuyard.cli.output import AsJson, print_json, remark, say
from gpuyard.cli.session import session_of
from gpuyard.errors import GpuyardError, Rejected
from gpuyard.job import Job

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
    as_json: AsJson = False,
) -> None:
    """Submit a job: gpuyard submit --gpus 2 -- python train.py"""
    requests = options.requests(command)

    async def work(yard: Client) -> list[Job | Rejected]:
        if len(requests) == 1:
            return [await yard.submit(requests[0])]
        return await yard.submit_many(requests)

    outcomes = session_of(ctx).run(work)
    accepted = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    refused = [(place, outcome) for place, outcome in enumerate(outcomes) if isinstance(outcome, Rejected)]
    if as_json:
        shown = [_plain(job) for job in accepted]
        print_json(shown[0] if len(requests) == 1 else shown)
    else:
        for job in accepted:
            say(str(job.number) if parsable else f"Submitted {_described(job)}")
    for place, outcome in refused:
        remark(f"gpuyard: job {place + 1} of {options.file}: {outcome}")
    if refused:
        raise GpuyardError(f"{len(refused)} of {len(outcomes)} jobs were rejected; the others are submitted")


def _plain(job: Job) -> dict[str, int | str]:
    plain: dict[str, int | str] = {"job": job.number, "submission_id": job.submission_id}
    return plain | ({"elements": job.elements} if job.elements else {})


def _described(job: Job) -> str:
    if not job.elements:
        return f"job {job.number}"
    return f"array {job.number} of {job.elements} jobs, {job.number} to {job.number + job.elements - 1}"
