"""What the agent tells Prometheus: names, units and buckets in one place."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuyard_agent.core.model import TRANSITIONS, Assignment
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import DeviceSample, InstanceSample, JobSample

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


#: Of a card: name, help, and the figure in the metric's unit; None: the card does not say.
_FIGURES: tuple[tuple[str, str, Callable[[DeviceSample], float | None]], ...] = (
    ("gpu_utilization_ratio", "Share of time the card computed", lambda s: _scaled(s.utilization_pct, 1 / 100)),
    ("gpu_memory_used_bytes", "Memory in use on the card", lambda s: _scaled(s.memory_used_mib, 2**20)),
    ("gpu_memory_bytes", "Memory of the card", lambda s: s.memory_total_mib * 2**20),
    ("gpu_power_watts", "Power drawn", lambda s: _scaled(s.power_mw, 1 / 1000)),
    ("gpu_power_limit_watts", "Power that the card may draw", lambda s: _scaled(s.power_limit_mw, 1 / 1000)),
    ("gpu_temperature_celsius", "Temperature of the chip", lambda s: s.temperature_c),
    ("gpu_memory_temperature_celsius", "Temperature of the memory", lambda s: s.memory_temperature_c),
    ("gpu_sm_clock_hertz", "Clock of the multiprocessors", lambda s: _scaled(s.sm_clock_mhz, 1_000_000)),
)
#: The same for what only grows, since the driver was loaded.
_TOTALS: tuple[tuple[str, str, Callable[[DeviceSample], float | None]], ...] = (
    ("gpu_energy_joules", "Energy used", lambda s: _scaled(s.energy_mj, 1 / 1000)),
    ("gpu_ecc_corrected", "Memory errors that were corrected", lambda s: s.ecc_corrected),
    ("gpu_ecc_uncorrected", "Memory errors that could not be corrected", lambda s: s.ecc_uncorrected),
)
_INSTANCE_FIGURES: tuple[tuple[str, str, Callable[[InstanceSample], float | None]], ...] = (
    ("mig_utilization_ratio", "Share of time the MIG instance computed", lambda s: _scaled(s.utilization_pct, 1 / 100)),
    ("mig_memory_used_bytes", "Memory in use in the MIG instance", lambda s: _scaled(s.memory_used_mib, 2**20)),
    ("mig_memory_bytes", "Memory of the MIG instance", lambda s: s.memory_total_mib * 2**20),
)
_SLOWED_BY = ("power-cap", "thermal", "thermal-hardware", "slowdown", "power-brake", "sync-boost")


class _Cards(Collector):
    """The newest measurement of every card and MIG instance."""

    def __init__(self, samples: Callable[[], tuple[DeviceSample, ...]]) -> None:
        self._samples = samples

    def collect(self) -> Iterable[Metric]:
        samples = self._samples()
        for name, text, figure in _FIGURES:
            yield _family(GaugeMetricFamily(f"gpuyard_agent_{name}", text, labels=["device"]), samples, figure)
        for name, text, figure in _TOTALS:
            yield _family(CounterMetricFamily(f"gpuyard_agent_{name}", text, labels=["device"]), samples, figure)
        slowed = GaugeMetricFamily(
            "gpuyard_agent_gpu_slowed", "1 while this keeps the card's clocks down", labels=["device", "reason"]
        )
        for sample in samples:
            for reason in _SLOWED_BY:
                slowed.add_metric([sample.uuid, reason], reason in sample.slowed_by)
        yield slowed
        for name, text, share in _INSTANCE_FIGURES:
            family = GaugeMetricFamily(f"gpuyard_agent_{name}", text, labels=["device", "instance", "profile"])
            for sample in samples:
                for one in sample.instances:
                    if (value := share(one)) is not None:
                        family.add_metric([sample.uuid, one.mig_uuid, one.profile], value)
            yield family


class _Jobs(Collector):
    """The newest look at what each replica does on its cards."""

    def __init__(self, uses: Callable[[], tuple[JobSample, ...]]) -> None:
        self._uses = uses

    def collect(self) -> Iterable[Metric]:
        labels = ["job", "replica"]
        memory = GaugeMetricFamily("gpuyard_agent_job_gpu_memory_bytes", "Memory held on cards", labels=labels)
        load = GaugeMetricFamily("gpuyard_agent_job_gpu_utilization_ratio", "Share of its cards it used", labels=labels)
        processes = GaugeMetricFamily("gpuyard_agent_job_gpu_processes", "Processes on cards", labels=labels)
        for use in self._uses():
            names = [str(use.key.job), str(use.key.replica)]
            memory.add_metric(names, use.memory_mib * 2**20)
            processes.add_metric(names, use.processes)
            if use.utilization_pct is not None:
                load.add_metric(names, use.utilization_pct / 100)
        yield from (memory, load, processes)


def _family(
    family: GaugeMetricFamily | CounterMetricFamily,
    samples: Iterable[DeviceSample],
    figure: Callable[[DeviceSample], float | None],
) -> Metric:
    for sample in samples:
        if (value := figure(sample)) is not None:
            family.add_metric([sample.uuid], value)
    return family


def _scaled(amount: int | None, factor: float) -> float | None:
    return None if amount is None else amount * factor


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
        #: The newest measurement; told when Prometheus asks, so that what is gone is not told any more.
        self.samples: tuple[DeviceSample, ...] = ()
        self.uses: tuple[JobSample, ...] = ()
        registry.register(_Cards(lambda: self.samples))
        registry.register(_Jobs(lambda: self.uses))
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

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)
