"""Who is alive: heartbeats in, changes out.

Heartbeats never enter the core; what enters is that a node fell silent (`NodeSuspected`, then `NodeLost`), spoke
again (`NodeReturned`) or cannot be understood (`NodeIncompatible`). Silence only counts while this process could have
heard: after a start, a lost connection or a pause of its own, every node has a fresh grace period.

Two live agent processes of one node are told by their speaking in turn; then the node takes no work until one has been
silent for `TWIN_WINDOW_S`. One heartbeat of a dead process that arrives late is no twin, and does not fence for long.

The newest telemetry of each node is kept here for views and metrics, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import structlog

from gpuyard_daemon.core.state.inputs import Input, NodeIncompatible, NodeLost, NodeReturned, NodeSuspected
from gpuyard_protocol import PROTOCOL_VERSION
from gpuyard_protocol.bus.base import Bus, Message
from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.nodes import Heartbeat, Telemetry
from gpuyard_protocol.subjects import ALL_HEARTBEATS, ALL_TELEMETRY, parse_node_subject

log = structlog.get_logger("nodes")

#: How often silence is looked for.
TICK_S = 0.5
#: A tick that comes this late was held up with everything else: nobody's silence is to be believed.
LATE_TICK_S = 2.0
#: Two agent processes of one node that speak in turn within this time both live.
TWIN_WINDOW_S = 10.0
TWIN_TURNS = 3
LOSSY_BYTES_MAX = 256 * 1024
#: A change that the core has not shown for so long is told again.
REPEAT_S = 5.0
#: States of a node that a heartbeat of its joined process ends.
_SILENT_STATES = ("suspected", "lost", "joining")
#: States of a node that long silence ends.
_LIVING_STATES = ("ready", "suspected", "joining", "incompatible")


class NodeFacts(Protocol):
    """What this file reads of the core."""

    def known_nodes(self) -> tuple[NodeId, ...]: ...
    def node_state(self, node: NodeId) -> str: ...
    def node_instance(self, node: NodeId) -> str: ...
    def node_is_twinned(self, node: NodeId) -> bool: ...


class _Watch:
    """One node as the monitor sees it. Times are monotonic seconds."""

    __slots__ = (
        "clock_ms",
        "doubled_at",
        "heard_at",
        "instance",
        "instances",
        "seen_at",
        "told",
        "told_at",
        "turns",
    )

    def __init__(self, now: float) -> None:
        #: From when silence counts: the last heartbeat, or the start of a grace period.
        self.heard_at = now
        #: Of the last real heartbeat; 0.0: none since this process started.
        self.seen_at = 0.0
        #: The change that the core was told last, and when; it has not taken it in while its state does not show it.
        self.told: Input | None = None
        self.told_at = 0.0
        self.instance = ""
        #: What the newest heartbeat of `instance` said of its node's clock; 0: nothing.
        self.clock_ms = 0
        #: When each of the latest agent processes was last heard.
        self.instances: dict[str, float] = {}
        #: Times in a row that another live process took the word.
        self.turns = 0
        #: When the word last went from one live process to another, as far as this process can know.
        self.doubled_at = now


class NodeMonitor:
    def __init__(
        self,
        core: NodeFacts,
        add_fact: Callable[[Input], None],
        on_heartbeat: Callable[[NodeId, str, int], None],
        *,
        suspected_after_s: float,
        lost_after_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._add_fact = add_fact
        self._on_heartbeat = on_heartbeat
        self.set_patience(suspected_after_s, lost_after_s)
        self._monotonic = monotonic
        self._last_tick = monotonic()
        self._watches = {node: _Watch(self._last_tick) for node in core.known_nodes()}
        self._is_deaf = False
        self.telemetry: dict[NodeId, Telemetry] = {}
        #: Lossy messages that were unreadable or about another node than their subject's.
        self.poison = 0
        #: Nodes for which two agent processes live at once.
        self.twins: set[NodeId] = set()

    def set_patience(self, suspected_after_s: float, lost_after_s: float) -> None:
        """After how long a silence a node is suspected, and lost."""
        self._suspected_after_s = suspected_after_s
        self._lost_after_s = lost_after_s

    async def open(self, bus: Bus) -> None:
        bus.on_disconnect(self.deafen)
        bus.on_reconnect(self.grace)
        await bus.subscribe(ALL_HEARTBEATS, self.on_heartbeat_message)
        await bus.subscribe(ALL_TELEMETRY, self.on_telemetry_message)

    # -- what arrives ----------------------------------------------------------------------------------------------

    def on_heartbeat_message(self, message: Message) -> None:
        try:
            beat = decode(Heartbeat, message.data, max_bytes=LOSSY_BYTES_MAX)
        except Malformed:
            self.poison += 1
            return
        if beat.node != parse_node_subject(message.subject):
            self.poison += 1
            return
        self.heard(beat)

    def heard(self, beat: Heartbeat) -> None:
        now = self._monotonic()
        watch = self._watches.get(beat.node)
        if watch is None:
            # Not known to the core yet: its `Joined` is on the way. Until then there is nothing to tell.
            return
        if beat.instance != watch.instance:
            self._other_instance(beat, watch, now)
        watch.instances[beat.instance] = now
        watch.heard_at = watch.seen_at = now
        watch.clock_ms = max(watch.clock_ms, beat.clock_ms)
        if not _can_talk(beat):
            self._fence(watch, now, NodeIncompatible(node=beat.node, reason=_skew(beat)))
            return
        if self._is_twinned(beat, watch, now):
            return
        is_joined = beat.instance == self._core.node_instance(beat.node)
        if is_joined and self._core.node_state(beat.node) in _SILENT_STATES:
            self._tell(watch, now, NodeReturned(node=beat.node, instance=beat.instance))
        self._on_heartbeat(beat.node, beat.instance, beat.applied)

    def _other_instance(self, beat: Heartbeat, watch: _Watch, now: float) -> None:
        """Another agent process speaks for the node than before: a restart, unless the earlier one speaks again."""
        last_heard = watch.instances.get(beat.instance, float("-inf"))
        watch.turns = watch.turns + 1 if now - last_heard < TWIN_WINDOW_S else 0
        if watch.turns:
            watch.doubled_at = now
        watch.instance, watch.clock_ms = beat.instance, 0
        watch.instances = {name: at for name, at in watch.instances.items() if now - at < TWIN_WINDOW_S}
        if watch.turns >= TWIN_TURNS and beat.node not in self.twins:
            self.twins.add(beat.node)
            log.error("node.twins", node=beat.node, instances=sorted(watch.instances))

    def _is_twinned(self, beat: Heartbeat, watch: _Watch, now: float) -> bool:
        """Whether the node is fenced because two processes speak for it; it is released here."""
        if beat.node not in self.twins and not self._core.node_is_twinned(beat.node):
            return False
        joined = self._core.node_instance(beat.node)
        if now - watch.doubled_at < TWIN_WINDOW_S:
            names = " and ".join(sorted({*watch.instances, joined} - {""}))
            reason = f"two agent processes speak for this node at once ({names}): stop one of them"
        elif beat.instance == joined:
            self.twins.discard(beat.node)
            watch.turns = 0
            if self._core.node_is_twinned(beat.node):
                self._tell(watch, now, NodeReturned(node=beat.node, instance=beat.instance))
            return self._core.node_is_twinned(beat.node)
        else:
            reason = f"the agent process that joined last ({joined}) is gone and {beat.instance} speaks: restart it"
        self._fence(watch, now, NodeIncompatible(node=beat.node, reason=reason, twins=True))
        return True

    def _fence(self, watch: _Watch, now: float, change: NodeIncompatible) -> None:
        """Nothing may be placed there: told until the core shows it."""
        if watch.told == change and (
            now - watch.told_at < REPEAT_S or self._core.node_state(change.node) == "incompatible"
        ):
            return
        watch.told, watch.told_at = change, now
        log.warning("node.fenced", node=change.node, reason=change.reason)
        self._add_fact(change)

    def joined(self, node: NodeId) -> None:
        """An agent process of the node reported in (durably): the core takes it for ready, so silence counts anew."""
        watch = self._watches.setdefault(node, _Watch(self._monotonic()))
        watch.heard_at = self._monotonic()
        watch.told, watch.turns = None, 0
        self.twins.discard(node)

    def clock_of(self, node: NodeId) -> tuple[str, int]:
        """The agent process that spoke last for a node, and what it said of the node's clock; 0: nothing."""
        watch = self._watches.get(node)
        return (watch.instance, watch.clock_ms) if watch is not None else ("", 0)

    def on_telemetry_message(self, message: Message) -> None:
        try:
            telemetry = decode(Telemetry, message.data, max_bytes=LOSSY_BYTES_MAX)
        except Malformed:
            self.poison += 1
            return
        if telemetry.node == parse_node_subject(message.subject) and telemetry.node in self._watches:
            self.telemetry[telemetry.node] = telemetry
        else:
            self.poison += 1

    # -- silence ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look for silence; to be called every `TICK_S`."""
        now = self._monotonic()
        late_s, self._last_tick = now - self._last_tick - TICK_S, now
        if late_s > LATE_TICK_S:
            log.warning("nodes.grace", reason="this process was held up", for_s=round(late_s, 1))
            self.grace()
        if self._is_deaf:
            return
        known = self._core.known_nodes()
        if len(self._watches) > len(known):
            for gone in self._watches.keys() - set(known):
                del self._watches[gone]
                self.telemetry.pop(gone, None)
                self.twins.discard(gone)
        for node in known:
            watch = self._watches.get(node)
            if watch is None:
                self._watches[node] = _Watch(now)
                continue
            silent_s = now - watch.heard_at
            if silent_s <= self._suspected_after_s:
                continue
            state = self._core.node_state(node)
            if silent_s > self._lost_after_s and state in _LIVING_STATES:
                self._tell(watch, now, NodeLost(node=node))
            elif state == "ready":
                self._tell(watch, now, NodeSuspected(node=node))

    def _tell(self, watch: _Watch, now: float, change: NodeSuspected | NodeLost | NodeReturned) -> None:
        """Tell the core once; again only if it has not taken it in for a while."""
        if watch.told == change and now - watch.told_at < REPEAT_S:
            return
        watch.told, watch.told_at = change, now
        silent_s = round(now - watch.heard_at, 1)
        log.warning("node.changed", node=change.node, change=type(change).__name__, silent_s=silent_s)
        self._add_fact(change)

    def deafen(self) -> None:
        """No connection: nobody can be heard, so nobody is silent."""
        self._is_deaf = True

    def grace(self) -> None:
        """From now on everybody has the full time again."""
        self._is_deaf = False
        now = self._monotonic()
        for watch in self._watches.values():
            watch.heard_at = now

    def heard_ms_ago(self, node: NodeId) -> int:
        """Since the last heartbeat; -1 if none was heard."""
        watch = self._watches.get(node)
        if watch is None or not watch.seen_at:
            return -1
        return int((self._monotonic() - watch.seen_at) * 1000)


def _can_talk(beat: Heartbeat) -> bool:
    """A daemon speaks its own version and those next to it."""
    return beat.v_min <= PROTOCOL_VERSION + 1 and beat.v_max >= PROTOCOL_VERSION - 1


def _skew(beat: Heartbeat) -> str:
    return (
        f"its agent speaks versions {beat.v_min} to {beat.v_max} of the protocol, the daemon "
        f"{PROTOCOL_VERSION - 1} to {PROTOCOL_VERSION + 1}: bring the agent up to date"
    )
