"""`gpuyard audit`: who did what on the yard, from where, with what outcome; for operators."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from gpuyard.cli.output import AsJson, clock, print_json, remark
from gpuyard.cli.session import session_of
from gpuyard.cli.tables import print_table
from gpuyard.cli.values import count
from gpuyard_protocol.audit import ENTRIES_PAGE_MAX, AuditEntry

COLUMNS = ("TIME", "WHO", "WHAT", "#TIMES", "ABOUT", "OUTCOME", "FROM")
ENTRIES_MAX = 1_000_000

_Limit = Annotated[
    int,
    typer.Option("--limit", "-n", metavar="N", parser=count(1, ENTRIES_MAX), help="The newest so many entries."),
]


def register(app: typer.Typer) -> None:
    app.command("audit")(audit)


def audit(ctx: typer.Context, limit: _Limit = 50, as_json: AsJson = False) -> None:
    """Who did what, oldest of the shown first (operators only)."""
    from gpuyard.context import load_context
    from gpuyard.operator import Operator

    async def work() -> list[AuditEntry]:
        found: list[AuditEntry] = []
        cursor = 0
        async with Operator(load_context(session_of(ctx).context)) as operator:
            while len(found) < limit:
                page = await operator.audit(limit=min(limit - len(found), ENTRIES_PAGE_MAX), cursor=cursor)
                found.extend(page.entries)
                cursor = page.next
                if not cursor:
                    break
        return found[:limit][::-1]

    entries = asyncio.run(work())
    if as_json:
        print_json(entries)
    elif not entries:
        remark("nothing has been recorded yet")
    else:
        print_table(COLUMNS, [_row(entry) for entry in entries])


def _row(entry: AuditEntry) -> tuple[str, ...]:
    about = f"{entry.about} … {entry.until}" if entry.until else entry.about
    return (clock(entry.at_ms), entry.who, entry.what, str(entry.count), about, entry.outcome, entry.where)
