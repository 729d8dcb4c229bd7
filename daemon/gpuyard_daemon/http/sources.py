"""Where the pages of this package get their figures: the parts of a running daemon, read and never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpuyard_daemon.announce import Announcer
from gpuyard_daemon.api import Api
from gpuyard_daemon.core.explaining.views import Gauges
from gpuyard_daemon.dispatch import Dispatcher
from gpuyard_daemon.health import Health
from gpuyard_daemon.history import History
from gpuyard_daemon.inbox import Inbox
from gpuyard_daemon.ingress import Ingress
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.leases import Leases
from gpuyard_daemon.levels import StreamLevels
from gpuyard_daemon.loads import Loads
from gpuyard_daemon.measures import Measures
from gpuyard_daemon.node_monitor import NodeMonitor
from gpuyard_daemon.reload import Reloader
from gpuyard_daemon.upkeep import Upkeep
from gpuyard_protocol.queries import NodeView, Stats


@dataclass(frozen=True, slots=True)
class Sources:
    stats: Callable[[], Stats]
    gauges: Callable[[], Gauges]
    #: Of every node, with what its cards do now.
    nodes: Callable[[], tuple[NodeView, ...]]
    measures: Measures
    health: Health
    inbox: Inbox
    journal: Journal
    ingress: Ingress
    dispatcher: Dispatcher
    announcer: Announcer
    monitor: NodeMonitor
    loads: Loads
    api: Api
    upkeep: Upkeep
    history: History
    levels: StreamLevels
    leases: Leases
    reloader: Reloader
    #: How many stand by for this daemon.
    standbys: Callable[[], int]
