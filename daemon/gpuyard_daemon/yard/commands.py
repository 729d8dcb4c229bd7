"""`gpuyard up`, `down`, `demo`, and the commands of `init`, `tenants` and `joining`, as they join the CLI.

This module is loaded with every `gpuyard` command, so it imports nothing that takes time or an extra; each command
loads what it needs, and says which extra brings it where it is missing. It turns words into settings and outcomes
into words.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gpuyard.cli.values import amount, count
from gpuyard.context import CONTEXT_VARIABLE, default_state_dir
from gpuyard.errors import GpuyardError
from gpuyard_daemon.yard import init, joining, tenants

if TYPE_CHECKING:
    from gpuyard_daemon.yard.up import Settings, Yard

T = TypeVar("T")

#: `up --detach` and `down` watch another process; so often.
WATCH_S = 0.05
DETACHED_START_TIMEOUT_S = 90.0
DOWN_TIMEOUT_S = 360.0

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Directory of the yard (default: /var/lib/gpuyard for root, else ~/.local/state/gpuyard).",
    ),
]
_Simulate = typer.Option("--simulate", metavar="SPEC", help="Model cards instead of using real ones: 8xH100-80GB.")
_Nodes = typer.Option(
    "--nodes", metavar="N", parser=count(1, 256), help="Agents to start; more than 1 only with --simulate."
)
_Nats = typer.Option(
    "--nats", metavar="URL", help="Use this NATS server, or cluster (URL,URL,URL), instead of one of its own."
)
_Port = typer.Option(
    "--port", metavar="PORT", parser=count(0, 65535), help="Of the NATS server; 0: any (default: as before, or 4222)."
)
_RunAs = typer.Option(
    "--run-as", metavar="USER", help="Account that jobs run as (default for root: the sudo user, or nobody)."
)
_Listen = typer.Option(
    "--listen",
    metavar="ADDRESS",
    help="Where the NATS server listens: 0.0.0.0 lets other machines join (`gpuyard node token`), over TLS.",
)
_Http = typer.Option(
    "--http", metavar="HOST:PORT", help="Of the daemon's page, metrics and health (default: 127.0.0.1:7790)."
)
_Standby = typer.Option("--standby", help="Also run a second daemon that takes over when the first one is gone.")
_Detach = typer.Option("--detach", "-d", help="Return once the yard is ready; stop it with `gpuyard down`.")
_Now = typer.Option("--now", help="Do not wait for the jobs' grace.")
_Seconds = typer.Option("--seconds", metavar="N", parser=count(5, 3600), help="Length of the mixed workload.")
_Trace = typer.Option("--trace", metavar="FILE", help="Replay this trace instead (CSV, also .gz).")
_Speed = typer.Option(
    "--speed", metavar="N", parser=amount(1), help="With --trace: so many times faster than it was recorded."
)
_Limit = typer.Option("--limit", metavar="N", parser=count(1), help="With --trace: only the first N jobs.")
_DemoNodes = typer.Option("--nodes", metavar="N", parser=count(1, 64), help="Nodes (default: 4, with --trace 8).")
_Gpus = typer.Option("--gpus", metavar="N", parser=count(1, 64), help="Cards of each node.")
_Json = typer.Option("--json", help="Print the summary as one JSON object on standard output.")


def register(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("down")(down)
    app.command("demo")(demo)
    init.register(app)
    tenants.register(app)
    joining.register(app)


def up(
    state: State = None,
    simulate: Annotated[str, _Simulate] = "",
    nodes: Annotated[int, _Nodes] = 1,
    nats: Annotated[str, _Nats] = "",
    port: Annotated[int | None, _Port] = None,
    run_as: Annotated[str, _RunAs] = "",
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Tenant to set up.")] = "main",
    user: Annotated[str, typer.Option("--user", metavar="NAME", help="Its user (default: your login name).")] = "",
    http: Annotated[str, _Http] = "",
    standby: Annotated[bool, _Standby] = False,
    listen: Annotated[str, _Listen] = "127.0.0.1",
    detach: Annotated[bool, _Detach] = False,
) -> None:
    """Run a whole yard on this machine: NATS server, daemon and agents."""
    if nodes > 1 and not simulate:
        raise typer.BadParameter("this machine is one node; more need --simulate", param_hint="--nodes")
    if nats and port is not None:
        raise typer.BadParameter("is of the yard's own server; with --nats there is none", param_hint="--port")
    if nats and listen != "127.0.0.1":
        raise typer.BadParameter("is of the yard's own server; with --nats there is none", param_hint="--listen")
    _check_address(http)
    for name, flag in ((tenant, "--tenant"), (user, "--user")):
        _check_name(name, flag)
    settings_of = _component("gpuyard_daemon.yard.up").Settings
    settings: Settings = settings_of(
        state=state if state is not None else default_state_dir(),
        simulate=simulate,
        nodes=nodes,
        nats=nats,
        port=port,
        run_as=run_as,
        tenant=tenant,
        user=user,
        http=http,
        standby=standby,
        listen=listen,
    )
    if detach:
        _start_detached(settings)
    else:
        _run(_conduct(settings))


def _check_name(name: str, flag: str) -> None:
    from gpuyard_protocol.names import NAME_EXPECTED, is_name

    if name and not is_name(name):
        raise typer.BadParameter(f"found {name!r}; expected {NAME_EXPECTED}", param_hint=flag)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if address and not (host and port.isdigit() and int(port) < 65536):
        raise typer.BadParameter(f"found {address!r}; expected HOST:PORT", param_hint="--http")


def _component(module: str) -> Any:
    """A module that needs more than a bare client, or the extra that brings what is missing."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise GpuyardError(
            f"this command needs {error.name}, which is not installed here: pip install 'gpuyard[daemon,agent]'"
        ) from None


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    from gpuyard_daemon.yard.home import YardTrouble
    from gpuyard_daemon.yard.server_files import ConfigurationError
    from gpuyard_protocol.bus.base import BusError

    try:
        return uvloop.run(work)
    except (YardTrouble, ConfigurationError, BusError) as error:
        raise GpuyardError(str(error)) from None


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


