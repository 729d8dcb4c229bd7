"""The tree of commands: this package's own, and those of the components installed beside it.

Commands that need a component live in that component and join through the entry-point group `gpuyard.commands`; each
entry is a function that takes the root `Typer`. A component that cannot be loaded costs its commands and nothing
else: they stay in the tree and say which extra brings them.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from gpuyard.cli import (
    audit,
    cancelling,
    cordon,
    handover,
    jobs,
    logs,
    nodes,
    running,
    scaling,
    services,
    submitting,
    top,
    usage,
)
from gpuyard.cli.session import Session
from gpuyard.errors import GpuyardError

GROUP = "gpuyard.commands"
#: A checkout on the module path has no installed metadata to read entry points from; these are the project's own.
_OWN = (
    EntryPoint("yard", "gpuyard_daemon.yard.commands:register", GROUP),
    EntryPoint("agent", "gpuyard_agent.doctor.commands:register", GROUP),
)
#: What components bring, for whoever has not installed them.
_COMPONENT_COMMANDS = {
    "up": ("Run a whole yard on this machine.", "daemon,agent"),
    "down": ("Stop the yard that `gpuyard up --detach` left running.", "daemon,agent"),
    "demo": ("Watch a mixed workload run on a simulated yard.", "daemon,agent"),
    "doctor": ("Say what this host can enforce as a node.", "agent"),
    "init": ("Make keys and configuration of a yard on several machines.", "daemon"),
    "tenants": ("Tenants and their users.", "daemon"),
    "node": ("Let a GPU host join the yard.", "daemon,agent"),
}


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="gpuyard",
        help="One shared pool out of a room of GPU hosts: submit jobs, run services, ask why.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_root)
    jobs_and_services = (submitting, running, jobs, logs, cancelling, scaling, services)
    for module in (*jobs_and_services, nodes, cordon, top, usage, audit, handover):
        module.register(app)
    _load_components(app)
    return app


def _print_version(asked: bool) -> None:
    """Eager: before typer finds that no command was named."""
    if asked:
        from gpuyard.cli.output import say

        say(f"gpuyard {_version()}")
        raise typer.Exit


def _root(
    ctx: typer.Context,
    context: Annotated[
        str | None,
        typer.Option("--context", help="Context file of the yard meant, or its directory (also: $GPUYARD_CONTEXT)."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    ctx.obj = Session(context)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("gpuyard")
    except PackageNotFoundError:
        return "of a checkout"


def _load_components(app: typer.Typer) -> None:
    for entry in tuple(entry_points(group=GROUP)) or _OWN:
        try:
            entry.load()(app)
        except ModuleNotFoundError:
            continue
    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    for name, (summary, extra) in _COMPONENT_COMMANDS.items():
        if name not in known:
            _add_missing(app, name, summary, extra)


def _add_missing(app: typer.Typer, name: str, summary: str, extra: str) -> None:
    @app.command(
        name,
        help=f"{summary} (not installed here)",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def missing() -> None:
        raise GpuyardError(f"`gpuyard {name}` is not installed here: pip install 'gpuyard[{extra}]'")
