"""How a command reaches the yard: which context, and one event loop for the length of the command."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from gpuyard.client import Client

T = TypeVar("T")


class Session:
    """What the root options say, for the command that follows."""

    def __init__(self, context: str | None) -> None:
        #: As given with --context; None: the usual places.
        self.context = context

    def run(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """Open the yard, do the work, close."""
        from gpuyard.client import connect

        client = connect(self.context)

        async def with_client() -> T:
            async with client as yard:
                return await work(yard)

        return asyncio.run(with_client())


def session_of(ctx: typer.Context) -> Session:
    session = ctx.find_object(Session)
    return session if session is not None else Session(None)
