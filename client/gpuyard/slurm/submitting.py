"""`sbatch` and `srun`: a script, or a command, handed in as a job of this yard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpuyard.cli.options import default_cwd
from gpuyard.cli.output import say
from gpuyard.cli.session import Session
from gpuyard.slurm.flags import in_script, job_of, parser

if TYPE_CHECKING:
    from gpuyard.client import Client
    from gpuyard.job import Job


def sbatch(arguments: Sequence[str]) -> None:
    flags = parser("sbatch")
    flags.add_argument("--wrap", metavar="LINE")
    flags.add_argument("--parsable", action="store_true")
    flags.add_argument("--test-only", action="store_true")
    flags.add_argument("-W", "--wait", action="store_true")
    flags.add_argument("script", nargs="?")
    flags.add_argument("arguments", nargs="...")
    given = flags.parse_args(arguments)
    job: dict[str, Any] = {}
    if given.wrap is None:
        text = sys.stdin.read() if given.script is None else _read(given.script)
        # The command line comes last, so that it wins.
        given = flags.parse_args([*in_script(text), *arguments])
        job = {"script": text, "command": given.arguments or None, "name": Path(given.script or "sbatch").name}
    else:
        job = {"command": given.wrap, "name": "wrap"}
    job = {field: value for field, value in (job | job_of(given)).items() if value is not None}
    _hand_in(_placed(job), given.parsable, given.test_only, given.wait)


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"sbatch: error: {path} cannot be read: {error}") from None
    if not text.startswith("#!"):
        raise SystemExit(f"sbatch: error: {path} does not begin with #! and an interpreter")
    return text


def _placed(job: dict[str, Any]) -> dict[str, Any]:
    return {"cwd": here} | job if "cwd" not in job and (here := default_cwd()) is not None else job


def _hand_in(job: dict[str, Any], parsable: bool, test_only: bool, wait: bool) -> None:
    async def work(yard: Client) -> int:
        if test_only:
            plan = await yard.plan(job)
            say(f"sbatch: {plan.summary}")
            return int(plan.verdict == "rejected")
        handed: Job = await yard.submit(job)
        say(str(handed.number) if parsable else f"Submitted batch job {handed.number}")
        if not wait:
            return 0
        view = await handed.wait()
        return view.exit_code if view.exit_code is not None else int(view.state != "succeeded")

    raise SystemExit(Session(None).run(work))


def srun(arguments: Sequence[str]) -> None:
    """Attached, as `gpuyard run`."""
    from gpuyard.cli.running import run_request

    flags = parser("srun")
    flags.add_argument("command", nargs="...")
    given = flags.parse_args(arguments)
    if not given.command:
        flags.error("a command to run is missing")
    try:
        run_request(Session(None), _placed(job_of(given) | {"command": given.command}), quiet=True)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None
