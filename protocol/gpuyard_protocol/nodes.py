"""What passes between the daemon and the agent of a node.

Orders go down as request-reply on `cmd.<node>` with a dense number per node; the agent takes them strictly in order,
and its answer means "the intent is durable in my ledger". Outcomes come back as reports through the REP stream, dense
too, so that both sides recognise what is repeated, stale or missing. Heartbeats and telemetry are lossy and decide
nothing.

Unknown fields are skipped here: a daemon works with agents one version older and newer.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.names import AssignmentKey, JobId, NodeId, ServiceName, Tenant, User
from gpuyard_protocol.resources import Device, Partition

# --- what a node is --------------------------------------------------------------------------------------------------


class NetworkInterface(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A network interface of a node that is up."""

    name: str
    addresses: tuple[str, ...] = ()
    #: 0: it does not say.
    speed_mbps: int = 0


class RdmaPort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port of an RDMA device, such as `mlx5_0:1`."""

    device: str
    port: int
    active: bool = False
    rate_gbps: int = 0
    #: `InfiniBand`, or `Ethernet` for RoCE.
    link_layer: str = ""
    #: The network interface of the same device, "" for none.
    interface: str = ""


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has. Reported when the agent starts and whenever it changes."""

    #: The hostname: a label for people, not the identity.
    hostname: str
    #: Where the other members of a gang reach this node.
    address: str
    cpu_milli: int
    memory_mib: int
    devices: tuple[Device, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    #: Who may run here, as "tenant/user" patterns with "*": those for whom the node has a Unix account.
    accounts: tuple[str, ...] = ("*/*",)
    #: Modelled devices, not real ones.
    simulated: bool = False
    driver: str = ""
    agent_version: str = ""
    interfaces: tuple[NetworkInterface, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    #: A timer outside the agent ends replicas whose lease has run out (`Launch.lease_ms`).
    keeps_leases: bool = False
    #: Host memory that suspended jobs may take here in all; 0: nothing can be suspended, and why not.
    suspend_mib: int = 0
    suspend_problem: str = ""
    #: What runs container images: `podman` or `docker`; "": nothing does, and why not.
    container_engine: str = ""
    container_problem: str = ""
    #: What starts processes: `systemd` or `supervisor`; and which limits it was found to keep, out of `cpu`, `memory`,
    #: `tasks`, `devices`, `accounts`. What is not named here is counted and not enforced.
    launcher: str = ""
    enforces: tuple[str, ...] = ()
    #: What jobs may ask of its agent, out of `resources.ABILITIES` and what newer versions add.
    abilities: tuple[str, ...] = ()


# --- orders: daemon → agent ------------------------------------------------------------------------------------------


class IdleGpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How long a replica may hold cards that compute nothing before each step; 0: never."""

    warn_ms: int = 0
    suspend_ms: int = 0
    release_ms: int = 0


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a node needs to start one replica."""

    tenant: Tenant
    user: User
    argv: tuple[str, ...] = ()
    script: str = ""
    name: str = ""
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    #: Size of the gang.
    replicas: int = 1
    cpu_milli: int = 1000
    memory_mib: int = 1024
    #: What the node is to enforce; 0: nothing was asked for.
    cpu_limit_milli: int = 0
    memory_limit_mib: int = 0
    time_limit_ms: int = 0
    stop_grace_ms: int = 30_000
    service: ServiceName = ""
    #: An element of an array: the array by its first job's number, which of it, and how many there are. 0: none.
    array_job: JobId = 0
    array_index: int = 0
    array_count: int = 0
    #: Its work may be taken off the card into the host's memory.
    suspendable: bool = False
    #: After so long without a `Renew` the replica must not run here any more, whatever becomes of the agent; 0: never.
    lease_ms: int = 0
    #: A container image to run the command in; "": the command runs on the host.
    image: str = ""
    #: None: as the node's own settings say.
    idle: IdleGpu | None = None
    #: Of an elastic job: the fewest and most replicas that it may have; `replicas` is what it has now. 0: one size.
    replicas_min: int = 0
    replicas_max: int = 0
    #: Starts a process for each card of the replica; "": the command is the one process.
    launcher: str = ""
    #: Narrows, inside the tenant, with whom it shares cards; "": with whoever names none.
    share_domain: str = ""
    #: What it brings along, unpacked into its own directory; the daemon brings it (`TakeUpload`). "": nothing.
    upload: str = ""
    #: Names of secrets of the tenant that the node puts into variables of these names.
    secrets: tuple[str, ...] = ()


class Start(msgspec.Struct, frozen=True, tag="start", kw_only=True, omit_defaults=True):
    """Make the partition and run the replica. With `hold`: prepare everything, report `Prepared`, and wait for `Go`."""

    key: AssignmentKey
    partition: Partition
    launch: Launch
    hold: bool = False


class Go(msgspec.Struct, frozen=True, tag="go", kw_only=True):
    """Every member of the gang is prepared: start."""

    key: AssignmentKey
    #: Rendezvous of the gang: replica 0's address and the port it holds.
    master_address: str
    master_port: int
    #: Address of each replica, by rank.
    peers: tuple[str, ...] = ()


class Stop(msgspec.Struct, frozen=True, tag="stop", kw_only=True, omit_defaults=True):
    """End it: SIGTERM, grace, SIGKILL of the whole group. For an unknown key: a tombstone, it will never start."""

    key: AssignmentKey
    grace_ms: int = 30_000
    #: Why, in one word: `cancelled`, `preempted`, `peer-failed`, `prepare-timeout`, `scaled-down`, `shutdown`.
    reason: str = "cancelled"


class Suspend(msgspec.Struct, frozen=True, tag="suspend", kw_only=True):
    """Take the replica's work off its card into the host's memory, and halt it. Answered by `Suspended` or
    `SuspendFailed`."""

    key: AssignmentKey
    #: 1, 2, 3 … of one key, `Suspend` and `Resume` alike: each is taken once, and the newest holds.
    step: int


class Resume(msgspec.Struct, frozen=True, tag="resume", kw_only=True):
    """Put the replica's work back on the card that it came from. Answered by `Resumed` or `ResumeFailed`."""

    key: AssignmentKey
    #: As in `Suspend`.
    step: int


Order: TypeAlias = Start | Go | Stop | Suspend | Resume


class OrderBatch(msgspec.Struct, frozen=True, tag="orders", kw_only=True):
    """Orders numbered `first`, `first + 1`, … for one node."""

    node: NodeId
    #: Of the agent's process: orders meant for an earlier one are refused.
    instance: str
    #: Sequence of the leader's claim; an older leader's orders are refused.
    epoch: int
    first: int
    orders: tuple[Order, ...]
    v: int = 1
    #: As in `Renew`; 0: renews nothing.
    clock_ms: int = 0


class Desired(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One assignment that should exist on a node, in a `Sync`."""

    start: Start
    #: Set once the gang may run.
    go: Go | None = None
    #: Set once it must end.
    stop: Stop | None = None
    #: The newest of the orders to suspend or resume it.
    standing: Suspend | Resume | None = None


class Sync(msgspec.Struct, frozen=True, tag="sync", kw_only=True):
    """The node's whole desired set as of order `n`: supersedes every order up to it. What is not in it must not run."""

    node: NodeId
    instance: str
    epoch: int
    n: int
    desired: tuple[Desired, ...]
    v: int = 1
    #: As in `Renew`; 0: renews nothing.
    clock_ms: int = 0
    #: Dense over all that one leader sends: of two at the same `n` the later holds, and what is repeated is told from
    #: what is new. 0: from a daemon that does not count them.
    serial: int = 0


class SyncPart(msgspec.Struct, frozen=True, tag="sync-part", kw_only=True):
    """A piece of a `Sync` that is too large for one message: `part` 1, 2, … of `parts`, all with the same `n`.

    Sent in order, each after the answer to the one before. Nothing of it is done until the last has come: the pieces
    together are the `Sync`. The answer to any but the last is `ok` with what was applied before.
    """

    node: NodeId
    instance: str
    epoch: int
    n: int
    part: int
    parts: int
    desired: tuple[Desired, ...]
    v: int = 1
    clock_ms: int = 0
    serial: int = 0


class Renew(msgspec.Struct, frozen=True, tag="renew", kw_only=True):
    """Replicas under a lease may run on until `clock_ms` + their `lease_ms`, on the clock of the node.

    `clock_ms` is what a heartbeat of this agent process said, sent back: however long this message was under way, the
    lease counts from a moment before the daemon granted it. Not an order: it has no number.
    """

    node: NodeId
    instance: str
    epoch: int
    clock_ms: int
    v: int = 1


class ReadLog(msgspec.Struct, frozen=True, tag="read-log", kw_only=True, omit_defaults=True):
    """A range of a replica's output; answered by `LogChunk`. Not an order: it has no number and changes nothing."""

    job: JobId
    #: 0: the newest that this node has.
    attempt: int = 0
    replica: int = 0
    stream: Literal["out", "err"] = "out"
    #: Negative: that many bytes before the end.
    offset: int = 0
    limit: int = 262_144


class FollowLog(msgspec.Struct, frozen=True, tag="follow-log", kw_only=True, omit_defaults=True):
    """Send what the replica writes, live, on `log.<tenant>.<job>.<replica>`, for `for_ms` from now."""

    tenant: Tenant
    job: JobId
    replica: int = 0
    for_ms: int = 30_000


class TakeUpload(msgspec.Struct, frozen=True, tag="take-upload", kw_only=True, omit_defaults=True):
    """A piece of what jobs bring along; answered by `UploadHeld`. Not an order. `size` 0: the head does not have it."""

    tenant: Tenant
    upload: str
    #: Of the whole.
    size: int
    offset: int = 0
    data: bytes = b""


Command: TypeAlias = OrderBatch | Sync | SyncPart | Renew | ReadLog | FollowLog | TakeUpload


class OrderAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The agent's word on orders. `ok`: durable up to `applied`. Otherwise nothing of the message was taken.

    `gap`: a number is missing, send a `Sync`. `stale`: an older leader's. `wrong-instance`: for an earlier process.
    """

    status: Literal["ok", "gap", "stale", "wrong-instance", "malformed"]
    applied: int = 0
    detail: str = ""
    v: int = 1


class LogChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of output: an answer to `ReadLog`, and what `log.<tenant>.<job>.<replica>` carries."""

    job: JobId
    attempt: int
    replica: int
    stream: Literal["out", "err"] = "out"
    #: Of the first byte of `data`.
    offset: int = 0
    data: bytes = b""
    #: Size of the file now.
    size: int = 0
    #: The replica has ended and nothing follows.
    ended: bool = False
    #: Why there is nothing, in words.
    error: str = ""


# --- reports: agent → daemon -----------------------------------------------------------------------------------------


class Joined(msgspec.Struct, frozen=True, tag="joined", kw_only=True):
    """An agent process started (or its inventory changed): what the node has, and what it holds."""

    inventory: Inventory
    #: Assignments in the ledger that have not ended.
    held: tuple[AssignmentKey, ...] = ()


class Prepared(msgspec.Struct, frozen=True, tag="prepared", kw_only=True):
    """Partition and files are there and a port is held; waits for `Go`."""

    key: AssignmentKey
    port: int


class Started(msgspec.Struct, frozen=True, tag="started", kw_only=True, omit_defaults=True):
    """The replica's process runs."""

    key: AssignmentKey
    at_ms: int
    pid: int = 0
    #: Where a service's replica listens, 0 for none.
    port: int = 0


#: Codes of refusals for which the node is to blame: the job may well run elsewhere, and pays nothing. All others are
#: the job's own: its command, its directory, what it may not execute.
NODE_FAULTS: frozenset[str] = frozenset(
    {
        "PartitionUnavailable",
        "PartitionLost",
        "NoFreePort",
        "OutputUnavailable",
        "AccountMissing",
        "LauncherFailed",
        "LeaseExpired",
        "ContainerEngineMissing",
    }
)


class Ended(msgspec.Struct, frozen=True, tag="ended", kw_only=True, omit_defaults=True):
    """The replica is gone from this node and its partition is free again.

    `exited`: by itself, with `exit_code`. `signalled`: killed by `signal` from outside the yard, or by itself.
    `stopped`: by a `Stop` (or never started because of one). `refused`: could not be started, `why.code` says why.
    `lost`: its processes vanished with a node restart, or nobody saw how they ended.
    """

    key: AssignmentKey
    outcome: Literal["exited", "signalled", "stopped", "refused", "lost"]
    at_ms: int
    exit_code: int = 0
    signal: int = 0
    #: `WorkingDirectoryMissing`, `CommandNotFound`, `PartitionUnavailable`, `TimeLimit`, `NodeRestarted`, …
    code: str = ""
    detail: str = ""
    started_ms: int = 0
    #: Of a refusal: the node is to blame and not the job (`NODE_FAULTS`, and what later agents may add).
    node_fault: bool = False


class Suspended(msgspec.Struct, frozen=True, tag="suspended", kw_only=True, omit_defaults=True):
    """The replica lies in the host's memory, halted, and its card is free of it."""

    key: AssignmentKey
    #: The newest step that this answers.
    step: int
    at_ms: int
    #: Host memory that its work takes meanwhile.
    image_mib: int = 0
    took_ms: int = 0


class Resumed(msgspec.Struct, frozen=True, tag="resumed", kw_only=True, omit_defaults=True):
    """The replica is back on its card and goes on."""

    key: AssignmentKey
    step: int
    at_ms: int
    took_ms: int = 0


class SuspendFailed(msgspec.Struct, frozen=True, tag="suspend-failed", kw_only=True, omit_defaults=True):
    """The replica runs on as before. `code`: `NotSuspendable`, `NoHostMemory`, `NotRunning`, `DriverRefused`,
    `Unsupported`. One that can neither be suspended nor go on is told by `Ended` (`SuspendBroken`)."""

    key: AssignmentKey
    step: int
    at_ms: int
    code: str = ""
    detail: str = ""


class ResumeFailed(msgspec.Struct, frozen=True, tag="resume-failed", kw_only=True, omit_defaults=True):
    """The replica is suspended as before. `code`: `PartitionUnavailable`, `DriverRefused`."""

    key: AssignmentKey
    step: int
    at_ms: int
    code: str = ""
    detail: str = ""


class Idle(msgspec.Struct, frozen=True, tag="idle", kw_only=True, omit_defaults=True):
    """The replica holds cards that compute nothing. `warn`: for people. `suspend`: it might be suspended now; the node
    does nothing about it unless ordered."""

    key: AssignmentKey
    at_ms: int
    idle_ms: int
    stage: Literal["warn", "suspend"] = "warn"
    #: So long idle, and the node ends it; 0: never.
    release_ms: int = 0


Report: TypeAlias = Joined | Prepared | Started | Ended | Suspended | Resumed | SuspendFailed | ResumeFailed | Idle


class ReportBatch(msgspec.Struct, frozen=True, kw_only=True):
    """On `rep.<node>.report`: reports numbered `first`, `first + 1`, … since the ledger was made."""

    node: NodeId
    instance: str
    boot_id: str
    first: int
    reports: tuple[Report, ...]
    #: Made at random with the ledger: under another one the numbers have begun again. "": an agent that does not say.
    ledger: str = ""
    v: int = 1


# --- lossy: heartbeats and telemetry ---------------------------------------------------------------------------------


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """On `hb.<node>`, each second."""

    node: NodeId
    instance: str
    boot_id: str
    #: Orders durable up to this number.
    applied: int
    #: Reports written up to this number (not necessarily delivered).
    reported: int
    running: int = 0
    #: The protocol versions this agent understands.
    v_min: int = 1
    v_max: int = 1
    v: int = 1
    #: The node's clock that counts from its boot and while it sleeps, as this was sent; `Renew` carries it back.
    clock_ms: int = 0


class InstanceSample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One MIG instance now. None: the card does not say (load of instances is given from Hopper on)."""

    mig_uuid: str
    profile: str = ""
    utilization_pct: int | None = None
    memory_used_mib: int | None = None
    memory_total_mib: int = 0


class DeviceSample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One card now. None: the card does not say."""

    uuid: str
    utilization_pct: int | None = None
    memory_used_mib: int | None = None
    memory_total_mib: int = 0
    power_mw: int | None = None
    temperature_c: int | None = None
    power_limit_mw: int | None = None
    #: Since the driver was loaded.
    energy_mj: int | None = None
    memory_temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    #: What keeps the clocks down: `power-cap`, `thermal`, `thermal-hardware`, `slowdown`, `power-brake`, `sync-boost`.
    slowed_by: tuple[str, ...] = ()
    #: Memory errors since the driver was loaded.
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    #: In MIG mode, by place on the card.
    instances: tuple[InstanceSample, ...] = ()


class JobSample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one replica does on its cards now, by the driver's list of processes."""

    key: AssignmentKey
    memory_mib: int = 0
    #: None: the driver does not tell it by process (MIG, MPS).
    utilization_pct: int | None = None
    processes: int = 0


class Telemetry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """On `tel.<node>.devices`."""

    node: NodeId
    at_ms: int
    devices: tuple[DeviceSample, ...]
    cpu_pct: int = 0
    memory_used_mib: int = 0
    v: int = 1
    #: Replicas that run on cards.
    jobs: tuple[JobSample, ...] = ()
