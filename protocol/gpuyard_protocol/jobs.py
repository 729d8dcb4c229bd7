"""What a tenant submits and is told about a job.

`JobRequest` is what people write (human units, every field the yard will ever honour); `JobSpec` is what it means
(integers, defaults filled in) and what the journal keeps. `JobRequest.specify()` leads from one to the other; nothing
is accepted and then ignored.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.arrays import ArraySpec as ArraySpec
from gpuyard_protocol.arrays import parse_array as parse_array
from gpuyard_protocol.codec import Malformed, RequestVersion
from gpuyard_protocol.names import (
    NAME_EXPECTED,
    SUBMISSION_EXPECTED,
    JobId,
    ServiceName,
    SubmissionId,
    Tenant,
    User,
    is_name,
    is_submission_id,
)
from gpuyard_protocol.needs import ResourceRequest, malformed, resource_need
from gpuyard_protocol.nodes import IdleGpu
from gpuyard_protocol.resources import ABILITIES, Ability, GpuLoad, Isolation, ResourceNeed
from gpuyard_protocol.units import Cpus, Duration, GpuWish, Memory, MigProfile, Moment, Share
from gpuyard_protocol.uploads import UPLOAD_EXPECTED, is_upload

Preemption: TypeAlias = Literal["never", "requeue", "checkpoint", "suspend"]
OnNodeLost: TypeAlias = Literal["wait", "restart"]

#: pending → starting → running → (stopping →) succeeded | failed | cancelled; a requeue leads back to pending.
JobState: TypeAlias = Literal[
    "pending", "starting", "running", "suspended", "stopping", "succeeded", "failed", "cancelled"
]  # fmt: skip
FINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
#: The same of a job, in a sentence.
ENDED_AS = {"succeeded": "has succeeded", "failed": "has failed", "cancelled": "was cancelled"}

#: `afterok`: it succeeded. `afternotok`: it failed or was cancelled. `afterany`: it ended.
DependencyKind: TypeAlias = Literal["afterok", "afternotok", "afterany"]
_DEPENDENCY_KINDS: dict[str, DependencyKind] = {
    "afterok": "afterok", "afternotok": "afternotok", "afterany": "afterany",
}  # fmt: skip
_DEPENDENCY = re.compile(r"singleton|(?:afterok|afternotok|afterany):[1-9][0-9]{0,15}")
DEPENDENCY_EXPECTED = "'afterok:JOB', 'afternotok:JOB', 'afterany:JOB' with a job's number, or 'singleton'"
DEPENDENCIES_MAX = 256

#: A container image as engines name it: registry, path, tag or digest.
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
IMAGE_EXPECTED = "an image such as 'docker.io/library/python:3.12'"

PRIORITY_MIN, PRIORITY_MAX = -2, 2
REPLICAS_MAX = 1024
TOTAL_GPUS_MAX = 4096
RETRIES_MAX = 100
DEFAULT_STOP_GRACE_MS = 30_000
#: A shorter lease would end jobs for every hiccup of the network.
LEASE_MIN_MS, LEASE_MAX_MS = 10_000, 7 * 86_400_000
#: Names that the yard sets itself in every job.
_RESERVED_ENV = re.compile(r"^(GPUYARD_.*|CUDA_VISIBLE_DEVICES|CUDA_MPS_.*|LD_PRELOAD)$")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LAUNCHER = re.compile(r"(?:/[^\0]*/)?torchrun")


class JobRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A job as people write it: the payload of `sub.<tenant>.<user>.submit`."""

    v: RequestVersion = 1
    #: De-duplication key, kept 7 days; without one the submission is `s<SUB sequence>`.
    submission_id: str | None = None
    name: str = ""
    #: A program and its arguments, or one line for /bin/sh.
    command: list[str] | str | None = None
    #: A script's text, started by its `#!` line (or /bin/sh); `command`, if given too, is its arguments.
    script: str | None = None
    #: A gang: all start together or none does.
    replicas: int = 1
    #: With it the gang is elastic: it starts with what fits between this and `replicas`, grows into GPUs that nobody
    #: waits for, and shrinks to this for others. Each change of size is a new start of its processes, uncharged.
    min_replicas: int | None = None
    #: Whole cards per replica.
    gpus: int | None = None
    #: A fraction of one card per replica.
    gpu: Share | None = None
    #: Memory of one card per replica.
    gpu_memory: Memory | None = None
    #: A MIG instance per replica.
    mig: MigProfile | None = None
    #: `hard`, `soft` (default for fractions) or `none`.
    isolation: Isolation | None = None
    #: Cards by model: `H100`, `A100|H100`, `A100:80GB`, `A100:80GB:4` (then also the number).
    gpu_model: GpuWish | None = None
    gpu_processes: int = 1
    #: Beside `mig`: its CUDA processes share the instance under MPS, at most `gpu_processes` of them.
    mps: bool = False
    #: Of a share: what it leans on, `compute`, `memory` or `light`; shares that lean on the same go to different cards.
    gpu_load: GpuLoad | None = None
    #: How fast models of card are for this job beside the fastest that it may get, as in `{"A100": 0.5}`; a model that
    #: is not named is as fast as the operator says. `estimate` is then the time on the fastest.
    throughput: dict[str, float] = {}
    cpus: Cpus | None = None
    memory: Memory | None = None
    node_labels: dict[str, str] = {}
    nodes: list[str] = []
    #: -2 … 2; larger goes first.
    priority: int = 0
    time_limit: Duration | None = None
    #: Between SIGTERM and SIGKILL.
    stop_grace: Duration | None = None
    #: Starts after a failure of the job's own.
    retries: int = 0
    env: dict[str, str] = {}
    #: Must exist on the node; without one the job starts in a directory of its own.
    cwd: str | None = None
    #: How it gives way to others: `never`; `requeue`: it is stopped and starts anew; `checkpoint`: SIGTERM tells it to
    #: save its state within `stop_grace`, and its next start goes on from there; `suspend`: its work goes into the
    #: host's memory and comes back, where its card and node can do that, else as `requeue`.
    preemption: Preemption = "requeue"
    #: What a new start costs it before it goes on where it was: dear jobs are preempted more rarely.
    restart_time: Duration | None = None
    #: `wait` for a node that fell silent, or `restart` elsewhere once the lease has run out; default: as the yard says.
    on_node_lost: OnNodeLost | None = None
    #: With `restart`: how long the job runs on a node that hears nothing of the yard (default: as the yard says).
    lease: Duration | None = None
    #: Wait even if no node of today could ever run it.
    allow_pending: bool = False
    #: Wait until released.
    hold: bool = False
    #: Not before this time (`2030-01-01T08:00:00Z`), or so long after acceptance (`+2h`).
    begin: Moment | None = None
    #: Start after other jobs: `afterok:17` (succeeded), `afternotok:17`, `afterany:17`; `singleton`: alone of its name.
    depends_on: list[str] = []
    #: The same job many times: `0-99`, `0-90:10`, `1,3,5`, and with `%8` at most 8 of them at once.
    array: str | None = None
    #: A queue of the operator's configuration; default: the tenant's.
    queue: str | None = None
    #: About how long it will run: small jobs go first, and one of unknown length counts by what it has had.
    estimate: Duration | None = None
    #: When it should have ended, with an `estimate` or `time_limit` beside it: it rises in line as that comes near.
    deadline: Moment | None = None
    #: A container image that the command runs in, on nodes that have an engine for it.
    image: str | None = None
    #: Whole cards in all; the yard chooses how many equal replicas they make, as large as its nodes hold.
    total_gpus: int | None = None
    #: What starts the replicas' processes: `torchrun` (or its absolute path) starts one for each card of a replica.
    launcher: str | None = None
    #: Names of secrets that the node keeps for the tenant: the job finds each in a variable of that name.
    secrets: list[str] = []
    #: Where the replicas of a gang must be together: `node`, `rack` or `spine`, by the labels of those names.
    topology: Literal["node", "rack", "spine"] | None = None
    #: Of a share: only jobs of the tenant that name the same may be on its card; default: all that name none.
    share_domain: str | None = None
    #: A directory that was handed in, by its content (`sha256:…`): the job finds what is in it in its own directory.
    upload: str | None = None

    def specify(self) -> JobSpec:
        """The job this means, or `Malformed` with the path of the first thing wrong."""
        self._check()
        return JobSpec(
            name=self.name,
            argv=self._argv(),
            script=self.script or "",
            replicas=self.total_gpus or self.replicas,
            min_replicas=self._min_replicas(),
            need=self._need(),
            image=self.image or "",
            priority=self.priority,
            time_limit_ms=int(self.time_limit or 0),
            stop_grace_ms=DEFAULT_STOP_GRACE_MS if self.stop_grace is None else int(self.stop_grace),
            retries=self.retries,
            env=tuple(sorted(self.env.items())),
            cwd=self.cwd or "",
            allow_pending=self.allow_pending,
            preemption=self.preemption,
            restart_ms=int(self.restart_time or 0),
            hold=self.hold,
            begin_ms=self.begin.at_ms if self.begin else 0,
            begin_after_ms=self.begin.after_ms if self.begin else 0,
            depends_on=self._dependencies(),
            singleton="singleton" in self.depends_on,
            array=parse_array(self.array) if self.array is not None else None,
            queue=self.queue or "",
            estimate_ms=int(self.estimate or 0),
            deadline_ms=self.deadline.at_ms if self.deadline else 0,
            deadline_after_ms=self.deadline.after_ms if self.deadline else 0,
            on_node_lost=self.on_node_lost or ("restart" if self.lease else ""),
            lease_ms=int(self.lease or 0),
            total_gpus=self.total_gpus or 0,
            launcher=self.launcher or "",
            secrets=tuple(dict.fromkeys(self.secrets)),
            upload=self.upload or "",
        )

    def _min_replicas(self) -> int:
        """0: the job has one size, as it has when both ends are the same."""
        least = self.min_replicas
        if least is None or least == self.replicas:
            return 0
        if not 1 <= least < self.replicas:
            raise malformed("min_replicas", least, f"a number between 1 and 'replicas', which is {self.replicas}")
        return least

    def _dependencies(self) -> tuple[tuple[DependencyKind, JobId], ...]:
        found: dict[tuple[DependencyKind, JobId], None] = {}
        if len(self.depends_on) > DEPENDENCIES_MAX:
            raise malformed("depends_on", f"{len(self.depends_on)} entries", f"at most {DEPENDENCIES_MAX}")
        for place, text in enumerate(self.depends_on):
            match = _DEPENDENCY.fullmatch(text)
            if match is None:
                raise Malformed(f"$.depends_on[{place}]", repr(text)[:120], DEPENDENCY_EXPECTED)
            if text != "singleton":
                kind, number = text.split(":")
                found[_DEPENDENCY_KINDS[kind], int(number)] = None
            elif not self.name:
                raise Malformed(
                    f"$.depends_on[{place}]", "'singleton'", "a 'name' beside it: jobs of one name go in turn"
                )
        return tuple(found)

    def _need(self) -> ResourceNeed:
        # How the cards are parted is said at acceptance, when it is known what nodes there are.
        asked_for = ResourceRequest(**{field: getattr(self, field) for field in ResourceRequest.__struct_fields__})
        need = resource_need(msgspec.structs.replace(asked_for, gpus=1) if self.total_gpus else asked_for)
        if self.share_domain is not None:
            if not need.is_share or need.isolation == "hard":
                raise malformed("share_domain", self.share_domain, "a share that may have neighbours beside it")
            if not is_name(self.share_domain):
                raise malformed("share_domain", self.share_domain, NAME_EXPECTED)
            need = msgspec.structs.replace(need, share_domain=self.share_domain)
        if self.topology is not None and (self.replicas > 1 or self.total_gpus):
            need = msgspec.structs.replace(need, within=self.topology)
        asked: dict[Ability, bool] = {
            "secrets": bool(self.secrets),
            "torchrun": self.launcher is not None,
            "upload": self.upload is not None,
        }
        if any(asked.values()):
            need = msgspec.structs.replace(need, abilities=tuple(each for each in ABILITIES if asked[each]))
        if self.image is None:
            return need
        if not IMAGE.fullmatch(self.image):
            raise malformed("image", self.image, IMAGE_EXPECTED)
        if need.mps or (need.is_share and need.isolation == "soft"):
            raise malformed(
                "image",
                self.image,
                "no 'mps', and 'isolation' hard or none beside a share: MPS cannot be used from a container",
            )
        return msgspec.structs.replace(need, containers=True)

    def _check(self) -> None:
        if self.submission_id is not None and not is_submission_id(self.submission_id):
            raise malformed("submission_id", self.submission_id, SUBMISSION_EXPECTED)
        if len(self.name) > 128 or not (self.name == "" or self.name.isprintable()):
            raise malformed("name", self.name, "at most 128 printable characters")
        if self.script and isinstance(self.command, str):
            raise malformed("command", self.command, "a list: beside 'script' it holds the script's arguments")
        if not self.command and not self.script:
            raise malformed("command", self.command, "a program with its arguments, a line for /bin/sh, or a script")
        for name, low, high in (
            ("replicas", 1, REPLICAS_MAX),
            ("priority", PRIORITY_MIN, PRIORITY_MAX),
            ("retries", 0, RETRIES_MAX),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise malformed(name, value, f"a number between {low} and {high}")
        if self.lease is not None and self.on_node_lost == "wait":
            raise malformed("lease", str(self.lease), "no value beside 'on_node_lost: wait'")
        if self.lease is not None and not LEASE_MIN_MS <= self.lease <= LEASE_MAX_MS:
            raise malformed("lease", str(self.lease), "between 10s and 7d")
        if self.time_limit is not None and self.time_limit <= 0:
            raise malformed("time_limit", str(self.time_limit), "more than 0")
        if self.estimate is not None and self.estimate <= 0:
            raise malformed("estimate", str(self.estimate), "more than 0")
        if self.deadline is not None and self.estimate is None and self.time_limit is None:
            raise malformed("deadline", self.deadline, "'estimate' or 'time_limit' beside it: how long will it run?")
        if self.queue is not None and not is_name(self.queue):
            raise malformed("queue", self.queue, NAME_EXPECTED)
        if self.restart_time is not None and self.restart_time < 0:
            raise malformed("restart_time", str(self.restart_time), "0 or more")
        self._check_gang()
        check_process(self._argv(), self.env, self.cwd)
        if "\0" in (self.script or ""):
            raise malformed("script", self.script, "text without NUL")

    def _check_gang(self) -> None:
        if self.total_gpus is not None:
            if not 1 <= self.total_gpus <= TOTAL_GPUS_MAX:
                raise malformed("total_gpus", self.total_gpus, f"a number between 1 and {TOTAL_GPUS_MAX}")
            others = ("gpus", "gpu", "gpu_memory", "mig", "min_replicas")
            beside = next((name for name in others if getattr(self, name) is not None), "")
            if beside or self.replicas != 1:
                raise malformed("total_gpus", self.total_gpus, f"no value beside {beside or 'replicas'!r}")
        if self.topology is not None and self.replicas == 1 and self.total_gpus is None:
            raise malformed(
                "topology", self.topology, "'replicas' above 1 or 'total_gpus' beside it: one is on one node"
            )
        if self.launcher is not None and not _LAUNCHER.fullmatch(self.launcher):
            raise malformed("launcher", self.launcher, "'torchrun', or its absolute path")
        if self.upload is not None and not is_upload(self.upload):
            raise malformed("upload", self.upload, UPLOAD_EXPECTED)
        for place, name in enumerate(self.secrets):
            if not _ENV_NAME.fullmatch(name) or _RESERVED_ENV.match(name) or name in self.env:
                raise Malformed(
                    f"$.secrets[{place}]",
                    repr(name)[:120],
                    "a variable that neither 'env' nor the yard sets",
                )

    def _argv(self) -> tuple[str, ...]:
        if isinstance(self.command, str):
            return ("/bin/sh", "-c", self.command)
        return tuple(self.command or ())


def check_process(argv: tuple[str, ...], env: dict[str, str], cwd: str | None) -> None:
    """What every process asked for must keep to, a job's as a service's; `Malformed` otherwise."""
    if any("\0" in part for part in argv):
        raise malformed("command", argv, "text without NUL")
    if cwd is not None and (not cwd.startswith("/") or "\0" in cwd):
        raise malformed("cwd", cwd, "an absolute path")
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name) or "\0" in value:
            raise Malformed(f"$.env.{name}", repr(value), "a variable name of letters, digits and _, without NUL")
        if _RESERVED_ENV.match(name):
            raise Malformed(f"$.env.{name}", repr(value), "a variable that the yard does not set itself")


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Many jobs in one message: the payload of `sub.<tenant>.<user>.submit-many`. Each is decided alone."""

    jobs: list[JobRequest]
    v: RequestVersion = 1
    submission_id: str | None = None


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job in integers, complete: what the core schedules and the journal keeps."""

    argv: tuple[str, ...] = ()
    script: str = ""
    name: str = ""
    replicas: int = 1
    need: ResourceNeed = ResourceNeed()
    priority: int = 0
    #: 0: none.
    time_limit_ms: int = 0
    stop_grace_ms: int = DEFAULT_STOP_GRACE_MS
    retries: int = 0
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    allow_pending: bool = False
    preemption: Preemption = "requeue"
    hold: bool = False
    #: Not before then, Unix milliseconds, or so long after acceptance; 0: at once.
    begin_ms: int = 0
    begin_after_ms: int = 0
    depends_on: tuple[tuple[DependencyKind, JobId], ...] = ()
    #: No earlier job of the same name and owner may be unfinished.
    singleton: bool = False
    #: Each element of an array has the whole array's spec.
    array: ArraySpec | None = None
    #: "": as the yard says, until the job is accepted; with `restart`, `lease_ms` 0 means the same.
    on_node_lost: Literal["", "wait", "restart"] = ""
    lease_ms: int = 0
    #: What a new start costs it; 0: as the yard's settings say for its kind of preemption.
    restart_ms: int = 0
    #: "": the tenant's.
    queue: str = ""
    #: Run time as its owner expects it; 0: unknown.
    estimate_ms: int = 0
    #: When it should have ended, Unix milliseconds, or so long after acceptance; 0: whenever.
    deadline_ms: int = 0
    deadline_after_ms: int = 0
    #: A container image that its command runs in; "": the host.
    image: str = ""
    #: Its queue's rule about cards that compute nothing, as it was when the job was accepted; None: each node's own.
    idle: IdleGpu | None = None
    #: Elastic: it starts with so many replicas at least, and `replicas` at most. 0: it has one size.
    min_replicas: int = 0
    #: Asked for in all; `replicas` and `need` say how they are parted, from its acceptance on. 0: they were asked for.
    total_gpus: int = 0
    #: Starts the processes of a replica; "": its command is the one process.
    launcher: str = ""
    #: Names of secrets that its node is to find.
    secrets: tuple[str, ...] = ()
    #: What it brings along; "": nothing.
    upload: str = ""

    @property
    def least_replicas(self) -> int:
        """What it waits for a place for, and what is never taken from it for others' sake."""
        return self.min_replicas or self.replicas


