"""Slurm's flags for a job, and the job of this yard that they mean.

A script's `#SBATCH` lines come first, then the command line, which wins. Units are Slurm's: minutes for a bare time,
megabytes for a bare amount of memory.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import Any, NoReturn

from gpuyard.cli.output import remark
from gpuyard_protocol.names import nearest

_PLAIN_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_MEMORY_UNITS = {"": "Mi", "K": "Ki", "M": "Mi", "G": "Gi", "T": "Ti"}
#: They only tell, and change nothing about the job.
_TELLING = ("--comment", "--mail-type", "--mail-user", "--wckey", "--account", "-A", "--qos", "-q", "--nice")


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, with the nearest flag there is."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = nearest(unknown[1].partition("=")[0], known)
            hint = f"; did you mean {near}?" if near else ""
            message = f"{unknown[1]} is not carried out here{hint} (see: gpuyard submit --help)"
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


def parser(name: str) -> argparse.ArgumentParser:
    flags = _Parser(prog=name, allow_abbrev=False, description="See also: gpuyard submit --help")
    add = flags.add_argument
    add("-J", "--job-name")
    add("-p", "--partition", help="a queue of the yard")
    add("-N", "--nodes", type=int, help="so many replicas, which start together")
    add("-n", "--ntasks", type=int)
    add("-c", "--cpus-per-task")
    add("--mem")
    add("-G", "--gpus", help="in all: [MODEL:]N")
    add("--gpus-per-node", help="[MODEL:]N")
    add("--gpus-per-task", help="[MODEL:]N")
    add("--gres", help="gpu[:MODEL]:N, or mps:PERCENT")
    add("-t", "--time")
    add("-a", "--array")
    add("-d", "--dependency")
    add("-b", "--begin")
    add("-H", "--hold", action="store_true")
    add("-w", "--nodelist")
    add("-D", "--chdir")
    add("-o", "--output")
    add("-e", "--error")
    add("--export")
    add("--requeue", action="store_true")
    for flag in [each for each in _TELLING if each.startswith("--")]:
        short = {"--account": "-A", "--qos": "-q"}.get(flag)
        add(*([short, flag] if short else [flag]), help=argparse.SUPPRESS)
    return flags


def in_script(text: str) -> list[str]:
    """What its `#SBATCH` lines say, up to the first command."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            found += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break
    return found


def job_of(given: argparse.Namespace) -> dict[str, Any]:
    """The request that these flags mean, without its command."""
    job: dict[str, Any] = {
        "name": given.job_name,
        "queue": given.partition,
        "cpus": given.cpus_per_task,
        "memory": _memory(given.mem),
        "time_limit": _time(given.time),
        "array": given.array,
        "depends_on": _dependencies(given.dependency),
        "begin": _begin(given.begin),
        "hold": given.hold or None,
        "nodes": given.nodelist.split(",") if given.nodelist else None,
        "cwd": given.chdir,
        "env": _exported(given.export),
    }
    job |= _gang(given)
    for flag, value in (("--output", given.output), ("--error", given.error)):
        if value:
            remark(f"note: {flag} {value} is not written; the output is the yard's: gpuyard logs JOB")
    return {field: value for field, value in job.items() if value is not None}


def _gang(given: argparse.Namespace) -> dict[str, Any]:
    """Replicas and what each has. A task is a replica; without tasks a node is one."""
    replicas = given.ntasks or given.nodes or 1
    if given.ntasks and given.nodes and given.ntasks != given.nodes:
        raise SystemExit(
            "error: --ntasks other than --nodes: a replica is one task on one node; ask for --nodes, or use torchrun"
        )
    asked = {
        flag: value
        for flag, value in (
            ("gpus_per_node", given.gpus_per_node),
            ("gpus_per_task", given.gpus_per_task),
            ("gres", given.gres),
            ("gpus", given.gpus),
        )
        if value
    }
    if len(asked) > 1:
        raise SystemExit(f"error: {' and '.join(asked)} say the same thing twice: leave one out")
    found: dict[str, Any] = {"replicas": replicas if replicas > 1 else None}
    for flag, text in asked.items():
        if flag == "gres" and text.startswith("mps:"):
            return found | {"gpu": f"{text.removeprefix('mps:')}%"}
        if flag == "gres" and text != "gpu" and not text.startswith("gpu:"):
            raise SystemExit(f"error: --gres={text}: expected gpu:N, gpu:MODEL:N or mps:PERCENT")
        model, _, count = (text.removeprefix("gpu").lstrip(":") if flag == "gres" else text).rpartition(":")
        count = count or "1"
        if not count.isdigit():
            model, count = count, "1"
        found["gpu_model"] = model or None
        if flag == "gpus" and replicas == 1 and int(count) > 0:
            found["total_gpus"] = int(count)
        elif flag == "gpus":
            if int(count) % replicas:
                raise SystemExit(f"error: --gpus={text} cannot be parted over {replicas} replicas")
            found["gpus"] = int(count) // replicas
        else:
            found["gpus"] = int(count)
    return found


def _time(text: str | None) -> str | None:
    """`MIN`, `MIN:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`."""
    if text is None:
        return None
    match = _PLAIN_TIME.fullmatch(text)
    if match is None:
        raise SystemExit(f"error: --time={text}: expected minutes, MM:SS, HH:MM:SS or D-HH[:MM[:SS]]")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] is not None:
        seconds = days * 86_400 + first * 3600 + second * 60 + third
    elif match[4] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    return f"{seconds}s"


def _memory(text: str | None) -> str | None:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text or "")
    if text is None:
        return None
    if match is None:
        raise SystemExit(f"error: --mem={text}: expected a number of megabytes, or one with K, M, G or T")
    return f"{match[1]}{_MEMORY_UNITS[match[2]]}"


def _dependencies(text: str | None) -> list[str] | None:
    """`afterok:1:2,singleton`."""
    if text is None:
        return None
    found = []
    for part in text.split(","):
        kind, *jobs = part.split(":")
        found += [f"{kind}:{job}" for job in jobs] or [kind]
    return found


def _begin(text: str | None) -> str | None:
    """`now+2hours`, or a time as the yard reads it."""
    match = re.fullmatch(r"now\+(\d+)(seconds?|minutes?|hours?|days?|)", text or "")
    return text if match is None else f"+{match[1]}{match[2][:1] or 's'}"


def _exported(text: str | None) -> dict[str, str] | None:
    import os

    if text in (None, "NONE"):
        return None
    if text == "ALL":
        raise SystemExit("error: --export=ALL: nothing goes along unless it is named: --export=NAME,OTHER=value")
    named = {}
    for part in text.split(","):
        name, is_given, value = part.partition("=")
        if is_given or name in os.environ:
            named[name] = value if is_given else os.environ[name]
    return named
