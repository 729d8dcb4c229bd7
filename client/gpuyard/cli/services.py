"""`gpuyard apply`, `services`, `delete`, `load`: inference services and what scales them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import AsJson, ago, now_ms, print_json, remark, say
from gpuyard.cli.session import session_of
from gpuyard.cli.tables import print_table
from gpuyard.cli.values import amount, count, length_s
from gpuyard.errors import GpuyardError, Rejected
from gpuyard.requests import read_items
from gpuyard_protocol.jobs import SubmissionAnswer
from gpuyard_protocol.names import nearest
from gpuyard_protocol.services import ServiceView

if TYPE_CHECKING:
    from gpuyard.client import Client

REPORT_EVERY_S = 1.0
COLUMNS = (
    "SERVICE", "MODEL", "USER", "#WANTED", "#RUNNING", "#STARTING", "#PENDING", "MIN-MAX", "#LOAD", "APPLIED",
    "ENDPOINTS",
)  # fmt: skip

ServiceArgument = Annotated[str, typer.Argument(metavar="SERVICE", help="The service's name.")]
_File = typer.Option("--file", "-f", metavar="FILE", help="Services, YAML or TOML ('-': standard input).")
_Concurrency = typer.Argument(metavar="CONCURRENCY", help="Requests in flight, over all replicas.", parser=count(0))
_P95 = typer.Option("--p95-ms", metavar="MS", parser=count(0), help="95th percentile of the latency.")
_Source = typer.Option("--source", help="Who reports; the loads of different sources add up.")
_For = typer.Option("--for", metavar="TIME", parser=length_s, help="Repeat each second for so long: 30s, 5m.")


def register(app: typer.Typer) -> None:
    app.command("apply")(apply)
    app.command("services")(services)
    app.command("delete")(delete)
    # So that a negative load is a number that is refused, and no option.
    app.command("load", context_settings={"ignore_unknown_options": True})(load)


def apply(ctx: typer.Context, file: Annotated[str, _File], as_json: AsJson = False) -> None:
    """Create services or change them in place."""
    items = read_items(file, "services")

    async def work(yard: Client) -> list[SubmissionAnswer | Rejected]:
        answers: list[SubmissionAnswer | Rejected] = []
        for item in items:
            try:
                answers.append(await yard.apply(item))
            except Rejected as refusal:
                answers.append(refusal)
        return answers

    answers = session_of(ctx).run(work)
    done = [answer for answer in answers if isinstance(answer, SubmissionAnswer)]
    if as_json:
        print_json(done)
    else:
        for accepted in done:
            say(f"Applied service {accepted.service}")
    for item, answer in zip(items, answers, strict=True):
        if isinstance(answer, Rejected):
            remark(f"gpuyard: {file}: service {item.get('name', '?')}: {answer}")
    if len(done) < len(answers):
        raise typer.Exit(1)


def services(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(metavar="[SERVICE]", help="Only this one.")] = "",
    as_json: AsJson = False,
) -> None:
    """List services, their replicas and their load."""

    async def work(yard: Client) -> tuple[ServiceView, ...]:
        return await known_services(yard, service) if service else await yard.services()

    found = session_of(ctx).run(work)
    if as_json:
        print_json(found)
    elif not found:
        remark("no services (make one: gpuyard apply -f FILE)")
    else:
        now = now_ms()
        print_table(COLUMNS, [_row(view, now) for view in found])
        for view in found:
            if said := faltering(view):
                remark(f"service {view.service}: {said}")


def _row(view: ServiceView, now: int) -> tuple[str, ...]:
    return (
        view.service,
        ":".join(part for part in (view.model, view.version) if part),
        view.user,
        str(view.wanted),
        str(view.running),
        str(view.starting),
        str(view.pending),
        f"{view.min_replicas}-{view.max_replicas}",
        f"{view.concurrency} at {view.target_concurrency} each",
        ago(view.applied_ms, now),
        " ".join(view.endpoints),
    )


def faltering(view: ServiceView) -> str:
    """Why replicas are missing that end by themselves; "" where none does."""
    if not view.crashes or view.running >= view.wanted:
        return ""
    often = "the last replica ended by itself" if view.crashes == 1 else f"{view.crashes} in a row ended by themselves"
    how = view.crash.text if view.crash else "it exited with code 0, and a service's replica is to stay"
    return f"{often}; job {view.crashed_job}: {how} (more: gpuyard logs --err {view.crashed_job})"


async def known_services(yard: Client, service: str) -> tuple[ServiceView, ...]:
    """The service by this name, or an error with the nearest name there is."""
    found = await yard.services()
    chosen = tuple(view for view in found if view.service == service)
    if not chosen:
        near = nearest(service, [view.service for view in found])
        hint = f": did you mean {near!r}?" if near else " (see: gpuyard services)"
        raise GpuyardError(f"there is no service {service!r}{hint}")
    return chosen


def delete(ctx: typer.Context, service: ServiceArgument) -> None:
    """Stop a service's replicas and forget it."""

    async def work(yard: Client) -> None:
        await yard.delete(service)

    session_of(ctx).run(work)
    say(f"Deleted service {service}")


def load(
    ctx: typer.Context,
    service: ServiceArgument,
    concurrency: Annotated[int, _Concurrency],
    queue: Annotated[int, typer.Option("--queue", metavar="N", parser=count(0), help="Requests that wait.")] = 0,
    qps: Annotated[float, typer.Option("--qps", metavar="N", parser=amount(0), help="Requests per second.")] = 0.0,
    p95_ms: Annotated[int, _P95] = 0,
    source: Annotated[str, _Source] = "gpuyard-load",
    lasting: Annotated[float, _For] = 0.0,
) -> None:
    """Report a service's load, as a gateway would: gpuyard load chat 40"""
    reports = max(1, int(lasting / REPORT_EVERY_S))

    async def work(yard: Client) -> None:
        await known_services(yard, service)
        for left in range(reports, 0, -1):
            await yard.report_load(service, concurrency, queue_depth=queue, qps=qps, p95_ms=p95_ms, source=source)
            if left > 1:
                await asyncio.sleep(REPORT_EVERY_S)

    session_of(ctx).run(work)
    say(f"Reported a load of {concurrency} for service {service}")
