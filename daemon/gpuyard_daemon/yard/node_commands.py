"""`gpuyard node declare-dead`, `remove` and `certificate`: hosts that are gone, and what a host may need to be read.

This module is loaded with every `gpuyard` command, so it imports nothing that takes time or an extra.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from gpuyard.cli.output import say
from gpuyard.cli.session import session_of
from gpuyard.context import default_state_dir
from gpuyard.errors import GpuyardError
from gpuyard_protocol.names import NAME_EXPECTED, is_name

_HeadState = Annotated[
    Path | None, typer.Option("--state", metavar="DIR", help="Directory of the yard, on its head node.")
]
_Names = Annotated[
    list[str], typer.Option("--name", metavar="NAME", help="Host name or address it is read at; may be repeated.")
]
_Node = Annotated[str, typer.Argument(metavar="NODE", help="As `gpuyard nodes` lists it.")]


def register(group: typer.Typer) -> None:
    group.command("declare-dead")(declare_dead)
    group.command("remove")(remove)
    group.command("certificate")(certificate)


def declare_dead(ctx: typer.Context, node: _Node) -> None:
    """Say that a lost node will not go on with its jobs: they may start elsewhere (operators).

    Only for a host that is off, or off the network for good: nobody can end what still runs there, and its jobs would
    run twice.
    """
    _say_of_node(ctx, "declare-dead", node)


def remove(ctx: typer.Context, node: _Node) -> None:
    """Take a lost node out of the yard, and its key (operators)."""
    _say_of_node(ctx, "remove-node", node)


def certificate(node: _Node, name: _Names, state: _HeadState = None) -> None:
    """Make a certificate for a host's HTTP endpoint (on the head).

    Where it is read over the network.
    """
    from gpuyard_daemon.yard.certificates import make_node_certificate
    from gpuyard_daemon.yard.init import check_owner
    from gpuyard_daemon.yard.server_files import ConfigurationError

    if not is_name(node):
        raise typer.BadParameter(f"found {node!r}; expected {NAME_EXPECTED}", param_hint="NODE")
    directory = (state if state is not None else default_state_dir()).absolute()
    try:
        check_owner(directory)
        cert, key = make_node_certificate(directory, node, name)
    except ConfigurationError as error:
        raise GpuyardError(str(error)) from None
    except OSError as error:
        raise GpuyardError(f"{error.filename or directory}: {error.strerror or error}") from None
    say(f"{cert} and {key}: take both to {node}, and set http_cert and http_key in its agent.toml")


def _say_of_node(ctx: typer.Context, verb: str, node: str) -> None:
    from gpuyard.context import load_context
    from gpuyard.operator import Operator

    async def work() -> str:
        async with Operator(load_context(session_of(ctx).context)) as operator:
            return await operator.say_of_node(verb, node)

    say(asyncio.run(work()))