class Why(msgspec.Struct, frozen=True, omit_defaults=True):
    """A reason, for programs (`code`) and for people (`text`)."""

    code: str
    text: str


class SubmissionAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """On `evt.<tenant>.sub.<submission_id>`: what became of a request (submit, cancel, apply, delete)."""

    submission_id: SubmissionId
    accepted: bool
    v: int = 1
    job: JobId = 0
    #: Of an array: its jobs are `job`, `job` + 1, …, so many; 0: it is none.
    elements: int = 0
    service: ServiceName = ""
    #: Set when rejected: `code` is one of `Malformed`, `Impossible`, `UnknownJob`, `NotYours`, ….
    reason: Why | None = None
    #: What exactly was wrong, when the request was malformed.
    path: str = ""
    found: str = ""
    expected: str = ""
    nearest: str = ""
    at_ms: int = 0
    #: Of a request that may be let in later: how long to wait before it is sent again. 0: nothing is known.
    retry_after_ms: int = 0
    #: What there is to say though it was let in: that its deadline cannot be promised.
    note: str = ""


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """On `evt.<tenant>.<job>`: a job entered a state."""

    job: JobId
    state: JobState
    at_ms: int
    v: int = 1
    submission_id: SubmissionId = ""
    attempt: int = 0
    #: Node of each replica, while it has one.
    nodes: tuple[str, ...] = ()
    reason: Why | None = None
    #: Of the replica that decided the outcome.
    exit_code: int | None = None


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where one replica of a job is, for lists."""

    replica: int
    state: str
    node: str = ""
    partition: str = ""
    devices: tuple[str, ...] = ()
    exit_code: int | None = None


class JobView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job as `jobs` and `job show` print it. Times are Unix milliseconds, 0 = not yet."""

    job: JobId
    tenant: Tenant
    user: User
    name: str
    state: JobState
    submission_id: SubmissionId
    priority: int
    replicas: int
    #: What one replica asked for, in words.
    wants: str
    submitted_ms: int
    attempt: int = 0
    retries_left: int = 0
    #: Of the first start.
    first_started_ms: int = 0
    #: Of the current or last attempt.
    started_ms: int = 0
    ended_ms: int = 0
    exit_code: int | None = None
    reason: Why | None = None
    service: ServiceName = ""
    placed: tuple[ReplicaView, ...] = ()
    #: The array it is an element of, by its first job's number, and which; 0: none.
    array: JobId = 0
    array_index: int = 0
    #: Of an elastic job: the replicas that it has now, and the fewest it may have. `replicas` is the most.
    size: int = 0
    min_replicas: int = 0
    #: In a list: this row stands for so many waiting elements of the array; 0: for the job alone.
    elements: int = 0
    #: The elements of an array but the first are put away without their script.
    spec: JobSpec | None = None
