"""`gpuyard scale` and `gpuyard rollout`: how many replicas run, and how a service goes over to new ones."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.output import AsJson, print_json, say
from gpuyard.cli.services import ServiceArgument, faltering, known_services
from gpuyard.cli.session import session_of
from gpuyard.cli.values import length_s
from gpuyard.errors import GpuyardError
from gpuyard_protocol.services import ServiceView

if TYPE_CHECKING:
    from gpuyard.client import Client

#: Between two looks at a service.
LOOK_EVERY_S = 0.5
_What = typer.Argument(metavar="JOB|SERVICE", help="An elastic job's number, or a service's name.")
_Replicas = typer.Argument(metavar="N|MIN:MAX", help="Replicas; of a service also the fewest and the most: 2:8.")
_Timeout = typer.Option("--timeout", metavar="TIME", parser=length_s, help="Give up after so long: 90s, 5m.")


def register(app: typer.Typer) -> None:
    app.command("scale")(scale)
    rollout = typer.Typer(help="Replace a service's replicas, one by one.", no_args_is_help=True, rich_markup_mode=None)
    rollout.command("status")(status)
    rollout.command("restart")(restart)
    rollout.command("undo")(undo)
    app.add_typer(rollout, name="rollout")


def scale(ctx: typer.Context, what: Annotated[str, _What], replicas: Annotated[str, _Replicas]) -> None:
    """Set how many replicas an elastic job or a service may have.

    gpuyard scale 17 4, gpuyard scale chat 2:8
    """
    least, most = _range(replicas)

    async def work(yard: Client) -> None:
        if what.isdigit():
            if most is not None:
                raise GpuyardError("a job has one number of replicas; the fewest were said when it was submitted")
            await yard.scale(int(what), least)
        else:
            await yard.scale_service(what, least, most)

    session_of(ctx).run(work)
    say(f"Scaled job {what} to {replicas}" if what.isdigit() else f"Scaled service {what} to {replicas}")


def _range(text: str) -> tuple[int, int | None]:
    least, colon, most = text.partition(":")
    if not least.isdigit() or (colon and not most.isdigit()):
        raise typer.BadParameter(f"found {text!r}; expected a number, or two such as 2:8", param_hint="N|MIN:MAX")
    return int(least), int(most) if colon else None


def status(
    ctx: typer.Context,
    service: ServiceArgument,
    timeout: Annotated[float, _Timeout] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Wait until every replica of a service is of its newest specification and runs."""
    until = time.monotonic() + timeout if timeout else None

    async def work(yard: Client) -> ServiceView:
        said = ""
        while True:
            (view,) = await known_services(yard, service)
            text = progress(view)
            if text != said and not as_json:
                say(text)
            said = text
            if is_through(view):
                return view
            if until is not None and time.monotonic() > until:
                raise GpuyardError(f"service {service}: {text}; gave up after {timeout:g} s")
            await asyncio.sleep(LOOK_EVERY_S)

    view = session_of(ctx).run(work)
    if as_json:
        print_json(view)


def is_through(view: ServiceView) -> bool:
    return not view.outdated and view.updated >= view.wanted and not view.starting and not view.pending


def progress(view: ServiceView) -> str:
    if is_through(view):
        return f"service {view.service}: {view.updated} replicas run, all of generation {view.generation}"
    old = f", {view.outdated} older ones left" if view.outdated else ""
    why = f"; {said}" if (said := faltering(view)) else ""
    run = f"{view.updated} of {view.wanted} replicas of generation {view.generation} run"
    return f"service {view.service}: {run}{old}{why}"


def restart(ctx: typer.Context, service: ServiceArgument) -> None:
    """Replace every replica by an equal one."""
    _roll(ctx, service, undo=False)
    say(f"Restarting service {service}, one replica after the other (see: gpuyard rollout status {service})")


def undo(ctx: typer.Context, service: ServiceArgument) -> None:
    """Go back to what the service's replicas ran before."""
    _roll(ctx, service, undo=True)
    say(f"Going back to what service {service} ran before (see: gpuyard rollout status {service})")


def _roll(ctx: typer.Context, service: str, *, undo: bool) -> None:
    async def work(yard: Client) -> None:
        await yard.rollout(service, undo=undo)

    session_of(ctx).run(work)
