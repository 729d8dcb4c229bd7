"""`gpuyard simulate` and `gpuyard replay`, as they join the CLI: a trace, or a yard's own past, under other policies.

Loaded with every `gpuyard` command, so it imports nothing that takes time; the command loads what it needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpuyard.cli.values import count

if TYPE_CHECKING:
    from gpuyard_daemon.sim.jobs_run import JobsRun

#: Columns of names; the others hold numbers.
_NAMES = ("policy", "run")
_FORMATS = ("muri", "philly", "chronus", "gpuyard")
_DURATIONS = ("known", "estimated", "unknown")

_Trace = Annotated[
    str, typer.Argument(metavar="TRACE", help="File of jobs (CSV, also .gz), or its path below --traces.")
]
_Format = Annotated[str, typer.Option("--format", metavar="NAME", help=f"One of {', '.join(_FORMATS)}.")]
_Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", metavar="NAME", help="Again for more than one (default: gpuyard, fifo-skip, srsf)."),
]
_Nodes = Annotated[int, typer.Option("--nodes", metavar="N", parser=count(1), help="Nodes of the simulated cluster.")]
_PerNode = Annotated[int, typer.Option("--gpus-per-node", metavar="N", parser=count(1, 64), help="Cards of each.")]
_Durations = Annotated[
    str, typer.Option("--durations", metavar="WHAT", help=f"What the policy is told: {', '.join(_DURATIONS)}.")
]
_Restart = Annotated[
    str, typer.Option("--restart-s", metavar="SECONDS|model", help="Without progress at each start, or by model.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object a line for each policy.")]
_Plot = Annotated[Path | None, typer.Option("--plot", metavar="DIR", help="Write charts (SVG) there.")]
_More = Annotated[bool, typer.Option("--more", help="Further figures: small jobs, restarts, allocation.")]
_Folder = Annotated[
    str | None, typer.Option("--traces", metavar="DIR", help="Folder of traces (default: $GPUYARD_TRACES).")
]


def register(root: typer.Typer) -> None:
    root.command("simulate", rich_help_panel="Yard")(simulate)
    root.command("replay", rich_help_panel="Yard")(replay)


def simulate(
    trace: _Trace,
    file_format: _Format = "gpuyard",
    policy: _Policies = None,
    nodes: _Nodes = 8,
    gpus_per_node: _PerNode = 8,
    durations: _Durations = "unknown",
    restart_s: _Restart = "30",
    as_json: _Json = False,
    more: _More = False,
    plot: _Plot = None,
    traces: _Folder = None,
) -> None:
    """Run a trace of jobs through a simulated cluster, under several policies.

    Compares completion times, waits and fairness.
    """
    from gpuyard_daemon.sim.charts import draw_job_runs
    from gpuyard_daemon.sim.experiments import JOB_POLICIES, jobs_result, run_jobs
    from gpuyard_daemon.sim.trace_files import TraceError, locate

    _one_of("--format", file_format, _FORMATS)
    _one_of("--durations", durations, _DURATIONS)
    names = policy or ["gpuyard", "fifo-skip", "srsf"]
    for name in names:
        _one_of("--policy", name, JOB_POLICIES)
    runs: list[JobsRun] = []
    try:
        path = locate(trace, file_format, traces)
        for name in names:
            restart = _restart(restart_s)
            runs.append(run_jobs(path, file_format, name, nodes, gpus_per_node, durations, restart))
    except TraceError as problem:
        typer.echo(f"gpuyard simulate: {problem}", err=True)
        raise typer.Exit(2) from None
    results = [jobs_result(run, more=more) for run in runs]
    if as_json:
        for result in results:
            typer.echo(json.dumps(result))
    else:
        _print_table(results)
    if plot is not None:
        try:
            for written in draw_job_runs(runs, plot):
                typer.echo(f"wrote {written}", file=sys.stderr)
        except OSError as problem:
            typer.echo(f"gpuyard simulate: no charts: {plot}: {problem.strerror or problem}", err=True)
            raise typer.Exit(1) from None


def _restart(text: str) -> float | None:
    if text == "model":
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise typer.BadParameter(f"found {text!r}; expected seconds or 'model'", param_hint="--restart-s") from None
    if not 0 <= seconds < float("inf"):
        raise typer.BadParameter(f"found {text!r}; expected at least 0", param_hint="--restart-s")
    return seconds


def _one_of(option: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise typer.BadParameter(f"found {found!r}; expected one of {', '.join(allowed)}", param_hint=option)


def _print_table(results: list[dict[str, object]]) -> None:
    from gpuyard.cli.tables import print_table

    # A column a policy: there are few of them and many figures, and a terminal is 80 wide.
    title = next(name for name in _NAMES if name in results[0])
    figures = [name for name in results[0] if name not in _NAMES]
    headings = [title.upper(), *[f"#{result[title]}" for result in results]]
    print_table(headings, [[name.replace("_", " "), *[f"{result[name]:,}" for result in results]] for name in figures])


_Sources = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="SOURCE",
        help="State directory of a yard, its archive, or journal files (default: this machine's yard).",
    ),
]
_Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A daemon's configuration: its [scheduler] and [tenants] decide."),
]
_Without = Annotated[
    list[str] | None, typer.Option("--without", metavar="NODE", help="As if this node had never been there.")
]
_MoreNodes = Annotated[
    list[str] | None, typer.Option("--more", metavar="NODE=N", help="As if there had been N more nodes like this one.")
]
_Orders = Annotated[
    list[str] | None,
    typer.Option("--policy", metavar="NAME", help="Also under this policy of `simulate` (jobs of whole cards only)."),
]


def replay(
    source: _Sources = None,
    config: _Config = None,
    without: _Without = None,
    more: _MoreNodes = None,
    policy: _Orders = None,
    as_json: _Json = False,
) -> None:
    """Live a real yard's journal again with other settings, quotas or hardware.

    Compares waits and allocation.
    """
    from gpuyard_daemon.config import load
    from gpuyard_daemon.sim.experiments import JOB_POLICIES
    from gpuyard_daemon.sim.replaying import Changed, run_replay
    from gpuyard_daemon.sim.trace_files import TraceError
    from gpuyard_protocol.service.settings_file import BadConfig

    for name in policy or ():
        _one_of("--policy", name, JOB_POLICIES)
    try:
        loaded = load(config, {})
        changed = Changed(
            settings=loaded.scheduler,
            policy=loaded.policy() if config is not None else None,
            without=frozenset(without or ()),
            more=dict([_counted(text) for text in more or ()]),
        )
        results = run_replay(source or [], changed, policy or [])
    except (TraceError, BadConfig) as problem:
        typer.echo(f"gpuyard replay: {problem}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        for result in results:
            typer.echo(json.dumps(result))
    else:
        _print_table(results)


def _counted(text: str) -> tuple[str, int]:
    node, _, count = text.rpartition("=")
    if not node or not count.isdigit():
        raise typer.BadParameter(f"found {text!r}; expected NODE=N, such as node-1=2", param_hint="--more")
    return node, int(count)