# --- up ---------------------------------------------------------------------------------------------------------------


async def _conduct(settings: Settings) -> None:
    """Start, say how to reach it, stay until told to go, stop."""
    from gpuyard_daemon.yard.up import Yard

    yard = Yard(settings, say=_say)
    asked = asyncio.Event()
    _listen_for_the_end(yard, asked)
    begun = time.monotonic()
    starting = asyncio.ensure_future(yard.start())
    leaving = asyncio.ensure_future(asked.wait())
    await asyncio.wait((starting, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    await starting
    try:
        text = "\n".join(await _how_to_reach(yard, time.monotonic() - begun))
        yard.announce(text)
        sys.stdout.write(
            f"{text}\nCtrl-C stops it; jobs are put back into the queue and start again with the next one.\n"
        )
        sys.stdout.flush()
        failure = asyncio.ensure_future(yard.failure())
        await asyncio.wait((leaving, failure), return_when=asyncio.FIRST_COMPLETED)
        failed = failure.result() if failure.done() else ""
        failure.cancel()
    finally:
        await yard.stop()
    _say("stopped; no process is left, and the next `gpuyard up` goes on from here")
    if failed:
        raise GpuyardError(failed)


def _listen_for_the_end(yard: Yard, asked: asyncio.Event) -> None:
    """The first signal asks for an end with grace, the second for one without."""

    def on_signal() -> None:
        if asked.is_set():
            yard.hurry.set()
        else:
            _say("stopping …")
            asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)


async def _how_to_reach(yard: Yard, took_s: float) -> list[str]:
    from collections import Counter

    from gpuyard_protocol.resources import Device

    context = yard.context
    assert context is not None
    nodes = await yard.nodes()
    cards = Counter(
        Device(uuid=card.uuid, index=card.index, model=card.model, memory_mib=card.memory_mib, modes=()).short_model
        for node in nodes
        if node.node in yard.node_names
        for card in node.cards
    )
    shown = ", ".join(f"{count}×{model}" for model, count in sorted(cards.items())) or "no GPU"
    simulated = " (simulated)" if yard.settings.simulate else ""
    count = len(yard.node_names)
    lines = [
        f"The yard is up after {took_s:.1f} s: {count} node{'s' if count > 1 else ''}, {shown}{simulated}. "
        f"You are {context.user} of tenant {context.tenant}; jobs run as {yard.account}.",
        "",
    ]
    lines += [
        f"  state   {yard.home.path}",
        f"  NATS    {context.url}",
        f"  status  {context.http}",
        "",
        *_export_lines(yard),
        "  gpuyard submit --gpus 1 -- sleep 10" if cards else "  gpuyard submit -- sleep 10",
        "  gpuyard jobs",
        "  gpuyard nodes",
        "",
    ]
    if not cards:
        lines.append("No GPU was found: jobs that ask for none run; to try the rest: gpuyard up --simulate 8xH100-80GB")
    return lines


def _export_lines(yard: Yard) -> list[str]:
    """What a shell must know; nothing where clients look by themselves."""
    if yard.guest_context is not None:
        return [f"  export {CONTEXT_VARIABLE}={yard.guest_context}   # for the user who called sudo"]
    return [] if yard.home.is_usual() else [f"  export {CONTEXT_VARIABLE}={yard.home.context_file}"]


def _start_detached(settings: Settings) -> None:
    """The same in a process of its own; return when it is ready."""
    import subprocess

    from gpuyard_daemon.yard.home import Home

    home = Home(settings.state)
    _take_briefly(home)
    log_file = home.path / "up.log"
    with log_file.open("wb") as log:
        conductor = subprocess.Popen(
            [sys.executable, "-m", "gpuyard.cli", "up", *_flags(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + DETACHED_START_TIMEOUT_S
    while time.monotonic() < deadline:
        running = home.read_running()
        if running is not None and running.announcement and running.conductor.pid == conductor.pid:
            sys.stdout.write(running.announcement)
            stop = "gpuyard down" + ("" if home.is_usual() else f" --state {home.path}")
            sys.stdout.write(f"\nIt runs in the background (process {conductor.pid}); stop it with: {stop}\n")
            return
        if conductor.poll() is not None:
            break
        time.sleep(WATCH_S)
    said = log_file.read_text().strip().rpartition("\n")[2].removeprefix("gpuyard: ")
    raise GpuyardError(f"the yard did not start: {said or 'it said nothing'}")


def _take_briefly(home: Any) -> None:
    from gpuyard_daemon.yard.home import YardTrouble

    try:
        home.take()
    except YardTrouble as error:
        raise GpuyardError(str(error)) from None
    home.release()


def _flags(settings: Settings) -> list[str]:
    """The settings as `up` takes them."""
    given = {
        "--state": str(settings.state.absolute()),
        "--simulate": settings.simulate,
        "--nodes": str(settings.nodes),
        "--nats": settings.nats,
        "--port": "" if settings.port is None else str(settings.port),
        "--run-as": settings.run_as,
        "--tenant": settings.tenant,
        "--user": settings.user,
        "--http": settings.http,
    }
    switches = ["--standby"] if settings.standby else []
    return [*(part for flag, value in given.items() if value for part in (flag, value)), *switches]


def down(state: State = None, now: Annotated[bool, _Now] = False) -> None:
    """Stop the yard that runs from a state directory, with grace."""
    _component("gpuyard_daemon.yard.up")
    from gpuyard_daemon.yard.home import Home
    from gpuyard_daemon.yard.processes import is_running

    home = Home(state if state is not None else default_state_dir())
    running = home.read_running()
    if not home.is_held() or running is None:
        raise GpuyardError(f"no yard runs from {home.path} (another one: gpuyard down --state DIR)")
    conductor = running.conductor.find()
    if conductor is None:
        raise GpuyardError(f"the yard at {home.path} is held by a process that {home.path / 'up.json'} does not name")
    conductor.terminate()
    if now:
        time.sleep(WATCH_S)
        conductor.terminate()
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    while home.is_held() or is_running(conductor):
        if time.monotonic() > deadline:
            raise GpuyardError(f"process {conductor.pid} does not end within {DOWN_TIMEOUT_S:g} s (gpuyard down --now)")
        time.sleep(WATCH_S)
    sys.stdout.write(f"The yard at {home.path} is stopped; `gpuyard up` goes on from there.\n")


# --- demo -------------------------------------------------------------------------------------------------------------


def demo(
    seconds: Annotated[int, _Seconds] = 60,
    trace: Annotated[Path | None, _Trace] = None,
    speed: Annotated[float, _Speed] = 10_000.0,
    limit: Annotated[int | None, _Limit] = None,
    nodes: Annotated[int | None, _DemoNodes] = None,
    gpus: Annotated[int, _Gpus] = 8,
    as_json: Annotated[bool, _Json] = False,
) -> None:
    """Watch a mixed workload run on a simulated yard of its own; nothing of it stays."""
    if trace is not None and not trace.is_file():
        raise typer.BadParameter(f"there is no file {trace}", param_hint="--trace")
    module = _component("gpuyard_daemon.yard.demo")
    plan = module.DemoPlan(
        seconds=seconds,
        trace=trace,
        speed=speed,
        limit=limit,
        nodes=nodes if nodes is not None else (8 if trace is not None else 4),
        gpus=gpus,
        as_json=as_json,
    )
    try:
        workload = module.plan_workload(plan)
    except _component("gpuyard_daemon.yard.home").YardTrouble as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None
    try:
        _run(module.run_demo(plan, workload))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
