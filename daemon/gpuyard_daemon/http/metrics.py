"""`/metrics`: names, units and sources of every figure, in one place, in a registry of the daemon's own.

Everything is read at the moment of the scrape from where it is kept anyway; nothing is counted twice for Prometheus's
sake. A large yard has thousands of lines by card: they are written piece by piece, and turns go on in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuyard_daemon.health import Health
from gpuyard_daemon.http.sources import Sources
from gpuyard_daemon.measures import Histogram
from gpuyard_protocol.nodes import DeviceSample, Telemetry

#: Nodes whose cards are written at once: about a millisecond.
NODES_AT_ONCE = 100
#: After so long the others have the loop for a pass. Not after each family: under load a pass is a whole turn.
PIECE_S = 0.002
_CARDS: tuple[tuple[str, str, Callable[[DeviceSample], float | None]], ...] = (
    (
        "gpuyard_gpu_utilization_ratio",
        "Of each card, as its driver says",
        lambda card: None if card.utilization_pct is None else card.utilization_pct / 100,
    ),
    (
        "gpuyard_gpu_memory_used_bytes",
        "Of each card, as its driver says",
        lambda card: None if card.memory_used_mib is None else card.memory_used_mib * 2**20,
    ),
    ("gpuyard_gpu_memory_bytes", "Of each card, as its driver says", lambda card: card.memory_total_mib * 2**20),
)


class DaemonCollector(Collector):
    def __init__(self, sources: Sources) -> None:
        self._of = sources

    def collect(self) -> Iterable[Metric]:
        yield from self._yard()
        yield self._heard()
        yield from self._turns()
        yield from self._messages()
        yield from self._upkeep()

    # -- the yard ----------------------------------------------------------------------------------------------------

    def _yard(self) -> Iterator[Metric]:
        gauges, stats = self._of.gauges(), self._of.stats()
        yield _by_label("gpuyard_jobs", "Jobs now, by state", "state", gauges.jobs.items())
        queue = [("ready", gauges.waiting), ("waits_for_retry", gauges.asleep)]
        yield _by_label("gpuyard_queue", "Jobs that wait for a place, or for the time of their retry", "wait", queue)
        yield _by_label("gpuyard_nodes", "Nodes now, by state", "state", gauges.nodes.items())
        yield _gauge("gpuyard_services", "Services", gauges.services)
        yield _gauge("gpuyard_gpus", "Cards of all nodes", stats.gpus)
        yield _gauge("gpuyard_gpus_unhealthy", "Cards that take no work", gauges.unhealthy_cards)
        yield _gauge("gpuyard_gpu_capacity", "Compute there is, in cards", gauges.capacity_milli / 1000)
        held = ((mode, milli / 1000) for mode, milli in gauges.held_milli_by_mode.items())
        yield _by_label("gpuyard_gpu_held", "Compute promised to jobs, in cards, by mode", "mode", held)
        yield _by_label("gpuyard_mode_gpus", "Cards in each mode", "mode", gauges.cards_by_mode.items())
        yield _counter("gpuyard_gpu_held_seconds", "Compute held, in card-seconds", stats.held_milli_ms / 1e6)
        yield _counter("gpuyard_gpu_capacity_seconds", "Compute there was, card-seconds", stats.capacity_milli_ms / 1e6)
        yield _counter("gpuyard_jobs_finished", "Jobs that ended", gauges.finished)
        yield _counter("gpuyard_jobs_started", "Attempts started", gauges.started)
        yield _counter("gpuyard_jobs_requeued", "Attempts that ended with the job waiting again", gauges.requeued)
        yield _counter("gpuyard_jobs_preempted", "Attempts that gave way to another job", gauges.preempted)
        lost = gauges.preempted_milli_ms / 1e6
        yield _counter("gpuyard_preemption_lost_seconds", "What giving way cost, in card-seconds", lost)
        yield _gauge("gpuyard_claims", "Jobs in line for which places are kept", gauges.claims)
        yield _counter("gpuyard_requests_rejected", "Requests that were refused", gauges.rejected)
        yield _counter("gpuyard_job_wait_seconds", "Waits from submission to first start", stats.wait_sum_ms / 1000)

    def _heard(self) -> Metric:
        monitor = self._of.monitor
        heard = ((node, monitor.heard_ms_ago(node) / 1000) for node in sorted(monitor.telemetry))
        since = [(node, seconds) for node, seconds in heard if seconds >= 0]
        return _by_label("gpuyard_node_heard_seconds", "Since each node's last heartbeat", "node", since)

    # -- the daemon --------------------------------------------------------------------------------------------------

    def _turns(self) -> Iterator[Metric]:
        measures, health = self._of.measures, self._of.health
        for name, text, histogram in (
            (
                "gpuyard_decision_seconds",
                "One start, or one proof that nothing that waits fits: a turn's scheduling time shared out among them",
                measures.decision_s,
            ),
            (
                "gpuyard_decision_latency_seconds",
                "From the arrival of each request or report to its decision in the journal",
                measures.decided_after_s,
            ),
            ("gpuyard_turn_seconds", "Whole turns", measures.turn_s),
            ("gpuyard_turn_core_seconds", "The scheduler's part of a turn", measures.core_s),
            ("gpuyard_journal_append_seconds", "One append, until it is durable", measures.append_s),
            ("gpuyard_turn_inputs", "Inputs a turn took", measures.turn_inputs),
        ):
            yield _histogram(name, text, histogram)
        yield _counter("gpuyard_turns", "Turns of the scheduler", measures.turns)
        yield _counter("gpuyard_journal_bytes", "Written to the journal by this process", measures.journal_bytes)
        yield _gauge("gpuyard_inbox_waiting", "Messages that wait for a turn", len(self._of.inbox))
        yield _gauge("gpuyard_loop_delay_seconds", "Largest since the last scrape", health.take_loop_delay_s())
        yield _gauge("gpuyard_loop_heartbeat_age_seconds", "Since the loop ran last", time.monotonic() - health.beat_at)
        yield _gauge("gpuyard_connected", "1 with a connection to NATS", health.is_connected())
        yield _gauge("gpuyard_leader_epoch", "Journal sequence of this daemon's claim", self._of.journal.epoch)
        yield _gauge("gpuyard_standbys", "Daemons that stand by for this one", self._of.standbys())

    def _messages(self) -> Iterator[Metric]:
        of = self._of
        refused = [
            ("malformed_request", of.ingress.counts["malformed"]),
            ("poison_submission", of.ingress.counts["poison_submission"]),
            ("poison_report", of.ingress.counts["poison_report"]),
            ("poison_question", of.api.counts["poison"]),
            ("poison_lossy", of.monitor.poison),
            ("malformed_load", of.loads.malformed),
            ("unknown_service_load", of.loads.unknown),
        ]
        yield _by_label(
            "gpuyard_messages_refused", "Messages that were not what they should be", "kind", refused, counts=True
        )
        questions = [(verb, count) for verb, count in sorted(of.api.counts.items()) if verb != "poison"]
        yield _by_label("gpuyard_questions", "Questions answered, by verb", "verb", questions, counts=True)
        yield _counter("gpuyard_load_reports", "Load reports taken", of.loads.reports)
        yield _counter("gpuyard_events_published", "Events told to tenants", of.announcer.published)
        yield _counter("gpuyard_events_lost", "Events that could not be told", of.announcer.lost)
        yield _gauge("gpuyard_events_waiting", "Events not told yet", of.announcer.waiting)
        yield _counter("gpuyard_orders", "Orders sent to nodes", of.dispatcher.orders_sent)
        yield _counter("gpuyard_order_batches", "Messages they were sent in", of.dispatcher.batches_sent)
        yield _counter("gpuyard_syncs", "Whole desired sets sent", of.dispatcher.syncs_sent)
        yield _counter(
            "gpuyard_order_failures", "Messages to nodes that were refused or not answered", of.dispatcher.failures
        )
        yield _gauge(
            "gpuyard_nodes_unconfirmed", "Nodes that may not have their desired set", of.dispatcher.unconfirmed
        )
        yield _counter("gpuyard_lease_renewals", "Leases renewed, by node", of.leases.renewed)
        yield _counter("gpuyard_lease_renewals_unconfirmed", "… and not confirmed by it", of.leases.unconfirmed)
        yield _gauge("gpuyard_node_twins", "Nodes for which two agents speak", len(of.monitor.twins))

    def _upkeep(self) -> Iterator[Metric]:
        upkeep, levels = self._of.upkeep, self._of.levels
        parts = levels.used_part.items()
        yield _by_label("gpuyard_stream_used_ratio", "Of the bytes each stream may hold", "stream", parts)
        yield _by_label("gpuyard_stream_messages", "Messages in each stream", "stream", levels.messages.items())
        if levels.disk is not None:
            yield _gauge("gpuyard_store_disk_used_ratio", "Of the NATS server's disk", levels.disk.used_part)
            yield _gauge("gpuyard_store_disk_free_bytes", "On the NATS server's disk", levels.disk.free_bytes)
        yield _gauge("gpuyard_alarms", "What a person should do something about", len(levels.alarms))
        yield _gauge("gpuyard_submissions_closed", "1 while submissions are refused for want of room", levels.is_closed)
        reloader = self._of.reloader
        yield _counter("gpuyard_config_reload", "Times the configuration was read again", reloader.reloads)
        yield _counter("gpuyard_config_reload_failed", "Times it made no sense, and nothing changed", reloader.failed)
        yield _counter("gpuyard_snapshots", "Snapshots made", upkeep.snapshots_made)
        yield _counter("gpuyard_snapshots_failed", "Snapshots that could not be made", upkeep.snapshots_failed)
        yield _gauge("gpuyard_snapshot_fork_seconds", "How long the loop stood still for the last one", upkeep.fork_s)
        yield _gauge(
            "gpuyard_history_through", "Journal sequence up to which the history is written", self._of.history.through
        )


def standby_exposition(health: Health) -> bytes:
    """The text of a scrape of a daemon that does not lead."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StandbyCollector(health))
    return generate_latest(registry)


