"""The flags that describe a job, once, for every command that makes one.

A flag that was not given says nothing: it neither overrides the job file nor sends a default, so that defaults have
one home, in the yard. Values go on as people wrote them; the yard judges them, and its refusal names the field.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gpuyard.cli.output import remark
from gpuyard.cli.values import whole
from gpuyard.errors import GpuyardError, Rejected
from gpuyard.requests import job_request, read_items
from gpuyard_protocol.jobs import JobRequest

Command = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[--] COMMAND...",
        help="Program and arguments; one quoted argument with spaces is a line for /bin/sh.",
        show_default=False,
    ),
]


def _option(*names: str, text: str, metavar: str | None = None, parser: Callable[[str], Any] | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, parser=parser, show_default=False)


_GPUS = _option("--gpus", "-g", metavar="N", parser=whole, text="Whole cards per replica.")
_GPU = _option("--gpu", metavar="SHARE", text="A share of one card: 0.3, 30%.")
_GPU_MEMORY = _option("--gpu-memory", metavar="SIZE", text="Memory of one card: 5Gi, 12GB.")
_MIG = _option("--mig", metavar="PROFILE", text="A MIG instance: 1g.10gb, 3g.40gb.")
_ISOLATION = _option("--isolation", metavar="hard|soft|none", text="How far neighbours on a card are kept apart.")
_GPU_MODEL = _option("--gpu-model", metavar="MODEL", text="Cards by model: H100, 'A100|H100', A100:80GB:4.")
_REPLICAS = _option("--replicas", "-r", metavar="N", parser=whole, text="Processes that start together or not at all.")
_MIN_REPLICAS = _option(
    "--min-replicas",
    metavar="N",
    parser=whole,
    text="Elastic: start with what fits from N to --replicas, grow and shrink between.",
)
_TOTAL_GPUS = _option(
    "--total-gpus", metavar="N", parser=whole, text="Whole cards in all; the yard parts them into replicas."
)
_LAUNCHER = _option("--launcher", metavar="torchrun", text="Starts one process for each card of a replica.")
_SECRET = _option("--secret", metavar="NAME", text="A secret that nodes keep, in a variable of that name; repeatable.")
_TOPOLOGY = _option("--topology", metavar="node|rack|spine", text="Where the replicas must be together.")
_SHARE_DOMAIN = _option("--share-domain", metavar="NAME", text="Share cards with jobs that say the same alone.")
_UPLOAD = _option(
    "--upload", metavar="DIR", text="Bring what is in DIR along (64 MiB at most): the job starts in a copy."
)
_CPUS = _option("--cpus", metavar="N", text="CPU cores per replica: 4, 0.5, 500m.")
_MEMORY = _option("--memory", metavar="SIZE", text="Host memory per replica: 8Gi.")
_TIME = _option("--time", "-t", metavar="TIME", text="Limit: 90s, 1h30m, 1-12:00:00; a bare number is minutes.")
_GPU_PROCESSES = _option(
    "--gpu-processes",
    metavar="N",
    parser=whole,
    text="CUDA processes at once: of a share, each gets its part of the memory.",
)
_GPU_LOAD = _option(
    "--gpu-load", metavar="compute|memory|light", text="What a share leans on, to choose its neighbours."
)
_MPS = _option("--mps", text="Beside --mig: the job's own CUDA processes share the instance under MPS.")
_PREEMPTION = _option(
    "--preemption",
    metavar="HOW",
    text="How it gives way: requeue (default), checkpoint (SIGTERM to save), suspend (to host memory), never.",
)
_RESTART_TIME = _option("--restart-time", metavar="TIME", text="What a new start costs it before it goes on: 5m.")
_STOP_GRACE = _option("--stop-grace", metavar="TIME", text="Between SIGTERM and SIGKILL: 30s.")
_PRIORITY = _option(
    "--priority",
    metavar="-2..2",
    parser=whole,
    text="Each step goes before jobs 4 times smaller, and costs double (default 0).",
)
_QUEUE = _option("--queue", metavar="NAME", text="A queue of the yard (default: the tenant's).")
_ESTIMATE = _option("--estimate", metavar="TIME", text="About how long it will run: small jobs go first.")
_DEADLINE = _option("--deadline", metavar="TIME", text="When it should have ended: 2030-01-01T08:00:00Z, +8h.")
_RETRIES = _option("--retries", metavar="N", parser=whole, text="Starts after a failure of the job's own (default 0).")
_ON_NODE_LOST = _option(
    "--on-node-lost", metavar="wait|restart", text="When its node falls silent: wait for it, or start elsewhere."
)
_LEASE = _option("--lease", metavar="TIME", text="… once it has run so long unheard, and then ended: 10m.")
_ENV = _option("--env", metavar="K=V", text="A variable for the job; repeatable.")
_CWD = _option("--cwd", metavar="DIR", text="Directory to run in (default: the current one; '': its own).")
_IMAGE = _option("--image", metavar="IMAGE", text="A container image to run it in: docker.io/library/python:3.12.")
_NAME = _option("--name", "-n", metavar="TEXT", text="A name for people.")
_NODE = _option("--node", metavar="NODE", text="Only on this node; repeatable.")
_LABEL = _option("--label", metavar="K=V", text="Only on nodes with this label; repeatable.")
_THROUGHPUT = _option(
    "--throughput",
    metavar="MODEL=F",
    text="How fast a model is for this job, of the fastest that it may get: A100=0.5; repeatable.",
)
_ALLOW_PENDING = _option("--allow-pending", text="Wait even if no node of today could ever run it.")
_HOLD = _option("--hold", text="Wait until `gpuyard release`.")
_BEGIN = _option("--begin", metavar="TIME", text="Not before: 2030-01-01T08:00:00Z, or +2h from now.")
_AFTER = _option(
    "--depends-on", "-d", metavar="WHAT", text="afterok:JOB, afternotok:JOB, afterany:JOB, singleton; repeatable."
)
_ARRAY = _option("--array", "-a", metavar="WHICH", text="The same job often: 0-99, 0-90:10, 1,3,5; 0-99%8: 8 at once.")
_SUBMISSION_ID = _option("--submission-id", metavar="ID", text="De-duplication key: the same id is one job.")
_FILE = _option("--file", "-f", metavar="FILE", text="Job file, YAML or TOML ('-': standard input).")


#: Fields of a request whose flag has another name.
_FLAG_NAMES = {"node_labels": "label", "nodes": "node", "secrets": "secret", "time_limit": "time"}
_FIELD = re.compile(r"\$\.(\w+)(?:\[\d+\]|\.([\w.-]+))?")
#: Fields as refusals name them: "expected 'gpus' or 'mig' beside it".
_QUOTED_FIELD = re.compile(r"'(" + "|".join(sorted(JobRequest.__struct_fields__)) + ")'")
#: Where a message of many has the job: its place in the file says more.
_IN_BATCH = re.compile(r"^\$\.jobs\[\d+\]")


def flag_of(field: str) -> str:
    """`--gpu-memory` for `gpu_memory`."""
    return "--" + _FLAG_NAMES.get(field, field).replace("_", "-")


@dataclasses.dataclass(kw_only=True)
class JobOptions:
    """Field by field a flag; None or false: not given."""

    gpus: Annotated[int | None, _GPUS] = None
    gpu: Annotated[str | None, _GPU] = None
    gpu_memory: Annotated[str | None, _GPU_MEMORY] = None
    mig: Annotated[str | None, _MIG] = None
    isolation: Annotated[str | None, _ISOLATION] = None
    gpu_model: Annotated[str | None, _GPU_MODEL] = None
    gpu_processes: Annotated[int | None, _GPU_PROCESSES] = None
    gpu_load: Annotated[str | None, _GPU_LOAD] = None
    mps: Annotated[bool, _MPS] = False
    replicas: Annotated[int | None, _REPLICAS] = None
    min_replicas: Annotated[int | None, _MIN_REPLICAS] = None
    total_gpus: Annotated[int | None, _TOTAL_GPUS] = None
    launcher: Annotated[str | None, _LAUNCHER] = None
    secret: Annotated[list[str] | None, _SECRET] = None
    topology: Annotated[str | None, _TOPOLOGY] = None
    share_domain: Annotated[str | None, _SHARE_DOMAIN] = None
    upload: Annotated[str | None, _UPLOAD] = None
    cpus: Annotated[str | None, _CPUS] = None
    memory: Annotated[str | None, _MEMORY] = None
    time: Annotated[str | None, _TIME] = None
    priority: Annotated[int | None, _PRIORITY] = None
    queue: Annotated[str | None, _QUEUE] = None
    estimate: Annotated[str | None, _ESTIMATE] = None
    deadline: Annotated[str | None, _DEADLINE] = None
    retries: Annotated[int | None, _RETRIES] = None
    preemption: Annotated[str | None, _PREEMPTION] = None
    restart_time: Annotated[str | None, _RESTART_TIME] = None
    stop_grace: Annotated[str | None, _STOP_GRACE] = None
    on_node_lost: Annotated[str | None, _ON_NODE_LOST] = None
    lease: Annotated[str | None, _LEASE] = None
    env: Annotated[list[str] | None, _ENV] = None
    cwd: Annotated[str | None, _CWD] = None
    image: Annotated[str | None, _IMAGE] = None
    name: Annotated[str | None, _NAME] = None
    node: Annotated[list[str] | None, _NODE] = None
    label: Annotated[list[str] | None, _LABEL] = None
    throughput: Annotated[list[str] | None, _THROUGHPUT] = None
    allow_pending: Annotated[bool, _ALLOW_PENDING] = False
    hold: Annotated[bool, _HOLD] = False
    begin: Annotated[str | None, _BEGIN] = None
    depends_on: Annotated[list[str] | None, _AFTER] = None
    array: Annotated[str | None, _ARRAY] = None
    submission_id: Annotated[str | None, _SUBMISSION_ID] = None
    file: Annotated[str | None, _FILE] = None

    def requests(self, command: list[str] | None) -> list[dict[str, Any]]:
        """The jobs these flags, the file and the command describe, as plain requests."""
        if self.file is None and not command:
            raise typer.BadParameter("a command to run is missing, or a job file with --file", param_hint="COMMAND")
        flags = self._flags()
        if command:
            flags["command"] = command[0] if len(command) == 1 and " " in command[0].strip() else command
        items = read_items(self.file, "jobs") if self.file is not None else [{}]
        if self.submission_id is not None and len(items) > 1:
            raise typer.BadParameter(f"names one job, but {self.file} holds {len(items)}", param_hint="--submission-id")
        jobs = [item | flags | _merged_maps(item, flags) for item in items]
        if self.upload is not None:
            # It starts where that is unpacked, unless it says otherwise.
            jobs = [job | {"upload": self.upload} for job in jobs]
        elif self.cwd is None and any("cwd" not in job for job in jobs) and (here := default_cwd()) is not None:
            jobs = [{"cwd": here} | job for job in jobs]
        return jobs

    def check(self, requests: list[dict[str, Any]]) -> None:
        """Raise what is wrong with the form of the first that is wrong, in the words of who asked."""
        for place, request in enumerate(requests):
            try:
                job_request(request, {})
            except Rejected as refusal:
                raise self.told(refusal, place, len(requests)) from None

    def told(self, refusal: Rejected, place: int = 0, count: int = 1) -> GpuyardError:
        """A refusal with the flag, or the place in the file, where what it is about was said."""
        path, text = _IN_BATCH.sub("$", refusal.path), _IN_BATCH.sub("$", str(refusal))
        if path and text.startswith(path):
            text = self.named(path) + self.in_flags(text.removeprefix(path))
        if self.file is None or text.startswith("--"):
            return GpuyardError(text)
        where = f"job {place + 1} of {self.file}" if count > 1 else self.file
        return GpuyardError(f"{where}: {text}")

    def named(self, path: str) -> str:
        """`--gpus` for `$.gpus`, `--env A` for `$.env.A`, where a flag said it; what a file says keeps its path."""
        field = _FIELD.match(path)
        if field is None or field[1] not in self._flags():
            return path
        return flag_of(field[1]) + (f" {field[2]}" if field[2] else "") + path.removeprefix(field[0])

    def in_flags(self, text: str) -> str:
        """What is said of other fields, in flags where there is no file whose words they would be."""
        return text if self.file is not None else _QUOTED_FIELD.sub(lambda field: flag_of(field[1]), text)

    def _flags(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "gpus": self.gpus,
            "gpu": self.gpu,
            "gpu_memory": self.gpu_memory,
            "mig": self.mig,
            "isolation": self.isolation,
            "gpu_model": self.gpu_model,
            "gpu_processes": self.gpu_processes,
            "gpu_load": self.gpu_load,
            "mps": self.mps or None,
            "replicas": self.replicas,
            "min_replicas": self.min_replicas,
            "total_gpus": self.total_gpus,
            "topology": self.topology,
            "share_domain": self.share_domain,
            "launcher": self.launcher,
            "secrets": self.secret or None,
            "cpus": self.cpus,
            "memory": self.memory,
            "time_limit": None if self.time is None else _time_limit(self.time),
            "priority": self.priority,
            "queue": self.queue,
            "estimate": None if self.estimate is None else _time_limit(self.estimate),
            "deadline": self.deadline,
            "retries": self.retries,
            "preemption": self.preemption,
            "restart_time": self.restart_time,
            "stop_grace": self.stop_grace,
            "on_node_lost": self.on_node_lost,
            "lease": None if self.lease is None else _time_limit(self.lease),
            "env": _pairs(self.env, "--env"),
            "cwd": os.path.abspath(self.cwd) if self.cwd else None,
            "image": self.image,
            "name": self.name,
            "nodes": self.node or None,
            "node_labels": _pairs(self.label, "--label"),
            "throughput": _factors(self.throughput),
            "allow_pending": self.allow_pending or None,
            "hold": self.hold or None,
            "begin": self.begin,
            "depends_on": self.depends_on or None,
            "array": self.array,
            "submission_id": self.submission_id,
        }
        return {field: value for field, value in given.items() if value is not None}


def _time_limit(text: str) -> str:
    """Minutes where there is no unit, as Slurm's users type it."""
    return f"{text}m" if text.isdigit() else text


