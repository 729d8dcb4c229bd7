"""gpuyard for Python: submit jobs to a yard of GPUs, run services on it, and ask it why.

    async with gpuyard.connect() as yard:
        job = await yard.submit(command=["python", "train.py"], gpus=2, time_limit="2h")
        print((await job.wait()).state)

Names are loaded when they are first used: the CLI lives in this package, and its help must not wait for a message
library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuyard.client import Client, connect
    from gpuyard.context import Context, load_context
    from gpuyard.errors import (
        Forbidden,
        Full,
        GpuyardError,
        NoRoom,
        NoYard,
        OutcomeUnknown,
        QueryFailed,
        Rejected,
        Undecided,
        Unreachable,
    )
    from gpuyard.job import Job
    from gpuyard.operator import Operator
    from gpuyard.sync import SyncClient, SyncJob, connect_sync
    from gpuyard_protocol.jobs import JobRequest, JobView
    from gpuyard_protocol.services import ServiceRequest, ServiceView

_HOMES = {
    "Client": "gpuyard.client",
    "Context": "gpuyard.context",
    "Forbidden": "gpuyard.errors",
    "Full": "gpuyard.errors",
    "GpuyardError": "gpuyard.errors",
    "Job": "gpuyard.job",
    "JobRequest": "gpuyard_protocol.jobs",
    "JobView": "gpuyard_protocol.jobs",
    "NoRoom": "gpuyard.errors",
    "NoYard": "gpuyard.errors",
    "Operator": "gpuyard.operator",
    "OutcomeUnknown": "gpuyard.errors",
    "QueryFailed": "gpuyard.errors",
    "Rejected": "gpuyard.errors",
    "ServiceRequest": "gpuyard_protocol.services",
    "ServiceView": "gpuyard_protocol.services",
    "SyncClient": "gpuyard.sync",
    "SyncJob": "gpuyard.sync",
    "Undecided": "gpuyard.errors",
    "Unreachable": "gpuyard.errors",
    "connect": "gpuyard.client",
    "connect_sync": "gpuyard.sync",
    "load_context": "gpuyard.context",
}

__all__ = [
    "Client",
    "Context",
    "Forbidden",
    "Full",
    "GpuyardError",
    "Job",
    "JobRequest",
    "JobView",
    "NoRoom",
    "NoYard",
    "Operator",
    "OutcomeUnknown",
    "QueryFailed",
    "Rejected",
    "ServiceRequest",
    "ServiceView",
    "SyncClient",
    "SyncJob",
    "Undecided",
    "Unreachable",
    "connect",
    "connect_sync",
    "load_context",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
