"""What the agent tells Prometheus: names, units and buckets in one place."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuyard_agent.core.model import TRANSITIONS, Assignment
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import DeviceSample

_LATENCY_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
#: Starts whose order was seen and whose process was not; more are not timed.
_TIMED_MAX = 10_000


class _Assignments(Collector):
    """Counted when somebody asks."""

    def __init__(self, live: Callable[[], Mapping[AssignmentKey, Assignment]]) -> None:
        self._live = live

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "gpuyard_agent_assignments", "Assignments that have not ended, by state", labels=["state"]
        )
        tally = Tally(assignment.state for assignment in self._live().values())
        for state in TRANSITIONS:
            family.add_metric([state], tally[state])
        yield family


class Metrics:
    """One agent's, in a registry of its own."""

    def __init__(self, live: Callable[[], Mapping[AssignmentKey, Assignment]], depth: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Assignments(live))
        self.orders = Counter("gpuyard_agent_orders", "Messages with orders, by answer", ["answer"], registry=registry)
        self.starts = Counter("gpuyard_agent_starts", "Processes started", registry=registry)
        self.ends = Counter("gpuyard_agent_ended", "Assignments ended, by outcome", ["outcome"], registry=registry)
        self.start_latency = Histogram(
            "gpuyard_agent_start_latency_seconds",
            "From the order (for a gang's member: the word to go) to the running process",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.commit_latency = Histogram(
            "gpuyard_agent_ledger_commit_seconds",
            "One commit of the ledger, fsync included",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.heartbeats = Counter("gpuyard_agent_heartbeats", "Heartbeats sent", registry=registry)
        depth_gauge = Gauge("gpuyard_agent_outbox_depth", "Reports not yet delivered", registry=registry)
        depth_gauge.set_function(depth)
        self.connected = Gauge("gpuyard_agent_bus_connected", "1 while connected to NATS", registry=registry)
        self.idle_assignments = Gauge(
            "gpuyard_agent_idle_assignments", "Assignments whose cards compute nothing", registry=registry
        )
        self._utilization = Gauge(
            "gpuyard_agent_gpu_utilization_ratio", "Share of time the card computed", ["device"], registry=registry
        )
        self._memory_used = Gauge(
            "gpuyard_agent_gpu_memory_used_bytes", "Memory in use on the card", ["device"], registry=registry
        )
        self._memory_total = Gauge(
            "gpuyard_agent_gpu_memory_bytes", "Memory of the card", ["device"], registry=registry
        )
        #: When the order to start came, for those whose process has not been seen yet.
        self._ordered_s: dict[AssignmentKey, float] = {}

    def ordered(self, key: AssignmentKey) -> None:
        if len(self._ordered_s) < _TIMED_MAX:
            self._ordered_s[key] = time.monotonic()

    def started(self, key: AssignmentKey) -> None:
        self.starts.inc()
        if (ordered_s := self._ordered_s.pop(key, None)) is not None:
            self.start_latency.observe(time.monotonic() - ordered_s)

    def ended(self, key: AssignmentKey, outcome: str) -> None:
        self._ordered_s.pop(key, None)
        self.ends.labels(outcome).inc()

    def sampled(self, samples: Iterable[DeviceSample]) -> None:
        for sample in samples:
            if sample.utilization_pct is not None:
                self._utilization.labels(sample.uuid).set(sample.utilization_pct / 100)
            if sample.memory_used_mib is not None:
                self._memory_used.labels(sample.uuid).set(sample.memory_used_mib * 2**20)
            self._memory_total.labels(sample.uuid).set(sample.memory_total_mib * 2**20)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)