def _pairs(texts: list[str] | None, flag: str) -> dict[str, str] | None:
    if not texts:
        return None
    for text in texts:
        if "=" not in text or text.startswith("="):
            raise typer.BadParameter(f"found {text!r}; expected NAME=VALUE", param_hint=flag)
    return dict(text.split("=", 1) for text in texts)


def _factors(texts: list[str] | None) -> dict[str, float] | None:
    """Whether they are possible ones, the yard says, as it does of a file's."""
    found: dict[str, float] = {}
    for model, text in (_pairs(texts, "--throughput") or {}).items():
        try:
            found[model] = float(text)
        except ValueError:
            raise typer.BadParameter(
                f"found {text!r} for {model}; expected a number from 0.001 to 1", param_hint="--throughput"
            ) from None
    return found or None


def _merged_maps(item: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """`--env`, `--label` and `--throughput` add to what the file says, name by name."""
    return {
        field: item[field] | flags[field]
        for field in ("env", "node_labels", "throughput")
        if field in flags and isinstance(item.get(field), dict)
    }


def default_cwd() -> str | None:
    """Where a job runs unless told: here; None where the job's account could not go.

    Root's jobs run as somebody else, and root is often in a place that only root may enter.
    """
    here = os.getcwd()
    if os.geteuid() == 0 and (closed := _first_closed(Path(here))) is not None:
        remark(f"note: {closed} is closed to other users, so the job starts in a directory of its own (--cwd chooses)")
        return None
    return here


def _first_closed(path: Path) -> Path | None:
    for part in (*reversed(path.parents), path):
        if not part.stat().st_mode & stat.S_IXOTH:
            return part
    return None


def takes_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `options: JobOptions` by one flag per field."""
    own = inspect.signature(command, eval_str=True)
    hints = get_type_hints(JobOptions, include_extras=True)
    flags = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(JobOptions)
    ]

    def expanded(**arguments: Any) -> None:
        options = JobOptions(**{flag.name: arguments.pop(flag.name) for flag in flags})
        command(options=options, **arguments)

    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "options"
    ]
    parameters = [*others, *flags]
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what `inspect` looks for
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__doc__ = command.__doc__
    expanded.__name__ = command.__name__
    return expanded
