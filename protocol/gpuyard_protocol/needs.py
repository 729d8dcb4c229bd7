"""What is wished for of cards and hosts, as people write it, and the integers that it means.

One replica's: of a job or of a service. What contradicts itself is refused here, with the path of the field.
"""

from __future__ import annotations

import re

import msgspec

from gpuyard_protocol.codec import Malformed
from gpuyard_protocol.resources import GpuLoad, Isolation, ResourceNeed
from gpuyard_protocol.units import Cpus, GpuWish, Memory, MigProfile, Share

GPUS_PER_REPLICA_MAX = 64
#: What one card serves under MPS at once.
GPU_PROCESSES_MAX = 48
#: Models of card that one job has figures for.
THROUGHPUTS_MAX = 16
_LABEL = re.compile(r"[A-Za-z0-9._/-]{1,63}")


def malformed(field: str, found: object, expected: str) -> Malformed:
    return Malformed(f"$.{field}", repr(found)[:120], expected)


class ResourceRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields of a request that say what one replica needs; a job has the same beside its others."""

    gpus: int | None = None
    gpu: Share | None = None
    gpu_memory: Memory | None = None
    mig: MigProfile | None = None
    isolation: Isolation | None = None
    gpu_model: GpuWish | None = None
    gpu_processes: int = 1
    #: Beside `mig`: its CUDA processes share the instance under MPS, at most `gpu_processes` of them.
    mps: bool = False
    gpu_load: GpuLoad | None = None
    throughput: dict[str, float] = {}
    cpus: Cpus | None = None
    memory: Memory | None = None
    node_labels: dict[str, str] = {}
    nodes: list[str] = []


def _speeds(throughput: dict[str, float]) -> tuple[tuple[str, int], ...]:
    if len(throughput) > THROUGHPUTS_MAX:
        raise malformed("throughput", f"{len(throughput)} models", f"at most {THROUGHPUTS_MAX}")
    for model, factor in throughput.items():
        if not model.strip():
            raise malformed("throughput", model, "names of models")
        if not 0.001 <= factor <= 1:
            raise Malformed(f"$.throughput.{model}", repr(factor), "a number from 0.001 to 1, the fastest model's")
    return tuple([(model, round(factor * 1000)) for model, factor in sorted(throughput.items())])


def resource_need(request: ResourceRequest, *, default_isolation: Isolation = "soft") -> ResourceNeed:
    """The integers behind the resource fields of a request; `Malformed` where they contradict each other."""
    wish = request.gpu_model
    gpus = _whole_cards(request)
    if request.gpu_memory is not None and request.gpu_memory <= 0:
        raise malformed("gpu_memory", str(request.gpu_memory), "more than 0")
    if not 1 <= request.gpu_processes <= GPU_PROCESSES_MAX:
        raise malformed("gpu_processes", request.gpu_processes, f"a number between 1 and {GPU_PROCESSES_MAX}")
    asked = [name for name, value in (("gpus", gpus), ("gpu", request.gpu), ("mig", request.mig)) if value]
    if request.gpu_memory is not None and "gpu" not in asked:
        asked.append("gpu_memory")
    if len(asked) > 1:
        raise malformed(asked[1], getattr(request, asked[1]), f"no value beside {asked[0]!r}: they exclude each other")
    if wish and not asked:
        raise malformed("gpu_model", str(wish), "'gpus', 'gpu', 'gpu_memory' or 'mig' beside it")
    isolation = request.isolation or default_isolation
    if request.mig and isolation == "none":
        raise malformed("isolation", "none", "'soft' or 'hard': a MIG instance is never shared in time")
    if request.mps and not request.mig:
        raise malformed("mps", True, "'mig' beside it: a share of a card ('gpu', 'gpu_memory') is under MPS by itself")
    if request.mig and request.gpu_processes > 1 and not request.mps:
        raise malformed("gpu_processes", request.gpu_processes, "'mps: true' beside it, or 1: nothing else counts them")
    if request.gpu_load and not (request.gpu or request.gpu_memory):
        raise malformed("gpu_load", request.gpu_load, "'gpu' or 'gpu_memory' beside it: only shares have neighbours")
    for label, value in request.node_labels.items():
        if not _LABEL.fullmatch(label) or not (value == "" or _LABEL.fullmatch(value)):
            raise Malformed(f"$.node_labels.{label}", repr(value), "letters, digits, '.', '_', '/', '-', at most 63")
    return ResourceNeed(
        gpus=gpus,
        share_milli=int(request.gpu or 0),
        share_memory_mib=int(request.gpu_memory or 0),
        mig=str(request.mig or ""),
        isolation=isolation,
        gpu_processes=request.gpu_processes,
        gpu_load=request.gpu_load or "",
        speeds=_speeds(request.throughput),
        mps=request.mps,
        models=wish.models if wish else (),
        card_memory_mib=wish.memory_mib if wish else 0,
        cpu_milli=1000 if request.cpus is None else int(request.cpus),
        memory_mib=1024 if request.memory is None else int(request.memory),
        cpu_asked=request.cpus is not None,
        memory_asked=request.memory is not None,
        node_labels=tuple(sorted(request.node_labels.items())),
        nodes=tuple(sorted(request.nodes)),
    )


def _whole_cards(request: ResourceRequest) -> int:
    counted = request.gpu_model.cards if request.gpu_model else None
    if counted is not None and (request.gpu or request.gpu_memory or request.mig):
        raise malformed("gpu_model", str(request.gpu_model), "no number of cards beside a share or MIG instance")
    if request.gpus is not None and counted is not None and request.gpus != counted:
        raise malformed("gpus", request.gpus, f"{counted}, as 'gpu_model' says")
    gpus = request.gpus if request.gpus is not None else counted or 0
    if not 0 <= gpus <= GPUS_PER_REPLICA_MAX:
        raise malformed("gpus", gpus, f"a number between 0 and {GPUS_PER_REPLICA_MAX} (per replica)")
    return gpus
