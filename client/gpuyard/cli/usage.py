"""`gpuyard usage`: what a tenant holds, has used and may have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import AsJson, clock, print_json, remark
from gpuyard.cli.session import session_of
from gpuyard.cli.tables import print_table
from gpuyard_protocol.queries import TenantUsage, UserUsage
from gpuyard_protocol.units import format_milli

if TYPE_CHECKING:
    from gpuyard.client import Client

COLUMNS = ("TENANT", "USER", "#GPUS NOW", "#LIMIT", "#JOBS", "#JOBS LIMIT", "#GPU HOURS", "SINCE")
#: GPU-milli × ms in a GPU-hour.
_PER_GPU_HOUR = 1000 * 3_600_000
MODEL_COLUMNS = ("TENANT", "USER", "MODEL", "#GPUS NOW", "#GPU HOURS HELD", "#GPU HOURS USED")
QUEUE_COLUMNS = ("TENANT", "QUEUE", "BELOW", "MODEL", "KIND", "#GPUS NOW", "#OWN", "#MAY BORROW", "#LENDS")
_Models = typer.Option("--models", help="By model of card, held and used apart.")
_Queues = typer.Option("--queues", help="The quotas of the tenant's queue and of those above it.")
_All = typer.Option("--all", "-a", help="Every tenant; for operators.")


def register(app: typer.Typer) -> None:
    app.command("usage")(usage)


def usage(
    ctx: typer.Context,
    all_tenants: Annotated[bool, _All] = False,
    models: Annotated[bool, _Models] = False,
    queues: Annotated[bool, _Queues] = False,
    as_json: AsJson = False,
) -> None:
    """Show GPU usage and limits, per user."""

    async def work(yard: Client) -> tuple[TenantUsage, ...]:
        return (await yard.usage(),)

    session = session_of(ctx)
    found = asyncio.run(_of_all(session.context)) if all_tenants else session.run(work)
    if as_json:
        print_json(found if all_tenants else found[0])
    else:
        _print(found, models=models, queues=queues)


def _print(found: tuple[TenantUsage, ...], *, models: bool, queues: bool) -> None:
    if models:
        print_table(MODEL_COLUMNS, [row for tenant in found for row in _model_rows(tenant)])
    elif queues:
        rows = [row for tenant in found for row in _queue_rows(tenant)]
        if rows:
            print_table(QUEUE_COLUMNS, rows)
        else:
            remark(
                "no queue has a quota: the cards are shared by demand (quotas are [queues] in the daemon's settings)"
            )
    else:
        print_table(COLUMNS, [row for tenant in found for row in _rows(tenant)])


async def _of_all(context: str | None) -> tuple[TenantUsage, ...]:
    from gpuyard.context import load_context
    from gpuyard.operator import Operator

    async with Operator(load_context(context)) as operator:
        return await operator.usage()


def _rows(tenant: TenantUsage) -> list[tuple[str, ...]]:
    """The tenant as a whole, then its users."""
    whole = (
        tenant.tenant,
        "all",
        format_milli(tenant.held_milli),
        format_milli(tenant.gpus_max_milli) if tenant.gpus_max_milli else "none",
        str(tenant.jobs),
        str(tenant.jobs_max) if tenant.jobs_max else "none",
        gpu_hours(tenant.used_milli_ms),
        clock(tenant.since_ms),
    )
    return [whole, *(_user_row(tenant, user) for user in tenant.users)]


def _user_row(tenant: TenantUsage, user: UserUsage) -> tuple[str, ...]:
    held, used = format_milli(user.held_milli), gpu_hours(user.used_milli_ms)
    return (tenant.tenant, user.user, held, "", "", "", used, clock(user.since_ms))


def _model_rows(tenant: TenantUsage) -> list[tuple[str, ...]]:
    """By model of card: the tenant as a whole, then its users."""
    owners = [("all", tenant.models), *((user.user, user.models) for user in tenant.users)]
    return [
        (
            tenant.tenant,
            owner,
            each.model,
            format_milli(each.held_milli),
            gpu_hours(each.held_milli_ms),
            gpu_hours(each.used_milli_ms),
        )
        for owner, models in owners
        for each in models
    ]


def _queue_rows(tenant: TenantUsage) -> list[tuple[str, ...]]:
    """The grants of the tenant's queue and of those above it."""
    return [
        (
            tenant.tenant,
            each.queue,
            each.parent or "the yard",
            each.model or "any",
            each.kind or "any",
            format_milli(each.used_milli),
            format_milli(each.nominal_milli),
            "any" if each.borrow_milli < 0 else format_milli(each.borrow_milli),
            "all" if each.lend_milli < 0 else format_milli(each.lend_milli),
        )
        for each in tenant.queues
    ]


def gpu_hours(used_milli_ms: int) -> str:
    """To a thousandth."""
    return f"{used_milli_ms / _PER_GPU_HOUR:.3f}"
