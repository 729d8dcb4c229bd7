"""`gpuyard jobs`, `gpuyard job show`, `gpuyard why`: what there is, how it went, and why it is where it is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.explaining import why_lines
from gpuyard.cli.output import AsJson, ago, clock, now_ms, print_fields, print_json, remark, rough, say
from gpuyard.cli.session import session_of
from gpuyard.cli.tables import print_table
from gpuyard.cli.values import count, job_number
from gpuyard_protocol.jobs import FINAL_STATES, JobSpec, JobView, ReplicaView
from gpuyard_protocol.names import nearest
from gpuyard_protocol.queries import WhyAnswer
from gpuyard_protocol.units import MILLI, format_mib, format_milli, format_ms

if TYPE_CHECKING:
    from gpuyard.client import Client

STATES = ("pending", "starting", "running", "suspended", "stopping", "succeeded", "failed", "cancelled")
#: Rows without --limit.
DEFAULT_ROWS = 100
#: Each reason is a question of its own: so many a list.
EXPLAINED_ROWS = 20
COLUMNS = ("#JOB", "NAME", "USER", "STATE", "WANTS", "SUBMITTED", "#TIME", "NODES OR REASON")

_Limit = typer.Option("--limit", "-l", metavar="N", parser=count(0), help="At most so many, 0: all.")
JobNumber = Annotated[int, typer.Argument(metavar="JOB", help="The job's number.", parser=job_number)]
_StateFlag = typer.Option("--state", "-s", metavar="STATE", help="Only these; repeatable.", show_default=False)


def register(app: typer.Typer) -> None:
    app.command("jobs")(jobs)
    job = typer.Typer(help="Show one job.", no_args_is_help=True, rich_markup_mode=None)
    # With a callback a lone command keeps its name: `job show`, not `job`.
    job.callback()(lambda: None)
    job.command("show")(show)
    app.add_typer(job, name="job")
    app.command("why")(why)


def jobs(
    ctx: typer.Context,
    show_all: Annotated[bool, typer.Option("--all", "-a", help="Also those that have ended.")] = False,
    state: Annotated[list[str] | None, _StateFlag] = None,
    user: Annotated[str, typer.Option("--user", "-u", metavar="USER", help="Only this user's.")] = "",
    service: Annotated[str, typer.Option("--service", metavar="NAME", help="Only replicas of this service.")] = "",
    limit: Annotated[int, _Limit] = DEFAULT_ROWS,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    states = _checked_states(state or [])
    # States that jobs end in are among those that the list leaves out unless asked for all.
    wants_ended = show_all or any(name in FINAL_STATES for name in states)

    async def work(yard: Client) -> tuple[list[JobView], dict[int, str]]:
        # One more than is shown tells whether there are more.
        rows = yard.jobs(
            states=states,
            all=wants_ended,
            user=user,
            service=service,
            fold=not as_json,
            limit=limit + 1 if limit else 0,
        )
        found = [view async for view in rows]
        return found, {} if as_json else await reasons_of(yard, found)

    found, reasons = session_of(ctx).run(work)
    shown = found[:limit] if limit else found
    if as_json:
        print_json(shown)
        return
    if not shown:
        remark("no jobs" if wants_ended else "no job is waiting or running (those that have ended: gpuyard jobs --all)")
        return
    now = now_ms()
    print_table(COLUMNS, [_row(view, now, reasons.get(view.job, "")) for view in shown])
    if len(found) > len(shown):
        remark(f"… and more: these are the newest {limit} (--limit 0 shows all)")


def _checked_states(given: list[str]) -> list[str]:
    states = [part.strip().lower() for text in given for part in text.split(",")]
    for name in states:
        if name not in STATES:
            near = nearest(name, STATES)
            hint = f"; did you mean {near!r}?" if near else ""
            raise typer.BadParameter(f"{name!r} is none of {', '.join(STATES)}{hint}", param_hint="--state")
    return states


async def reasons_of(yard: Client, found: list[JobView]) -> dict[int, str]:
    """Why the longest waiting of the jobs wait, for those whose view does not say."""
    waiting = [view.job for view in found if view.state == "pending" and view.reason is None][-EXPLAINED_ROWS:]
    answers = await asyncio.gather(*(yard.why(job, brief=True) for job in waiting), return_exceptions=True)
    return {answer.job: answer.summary for answer in answers if isinstance(answer, WhyAnswer)}


def _row(view: JobView, now: int, reason: str) -> tuple[str, ...]:
    wants = view.wants if view.replicas == 1 else f"{_how_many(view)} × ({view.wants})"
    spent_ms = (view.ended_ms or now) - view.started_ms if view.started_ms else 0
    return (
        f"{view.array}[{view.elements} left]" if view.elements else str(view.job),
        f"{view.name}[{view.array_index}]" if view.array and not view.elements else view.name,
        view.user,
        view.state,
        wants,
        ago(view.submitted_ms, now),
        rough(spent_ms) if view.started_ms else "",
        _where(view) or reason,
    )


def _how_many(view: JobView) -> str:
    """`4`; of an elastic job `2-8`, and while it runs `4 of 2-8`."""
    if not view.min_replicas:
        return str(view.replicas)
    between = f"{view.min_replicas}-{view.replicas}"
    return f"{view.size} of {between}" if view.size else between


def _where(view: JobView) -> str:
    reason = view.reason.text if view.reason else ""
    if view.state in ("pending", "failed", "cancelled") and reason:
        return reason
    if view.state == "failed" and view.exit_code:
        return f"exit code {view.exit_code}"
    return ",".join(dict.fromkeys(replica.node for replica in view.placed if replica.node))


def show(ctx: typer.Context, job: JobNumber, as_json: AsJson = False) -> None:
    """Show one job in full."""

    async def work(yard: Client) -> JobView:
        return await yard.job(job)

    view = session_of(ctx).run(work)
    if as_json:
        print_json(view)
        return
    print_fields(_fields(view))
    for replica in view.placed:
        say(f"  replica {replica.replica}: {_replica_line(replica)}")


def _fields(view: JobView) -> list[tuple[str, str]]:
    spec = view.spec or JobSpec()
    now = now_ms()
    waited_ms = (view.first_started_ms or view.ended_ms or now) - view.submitted_ms
    lasted_ms = (view.ended_ms or now) - view.started_ms if view.started_ms else 0
    cpus = "1 CPU" if spec.need.cpu_milli == MILLI else f"{format_milli(spec.need.cpu_milli)} CPUs"
    host = f"{cpus}, {format_mib(spec.need.memory_mib)} per replica"
    return [
        ("job", str(view.job)),
        ("name", view.name),
        ("owner", f"{view.tenant}/{view.user}"),
        ("state", view.state),
        ("reason", view.reason.text if view.reason else ""),
        ("exit code", "" if view.exit_code is None else str(view.exit_code)),
        ("service", view.service),
        ("array", f"element {view.array_index} of array {view.array}" if view.array else ""),
        ("command", _shell_line(spec)),
        ("wants", view.wants + (f", {_how_many(view)} replicas together" if view.replicas > 1 else "")),
        ("host", host if view.spec else ""),
        ("time limit", format_ms(spec.time_limit_ms) if spec.time_limit_ms else ""),
        ("directory", spec.cwd),
        ("priority", str(view.priority) if view.priority else ""),
        ("submission", view.submission_id),
        ("submitted", clock(view.submitted_ms)),
        ("started", clock(view.started_ms)),
        ("ended", clock(view.ended_ms)),
        ("waited", rough(max(0, waited_ms))),
        ("ran", rough(lasted_ms) if view.started_ms else ""),
        ("attempt", f"{view.attempt}, {view.retries_left} retries left" if view.attempt else ""),
    ]


def _shell_line(spec: JobSpec) -> str:
    import shlex

    if spec.argv[:2] == ("/bin/sh", "-c") and len(spec.argv) == 3:
        return spec.argv[2]
    return ("(script) " if spec.script else "") + shlex.join(spec.argv)


def _replica_line(replica: ReplicaView) -> str:
    ended = "" if replica.exit_code is None else f", exit code {replica.exit_code}"
    partition = f", {replica.partition}" if replica.partition else ""
    devices = f" on {', '.join(replica.devices)}" if replica.devices else ""
    return f"{replica.state}{ended} at {replica.node or 'no node'}{partition}{devices}"


def why(ctx: typer.Context, job: JobNumber, as_json: AsJson = False) -> None:
    """Say why a job is where it is."""

    async def work(yard: Client) -> WhyAnswer:
        return await yard.why(job)

    answer = session_of(ctx).run(work)
    if as_json:
        print_json(answer)
        return
    for line in why_lines(answer, now_ms()):
        say(line)
