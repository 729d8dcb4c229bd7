"""`gpuyard doctor` on the command line; joins it through the entry-point group `gpuyard.commands`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard_protocol.codec import to_plain

if TYPE_CHECKING:
    from gpuyard_agent.doctor.checks import Finding

#: Where the installed unit has it.
CONFIG = Path("/etc/gpuyard/agent.toml")
_SIGNS = {"yes": "ok     ", "partly": "partly ", "no": "missing"}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help=f"Settings of the agent (default: {CONFIG}).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what this host can enforce as a node, what is missing, and how to get it."""
    # Here and not above: other commands need none of it.
    import orjson

    from gpuyard_agent.config import load
    from gpuyard_agent.doctor.checks import examine
    from gpuyard_protocol.service.settings_file import BadConfig

    try:
        settings = load(config or (CONFIG if CONFIG.is_file() else None), {})
    except BadConfig as error:
        typer.echo(f"gpuyard: {error}", err=True)
        raise typer.Exit(1) from None
    findings = asyncio.run(examine(settings))
    if as_json:
        typer.echo(orjson.dumps(to_plain(list(findings)), option=orjson.OPT_INDENT_2))
    else:
        _print(findings)


def _print(findings: Sequence[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            typer.echo(f"{area}:")
        typer.echo(f"  {_SIGNS[finding.state]}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            typer.echo(f"  {'':7}  {'':<{width}}  to get it: {finding.remedy}")