class _StandbyCollector(Collector):
    def __init__(self, health: Health) -> None:
        self._health = health

    def collect(self) -> Iterable[Metric]:
        yield _gauge("gpuyard_standby", "1 while another daemon leads and this one stands by", 1)
        yield _gauge("gpuyard_standby_behind", "Messages of the journal not applied yet", self._health.standby_behind)


def exposition(sources: Sources) -> Callable[[], Awaitable[bytes]]:
    """The text of a scrape."""

    async def read() -> bytes:
        found = []
        since = time.monotonic()
        for piece in _pieces(sources):
            found.append(piece)
            if time.monotonic() - since > PIECE_S:
                await asyncio.sleep(0)
                since = time.monotonic()
        return b"".join(found)

    return read


def _pieces(sources: Sources) -> Iterator[bytes]:
    for family in DaemonCollector(sources).collect():
        yield generate_latest(_Only(family))
    nodes = sorted(sources.monitor.telemetry.items())
    for name, text, value_of in _CARDS:
        yield f"# HELP {name} {text}\n# TYPE {name} gauge\n".encode()
        for first in range(0, len(nodes), NODES_AT_ONCE):
            yield _card_lines(name, value_of, nodes[first : first + NODES_AT_ONCE])


class _Only(Collector):
    """One family, to be written alone."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _card_lines(
    name: str, value_of: Callable[[DeviceSample], float | None], nodes: Iterable[tuple[str, Telemetry]]
) -> bytes:
    lines = [
        f'{name}{{node="{node}",gpu="{_escaped(card.uuid)}"}} {float(value)}\n'
        for node, telemetry in nodes
        for card in telemetry.devices
        if (value := value_of(card)) is not None
    ]
    return "".join(lines).encode()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))


def _by_label(name: str, text: str, label: str, values: Iterable[tuple[str, float]], *, counts: bool = False) -> Metric:
    family = (CounterMetricFamily if counts else GaugeMetricFamily)(name, text, labels=[label])
    for value, amount in values:
        family.add_metric([value], amount)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.cumulative(), sum_value=histogram.sum)
